"""A window shows the store's events, asks while a call waits, and ends with a page, never with an error."""

import asyncio
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest

from claude_hitl_template.domain import events
from claude_hitl_template.domain.canonical_json import digest
from claude_hitl_template.domain.models import Agent, Environment, ImageFacts, Session, Usage
from claude_hitl_template.domain.people import Actor
from claude_hitl_template.errors import NotFound, Unavailable
from claude_hitl_template.files.manifest import Manifest, SavedFile, blob_name
from claude_hitl_template.panel.flow import mirror
from claude_hitl_template.panel.services import WindowServices
from claude_hitl_template.store.core import CoreStore
from claude_hitl_template.store.protocol import Call, Store
from claude_hitl_template.testing.memory_backend import MemoryBackend

KEY = "key_1"


class Runner:
    """Kodosumi's runner as seen by a window: its tracer and its locks."""

    fid = "f" * 24

    def __init__(self) -> None:
        self.shown: list[str] = []
        self.locks: dict[str, str] = {}
        self.answerable: dict[str, Mapping[str, Any]] = {}
        self.queue = self
        self.jwt, self._client = "login", self
        self.headers: dict[str, str] = {}
        self.offered: dict[str, bytes] = {}
        self._changed = asyncio.Condition()

    async def html(self, said: str) -> None:
        self.shown.append(said)
        await self._tell()

    async def put_async(self, event: dict[str, Any]) -> None:
        facts = json.loads(event["payload"])["dict"]
        self.locks[facts["lid"]] = event["kind"]
        await self._tell()

    async def fs(self) -> "Runner":
        return self

    async def __aenter__(self) -> "Runner":
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def upload(self, folder: str) -> list[str]:
        assert self.headers["KODOSUMI_API_KEY"] == "login"  # the panel takes no cookie alone
        self.offered = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
        return list(self.offered)

    async def wait(self, name: str, lock_id: str, data: Mapping[str, Any], timeout_s: float) -> Any:
        self.answerable[lock_id] = {"name": name, **data}
        await asyncio.Event().wait()

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def until(self, what: Any) -> None:
        async with self._changed:
            await self._changed.wait_for(what)

    def open_locks(self) -> list[str]:
        return [lid for lid, kind in self.locks.items() if kind == "lock"]

    def saw(self, text: str) -> bool:
        return any(text in said for said in self.shown)


@pytest.fixture
def store() -> CoreStore:
    return CoreStore(MemoryBackend())


@pytest.fixture
def runner() -> Runner:
    return Runner()


async def begun(store: CoreStore) -> Session:
    message = events.UserMessage.model_validate({"type": "user.message", "content": events.text_blocks("go")})
    made = await store.create_session(
        KEY, agent=Agent(), environment=Environment(), title="T", metadata={}, initial=[message]
    )
    return await store.acquire(made.id, "owner", lease_s=60)


async def ask(store: CoreStore, session: Session, *ids: str) -> None:
    given = {"command": "ls"}
    drafts = [events.tool_use(i, "Bash", given, "ask", None) for i in ids]
    calls = [Call(call_id=i, tool_name="Bash", input=given, digest=digest(given), verdict="ask") for i in ids]
    await store.open_calls(session.id, session.epoch, drafts, calls, cwd="/w", expires_at=None)


async def decide(store: CoreStore, session: Session, call: str, by: str) -> None:
    said = events.UserToolConfirmation(type="user.tool_confirmation", tool_use_id=call, result="allow")
    await store.send_events(session.id, None, [said], by=Actor(name=by))


def window(store: Store, runner: Runner, session_id: str, wait_s: float = 3600.0) -> "asyncio.Task[Any]":
    async def known(_image: str) -> ImageFacts | None:
        return None

    services = WindowServices(store, known, wait_s, 1000, "http://pages.test/claude-hitl")
    inputs = {"session": session_id, "after": 0, "entries": "/e"}
    return asyncio.create_task(mirror(inputs, cast(Any, runner), services, cast(Any, runner)))


async def test_a_decision_made_elsewhere_closes_the_lock_and_says_whose_it_was(
    store: CoreStore, runner: Runner
) -> None:
    session = await begun(store)
    await ask(store, session, "toolu_1")
    task = window(store, runner, session.id)
    await runner.until(runner.open_locks)
    await decide(store, session, "toolu_1", "ann <b>")
    await runner.until(lambda: not runner.open_locks())
    assert runner.saw("Allowed by ann &lt;b&gt;")
    await runner.until(lambda: runner.saw(f".hitl-lock-{next(iter(runner.locks))}{{display:none}}"))
    assert len(runner.answerable) == 1  # a form that comes late is answered still
    task.cancel()


