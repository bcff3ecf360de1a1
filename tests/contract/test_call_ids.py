"""Ids from a model's server are only data: each call has its own id, decision and result."""

import asyncio
import json
import re
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from claude_hitl_template.model.offline import Reply, Text, ToolUse, sse
from claude_hitl_template.model.upstream import MESSAGES, Answer, Call
from claude_hitl_template.session import gate
from claude_hitl_template.session.runner import SessionRunner
from tests.contract.test_session import House, driven, house, model_url
from tests.serving import model_app, serving

__all__ = ["model_url"]


class Scripted:
    """A model that gives the answers of a script in order, with the script's ids, regardless of the requests."""

    def __init__(self, answers: Sequence[Reply], message_id: str | None) -> None:
        self._answers, self._message_id = [*answers, Reply((Text("That is all."),))], message_id
        self.told: list[str] = []

    @asynccontextmanager
    async def call(self, call: Call) -> AsyncGenerator[Answer]:
        body = json.loads(b"".join([chunk async for chunk in call.body]))
        self.told.append(json.dumps(body["messages"]))
        reply = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        yield Answer(200, {"content-type": "text/event-stream"}, self._chunks(reply))

    async def _chunks(self, reply: Reply) -> AsyncIterator[bytes]:
        for chunk in sse(reply, "model"):
            named = f'"id": "{self._message_id}"'.encode()
            yield re.sub(rb'"id": "msg_offline\w+"', named, chunk) if self._message_id else chunk


def straight_app(model: Scripted) -> FastAPI:
    """Serves the model without the endpoint, so that the CLI gets the script's ids unchanged."""
    app = FastAPI()

    @app.post("/v1/messages")
    async def answer(request: Request) -> StreamingResponse:
        async with model.call(Call(MESSAGES, "", {}, request.stream())) as given:
            return StreamingResponse(given.chunks, headers=dict(given.headers))

    return app


@asynccontextmanager
async def scripted(
    tmp_path: Path, *answers: Reply, message_id: str | None = None, straight: bool = False, **more: Any
) -> AsyncGenerator[tuple[House, Scripted]]:
    model = Scripted(answers, message_id)
    async with serving(straight_app(model) if straight else model_app(model)) as url:
        yield await house(tmp_path, url, "go", **more), model


def bash(identity: str, command: str) -> ToolUse:
    return ToolUse("Bash", {"command": command}, identity)


def read(identity: str, path: str) -> ToolUse:
    return ToolUse("Read", {"file_path": path}, identity)


async def decided(h: House, decisions: dict[str, str]) -> None:
    """Parks at each question, and decides by the command that it asks about."""
    for _ in range(12):
        await h.drive()
        stop = await h.until_idle()
        if stop["type"] != "requires_action":
            return
        waiting = {a.event_id: a for a in (await h.store.list_approvals("key_test", limit=100)).data}
        for event_id in stop["event_ids"]:
            given = waiting[event_id].input
            await h.confirm(event_id, decisions[str(given.get("command") or given.get("file_path"))])
    raise AssertionError("it is asked without end")


async def check_log(h: House) -> None:
    """Each call is shown once, waits under that id, and has one result, after its decision."""
    log = await h.log()
    uses = [e for e in log if e.type == "agent.tool_use"]
    results = [e for e in log if e.type == "agent.tool_result"]
    asked = {i for e in log for i in (e.payload.get("stop_reason") or {}).get("event_ids", ())}
    assert len({e.id for e in uses}) == len(uses)
    assert all(re.fullmatch(r"sevt_\w{1,100}", e.id) for e in log), "an id that no client can send back"
    assert sorted(e.payload["tool_use_id"] for e in results) == sorted(e.id for e in uses)
    decisions = {e.payload["tool_use_id"]: e.seq for e in log if e.type == "user.tool_confirmation"}
    assert asked == set(decisions)
    for result in results:
        assert result.seq > decisions.get(result.payload["tool_use_id"], 0)


STRAIGHT = pytest.mark.parametrize("straight", [False, True], ids=["through the endpoint", "straight"])


@STRAIGHT
async def test_an_id_that_comes_again_is_another_call(tmp_path: Path, straight: bool):
    answers = [Reply((read("call_0", "a.txt"),)), Reply((bash("call_0", "echo b >> ran"),))]
    async with scripted(tmp_path, *answers, hot_s=30.0, straight=straight) as (h, _):
        h.workspace.mkdir()
        (h.workspace / "a.txt").write_text("A")
        async with driven(h):
            [event_id] = (await h.until_idle())["event_ids"]
            uses = await h.log("agent.tool_use")
            assert [(u.payload["name"], u.id == event_id) for u in uses] == [("Read", False), ("Bash", True)]
            await h.confirm(event_id)
            assert (await h.until_idle())["type"] == "end_turn"
        assert (h.workspace / "ran").read_text() == "b\n"
        await check_log(h)
        first, second = await h.log("agent.tool_result")
        assert "A" in str(first.payload["content"])
        assert second.payload["tool_use_id"] == event_id


@pytest.mark.slow
@STRAIGHT
@pytest.mark.parametrize("identity", ["call_0", "functions.Bash:0", "a" * 949, 'odd/../"\\\u00e9 id'])
async def test_calls_with_one_id_in_each_turn_are_decided_one_by_one_while_parked(
    tmp_path: Path, identity: str, straight: bool
):
    commands = {f"echo {n} >> ran": "deny" if n == 1 else "allow" for n in range(3)}
    answers = [Reply((bash(identity, c),)) for c in commands]
    async with scripted(tmp_path, *answers, straight=straight) as (h, model):
        await decided(h, commands)
        assert (h.workspace / "ran").read_text().split() == ["0", "2"]
        approvals = (await h.store.list_approvals("key_test", limit=100)).data
        assert [a.state.value for a in approvals] == ["succeeded", "denied", "succeeded"]
        await check_log(h)
        if not straight:  # else the CLI tells it of the first one only
            assert "Denied by a human" in model.told[-1]
            assert model.told[-1].count(json.dumps({"id": identity})[1:-1]) == len(commands)
            assert "hitl_" not in model.told[-1]


