"""Fault points: named places at which a test lets a process die, stand still, wait or fail. Nothing in production.

They are switched on by the environment, when this module is imported: HITL_TEST_FAULTS names a folder, in which

- `plan.json` maps a point to what happens at which hit: {"claim.after_commit": {"1": "kill", "3": "delay 2.5"}}.
  Hits of all processes count together. What can happen: see `_act`.
- `hits.jsonl` gets a line for each hit: point, number, process, when (seconds since 1970), and what was done.
"""

import asyncio
import fcntl
import json
import os
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from claude_hitl_template.errors import Away, Unavailable

VARIABLE = "HITL_TEST_FAULTS"
BUGS_VARIABLE = "HITL_TEST_BUGS"

# The Store's writes, each in one transaction: reached in it, with its locks held, and when it is durable.
WRITES = (
    "add_key",
    "create_session",
    "update_session",
    "archive_session",
    "delete_session",
    "send_events",
    "commit",
    "open_calls",
    "begin_turn",
    "claim",
    "hold",
    "defer",
    "remind",
    "end_turn",
    "release",
    "renew",
    "append_transcript",
    "delete_transcripts",
    "acquire",
    "drop_lease",
    "give_up",
    "expire",
    "retire",
    "tell_waiting",
    "save_workspace",
    "add_files",
)
# What is done outside of the Store: reached before it and after it.
STEPS = (
    "notify",  # a message to the other ledgers
    "spawn",  # the CLI, in its owner
    "resume",  # ... with a transcript
    "flush",  # what was heard, to the log
    "park",  # giving the lease up, the CLI gone
    "run",  # a claimed call's permission, to the CLI
    "own",  # handing a session with its new epoch to an owner
)
POINTS = (
    *(f"{write}.{when}_commit" for write in WRITES for when in ("before", "after")),
    *(f"{step}.{when}" for step in STEPS for when in ("before", "after")),
)

# Safeguards that a test can take away, to see that another test notices: HITL_TEST_BUGS names some, with commas between.
BUGS = (
    "stale_owners_write",
    "any_input_runs",
    "refused_calls_run",
    "claims_are_not_counted",
    "the_last_decision_wins",
    "a_message_decides",
    "time_allows",
    "unknown_calls_run_again",
    "events_repeat",
    "nobody_is_told",
    "interrupted_calls_run",
    "acknowledged_before_it_is_kept",
    "idempotency_keys_are_forgotten",
    "what_waits_is_deleted",
    "epochs_are_not_raised",
)


async def _nothing(_point: str) -> None:
    pass


class _Faults:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    async def reach(self, point: str) -> None:
        if point not in POINTS:
            raise AssertionError(f"{point} is not listed in faults.py")
        number, action = self._hit(point)
        if action:
            await _act(point, number, *action.split())

    def _hit(self, point: str) -> tuple[int, str]:
        with (self._folder / "counts.json").open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            counts: dict[str, int] = json.loads(file.read() or "{}")
            number = counts[point] = counts.get(point, 0) + 1
            file.seek(0)
            file.truncate()
            json.dump(counts, file)
            action = self._plan().get(point, {}).get(str(number), "")
            hit = {"point": point, "hit": number, "pid": os.getpid(), "at": time.time(), "did": action}
            with (self._folder / "hits.jsonl").open("a") as hits:
                hits.write(json.dumps(hit) + "\n")
        return number, action

    def _plan(self) -> dict[str, Any]:
        try:
            return json.loads((self._folder / "plan.json").read_text())
        except FileNotFoundError:
            return {}


async def _act(point: str, number: int, what: str, *given: str) -> None:
    match what:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":  # until somebody sends SIGCONT
            os.kill(os.getpid(), signal.SIGSTOP)
        case "delay":
            await asyncio.sleep(float(given[0]))
        case "fail":
            raise Unavailable(f"a fault was planned at {point}, hit {number}")
        case "lose":  # what was done is done, and nobody is told
            raise Away(f"the answer at {point}, hit {number}, is lost as planned")
        case _:
            raise AssertionError(f"no such fault: {what}")


def _chosen() -> Callable[[str], Awaitable[None]]:
    folder = os.environ.get(VARIABLE)
    return _Faults(Path(folder)).reach if folder else _nothing


reach = _chosen()
_seeded = frozenset(os.environ.get(BUGS_VARIABLE, "").split(",")) & frozenset(BUGS)


def seeded(bug: str) -> bool:
    """Whether a test took this safeguard away; False in production."""
    return bug in _seeded
