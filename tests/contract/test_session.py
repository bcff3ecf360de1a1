"""A session over the real CLI and the offline model; the runner is driven as by the actor, without Ray."""

import asyncio
import contextlib
import fcntl
import json
import os
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, cast

import psutil
import pytest

from claude_hitl_template.claude import cli_engine, starts
from claude_hitl_template.claude.cli_engine import CliConfig, CliEngine, is_plan_folder
from claude_hitl_template.claude.layers import Layers
from claude_hitl_template.claude.sandbox import SandboxConfig, default_sandbox
from claude_hitl_template.claude.transcripts import TranscriptStore
from claude_hitl_template.domain.events import UserInterrupt, UserMessage, UserToolConfirmation
from claude_hitl_template.domain.models import (
    Agent,
    ApprovalState,
    Environment,
    Event,
    Networking,
    Session,
    new_id,
    utcnow,
)
from claude_hitl_template.domain.people import Actor
from claude_hitl_template.domain.policy import PermissionPolicy, Rule
from claude_hitl_template.domain.policy.floor import BUILT_IN, Floor
from claude_hitl_template.errors import EngineError, Superseded, Unavailable
from claude_hitl_template.model.endpoint import OfflineUpstream
from claude_hitl_template.model.offline import Scenarios
from claude_hitl_template.session.runner import Limits, SessionRunner
from claude_hitl_template.store.core import CoreStore
from claude_hitl_template.store.protocol import TranscriptKey
from claude_hitl_template.testing.clock import FakeClock
from claude_hitl_template.testing.memory_backend import MemoryBackend
from claude_hitl_template.workspace.sync import WorkspaceLocation
from tests.serving import model_app, serving

KEY = "key_test"
WAIT_S = 60
DAY_S = 86400.0


@pytest.fixture(scope="module")
async def model_url() -> AsyncIterator[str]:
    async with serving(model_app(OfflineUpstream(Scenarios.load()))) as url:
        yield url


@dataclass
class House:
    """One session with its store and its folders."""

    store: CoreStore
    session: Session
    root: Path
    model_url: str
    limits: Limits
    cli_path: Path | None = None
    layers: Layers | None = None
    floor: Floor = BUILT_IN
    starts: Path | None = None
    patience_s: float = WAIT_S
    sandbox: SandboxConfig | None = field(default_factory=default_sandbox)
    runs: Callable[[SessionRunner], Coroutine[Any, Any, None]] = SessionRunner.run

    @property
    def workspace(self) -> Path:
        return self.root / "workspace"

    @property
    def place(self) -> WorkspaceLocation:
        return WorkspaceLocation(self.workspace, self.root / "saved")

    async def drive(self) -> None:
        """Runs one owner, from its lease to its parking."""
        session = await self.store.acquire(self.session.id, new_id("own"), lease_s=self.patience_s)
        config = CliConfig(
            workspace=self.workspace,
            config_dir=self.root / f"config-{session.epoch}",
            model_url=self.model_url,
            token="token",
            cli_path=self.cli_path,
            layers=self.layers,
            sandbox=self.sandbox,
            starts=self.starts,
        )
        transcripts = TranscriptStore(self.store, session.id, epoch=session.epoch, any_folder=True)
        runner = SessionRunner(
            self.store,
            session,
            make_engine=lambda s, gate: CliEngine(s, gate, transcripts, config),
            workspace=self.place,
            is_plan_folder=is_plan_folder(config.config_dir),
            limits=self.limits,
            floor=self.floor,
        )
        await asyncio.wait_for(self.runs(runner), self.patience_s)

    async def send(self, *inbound: Any) -> list[Event]:
        return await self.store.send_events(self.session.id, KEY, inbound, by=Actor(name="tester"))

    async def confirm(self, event_id: str, result: Any = "allow", **more: Any) -> None:
        said = UserToolConfirmation(
            type="user.tool_confirmation", tool_use_id=event_id, result=result, **more
        )
        await self.send(said)

    async def until_idle(self) -> dict[str, Any]:
        """Waits until the session is idle again, and returns the stop reason."""
        while True:
            session = await self.store.get_session(self.session.id)
            if session.status == "idle" and session.stop_reason:
                return session.stop_reason
            after = session.next_seq - 1
            await asyncio.wait_for(self.store.wait_events(session.id, KEY, after, timeout_s=1), WAIT_S)

    async def log(self, *types: str) -> list[Event]:
        return (await self.store.list_events(self.session.id, KEY, limit=1000, types=types)).data

    async def said(self) -> str:
        return " ".join(e.payload["content"][0]["text"] for e in await self.log("agent.message"))