async def test_a_batch_is_one_lock_until_its_last_call_is_decided(store: CoreStore, runner: Runner) -> None:
    session = await begun(store)
    await ask(store, session, "toolu_1", "toolu_2")
    task = window(store, runner, session.id)
    await runner.until(runner.open_locks)
    (lock,) = runner.open_locks()
    await decide(store, session, "toolu_1", "ann")
    await runner.until(lambda: runner.saw("Allowed by ann"))
    await decide(store, session, "toolu_2", "bob")
    await runner.until(lambda: not runner.open_locks())
    assert list(runner.locks) == [lock]
    assert len(runner.answerable[lock]["calls"]) == 2
    task.cancel()


async def test_a_quiet_window_ends_as_parked_and_says_where_to_go_on(
    store: CoreStore, runner: Runner
) -> None:
    session = await begun(store)
    await ask(store, session, "toolu_1")
    page = await window(store, runner, session.id, wait_s=0.01)
    assert "Nothing is lost" in page.body
    assert "/e/approvals" in page.body
    assert "/e/continue" in page.body
    assert not runner.open_locks()


async def test_a_window_outlasts_a_turn_however_long_it_runs(store: CoreStore, runner: Runner) -> None:
    session = await begun(store)
    task = window(store, runner, session.id, wait_s=0.01)
    await runner.until(lambda: runner.saw("prompt"))
    done, _ = await asyncio.wait([task], timeout=0.2)
    assert not done
    task.cancel()


async def test_the_end_of_a_conversation_is_the_end_of_its_window(store: CoreStore, runner: Runner) -> None:
    session = await begun(store)
    await ask(store, session, "toolu_1")
    task = window(store, runner, session.id)
    await runner.until(runner.open_locks)
    await store.archive_session(session.id, KEY)
    page = await task
    assert "The conversation has ended" in page.body
    assert not runner.open_locks()


async def test_what_a_turn_saved_is_offered_when_it_ends_and_what_was_there_before_is_not(
    store: CoreStore, runner: Runner
) -> None:
    session = await begun(store)
    task = window(store, runner, session.id)
    await runner.until(lambda: runner.saw("prompt"))
    [said] = (await store.list_events(session.id, None, limit=9, types=["user.message"])).data
    await store.begin_turn(session.id, session.epoch, said.id)
    now_ns = time.time_ns()
    files = [
        SavedFile("old", 0o644, 3, now_ns - 3600 * 10**9, (blob_name(b"old"),)),
        SavedFile("sub/new", 0o644, 3, now_ns, (blob_name(b"new"),)),
    ]
    encoded = Manifest.of(files).encode()
    await store.put_blobs([b"old", b"new", *encoded])
    await store.save_workspace(session.id, session.epoch, blob_name(encoded[-1]))
    await store.end_turn(
        session.id, session.epoch, [], end_id="end", usage=Usage(), stop_reason=events.END_TURN
    )
    await runner.until(lambda: runner.saw("Files that this turn changed"))
    assert runner.offered == {"1-new": b"new"}
    assert runner.saw("sub/new")
    task.cancel()


async def test_a_deleted_conversation_ends_its_window_too(store: CoreStore, runner: Runner) -> None:
    session = await begun(store)
    await ask(store, session, "toolu_1")
    task = window(store, runner, session.id)
    await runner.until(runner.open_locks)
    await store.delete_session(session.id, KEY)
    assert "deleted" in (await task).body


class _Away:
    """A store that is unreachable at first, or always."""

    def __init__(self, store: CoreStore, error: Exception, times: int) -> None:
        self._store, self._error, self._left = store, error, times

    async def wait_events(self, *args: Any, **kwargs: Any) -> Any:
        if self._left:
            self._left -= 1
            raise self._error
        return await self._store.wait_events(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


async def test_a_store_that_is_away_for_a_while_is_waited_for(store: CoreStore, runner: Runner) -> None:
    session = await begun(store)
    await ask(store, session, "toolu_1")
    task = window(cast(Store, _Away(store, Unavailable("gone"), 1)), runner, session.id)
    await runner.until(runner.open_locks)
    assert runner.saw("does not answer")
    task.cancel()


@pytest.mark.filterwarnings("ignore")
async def test_a_defect_ends_as_a_page_without_what_it_was_about(store: CoreStore, runner: Runner) -> None:
    session = await begun(store)
    away = _Away(store, KeyError("<script>"), -1)
    page = await window(cast(Store, away), runner, session.id)
    assert "KeyError" in page.body
    assert "<script>" not in page.body


async def test_no_such_conversation_is_said(store: CoreStore, runner: Runner) -> None:
    with pytest.raises(NotFound):
        await store.get_session("sesn_none")
    assert "deleted" in (await window(store, runner, "sesn_none")).body
