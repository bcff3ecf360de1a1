"""Every waiting call is shown once, under one id, and has one result, after its decision."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from claude_hitl_template.domain.events import UserInterrupt
from claude_hitl_template.model.endpoint import OfflineUpstream
from claude_hitl_template.model.offline import Scenarios
from tests.contract.test_call_ids import check_log
from tests.contract.test_layers import bash, script
from tests.contract.test_session import House, house, user
from tests.serving import model_app, serving


@pytest.fixture(scope="module")
async def model_url() -> AsyncIterator[str]:
    async with serving(model_app(OfflineUpstream(Scenarios.load()))) as url:
        yield url


def task(*commands: str) -> dict[str, object]:
    """Returns a call of a subagent that makes these calls, one by one."""
    given = {
        "description": "Leave a mark",
        "prompt": script(*({"tools": [bash(command)]} for command in commands)),
        "subagent_type": "general-purpose",
        "run_in_background": False,
    }
    return {"name": "Agent", "input": given}


async def decide_all(h: House, *results: str) -> None:
    """Answers waiting calls by `results`, in turn, until the turn ends."""
    said = list(results)
    for _ in range(12):
        stop = await h.until_idle()
        if stop["type"] != "requires_action":
            return
        for event_id in stop["event_ids"]:
            await h.confirm(event_id, said.pop(0) if len(said) > 1 else said[0])
        await h.drive()
    raise AssertionError("it is asked without end")


@pytest.mark.parametrize("result", ["allow", pytest.param("deny", marks=pytest.mark.slow)])
async def test_a_held_call_of_a_subagent_runs_under_the_id_that_was_decided(
    tmp_path: Path, model_url: str, result: str
):
    h = await house(tmp_path, model_url, script({"tools": [task("echo a >> ran")]}))
    await h.drive()
    [event_id] = (await h.until_idle())["event_ids"]
    assert event_id not in [e.payload["tool_use_id"] for e in await h.log("agent.tool_result")]
    await decide_all(h, result)
    await check_log(h)
    assert (h.workspace / "ran").exists() == (result == "allow")
    shown = [e.id for e in await h.log("agent.tool_use") if e.payload["name"] == "Bash"]
    assert shown == [event_id]
    [told] = [e for e in await h.log("agent.tool_result") if e.payload["tool_use_id"] == event_id]
    assert told.payload["is_error"] == (result == "deny")


@pytest.mark.slow
async def test_calls_of_two_subagents_are_shown_once_each(tmp_path: Path, model_url: str):
    h = await house(
        tmp_path,
        model_url,
        script({"tools": [task("echo a >> ran"), task("echo b >> ran", "echo c >> ran")]}),
    )
    await h.drive()
    await decide_all(h, "allow")
    await check_log(h)
    assert sorted((h.workspace / "ran").read_text().split()) == ["a", "b", "c"]


@pytest.mark.parametrize(
    "results",
    [
        *(pytest.param(one, marks=pytest.mark.slow) for one in (("allow",), ("deny",), ("allow", "deny"))),
        ("deny", "allow"),
    ],
)
async def test_the_calls_of_a_batch_have_one_result_each(
    tmp_path: Path, model_url: str, results: tuple[str, ...]
):
    h = await house(tmp_path, model_url, script({"tools": [bash(f"echo {n} >> ran") for n in range(3)]}))
    await h.drive()
    await decide_all(h, *results)
    await check_log(h)
    assert len(await h.log("agent.tool_use")) == 3


async def test_what_an_interrupt_superseded_has_a_result_that_says_so(tmp_path: Path, model_url: str):
    calls = [bash(f"echo {n} >> ran") for n in range(2)]
    h = await house(tmp_path, model_url, script({"tools": [*calls, task("echo c >> ran")]}))
    await h.drive()
    waited = (await h.until_idle())["event_ids"]
    await h.send(UserInterrupt(type="user.interrupt"), user("Read hello.txt"))
    await h.drive()
    results = [e.payload for e in await h.log("agent.tool_result") if e.payload["tool_use_id"] in waited]
    assert sorted(r["tool_use_id"] for r in results) == sorted(waited)
    assert all(r["is_error"] for r in results)
    assert not (h.workspace / "ran").exists()