def user(text: str) -> UserMessage:
    return UserMessage.model_validate({"type": "user.message", "content": [{"type": "text", "text": text}]})


async def house(
    tmp_path: Path,
    model_url: str,
    prompt: str,
    *,
    hot_s: float = 0.0,
    clock: Callable[[], datetime] = utcnow,
    floor: Floor = BUILT_IN,
    networking: Networking | None = None,
    **agent: Any,
) -> House:
    store = CoreStore(MemoryBackend(), clock)
    session = await store.create_session(
        KEY, agent=Agent(**agent), environment=Environment(networking=networking or Networking()),
        title=None, metadata={}, initial=[user(prompt)],
    )  # fmt: skip
    limits = Limits(hot_window_s=hot_s, idle_timeout_s=0.0)
    return House(store, session, tmp_path, model_url, limits, floor=floor)


@contextlib.asynccontextmanager
async def driven(house: House) -> AsyncIterator[None]:
    driving = asyncio.create_task(house.drive())
    try:
        yield
        await driving
    finally:
        driving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await driving


async def test_a_call_that_was_allowed_while_hot_runs(tmp_path: Path, model_url: str):
    h = await house(tmp_path, model_url, "Write hello.txt with a greeting", hot_s=30)
    async with driven(h):
        stop = await h.until_idle()
        assert stop["type"] == "requires_action"
        assert not (h.workspace / "hello.txt").exists()
        await h.confirm(stop["event_ids"][0])
        assert (await h.until_idle())["type"] == "end_turn"
    assert (h.workspace / "hello.txt").exists()


async def test_a_call_that_was_allowed_while_parked_runs_with_the_edited_input(
    tmp_path: Path, model_url: str
):
    h = await house(tmp_path, model_url, "Write hello.txt with a greeting")
    await h.drive()
    stop = await h.until_idle()
    assert (await h.store.get_session(h.session.id)).parked
    edited = {"file_path": "hello.txt", "content": "edited by a human"}
    await h.confirm(stop["event_ids"][0], updated_input=edited)
    await h.drive()
    assert (await h.until_idle())["type"] == "end_turn"
    assert (h.workspace / "hello.txt").read_text() == "edited by a human"


async def test_a_parked_call_runs_though_its_owner_died_before_the_store_had_the_end_of_the_transcript(
    tmp_path: Path, model_url: str
):
    h = await house(tmp_path, model_url, "Write hello.txt with a greeting")
    await h.drive()
    [call] = (await h.until_idle())["event_ids"]
    key: TranscriptKey = {
        "scope": h.session.id,
        "project_key": "-",
        "session_id": h.session.transcript_id,
        "subpath": "",
    }
    entries = await h.store.load_transcript(key) or []
    (deferred,) = [
        i for i, e in enumerate(entries) if (e.get("attachment") or {}).get("type") == "hook_deferred_tool"
    ]
    await h.store.delete_transcripts(key)
    await h.store.append_transcript(key, entries[:deferred], epoch=None)
    await h.confirm(call)
    await h.drive()
    assert (await h.until_idle())["type"] == "end_turn"
    (approval,) = (await h.store.list_approvals(KEY, limit=10)).data
    assert approval.state.value == "succeeded"
    assert (h.workspace / "hello.txt").exists()


class WithoutClaims:
    """A store that is unreachable whenever a call is claimed: before the commit, or after it."""

    def __init__(self, store: CoreStore, *, committed: bool) -> None:
        self._store, self._committed = store, committed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def claim(self, *args: Any, **kwargs: Any) -> Any:
        if self._committed:
            await self._store.claim(*args, **kwargs)
        raise Unavailable("the store is unreachable")


