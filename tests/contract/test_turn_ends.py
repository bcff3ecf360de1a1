"""The end of a turn on the real CLI: by an interrupt, after /clear, and with calls that the CLI refuses by itself."""

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from claude_agent_sdk import ClaudeSDKClient

from claude_hitl_template.domain.events import UserInterrupt
from claude_hitl_template.domain.policy import PermissionPolicy, Rule
from claude_hitl_template.domain.policy.floor import Floor
from claude_hitl_template.model import offline
from claude_hitl_template.model.offline import Reply, ToolUse
from tests.contract.test_call_ids import bash, check_log, scripted
from tests.contract.test_layers import Model, model, script
from tests.contract.test_session import House, driven, house, user

__all__ = ["model"]  # a fixture
SLOW = "echo begun > ran; sleep 60"


async def interrupt_running(h: House) -> dict[str, Any]:
    """Interrupts while the command SLOW runs, and returns the stop reason."""
    while not (h.workspace / "ran").exists():
        await asyncio.sleep(0.05)
    await h.send(UserInterrupt(type="user.interrupt"))
    return await h.until_idle()


@pytest.mark.parametrize("asked", [True, False])
async def test_a_command_that_is_interrupted_while_it_runs_has_an_unknown_outcome(
    tmp_path: Path, asked: bool
):
    policy = (
        PermissionPolicy() if asked else PermissionPolicy(rules=(Rule(rule="Bash", policy="always_allow"),))
    )
    async with scripted(
        tmp_path, Reply((bash("c1", SLOW),)), hot_s=60.0, policy=policy, floor=Floor(default="always_allow")
    ) as (h, _):
        async with driven(h):
            if asked:
                [event_id] = (await h.until_idle())["event_ids"]
                await h.confirm(event_id)
            assert (await interrupt_running(h))["type"] == "end_turn"
        [result] = await h.log("agent.tool_result")
        text = str(result.payload["content"])
        assert result.payload["outcome"] == "unknown"
        assert "interrupted while it ran" in text
        assert "NOT written" not in text
        states = [a.state.value for a in (await h.store.list_approvals("key_test", limit=1)).data]
        assert states == (["unknown"] if asked else [])


@pytest.mark.takes_long("the CLI is ended while it runs a command, and is given time for it")
async def test_an_interrupt_that_the_sdk_fails_to_deliver_ends_the_turn_and_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    async def fails(_client: ClaudeSDKClient) -> None:
        raise Exception("Control request timeout: interrupt")  # noqa: TRY002 - as the SDK raises it

    monkeypatch.setattr(ClaudeSDKClient, "interrupt", fails)
    async with scripted(tmp_path, Reply((bash("c1", SLOW),)), hot_s=60.0) as (h, _):
        async with driven(h):
            [event_id] = (await h.until_idle())["event_ids"]
            await h.confirm(event_id)
            assert (await interrupt_running(h))["type"] == "end_turn"
        [approval] = (await h.store.list_approvals("key_test", limit=1)).data
        assert approval.state.value == "unknown"
        assert (await h.store.get_session(h.session.id)).recoveries == 0


@dataclass
class Broken:
    """Replaces the deltas of a tool's input by text that is not JSON."""

    pieces: list[str] = field(default_factory=lambda: ['{"command": "echo'])

    def deltas(self, block: Any) -> Any:
        if isinstance(block, ToolUse):
            return iter([{"type": "input_json_delta", "partial_json": piece} for piece in self.pieces])
        return iter([{"type": "text_delta", "text": block.text}])


REFUSED = {
    "unknown tool": ToolUse("Frobnicate", {"x": 1}, "c1"),
    "no file_path": ToolUse("Write", {"content": "x"}, "c1"),
    "a list": ToolUse("Bash", ["echo"], "c1"),  # type: ignore[arg-type]
    "broken JSON": ToolUse("Bash", {}, "c1"),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_a_call_that_the_cli_refuses_by_itself_is_shown_to_nobody_as_a_question(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
):
    if name == "broken JSON":
        monkeypatch.setattr(offline, "_deltas", Broken().deltas)
    async with scripted(tmp_path, Reply((REFUSED[name],))) as (h, _):
        await h.drive()
        assert (await h.until_idle())["type"] == "end_turn"
        assert not (await h.store.list_approvals("key_test", limit=1)).data
        [use] = await h.log("agent.tool_use")
        assert use.payload["evaluated_permission"] == "deny"
        await check_log(h)


async def test_a_refused_call_of_a_batch_or_a_subagent_does_not_wait_with_the_others(
    tmp_path: Path, model: Model
):
    wrong = {"name": "Frobnicate", "input": {"x": 1}}
    task = {
        "description": "x",
        "prompt": script({"tools": [wrong]}),
        "subagent_type": "general-purpose",
        "run_in_background": False,
    }
    steps = script({"tools": [{"name": "Agent", "input": task}]}, {"tools": [bash_call("true"), wrong]})
    h = await house(tmp_path, model.url, steps)
    await h.drive()
    assert len((await h.until_idle())["event_ids"]) == 1
    [approval] = (await h.store.list_approvals("key_test", limit=10)).data
    assert approval.tool_name == "Bash"
    await h.confirm(approval.event_id)
    await h.drive()
    assert (await h.until_idle())["type"] == "end_turn"
    await check_log(h)


def bash_call(command: str) -> dict[str, Any]:
    return {"name": "Bash", "input": {"command": command}}


@pytest.mark.slow
@pytest.mark.parametrize("said_after", [True, False])
async def test_what_was_cleared_stays_cleared_after_parking_and_what_came_after_is_there(
    tmp_path: Path, model: Model, said_after: bool
):
    h = await house(tmp_path, model.url, "What I said first.")
    after = [user("What I said after."), user(script({"tools": [bash_call("echo ran > ran")]}))]
    await h.send(user("/clear"), *(after if said_after else []))
    await h.drive()
    if said_after:
        [event_id] = (await h.until_idle())["event_ids"]
        await h.confirm(event_id)
        await h.drive()
        assert (h.workspace / "ran").exists()
    model.recorder.told()
    for _ in range(2):  # the second time by an owner that knows of no /clear
        await h.send(user("What I say now."))
        await h.drive()
        assert (await h.until_idle())["type"] == "end_turn"
        told = model.recorder.told()
        assert "What I said first." not in told
        assert ("What I said after." in told) == said_after
        assert "What I say now." in told
    await h.send(user("/clear"), user("What I say last."))
    await h.drive()
    assert "What I say now." not in model.recorder.told()
