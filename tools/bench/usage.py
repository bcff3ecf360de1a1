"""Processor time and memory of sets of processes, some of which begin or end meanwhile."""

from collections.abc import Callable, Iterable

import psutil


class CpuUse:
    """The processor time that the processes of `find` use from now on.

    A process that ended is counted up to the last look at it; `look` takes one.
    """

    def __init__(self, find: Callable[[], Iterable[psutil.Process]]) -> None:
        self._find = find
        self._last = self._times()
        self._used = 0.0

    def look(self) -> None:
        now = self._times()
        self._used += sum(seconds - self._last.get(process, 0.0) for process, seconds in now.items())
        self._last = now

    def seconds(self) -> float:
        self.look()
        return self._used

    def _times(self) -> dict[psutil.Process, float]:
        found: dict[psutil.Process, float] = {}
        for process in self._find():
            try:
                found[process] = sum(process.cpu_times()[:2])
            except psutil.NoSuchProcess:
                continue
        return found


def pss_bytes(processes: Iterable[psutil.Process]) -> int:
    """Memory of the processes, where what several share is counted once."""
    total = 0
    for process in processes:
        try:
            found = process.memory_full_info()
        except psutil.NoSuchProcess:
            continue
        total += getattr(found, "pss", found.uss)  # macOS has no PSS
    return total