@pytest.mark.parametrize("committed", [False, True])
async def test_an_allow_comes_to_something_though_the_store_was_away_when_it_was_claimed(
    committed: bool, tmp_path: Path, model_url: str
):
    h = await house(tmp_path, model_url, "Write hello.txt with a greeting")
    await h.drive()
    await h.confirm((await h.until_idle())["event_ids"][0])
    store = h.store
    h.store = cast("CoreStore", WithoutClaims(store, committed=committed))
    with pytest.raises(EngineError):
        await h.drive()
    h.store = store
    await store.drop_lease(h.session.id, (await store.get_session(h.session.id)).epoch)
    await h.drive()
    assert (await h.until_idle())["type"] == "end_turn"
    (approval,) = (await store.list_approvals(KEY, limit=10)).data
    (result,) = await h.log("agent.tool_result")
    if committed:  # whether it ran cannot be known
        assert (approval.state.value, result.payload.get("outcome")) == ("unknown", "unknown")
    else:
        assert approval.state.value == "succeeded"
    assert (h.workspace / "hello.txt").exists() is not committed


def has_place(folder: Path) -> bool:
    """Whether a CLI has the first place among those that start."""
    with (folder / "0").open("ab") as place, contextlib.suppress(BlockingIOError):
        fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    return True