async def test_a_call_without_an_id_is_asked_about_as_any_other(tmp_path: Path):
    async with scripted(tmp_path, Reply((bash("", "echo a >> ran"),))) as (h, model):
        await decided(h, {"echo a >> ran": "allow"})
        assert (h.workspace / "ran").read_text() == "a\n"
        await check_log(h)
        assert "hitl_" not in model.told[-1]


async def test_a_call_that_reaches_the_cli_without_an_id_does_not_run_and_nobody_is_asked_about_it(
    tmp_path: Path,
):
    async with scripted(tmp_path, Reply((bash("", "echo a >> ran"),)), straight=True) as (h, _):
        await h.drive()
        assert (await h.until_idle())["type"] == "end_turn"
        assert not (h.workspace / "ran").exists()
        assert not (await h.store.list_approvals("key_test", limit=1)).data
        await check_log(h)


@pytest.mark.slow
@STRAIGHT
async def test_of_two_calls_with_one_id_in_one_message_each_runs_by_its_own_decision(
    tmp_path: Path, straight: bool
):
    commands = {"echo a >> ran": "deny", "echo b >> ran": "allow"}
    answers = [Reply(tuple(bash("call_0", c) for c in commands)), Reply((bash("call_0", "echo b >> ran"),))]
    async with scripted(tmp_path, *answers, straight=straight) as (h, _):
        await decided(h, commands)
        assert (h.workspace / "ran").read_text().split() == ["b"]
        await check_log(h)
        uses = {e.id: e.payload for e in await h.log("agent.tool_use")}
        asked = [u["input"]["command"] for u in uses.values() if u["evaluated_permission"] == "ask"]
        # The CLI cannot tell two calls with one id apart: straight, both are refused until they come one by one.
        assert asked == (["echo b >> ran"] if straight else list(commands))


@pytest.mark.slow
async def test_answers_that_share_one_message_id_are_all_in_the_log(tmp_path: Path):
    answers = [Reply((Text(f"Answer {n}."), bash(f"call_{n}", f"echo {n}"))) for n in range(3)]
    async with scripted(tmp_path, *answers, message_id="msg_same") as (h, _):
        await decided(h, {f"echo {n}": "allow" for n in range(3)})
        said = [e.payload["content"][0]["text"] for e in await h.log("agent.message")]
        assert said == ["Answer 0.", "Answer 1.", "Answer 2.", "That is all."]
        for step in ("start", "end"):
            assert len(await h.log(f"span.model_request_{step}")) == 4
        await check_log(h)


@pytest.mark.parametrize("notices", [True, False], ids=["notices", "takes the message for lost"])
async def test_what_is_heard_late_is_the_call_that_was_asked_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, notices: bool
):
    """The store takes longer than the gate waits for a message, so the CLI asks about calls that the gate does not
    know yet."""
    answers = [
        Reply((read("call_0", "a.txt"),)),
        Reply(tuple(bash(f"call_{n}", f"echo {n} >> ran") for n in range(3))),
    ]
    monkeypatch.setattr(gate, "REGISTER_TIMEOUT_S", 0.02)
    if not notices:
        monkeypatch.setattr(SessionRunner, "_is_behind", lambda _: False)
    async with scripted(tmp_path, *answers, hot_s=600.0) as (h, _):
        for name in ("commit", "open_calls"):
            monkeypatch.setattr(h.store, name, slowly(getattr(h.store, name)))
        h.workspace.mkdir()
        (h.workspace / "a.txt").write_text("A")
        async with driven(h):
            while (stop := await h.until_idle())["type"] == "requires_action":
                waiting = {a.event_id: a for a in (await h.store.list_approvals("key_test", limit=100)).data}
                denied = waiting[stop["event_ids"][0]].input["command"] == "echo 1 >> ran"
                await h.confirm(stop["event_ids"][0], "deny" if denied else "allow")
        assert sorted((h.workspace / "ran").read_text().split()) == ["0", "2"]
        await check_log(h)
        assert len(await h.log("agent.tool_use")) == 4


async def test_a_plan_whose_draft_is_heard_late_is_asked_about_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_url: str
):
    monkeypatch.setattr(gate, "REGISTER_TIMEOUT_S", 0.02)
    monkeypatch.setattr(SessionRunner, "_is_behind", lambda _: False)
    h = await house(tmp_path, model_url, "Make a plan first", hot_s=0.0)
    for name in ("commit", "open_calls"):
        monkeypatch.setattr(h.store, name, slowly(getattr(h.store, name)))
    await h.drive()
    [event_id] = (await h.until_idle())["event_ids"]
    approvals = (await h.store.list_approvals("key_test", limit=100)).data
    assert [(a.event_id, a.tool_name) for a in approvals] == [(event_id, "ExitPlanMode")]
    await check_log_of_waiting(h, event_id)


async def check_log_of_waiting(h: House, event_id: str) -> None:
    """Asserts that exactly the waiting calls have no result."""
    uses = {e.id for e in await h.log("agent.tool_use")}
    assert uses - {e.payload["tool_use_id"] for e in await h.log("agent.tool_result")} == {event_id}


def slowly(write: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    async def later(*args: Any, **kwargs: Any) -> Any:
        await asyncio.sleep(0.3)
        return await write(*args, **kwargs)

    return later
