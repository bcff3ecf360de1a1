"""How many CLIs start at once on a machine."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from claude_hitl_template.claude import starts
from claude_hitl_template.claude.starts import turn_to_start

HOLDS = """
import asyncio, pathlib, sys
from claude_hitl_template.claude.starts import turn_to_start

async def hold():
    with await turn_to_start(pathlib.Path(sys.argv[1])):
        print("started", flush=True)
        await asyncio.sleep(600)

asyncio.run(hold())
"""


@pytest.fixture(autouse=True)
def two_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(starts, "PATIENCE_S", 60.0)


async def test_no_more_start_at_once_than_there_are_cpus(tmp_path: Path) -> None:
    at_once, most = 0, 0

    async def start() -> None:
        nonlocal at_once, most
        with await turn_to_start(tmp_path / "starts"):
            at_once += 1
            most = max(most, at_once)
            await asyncio.sleep(0.005)
            at_once -= 1

    await asyncio.gather(*(start() for _ in range(50)))
    assert (at_once, most) == (0, 2)


async def test_a_start_that_fails_or_is_cancelled_gives_up_its_place(tmp_path: Path) -> None:
    async def stay() -> None:
        with await turn_to_start(tmp_path):
            await asyncio.Event().wait()

    staying = asyncio.create_task(stay())
    await asyncio.sleep(0)
    for _ in range(3):
        with pytest.raises(ValueError, match="no CLI"), await turn_to_start(tmp_path):
            raise ValueError("no CLI")
    staying.cancel()
    with pytest.raises(asyncio.CancelledError):
        await staying
    with await turn_to_start(tmp_path), await turn_to_start(tmp_path):
        pass


async def test_the_place_of_a_process_that_was_killed_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    command = [sys.executable, "-c", "import os; os.cpu_count = lambda: 1\n" + HOLDS, str(tmp_path)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "started\n"

    async def start() -> None:
        with await turn_to_start(tmp_path):
            pass

    starting = asyncio.create_task(start())
    await asyncio.sleep(5 * starts.POLL_S)
    waited = not starting.done()
    holder.kill()
    holder.communicate()
    await starting
    assert waited


async def test_a_start_does_not_wait_for_ever_for_one_that_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(starts, "PATIENCE_S", 0.05)
    with await turn_to_start(tmp_path), await turn_to_start(tmp_path), await turn_to_start(tmp_path):
        pass