async def test_a_cli_counts_as_starting_until_it_asks_the_model_or_runs_a_call(
    tmp_path: Path, model_url: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    monkeypatch.setattr(cli_engine, "BUSY_S", 600.0)
    monkeypatch.setattr(starts, "PATIENCE_S", 600.0)
    seen = list[tuple[str, bool]]()

    def seeing(name: str) -> None:
        step = getattr(CliEngine, name)

        async def seen_step(*given: Any) -> Any:
            seen.append((name, has_place(tmp_path / "starts")))
            return await step(*given)

        monkeypatch.setattr(CliEngine, name, seen_step)

    h = await house(tmp_path, model_url, "Write hello.txt with a greeting")
    h.starts = tmp_path / "starts"
    for step in ("say", "_hook", "_can_use_tool", "_after"):
        seeing(step)
    await h.drive()
    assert seen == [("say", True), ("_hook", False)]
    seen.clear()
    await h.confirm((await h.until_idle())["event_ids"][0])
    await h.drive()
    if seen[0][0] == "_hook":  # a CLI may resume a call before its hooks are registered
        assert seen.pop(0)[1]
    assert seen == [("_can_use_tool", True), ("_after", False)]
    assert (h.workspace / "hello.txt").exists()


async def test_a_cli_that_does_neither_soon_no_longer_counts_as_starting(
    tmp_path: Path, model_url: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    monkeypatch.setattr(cli_engine, "BUSY_S", 0.0)
    say = CliEngine.say

    async def say_later(*given: Any) -> None:
        while has_place(tmp_path / "starts"):
            await asyncio.sleep(0.01)
        await say(*given)

    monkeypatch.setattr(CliEngine, "say", say_later)
    h = await house(tmp_path, model_url, "Write hello.txt with a greeting")
    h.starts = tmp_path / "starts"
    await h.drive()
    assert (await h.until_idle())["type"] == "requires_action"


async def test_a_denied_call_never_runs_and_the_model_is_told_why(tmp_path: Path, model_url: str):
    h = await house(tmp_path, model_url, "Write hello.txt with a greeting")
    await h.drive()
    stop = await h.until_idle()
    await h.confirm(stop["event_ids"][0], "deny", deny_message="not in this folder")
    await h.drive()
    assert "not in this folder" in await h.said()
    assert not (h.workspace / "hello.txt").exists()


async def test_a_message_while_an_approval_waits_is_no_decision(tmp_path: Path, model_url: str):
    h = await house(tmp_path, model_url, "Write hello.txt with a greeting")
    await h.drive()
    await h.send(user("yes, run it"))
    session = await h.store.get_session(h.session.id)
    assert session.status == "idle"
    assert not (h.workspace / "hello.txt").exists()


async def test_a_batch_is_shown_at_once_and_each_call_runs_once(tmp_path: Path, model_url: str):
    h = await house(tmp_path, model_url, "Do three things at once")
    await h.drive()
    stop = await h.until_idle()
    assert len(stop["event_ids"]) > 1
    for event_id in stop["event_ids"]:
        await h.confirm(event_id)
    await h.drive()
    assert (await h.until_idle())["type"] == "end_turn"
    approvals = (await h.store.list_approvals(KEY, limit=100)).data
    assert [a.state.value for a in approvals] == ["succeeded"] * len(stop["event_ids"])


async def test_an_interrupt_ends_a_parked_turn_and_the_call_never_runs(tmp_path: Path, model_url: str):
    h = await house(tmp_path, model_url, "Write hello.txt with a greeting")
    await h.drive()
    await h.send(UserInterrupt(type="user.interrupt"))
    assert (await h.until_idle())["type"] == "end_turn"
    await h.send(user("Run a command"))
    await h.drive()
    assert not (h.workspace / "hello.txt").exists()


async def test_a_rule_of_the_policy_allows_without_asking(tmp_path: Path, model_url: str):
    policy = PermissionPolicy(rules=(Rule(rule="Write(./hello.txt)", policy="always_allow"),))
    h = await house(tmp_path, model_url, "Write hello.txt with a greeting", policy=policy)
    await h.drive()
    assert (h.workspace / "hello.txt").exists()
    assert not (await h.store.list_approvals(KEY, limit=10)).data


async def test_a_turn_whose_process_was_killed_is_continued(tmp_path: Path, model_url: str):
    h = await house(tmp_path, model_url, "Write hello.txt with a greeting", hot_s=30)
    with contextlib.suppress(asyncio.CancelledError):
        async with driven(h):
            stop = await h.until_idle()
            raise asyncio.CancelledError
    await h.confirm(stop["event_ids"][0])
    await h.drive()
    assert (await h.until_idle())["type"] in ("end_turn", "requires_action")
    seqs = [e.seq for e in await h.log()]
    assert seqs == list(range(1, len(seqs) + 1))


async def test_a_subagents_call_is_held_and_runs_once_it_is_allowed(tmp_path: Path, model_url: str):
    h = await house(tmp_path, model_url, "Let a subagent do it")
    await h.drive()
    stop = await h.until_idle()
    assert stop["type"] == "requires_action"
    await h.confirm(stop["event_ids"][0])
    await h.drive()
    assert (await h.until_idle())["type"] == "end_turn"
    states = [a.state.value for a in (await h.store.list_approvals(KEY, limit=10)).data]
    assert states == ["succeeded"]


async def test_a_question_is_answered_by_a_human(tmp_path: Path, model_url: str):
    h = await house(tmp_path, model_url, "Ask me a question")
    await h.drive()
    stop = await h.until_idle()
    approval = (await h.store.list_approvals(KEY, limit=10)).data[0]
    assert approval.kind == "question"
    asked = approval.input["questions"]
    answers = {q["question"]: q["options"][0]["label"] for q in asked}
    await h.confirm(stop["event_ids"][0], answers=answers)
    await h.drive()
    assert (await h.until_idle())["type"] == "end_turn"
    results = await h.log("agent.tool_result")
    assert asked[0]["options"][0]["label"] in str(results[-1].payload["content"])


async def test_a_plan_is_accepted_while_parked_and_then_carried_out(tmp_path: Path, model_url: str):
    h = await house(tmp_path, model_url, "Make a plan first")
    kinds: list[str] = []
    for _ in range(6):
        await h.drive()
        stop = await h.until_idle()
        if stop["type"] != "requires_action":
            break
        waiting = (await h.store.list_approvals(KEY, limit=10, states=[ApprovalState.PENDING])).data
        kinds += [f"{a.kind} {a.tool_name}" for a in waiting]
        assert all("planned.txt" in a.input["plan"] for a in waiting if a.kind == "plan")
        for event_id in stop["event_ids"]:
            await h.confirm(event_id)
    assert kinds == ["plan ExitPlanMode", "tool Write"]
    assert (h.workspace / "planned.txt").exists()
    assert (await h.store.get_session(h.session.id)).agent.permission_mode == "default"


async def test_a_plan_that_is_sent_back_is_not_carried_out(tmp_path: Path, model_url: str):
    h = await house(tmp_path, model_url, "Make a plan first")
    await h.drive()
    stop = await h.until_idle()
    await h.confirm(stop["event_ids"][0], "deny", deny_message="say why first")
    await h.drive()
    assert (await h.until_idle())["type"] == "end_turn"
    assert "say why first" in await h.said()
    assert not (h.workspace / "planned.txt").exists()
    assert (await h.store.get_session(h.session.id)).agent.permission_mode == "plan"


async def test_what_is_remembered_is_not_asked_again_and_nothing_else_is_allowed(
    tmp_path: Path, model_url: str
):
    h = await house(tmp_path, model_url, "Write hello.txt with a greeting")
    await h.drive()
    await h.confirm((await h.until_idle())["event_ids"][0], remember=True)
    await h.drive()
    (h.workspace / "hello.txt").unlink()
    await h.send(user("Write hello.txt with a greeting"))
    await h.drive()
    assert (await h.until_idle())["type"] == "end_turn"
    assert (h.workspace / "hello.txt").exists()
    await h.send(user("Run a command"))
    await h.drive()
    assert (await h.until_idle())["type"] == "requires_action"
    second = (await h.store.list_approvals(KEY, limit=10)).data[1]
    assert second.decision is not None
    assert second.decision.decided_by.startswith("rule:")


async def test_a_call_that_nobody_decided_on_in_time_never_runs(tmp_path: Path, model_url: str):
    h = await house(tmp_path, model_url, "Write hello.txt with a greeting")
    h.limits = Limits(hot_window_s=0, idle_timeout_s=0, approval_ttl_s=0)
    await h.drive()
    await h.until_idle()
    assert await h.store.expire_due() == 1
    await h.drive()
    assert (await h.until_idle())["type"] == "end_turn"
    assert "no decision" in (await h.said()).lower()
    assert not (h.workspace / "hello.txt").exists()


async def let_days_pass(h: House, clock: FakeClock, days: int) -> None:
    """Moves the store's clock, and makes the CLI's own timestamps older by the same time."""
    clock.move(days * DAY_S)
    key: TranscriptKey = {
        "scope": h.session.id, "project_key": "-", "session_id": h.session.transcript_id, "subpath": ""
    }  # fmt: skip
    entries = await h.store.load_transcript(key)
    assert entries
    for entry in entries:
        if "timestamp" in entry:
            written = datetime.fromisoformat(entry["timestamp"]) - timedelta(days=days)
            entry["timestamp"] = written.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    await h.store.delete_transcripts(key)
    await h.store.append_transcript(key, entries)


@pytest.mark.parametrize(
    ("ttl_days", "result"),
    [
        (40, "allow"),
        (None, "deny"),
        pytest.param(None, "allow", marks=pytest.mark.slow),
        pytest.param(40, "deny", marks=pytest.mark.slow),
    ],
)
async def test_what_is_decided_after_35_days_and_a_retention_of_one_runs_or_not_as_decided(
    tmp_path: Path, model_url: str, ttl_days: int | None, result: str
):
    clock = FakeClock()
    h = await house(tmp_path, model_url, "Write hello.txt with a greeting", clock=clock)
    h.limits = Limits(0, 0, approval_ttl_s=ttl_days and ttl_days * DAY_S)
    await h.drive()
    stop = await h.until_idle()
    assert not list(tmp_path.glob("config-*")), "a transcript that the CLI would sweep"
    await let_days_pass(h, clock, 35)
    assert await h.store.expire_due() == 0
    assert await h.store.retire(clock.now - timedelta(days=1)) == []
    await h.confirm(stop["event_ids"][0], result)
    await h.drive()
    assert (await h.until_idle())["type"] == "end_turn"
    assert (h.workspace / "hello.txt").exists() is (result == "allow")
    [told] = await h.log("agent.tool_result")
    assert told.payload["is_error"] is (result == "deny")


async def test_what_expired_while_parked_is_not_decided_any_more_and_never_runs(
    tmp_path: Path, model_url: str
):
    clock = FakeClock()
    h = await house(tmp_path, model_url, "Write hello.txt with a greeting", clock=clock)
    h.limits = Limits(0, 0, approval_ttl_s=30 * DAY_S)
    await h.drive()
    stop = await h.until_idle()
    await let_days_pass(h, clock, 35)
    for expired in (0, 1):
        assert await h.store.retire(clock.now - timedelta(days=1)) == []
        with pytest.raises(Superseded):
            await h.confirm(stop["event_ids"][0])
        assert await h.store.expire_due() == 1 - expired
    await h.drive()
    assert (await h.until_idle())["type"] == "end_turn"
    assert not (h.workspace / "hello.txt").exists()


@pytest.mark.parametrize("ahead_days", [-35, 35])
async def test_an_approval_expires_by_the_ledger_s_clock_however_wrong_the_session_s_host_s_is(
    tmp_path: Path, model_url: str, ahead_days: int
):
    clock = FakeClock()
    clock.move(ahead_days * DAY_S)
    h = await house(tmp_path, model_url, "Write hello.txt with a greeting", clock=clock)
    h.limits = Limits(0, 0, approval_ttl_s=DAY_S)
    await h.drive()
    (asked,) = (await h.store.list_approvals(KEY, limit=10)).data
    assert asked.expires_at is not None
    assert abs(asked.expires_at - clock.now - timedelta(days=1)) < timedelta(seconds=WAIT_S)


async def test_calls_of_an_answer_that_was_cut_off_wait_for_a_human_too(tmp_path: Path, model_url: str):
    prompt = (
        "```scenario\n"
        "- text: Two calls, and the line breaks in the second.\n"
        "  tools:\n"
        "    - {name: Bash, input: {command: 'echo ran >> first.txt'}}\n"
        "    - {name: Bash, input: {command: 'echo ran >> second.txt'}}\n"
        "  error: {status: malformed}\n"
        "- text: Done.\n"
        "```"
    )
    h = await house(tmp_path, model_url, prompt)
    await h.drive()
    for _ in range(4):
        stop = await h.until_idle()
        if stop["type"] != "requires_action":
            break
        assert not (h.workspace / "first.txt").exists()
        for event_id in stop["event_ids"]:
            await h.confirm(event_id)
        await h.drive()
    assert (h.workspace / "first.txt").read_text() == "ran\n"
    assert not (h.workspace / "second.txt").exists()


def _command_line(process: psutil.Process) -> list[str]:
    """Empty for a process that has ended, such as a child of another test that was not waited for."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


async def kill(h: House, driving: "asyncio.Task[None]") -> None:
    """Kills the session's CLI with SIGKILL, as an operator or the kernel would; its owner ends because of that."""
    found = [
        child
        for child in psutil.Process().children(recursive=True)
        if h.session.transcript_id in " ".join(_command_line(child))
    ]
    assert found
    for child in found:
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended with the one before it
            child.kill()
    with pytest.raises(EngineError):
        await driving


async def test_a_batch_whose_process_was_killed_is_asked_about_once(tmp_path: Path, model_url: str):
    h = await house(tmp_path, model_url, "Do three things at once", hot_s=60)
    driving = asyncio.create_task(h.drive())
    stop = await h.until_idle()
    await kill(h, driving)
    first, second, third = stop["event_ids"]
    await h.confirm(first)
    await h.confirm(second, "deny", deny_message="not the date")
    await h.confirm(third)
    h.limits = Limits(hot_window_s=0, idle_timeout_s=0)
    await h.drive()
    assert (await h.until_idle())["type"] == "end_turn"
    states = {a.event_id: a.state.value for a in (await h.store.list_approvals(KEY, limit=10)).data}
    assert states == {first: "succeeded", second: "denied", third: "succeeded"}
    assert (h.workspace / "batch.txt").exists()
    assert not (h.workspace / "batch" / "date.txt").exists()
    assert (h.workspace / "batch" / "system.txt").exists()
    assert "not the date" in str([e.payload for e in await h.log()])


async def refuse_the_rest(h: House) -> None:
    """Denies the calls that the model asks for again, because a killed CLI may not have sent everything to the store."""
    while (stop := await h.until_idle())["type"] == "requires_action":
        for event_id in stop["event_ids"]:
            await h.confirm(event_id, "deny")
        await h.drive()
    assert stop["type"] == "end_turn"


async def test_an_allowed_call_runs_though_the_owner_died_after_the_model_was_told_to_issue_it_again(
    tmp_path: Path, model_url: str
):
    commands = ["echo one >> runs.txt", "echo two >> runs.txt; sleep 60", "echo three >> runs.txt"]
    calls = [{"name": "Bash", "input": {"command": command}} for command in commands]
    answers = [{"text": "Three.", "tools": calls}, {"text": "Done."}]
    h = await house(tmp_path, model_url, f"```scenario\n{json.dumps(answers)}\n```")
    await h.drive()
    *_, third = event_ids = (await h.until_idle())["event_ids"]
    for event_id in event_ids:
        await h.confirm(event_id)
    driving, runs = asyncio.create_task(h.drive()), h.workspace / "runs.txt"
    while not runs.exists() or "two" not in runs.read_text():
        await asyncio.sleep(0.05)
    await kill(h, driving)
    await h.drive()
    await refuse_the_rest(h)
    states = {a.event_id: a.state.value for a in (await h.store.list_approvals(KEY, limit=10)).data}
    assert states[third] == "succeeded"
    assert runs.read_text().split() == ["one", "two", "three"]


async def test_an_allowed_call_runs_though_an_earlier_one_of_its_turn_was_parked_and_its_outcome_is_unknown(
    tmp_path: Path, model_url: str
):
    commands = ["echo one >> runs.txt; sleep 60", "echo two >> runs.txt"]
    calls = [{"text": "One.", "tools": [{"name": "Bash", "input": {"command": c}}]} for c in commands]
    prompt = f"```scenario\n{json.dumps([*calls, {'text': 'Done.'}])}\n```"
    h = await house(tmp_path, model_url, prompt)
    await h.drive()
    await h.confirm((await h.until_idle())["event_ids"][0])
    h.limits = Limits(hot_window_s=60, idle_timeout_s=0)
    driving = asyncio.create_task(h.drive())
    while not (h.workspace / "runs.txt").exists():
        await asyncio.sleep(0.05)
    await kill(h, driving)
    driving = asyncio.create_task(h.drive())
    [second] = (await h.until_idle())["event_ids"]
    await kill(h, driving)
    await h.confirm(second)
    h.limits = Limits(hot_window_s=0, idle_timeout_s=0)
    await h.drive()
    await refuse_the_rest(h)
    states = {a.event_id: a.state.value for a in (await h.store.list_approvals(KEY, limit=10)).data}
    assert states[second] == "succeeded"
    assert (h.workspace / "runs.txt").read_text().split() == ["one", "two"]


async def test_a_parked_batch_in_which_one_call_is_refused_is_asked_about_once(
    tmp_path: Path, model_url: str
):
    h = await house(tmp_path, model_url, "Do three things at once")
    await h.drive()
    first, second, third = (await h.until_idle())["event_ids"]
    await h.confirm(second, "deny", deny_message="not the date")
    await h.confirm(first)
    await h.confirm(third)
    await h.drive()
    assert (await h.until_idle())["type"] == "end_turn"
    states = {a.event_id: a.state.value for a in (await h.store.list_approvals(KEY, limit=10)).data}
    assert states == {first: "succeeded", second: "denied", third: "succeeded"}
    assert not (h.workspace / "batch" / "date.txt").exists()


async def test_a_refused_call_whose_process_was_killed_is_told_to_the_model(tmp_path: Path, model_url: str):
    h = await house(tmp_path, model_url, "Write hello.txt with a greeting", hot_s=60)
    driving = asyncio.create_task(h.drive())
    stop = await h.until_idle()
    await kill(h, driving)
    await h.confirm(stop["event_ids"][0], "deny", deny_message="use another name")
    await h.drive()
    assert (await h.until_idle())["type"] == "end_turn"
    assert "use another name" in await h.said()
    assert not (h.workspace / "hello.txt").exists()


async def test_a_resumed_call_whose_process_is_killed_while_it_runs_is_not_repeated(
    tmp_path: Path, model_url: str
):
    prompt = (
        "```scenario\n"
        "- text: Slow.\n"
        "  tools:\n"
        "    - {name: Bash, input: {command: 'echo ran >> runs.txt; sleep 20'}}\n"
        "- text: 'Done: {tool_result}'\n"
        "```"
    )
    h = await house(tmp_path, model_url, prompt)
    await h.drive()
    await h.confirm((await h.until_idle())["event_ids"][0])
    driving = asyncio.create_task(h.drive())
    runs = h.workspace / "runs.txt"
    while not runs.exists():
        await asyncio.sleep(0.05)
    await kill(h, driving)
    await h.drive()
    assert (await h.until_idle())["type"] == "end_turn"
    assert runs.read_text() == "ran\n"
    assert [a.state.value for a in (await h.store.list_approvals(KEY, limit=10)).data] == ["unknown"]
    assert [e.payload.get("outcome") for e in await h.log("agent.tool_result")] == ["unknown"]
