"""A CLI that is started before its session exists does nothing until the session is assigned to its owner, and then the same
as any other. Over the real CLI and the offline model."""

import asyncio
import contextlib
import json
import os
import sqlite3
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import pytest_asyncio

from claude_hitl_template.domain.events import UserToolConfirmation
from claude_hitl_template.domain.models import Agent, Environment, Session, transcript_id
from claude_hitl_template.domain.people import Actor
from claude_hitl_template.testing.local_service import LocalService, serve_in_process
from tests.contract.asking import message
from tests.integration.harness import script

PATIENCE_S = 60.0
PROMPT = script("echo made > made.txt", "cat made.txt")


@dataclass
class House:
    """The service, which keeps one spare owner, and one workspace in it."""

    service: LocalService
    key: str

    async def create(self, **agent: Any) -> Session:
        return await self.service.store.create_session(
            self.key, agent=Agent(**agent), environment=Environment(), title=None, metadata={},
            initial=[message(PROMPT)],
        )  # fmt: skip

    async def asked(self, session: Session) -> str:
        """Waits until a call waits; returns its event's id."""

        async def stopped() -> Any:
            found = await self.service.store.get_session(session.id)
            return found.stop_reason if found.status == "idle" else None

        reason = await until(stopped)
        assert reason["type"] == "requires_action"
        return reason["event_ids"][0]

    async def allow(self, session: Session, event_id: str) -> None:
        said = UserToolConfirmation(type="user.tool_confirmation", tool_use_id=event_id, result="allow")
        await self.service.store.send_events(session.id, self.key, [said], by=Actor(name="ann"))

    async def talk(self, session: Session) -> list[str]:
        """Allows both calls; returns what the log has at the end."""
        for _ in range(2):
            await self.allow(session, await self.asked(session))
        return await until(lambda: self.ended(session))

    async def ended(self, session: Session) -> list[str] | None:
        log = (await self.service.store.list_events(session.id, self.key, limit=100)).data
        is_over = [e for e in log if e.type == "session.status_idle"][-1:]
        if not is_over or is_over[0].payload["stop_reason"]["type"] != "end_turn":
            return None
        return [e.type for e in log if not e.type.startswith(("session.", "span."))]

    async def prepared(self) -> str:
        """Waits until a session that does not exist has a CLI; returns the id that is reserved for it."""
        with contextlib.closing(sqlite3.connect(self.service.folder / "hitl.sqlite3")) as database:

            async def found() -> str | None:
                rows = database.execute("SELECT reply FROM replies WHERE key_id LIKE 'reserved %'").fetchall()
                return json.loads(rows[0][0]) if rows else None

            prepared = await until(found)
        assert clis(prepared)
        return prepared


def clis(session_id: str) -> list[psutil.Process]:
    """The processes of a session's CLI, and of its sandbox."""
    found: list[psutil.Process] = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if transcript_id(session_id) in " ".join(process.cmdline()):
                found.append(process)
    return found


async def until[T](poll: Callable[[], Any]) -> Any:
    async with asyncio.timeout(PATIENCE_S):
        while not (found := await poll()):
            await asyncio.sleep(0.02)
    return found


@pytest_asyncio.fixture
async def house(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[House]:
    hot_window_s = getattr(request, "param", 60.0)
    async with serve_in_process(
        tmp_path, keys={"me": "secret"}, hot_window_s=hot_window_s, spare_owners=1
    ) as service:
        yield House(service, (await service.store.list_keys())[0].id)


async def gone(session_id: str, folder: Path) -> bool:
    left = [*(folder / "run").glob(f"{session_id}-*"), *(folder / "workspaces").glob(session_id)]
    return not left and not clis(session_id)


@pytest.mark.takes_long("two conversations with the real CLI, and the pause between them")
@pytest.mark.parametrize("house", [60.0, 0.0], ids=["hot", "parked"], indirect=True)
async def test_a_conversation_with_a_cli_that_was_prepared_is_the_same(house: House) -> None:
    first = await house.create()
    usual = await house.talk(first)
    prepared = await house.prepared()
    processes = {process.pid for process in clis(prepared)}
    second = await house.create()
    assert second.id == prepared
    await house.asked(second)
    assert {process.pid for process in clis(prepared)} <= processes, "another CLI was started"
    assert await house.talk(second) == usual
    assert (house.service.workspace(second.id) / "made.txt").read_text() == "made\n"


@pytest.mark.takes_long("two sessions with the real CLI, and the pause between them")
async def test_a_session_of_another_agent_does_not_get_it_and_nothing_of_it_is_left(house: House) -> None:
    await house.talk(await house.create())
    prepared = await house.prepared()
    other = await house.create(system="Be another one.")
    assert other.id != prepared
    await house.asked(other)
    assert await gone(prepared, house.service.folder)
    third = await house.create()  # the id is still reserved, and the session starts as any other
    assert third.id == prepared
    await house.talk(third)


@pytest.mark.takes_long("two sessions with the real CLI, and the pause between them")
async def test_a_session_whose_prepared_cli_has_died_gets_another_one(house: House) -> None:
    usual = await house.talk(await house.create())
    prepared = await house.prepared()
    for process in clis(prepared):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    second = await house.create()
    assert second.id == prepared
    assert await house.talk(second) == usual


@pytest.mark.takes_long("a session with the real CLI, and the pause after it")
async def test_nothing_of_a_cli_without_a_session_reaches_the_model(house: House) -> None:
    await house.talk(await house.create())
    prepared = await house.prepared()
    sockets = os.open(house.service.folder / "run" / f"{prepared}-1/config.sandbox/sockets", os.O_PATH)
    transport = httpx.AsyncHTTPTransport(uds=f"/proc/self/fd/{sockets}/model")  # its own path is too long
    async with httpx.AsyncClient(transport=transport, base_url="http://model.hitl") as http:
        answer = await http.post("/v1/messages", json={"model": "any", "max_tokens": 1, "messages": []})
    os.close(sockets)
    assert answer.status_code == 403
    assert not (await house.service.store.existing([prepared]))
