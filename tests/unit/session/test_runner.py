"""The owner of a session over a scripted engine: whatever the engine does, the turn ends with a reason."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from claude_hitl_template.domain.events import UserInterrupt, UserMessage
from claude_hitl_template.domain.models import Agent, Environment, Session
from claude_hitl_template.domain.people import Actor
from claude_hitl_template.errors import EngineError, StaleOwner
from claude_hitl_template.session import turn
from claude_hitl_template.session.engine import (
    EngineEvent,
    RequestEnd,
    RequestStart,
    Text,
    ToolResult,
    ToolUse,
    TurnEnd,
)
from claude_hitl_template.session.gate import Gate
from claude_hitl_template.session.runner import HEARD_AT_ONCE, Limits, SessionRunner
from claude_hitl_template.store.base import AskLimits
from claude_hitl_template.store.core import CoreStore
from claude_hitl_template.testing.memory_backend import MemoryBackend
from claude_hitl_template.workspace.sync import WorkspaceLocation

KEY = "key_test"


async def no_wait() -> None:
    pass


type Play = Callable[["Scripted", int], AsyncIterator[EngineEvent]]


@dataclass
class Scripted:
    """An engine that calls `play` for each message, with its number, counted from 1."""

    play: Play
    gate: Gate
    said: asyncio.Queue[int] = field(default_factory=asyncio.Queue[int])
    count: int = 0
    stopped: bool = False
    refuses_interrupts: bool = False
    starts: Callable[[], Awaitable[None]] = no_wait
    interrupted: asyncio.Event = field(default_factory=asyncio.Event)

    async def start(self, *, resume: bool, plan_mode: bool) -> None:
        await self.starts()

    async def say(self, message_uuid: str, content: list[dict[str, Any]]) -> None:
        self.count += 1
        await self.said.put(self.count)

    async def events(self) -> AsyncIterator[EngineEvent]:
        while True:
            number = await self.said.get()
            async for event in self.play(self, number):
                yield event

    async def interrupt(self) -> None:
        if self.refuses_interrupts:
            raise EngineError("Control request timeout: interrupt")
        self.interrupted.set()

    async def stop(self) -> None:
        self.stopped = True


@dataclass
class House:
    store: CoreStore
    session: Session
    root: Path
    play: Play
    engines: list[Scripted] = field(default_factory=list[Scripted])
    refuses_interrupts: bool = False
    starts: Callable[[], Awaitable[None]] = no_wait

    def runner(self, session: Session, idle_timeout_s: float = 0) -> SessionRunner:
        def make(_session: Session, gate: Gate) -> Scripted:
            made = Scripted(self.play, gate, refuses_interrupts=self.refuses_interrupts, starts=self.starts)
            self.engines.append(made)
            return made

        return SessionRunner(
            self.store,
            session,
            make_engine=make,
            workspace=WorkspaceLocation(self.root / "workspace", self.root / "saved"),
            limits=Limits(hot_window_s=0, idle_timeout_s=idle_timeout_s),
        )

    async def drive(self) -> None:
        session = await self.store.acquire(self.session.id, f"own{len(self.engines)}", lease_s=60)
        await self.runner(session).run()

    async def send(self, *inbound: Any) -> None:
        await self.store.send_events(self.session.id, KEY, inbound, by=Actor(name="tester"))

    async def stop_reason(self) -> str:
        session = await self.store.get_session(self.session.id)
        assert session.status == "idle"
        return str((session.stop_reason or {}).get("type"))

    async def log(self, kind: str) -> list[dict[str, Any]]:
        return [
            e.payload
            for e in (await self.store.list_events(self.session.id, KEY, limit=100, types=[kind])).data
        ]


def user(text: str) -> UserMessage:
    return UserMessage.model_validate({"type": "user.message", "content": [{"type": "text", "text": text}]})


async def house(tmp_path: Path, play: Play) -> House:
    store = CoreStore(MemoryBackend())
    session = await store.create_session(
        KEY, agent=Agent(), environment=Environment(), title=None, metadata={}, initial=[user("go")]
    )
    return House(store, session, tmp_path, play)


@pytest.mark.parametrize(
    "error", [KeyError("message"), TypeError("no shape"), ValueError("x"), AttributeError("y")]
)
async def test_a_message_that_cannot_be_read_ends_the_turn_with_a_reason_and_no_owner(
    tmp_path: Path, error: Exception
):
    async def play(_engine: Scripted, number: int) -> AsyncIterator[EngineEvent]:
        yield RequestStart("m1")
        if number == 1 and len(h.engines) == 1:
            raise error
        yield Text("sevt_1", "again")
        yield RequestEnd("m1", {})
        yield TurnEnd()

    h = await house(tmp_path, play)
    await h.drive()
    assert await h.stop_reason() == "retries_exhausted"
    [told] = await h.log("session.error")
    assert type(error).__name__ in told["error"]["message"]
    assert h.engines[0].stopped
    assert (await h.store.get_session(h.session.id)).recoveries == 0
    await h.send(user("go on"))
    await h.drive()
    assert await h.stop_reason() == "end_turn"
    assert len(await h.log("agent.message")) >= 1


async def test_an_interrupt_that_the_engine_does_not_take_ends_the_turn_all_the_same(tmp_path: Path):
    running = asyncio.Event()

    async def play(_engine: Scripted, number: int) -> AsyncIterator[EngineEvent]:
        yield RequestStart(f"m{number}")
        if len(h.engines) == 1:
            running.set()
            await asyncio.Event().wait()
        yield TurnEnd()

    h = await house(tmp_path, play)
    h.refuses_interrupts = True
    driving = asyncio.create_task(h.drive())
    await running.wait()
    await h.send(UserInterrupt(type="user.interrupt"))
    await driving
    assert await h.stop_reason() == "end_turn"
    assert h.engines[0].stopped
    await h.send(user("next"))
    await h.drive()
    assert await h.stop_reason() == "end_turn"


async def test_an_owner_that_is_cancelled_while_it_ends_its_tasks_is_cancelled(tmp_path: Path):
    running = asyncio.Event()

    async def play(_engine: Scripted, _number: int) -> AsyncIterator[EngineEvent]:
        yield RequestStart("m1")
        running.set()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)  # a task that takes its time to end

    h = await house(tmp_path, play)
    driving = asyncio.create_task(h.drive())
    await running.wait()
    driving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await driving
    assert h.engines[0].stopped


async def test_a_failure_of_a_task_in_the_background_is_the_owners(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    async def play(_engine: Scripted, _number: int) -> AsyncIterator[EngineEvent]:
        yield ToolUse("t1", "Read", {"file_path": "a"})
        yield RequestEnd("m1", {})
        await asyncio.Event().wait()

    h = await house(tmp_path, play)

    async def broken(*_args: Any, **_more: Any) -> Any:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(h.store, "open_calls", broken)
    with pytest.raises(ZeroDivisionError):
        await asyncio.wait_for(h.drive(), 10)


async def test_an_engine_that_is_not_listened_to_is_not_read_without_end(tmp_path: Path):
    given = 0

    async def play(_engine: Scripted, _number: int) -> AsyncIterator[EngineEvent]:
        nonlocal given
        yield TurnEnd()
        while True:
            given += 1
            yield Text(f"sevt_{given}", "x")
            await asyncio.sleep(0)

    h = await house(tmp_path, play)
    session = await h.store.acquire(h.session.id, "own", lease_s=60)
    runner = h.runner(session, idle_timeout_s=3600)  # the process is kept, and no consumer reads events
    driving = asyncio.create_task(runner.run())
    while given <= HEARD_AT_ONCE:
        await asyncio.sleep(0)
    for _ in range(1000):
        await asyncio.sleep(0)
    assert given <= HEARD_AT_ONCE + 1
    runner.stop_for("no room is left in the queue for this")
    driving.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await driving


@pytest.mark.parametrize("ends", [True, False])
async def test_a_session_that_is_stopped_while_its_engine_starts_says_why(tmp_path: Path, ends: bool):
    """Its processes are ended with it: that the engine did not start, if it did not, is not the reason."""

    async def play(_engine: Scripted, _number: int) -> AsyncIterator[EngineEvent]:
        yield TurnEnd()

    h = await house(tmp_path, play)
    runner = h.runner(await h.store.acquire(h.session.id, "own", lease_s=60))

    async def starts() -> None:
        assert runner.workspace_ready.is_set()
        runner.stop_for("over its share")
        if ends:
            raise EngineError("exit code -9")

    h.starts = starts
    assert not runner.workspace_ready.is_set()
    await runner.run()
    assert await h.stop_reason() == "retries_exhausted"
    [said] = await h.log("session.error")
    assert said["error"]["message"] == "over its share"
    h.starts = no_wait
    await h.send(user("go on"))
    await h.drive()
    assert await h.stop_reason() == "end_turn"


async def test_an_owner_that_gives_its_lease_up_is_not_told_that_it_was_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The task that renews the lease learns that it is gone before the task that released it gets its answer."""

    async def play(_engine: Scripted, _number: int) -> AsyncIterator[EngineEvent]:
        yield TurnEnd()

    h = await house(tmp_path, play)
    release, wait, heard = h.store.release, h.store.wait_session, asyncio.Event()

    async def slowly_released(*args: Any) -> bool:
        released = await release(*args)
        await h.send(user("wakes waiting tasks"))
        await heard.wait()
        await asyncio.sleep(0)
        return released

    async def waited(*args: Any, **kwargs: Any) -> Any:
        try:
            return await wait(*args, **kwargs)
        except StaleOwner:
            heard.set()
            raise

    monkeypatch.setattr(h.store, "release", slowly_released)
    monkeypatch.setattr(h.store, "wait_session", waited)
    await asyncio.wait_for(h.drive(), 60)
    assert heard.is_set()
    assert (await h.store.get_session(h.session.id)).lease is None


