"""A session over the real CLI and the offline model: the runner as the actor drives it, without Ray."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import uvicorn
from fastapi import FastAPI

from claude_hitl_template.claude.cli import CliConfig, CliEngine, is_plan_folder
from claude_hitl_template.claude.transcripts import TranscriptStore
from claude_hitl_template.errors import EngineError
from claude_hitl_template.events import UserInterrupt, UserMessage, UserToolConfirmation
from claude_hitl_template.model.endpoint import OfflineUpstream, build_router
from claude_hitl_template.model.offline import Scenarios
from claude_hitl_template.models import Agent, ApprovalState, Environment, Event, Session
from claude_hitl_template.policy import PermissionPolicy, Rule
from claude_hitl_template.session import Limits, SessionRunner
from claude_hitl_template.store.core import CoreStore
from claude_hitl_template.store.memory import MemoryBackend

KEY = "key_test"
WAIT_S = 60


async def _anyone(_token: str) -> None:
    """Any token will do."""


@pytest.fixture(scope="module")
async def model_url() -> AsyncIterator[str]:
    app = FastAPI()
    app.include_router(build_router(OfflineUpstream(Scenarios.load()), _anyone))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    await serving


@dataclass
class House:
    """One session, its store, and the folders it lives in."""

    store: CoreStore
    session: Session
    root: Path
    model_url: str
    limits: Limits
    cli_path: Path | None = None
    patience_s: float = WAIT_S

    @property
    def workspace(self) -> Path:
        return self.root / "workspace"

    async def drive(self) -> None:
        """One owner, from its lease to its parking."""
        session = await self.store.acquire(self.session.id, "test", lease_s=self.patience_s)
        config = CliConfig(
            self.workspace, self.root / f"config-{session.epoch}", self.model_url, "token", self.cli_path
        )
        transcripts = TranscriptStore(self.store, session.id, epoch=session.epoch, any_folder=True)
        runner = SessionRunner(
            self.store,
            session,
            make_engine=lambda s, gate: CliEngine(s, gate, transcripts, config),
            workspace=self.workspace,
            is_plan_folder=is_plan_folder(config.config_dir),
            limits=self.limits,
        )
        await asyncio.wait_for(runner.run(), self.patience_s)

    async def send(self, *inbound: Any) -> list[Event]:
        return await self.store.send_events(self.session.id, KEY, inbound, decided_by="tester")

    async def confirm(self, event_id: str, result: Any = "allow", **more: Any) -> None:
        said = UserToolConfirmation(
            type="user.tool_confirmation", tool_use_id=event_id, result=result, **more
        )
        await self.send(said)

    async def until_idle(self) -> dict[str, Any]:
        """The stop reason, once the session is idle again."""
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


async def house(tmp_path: Path, model_url: str, prompt: str, *, hot_s: float = 0.0, **agent: Any) -> House:
    store = CoreStore(MemoryBackend())
    session = await store.create_session(
        KEY, agent=Agent(**agent), environment=Environment(), title=None, metadata={}, initial=[user(prompt)]
    )
    return House(store, session, tmp_path, model_url, Limits(hot_window_s=hot_s, idle_timeout_s=0.0))


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
    assert "nobody decided" in (await h.said()).lower()
    assert not (h.workspace / "hello.txt").exists()


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


def kill_cli(session: Session) -> None:
    """kill -9, as an operator or the kernel does it."""
    found = [
        child
        for child in psutil.Process().children(recursive=True)
        if session.transcript_id in " ".join(child.cmdline())
    ]
    assert found
    for child in found:
        child.kill()


async def test_a_batch_whose_process_was_killed_is_asked_about_once(tmp_path: Path, model_url: str):
    h = await house(tmp_path, model_url, "Do three things at once", hot_s=60)
    driving = asyncio.create_task(h.drive())
    stop = await h.until_idle()
    kill_cli(h.session)
    with pytest.raises(EngineError):
        await driving
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
    kill_cli(h.session)
    with pytest.raises(EngineError):
        await driving
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
    kill_cli(h.session)
    with pytest.raises(EngineError):
        await driving
    await h.drive()
    assert (await h.until_idle())["type"] == "end_turn"
    assert runs.read_text() == "ran\n"
    assert [a.state.value for a in (await h.store.list_approvals(KEY, limit=10)).data] == ["unknown"]
    assert [e.payload.get("outcome") for e in await h.log("agent.tool_result")] == ["unknown"]
