"""How long it takes until a session goes on whose process died, and until an acknowledged decision is carried out when
everything died right after it."""

import time

from claude_hitl_template.cli.client import Client
from claude_hitl_template.cli.common import step
from claude_hitl_template.cli.host import service
from claude_hitl_template.cli.host.processes import end, family, strays
from claude_hitl_template.config.secret_files import operator_key
from claude_hitl_template.errors import ConfigError
from tools.bench.contenders import CALL, SLOW, conversation, started_after
from tools.bench.service_fixture import BenchService


def killed_and_gone_on(one: BenchService, *, owner: bool) -> float:
    """Seconds from the death of a session's CLI, or of its owner, in the middle of an answer, to the first event of the
    work that another owner does."""
    with conversation(one.client, SLOW) as ours:
        ours.until(lambda event: event["type"] == "span.model_request_start")
        one.until_spare()
        of_session = one.processes_of(ours.transcript_id)
        # A sandbox's processes are between the owner and its CLI.
        killed = (min if owner else max)(of_session, key=lambda process: len(process.parents()))
        began = time.perf_counter()
        killed.kill()
        ours.until(lambda event: event["type"] == "session.status_rescheduled")
        ours.until(lambda event: event["type"] != "session.status_running")
        seconds = time.perf_counter() - began
        ours.until_rest()
    return seconds


def acknowledged_and_restarted(one: BenchService) -> tuple[float, float]:
    """Seconds until a decision on a parked call is acknowledged, and from the death of all processes to its tool's start.

    No decided call may run before: the supervisor is set to start nothing.
    """
    with conversation(one.client, CALL, keep=True) as ours:
        event_id = ours.until_asked()
        one.until_parked(ours.id)
        _drain(one)
        began = time.perf_counter()
        ours.decide(event_id)
        acknowledged = time.perf_counter() - began
    killed_ns = time.time_ns()
    _kill(one)
    _start_again(one)
    return acknowledged, started_after(one.settings.workspaces / ours.id, killed_ns)


def _start_again(one: BenchService) -> None:
    """Runs `./hitl up` as an operator does, a second time if a busy machine took too long. Raises ConfigError."""
    for last in (False, True):
        try:
            service.start(one.settings, step)
        except ConfigError:
            if last:
                raise
        else:
            return


def _drain(one: BenchService) -> None:
    operator = Client(one.settings.base_url, operator_key(one.settings))
    operator.post("/v1/internal/drain", {"grace_s": 0})
    operator.close()


def _kill(one: BenchService) -> None:
    """Kills every process of the cluster with SIGKILL; a database that is not part of it stays."""
    head = service.ray_process(one.settings)
    end([*(family(head) if head else []), *strays(one.settings)])