async def test_a_session_that_asks_too_often_rests_with_a_reason_until_a_human_says_more(tmp_path: Path):
    async def play(engine: Scripted, _number: int) -> AsyncIterator[EngineEvent]:
        yield RequestStart("m1")
        if len(h.engines) == 1:
            for n in range(3):
                yield ToolUse(f"toolu_{n}", "Bash", {"command": f"rm {n}"})
            yield RequestEnd("m1", {})
            await engine.interrupted.wait()  # the CLI waits for answers
        yield Text("sevt_1", "done")
        yield RequestEnd("m1", {})
        yield TurnEnd()

    h = await house(tmp_path, play)
    h.store = CoreStore(MemoryBackend(), ask_limits=AskLimits(per_minute=2, per_session=100))
    h.session = await h.store.create_session(
        KEY, agent=Agent(), environment=Environment(), title=None, metadata={}, initial=[user("go")]
    )
    await h.drive()
    assert await h.stop_reason() == "retries_exhausted"
    [reported] = await h.log("session.error")
    assert "asked for 3 decisions within a minute, and may ask for 2" in reported["error"]["message"]
    assert await h.log("agent.tool_use") == [], "no call is shown that cannot be decided"
    assert h.engines[0].stopped
    await h.send(user("go on"))
    await h.drive()
    assert await h.stop_reason() == "end_turn"


async def test_a_tools_result_is_committed_without_waiting_for_what_follows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(turn, "FLUSH_S", 3600.0)

    async def play(_engine: Scripted, _number: int) -> AsyncIterator[EngineEvent]:
        yield RequestStart("m1")
        yield ToolUse("toolu_1", "Read", {"file_path": "a"})
        yield RequestEnd("m1", {})
        yield ToolResult("toolu_1", [{"type": "text", "text": "its content"}], False)
        async with asyncio.timeout(10):
            while not await h.log("agent.tool_result"):
                await asyncio.sleep(0.001)
        yield TurnEnd()

    h = await house(tmp_path, play)
    await h.drive()
    assert await h.stop_reason() == "end_turn"
