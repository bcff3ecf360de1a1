"""Plans faults at the fault points of a running service, and reads those that happened."""

import fcntl
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from tests import faults


@dataclass(frozen=True)
class Hit:
    """A fault that happened to a process at a fault point."""

    point: str
    did: str
    at: datetime


class Points:
    """The fault points of one service. `folder` is created for it; see tests/faults.py."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir()
        self._seen = 0

    @property
    def environment(self) -> dict[str, str]:
        return faults.environment(self._folder)

    def plan(self, which: float, action: str) -> str | None:
        """Plans `action` for the next hit of a point that was reached before, chosen by `which` in [0, 1)."""
        return self._plan(lambda reached: reached[int(which * len(reached))] if reached else None, action)

    def plan_at(self, point: str, action: str) -> None:
        """Plans `action` for the next hit of this point, which was reached before, and cancels all other plans."""
        self.clear()
        self._plan(lambda _: point, action)

    def _plan(self, choose: Callable[[Sequence[str]], str | None], action: str) -> str | None:
        with (self._folder / "counts.json").open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            counts: dict[str, int] = json.loads(file.read() or "{}")
            point = choose(sorted(counts))
            if point is not None:
                self._write({**self._planned(), point: {str(counts[point] + 1): action}})
        return point

    def clear(self) -> None:
        self._write({})

    def hits(self) -> list[Hit]:
        """Returns the hits since the last call, oldest first."""
        path = self._folder / "hits.jsonl"
        if not path.exists():
            return []
        with path.open() as file:
            file.seek(self._seen)
            lines = [line for line in file.read().splitlines(keepends=True) if line.endswith("\n")]
        self._seen += sum(len(line.encode()) for line in lines)
        told = [json.loads(line) for line in lines]
        return [
            Hit(hit["point"], hit["did"], datetime.fromtimestamp(hit["at"], UTC))
            for hit in told
            if hit["did"]
        ]

    def _planned(self) -> dict[str, dict[str, str]]:
        path = self._folder / "plan.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def _write(self, planned: dict[str, dict[str, str]]) -> None:
        draft = self._folder / "plan.draft"
        draft.write_text(json.dumps(planned))
        os.replace(draft, self._folder / "plan.json")
