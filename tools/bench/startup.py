"""How long the service takes to start, and what it uses while nothing happens."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import psutil

from claude_hitl_template.cli.client import Client
from claude_hitl_template.cli.common import step
from claude_hitl_template.cli.host import service
from claude_hitl_template.cli.host.processes import strays
from claude_hitl_template.config.secret_files import prepare, prepare_panel
from claude_hitl_template.config.settings import Settings
from tools.bench.figures import Measure
from tools.bench.service_fixture import POLL_S, BenchService
from tools.bench.usage import CpuUse, pss_bytes

HEALTHY_S, PANEL_S, RESTARTED_S = 15, 25, 12
IDLE_S, CALM_S = 30.0, 15.0
MOST_CPU, MOST_GIB = 10, 1.2
GIB = 1024**3

type New = Callable[..., Measure]


def startup(settings: Settings, new: New) -> None:
    """A first start with the panel, an idle time, and a restart without it."""
    with_panel = settings.model_copy(update={"panel": True, "spare_owners": 1})
    prepare(with_panel)
    prepare_panel(with_panel)
    try:
        with step("Measuring the first start"):
            healthy_s, ready_s = _start(with_panel)
        new("first start until the REST API is healthy", "s", "p50", HEALTHY_S).ours.append(healthy_s)
        new("first start until the panel is ready", "s", "p50", PANEL_S).ours.append(ready_s)
        client = Client.open(with_panel)
        try:
            _idle(BenchService(with_panel, client), new)
        finally:
            client.close()
        service.stop(with_panel)
        with step("Measuring a restart without the panel"):
            healthy_s, _ = _start(settings)
        new("restart without the panel until the REST API is healthy", "s", "p50", RESTARTED_S).ours.append(
            healthy_s
        )
    finally:
        service.stop(with_panel)


def _start(settings: Settings) -> tuple[float, float]:
    """Seconds until the REST API is healthy, and until everything is ready."""
    began = time.perf_counter()
    with ThreadPoolExecutor(1) as pool:
        starting = pool.submit(service.start, settings, lambda _message: nullcontext())
        while service.healthy(settings) is None and not starting.done():
            time.sleep(POLL_S)
        healthy_s = time.perf_counter() - began
        starting.result()
    return healthy_s, time.perf_counter() - began


def _idle(one: BenchService, new: New) -> None:
    with step("Measuring the idle service"):
        one.until_spare()
        time.sleep(CALM_S)
        found = _running(one)
        used = CpuUse(lambda: _running(one))
        began = time.perf_counter()
        time.sleep(IDLE_S)
        share = used.seconds() / (time.perf_counter() - began) * 100
    new("idle, with panel: processor", "% of a core", "p50", MOST_CPU).ours.append(share)
    new("idle, with panel: memory (PSS)", "GiB", "p50", MOST_GIB).ours.append(pss_bytes(found) / GIB)
    new("idle, with panel: processes", "count").ours.append(len(found))


def _running(one: BenchService) -> set[psutil.Process]:
    """All processes of the service: the panel's, Ray's head, and those below it, some of which rename themselves."""
    return {*strays(one.settings), *one.processes()}
