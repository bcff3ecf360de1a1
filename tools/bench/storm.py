"""Many parked calls that are allowed at once: when the last of their tools ran, and what each wake-up cost."""

import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import psutil

from claude_hitl_template.cli.common import step
from tools.bench.asks import decide
from tools.bench.contenders import CALL, TEXT, bare, conversation, message, started_after
from tools.bench.figures import Measure
from tools.bench.service_fixture import BenchService, command, wait_for
from tools.bench.usage import CpuUse

CLIENTS = 8
LAST_S = {25: 15, 100: 45}
MOST_CPU_S = 1.0
LOOK_S = 2.0  # a look takes 9 ms of a CPU
STORM_S = 600.0
CLI = ("bwrap", "claude_agent_sdk/_bundled")

type New = Callable[..., Measure]


def storm(one: BenchService, new: New, count: int) -> None:
    last = new(
        f"{count} parked calls allowed at once: last tool began after (bare: CLIs alone)",
        "s",
        "p50",
        LAST_S.get(count),
    )
    cpu = new(f"processor time of a wake-up beyond the CLI's, {count} at once", "s", "p50", MOST_CPU_S)
    with step(f"Making {count} sessions with a parked call"):
        sessions = _parked_sessions(one, count)
        one.until_spare()
    with (
        step(f"Allowing {count} parked calls at once"),
        _watched(one) as used,
        ThreadPoolExecutor(CLIENTS) as pool,
    ):
        began_ns = time.time_ns()
        list(pool.map(partial(decide, one), sessions.keys(), sessions.values()))
        places = [one.settings.workspaces / session_id for session_id in sessions]
        last.ours.append(max(started_after(place, began_ns, patience_s=STORM_S) for place in places))
        for session_id in sessions:
            wait_for("a turn to end", partial(_rests, one, session_id), patience_s=STORM_S)
    cpu.ours.append(used.seconds() / count)
    for session_id in sessions:
        one.client.delete(f"/v1/sessions/{session_id}")
    with step(f"Starting {count} CLIs without the service"), conversation(one.client, TEXT) as awake:
        awake.until_rest()
        with bare(one, awake.id, one.settings.data_dir / "bare") as theirs:
            one.until_spare()
            last.bare.append(theirs.storm(count))


def _parked_sessions(one: BenchService, count: int) -> dict[str, str]:
    """Event ids of the calls that wait, by session."""
    body = {"agent": "default", "environment_id": "default", "initial_events": [message(CALL)]}
    ids = [str(one.client.post("/v1/sessions", body)["id"]) for _ in range(count)]
    return {session_id: _parked_call(one, session_id) for session_id in ids}


def _parked_call(one: BenchService, session_id: str) -> str:
    def waits() -> str | None:
        found = one.client.get(f"/v1/sessions/{session_id}")
        stop = found["stop_reason"] or {}
        return stop["event_ids"][0] if found["parked"] and stop.get("type") == "requires_action" else None

    return wait_for("a parked call", waits, patience_s=STORM_S)


def _rests(one: BenchService, session_id: str) -> bool | None:
    """Whether its turn ended. The last sessions stay awake: nothing needs their room."""
    return one.client.get(f"/v1/sessions/{session_id}")["status"] == "idle" or None


@contextmanager
def _watched(one: BenchService) -> Generator[CpuUse]:
    """Looks at the processes now and then, so that those that end are counted."""
    used, over = CpuUse(lambda: _without_cli(one.processes())), threading.Event()

    def watch() -> None:
        while not over.wait(LOOK_S):
            used.look()

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield used
    finally:
        over.set()
        watching.join()


def _without_cli(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    return [p for p in processes if not any(part in command(p) for part in CLI)]
