"""Lets no more CLIs start at once on a machine than it has CPUs: a start keeps a CPU busy, and takes half as much again
where many share two."""

import asyncio
import contextlib
import fcntl
import os
from pathlib import Path

POLL_S = 0.01
PATIENCE_S = 10.0  # after which a CLI is started all the same: those that start may have been stopped


async def turn_to_start(folder: Path) -> contextlib.ExitStack:
    """Waits until fewer CLIs than this machine has CPUs have a place in this folder.

    Returns:
        The place, which is free when it is closed. That of a process that dies is free at once: it is a lock that the
        kernel releases.
    """
    with contextlib.ExitStack() as place:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(_take(_open(folder, place)), PATIENCE_S)
        return place.pop_all()


def _open(folder: Path, files: contextlib.ExitStack) -> list[int]:
    folder.mkdir(mode=0o700, exist_ok=True)
    numbers = range(os.cpu_count() or 1)
    return [files.enter_context((folder / str(number)).open("ab")).fileno() for number in numbers]


async def _take(places: list[int]) -> None:
    """Returns when this process has one of the places."""
    while True:
        if any(map(_taken, places)):
            return
        await asyncio.sleep(POLL_S)


def _taken(place: int) -> bool:
    """Whether this process has the place now."""
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False
