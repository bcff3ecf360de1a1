"""What happens at the product's fault points. HITL_TEST_FAULTS names a folder, in which

- `plan.json` maps a point to what happens at which hit: {"claim.after_commit": {"1": "kill", "3": "delay 2.5"}}.
  Hits of all processes count together. What can happen: see `_act`.
- `hits.jsonl` gets a line for each hit: point, number, process, when (seconds since 1970), and what was done.

A process looks at the variable only where `injected` is on its path, or where a test calls `install`.
"""

import asyncio
import fcntl
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from claude_hitl_template import fault_points
from claude_hitl_template.errors import StoreUnreachable, Unavailable

VARIABLE = "HITL_TEST_FAULTS"
COUNTS = "counts.json"
INJECTED = str(Path(__file__).parent / "injected")


def environment(folder: Path) -> dict[str, str]:
    """Returns the environment variables of processes in which the plan in `folder` applies."""
    return {VARIABLE: str(folder), "PYTHONPATH": INJECTED}


class Faults:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    async def reach(self, point: str) -> None:
        if point not in fault_points.POINTS:
            raise AssertionError(f"{point} is not listed in fault_points.py")
        number, action = self._hit(point)
        if action:
            await _act(point, number, *action.split())

    def _hit(self, point: str) -> tuple[int, str]:
        with (self._folder / COUNTS).open("a+") as file:
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
        case "stop":  # until a test sends SIGCONT
            os.kill(os.getpid(), signal.SIGSTOP)
        case "delay":
            await asyncio.sleep(float(given[0]))
        case "fail":
            raise Unavailable(f"a fault was planned at {point}, hit {number}")
        case "lose":  # the work is done, but its caller gets an error
            raise StoreUnreachable(f"the answer at {point}, hit {number}, is lost as planned")
        case _:
            raise AssertionError(f"no such fault: {what}")


def forget_hits(folder: Path) -> None:
    """Counts the hits of every point from 1 again."""
    (folder / COUNTS).unlink(missing_ok=True)


def install(folder: Path) -> None:
    """Activates the plan in `folder` in this process."""
    fault_points.install(Faults(folder).reach)
