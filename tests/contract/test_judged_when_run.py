"""A call runs as shown: its folder, links and plan are judged again at the moment at which it runs.

On the real CLI; the offline model issues what a test scripts.
"""

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest

from claude_hitl_template.claude import cli_engine
from claude_hitl_template.domain.canonical_json import call_digest, digest
from claude_hitl_template.domain.models import Approval
from claude_hitl_template.domain.policy import PermissionPolicy, Rule
from claude_hitl_template.domain.policy.floor import Floor
from claude_hitl_template.model.endpoint import OfflineUpstream
from claude_hitl_template.model.offline import Scenarios
from claude_hitl_template.model.scenario import Scenario, Step, ToolCall
from tests.contract.test_session import KEY, House, driven, house, model_url
from tests.serving import model_app, serving

__all__ = ["model_url"]


def call(name: str, **given: Any) -> dict[str, Any]:
    return {"name": name, "input": given}


def script(*steps: dict[str, Any]) -> str:
    first = {"text": "[offline model] I follow the script of a test.", **steps[0]}
    return f"```scenario\n{json.dumps([first, *steps[1:], {'text': 'That is all.'}])}\n```"


def policy(*rules: str, default: Any = None, how: Any = "always_ask") -> PermissionPolicy:
    return PermissionPolicy(rules=tuple(Rule(rule=r, policy=how) for r in rules), default=default)


async def approvals(h: House) -> list[Approval]:
    return (await h.store.list_approvals(KEY, limit=100)).data


async def results(h: House) -> list[str]:
    found = await h.log("agent.tool_result")
    return [" ".join(block.get("text", "") for block in e.payload["content"]) for e in found]


async def until_asked(h: House) -> list[Approval]:
    """Waits until calls wait, and returns their ids."""
    while True:
        stop = await h.until_idle()
        assert stop["type"] == "requires_action", stop
        if waiting := [a for a in await approvals(h) if a.event_id in stop["event_ids"]]:
            return waiting
        await asyncio.sleep(0)


async def until_asked_for(h: House, tool: str) -> Approval:
    """Waits until a call of this tool waits, and returns it."""
    after = 0
    while True:
        for approval in await approvals(h):
            if (approval.tool_name, approval.state.value) == (tool, "pending"):
                return approval
        found, _, after = await h.store.wait_events(h.session.id, KEY, after, timeout_s=60)
        after = found[-1].seq if found else after


def unpinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Removes the CLI's pinned folder, so that a `cd` persists after its command."""
    monkeypatch.setattr(cli_engine, "FIXED", cli_engine.MENTIONS_OFF)


UNASKED = Floor(default="always_allow")

# -- the folder

INTO_SUB = (
    {"tools": [call("Bash", command="cd sub")]},
    {"tools": [call("Read", file_path="there.txt")]},
    {"tools": [call("Bash", command="touch here")]},
)


@pytest.mark.slow
async def test_a_folder_that_a_command_entered_is_left_again(tmp_path: Path, model_url: str):
    steps = ({"tools": [call("Bash", command="cd sub")]}, {"tools": [call("Bash", command="pwd")]})
    h = await house(tmp_path, model_url, script(*steps), policy=policy(default="always_allow"), floor=UNASKED)
    (h.workspace / "sub").mkdir(parents=True)
    await h.drive()
    assert str(h.workspace) in (await results(h))[-1].splitlines()


ENTERED = [
    ({"rules": ("Read(./secrets/**)",)}, "secrets", call("Read", file_path="key.txt")),
    ({"rules": ("Edit(./**)",)}, ".git/hooks", call("Write", file_path="pre-commit", content="#!/bin/sh\n")),
    ({"rules": ("Grep",)}, "secrets", call("Grep", pattern="KEY", output_mode="content")),
]


@pytest.mark.slow
@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize(("ruled", "entered", "then"), ENTERED)
async def test_an_ask_rule_holds_in_the_folder_that_a_command_entered(
    ruled: Any,
    entered: str,
    then: dict[str, Any],
    pinned: bool,
    tmp_path: Path,
    model_url: str,
    monkeypatch: pytest.MonkeyPatch,
):
    if not pinned:
        unpinned(monkeypatch)
    again = () if pinned else ({"tools": [then]},)
    steps = ({"tools": [call("Bash", command=f"cd {entered}")]}, {"tools": [then]}, *again)
    h = await house(
        tmp_path,
        model_url,
        script(*steps),
        policy=policy(*ruled["rules"], default="always_allow"),
        floor=UNASKED,
    )
    folder = h.workspace / entered
    folder.mkdir(parents=True)
    (folder / "key.txt").write_text("KEY")
    await h.drive()
    asked = [a for a in await approvals(h) if a.tool_name == then["name"]]
    if pinned and then["name"] == "Read":
        assert not asked  # it names a file of the workspace, which is not there
    else:
        assert [a.state.value for a in asked][-1:] == ["pending"]
        assert asked[-1].cwd == str(h.workspace if pinned else folder)
    assert not any("KEY" in text for text in await results(h))
    assert not (folder / "pre-commit").exists()


@pytest.mark.slow
async def test_a_remembered_command_is_asked_about_in_another_folder(
    tmp_path: Path, model_url: str, monkeypatch: pytest.MonkeyPatch
):
    unpinned(monkeypatch)
    run = {"tools": [call("Bash", command="./run.sh")]}
    steps = (run, {"tools": [call("Bash", command="cd sub")]}, run)
    h = await house(tmp_path, model_url, script(*steps), policy=policy("Bash(cd sub)", how="always_allow"))
    for folder in (h.workspace, h.workspace / "sub"):
        folder.mkdir(parents=True)
        (folder / "run.sh").write_text(f"#!/bin/sh\necho ran > {folder}/ran\n")
        (folder / "run.sh").chmod(0o755)
    await h.drive()
    [first] = (await h.until_idle())["event_ids"]
    await h.confirm(first, remember=True)
    await h.drive()
    assert (h.workspace / "ran").exists()
    # A command that was judged for the workspace is refused; when the model issues it again, its real folder is shown.
    assert not (h.workspace / "sub" / "ran").exists()
    assert "would run in the folder ./sub" in " ".join(await results(h))


@pytest.mark.slow
async def test_the_folder_that_is_shown_is_the_one_it_runs_in_and_part_of_what_is_approved(
    tmp_path: Path, model_url: str, monkeypatch: pytest.MonkeyPatch
):
    unpinned(monkeypatch)
    h = await house(
        tmp_path, model_url, script(*INTO_SUB), hot_s=60, policy=policy("Bash(cd:*)", how="always_allow")
    )
    (h.workspace / "sub").mkdir(parents=True)
    (h.workspace / "sub" / "there.txt").write_text("there")
    async with driven(h):
        [asked] = await until_asked(h)
        assert asked.cwd == str(h.workspace / "sub")
        assert asked.digest == call_digest({"command": "touch here"}, asked.cwd)
        assert asked.digest != digest({"command": "touch here"})
        await h.confirm(asked.event_id)
    assert (h.workspace / "sub" / "here").exists()
    [ran] = await approvals(h)
    assert (ran.state.value, ran.run_digest) == ("succeeded", asked.digest)


@pytest.mark.slow
async def test_what_was_allowed_for_a_folder_does_not_run_in_another_one_after_parking(
    tmp_path: Path, model_url: str, monkeypatch: pytest.MonkeyPatch
):
    unpinned(monkeypatch)
    h = await house(tmp_path, model_url, script(*INTO_SUB), policy=policy("Bash(cd:*)", how="always_allow"))
    (h.workspace / "sub").mkdir(parents=True)
    (h.workspace / "sub" / "there.txt").write_text("there")
    await h.drive()
    [asked] = await until_asked(h)
    await h.confirm(asked.event_id)
    await h.drive()  # a new CLI, which starts in the workspace
    assert not (h.workspace / "here").exists()
    assert not (h.workspace / "sub" / "here").exists()
    [approval] = await approvals(h)
    assert approval.state.value == "superseded"
    assert "would run in the folder ." in (await results(h))[-1]


# -- links


@pytest.mark.slow
async def test_a_read_through_a_link_that_a_sibling_made_is_asked_about(tmp_path: Path, model_url: str):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "s.txt").write_text("OUTSIDE")
    batch = {"tools": [call("Bash", command=f"ln -s {outside} docs"), call("Read", file_path="docs/s.txt")]}
    h = await house(tmp_path, model_url, script(batch), hot_s=60)
    async with driven(h):
        [link] = await until_asked(h)
        await h.confirm(link.event_id)
        read = await until_asked_for(h, "Read")
        assert read.targets == (f"/{outside}/s.txt",)
        assert not any("OUTSIDE" in text for text in await results(h))
        await h.confirm(read.event_id, "deny")
    assert not any("OUTSIDE" in text for text in await results(h))


@pytest.mark.slow
@pytest.mark.parametrize("hot_s", [0.0, 60.0])
async def test_a_write_that_leads_elsewhere_since_it_was_shown_does_not_run(
    hot_s: float, tmp_path: Path, model_url: str
):
    write = {"tools": [call("Write", file_path="docs/a.txt", content="hello")]}
    h = await house(tmp_path, model_url, script(write), hot_s=hot_s)
    elsewhere = h.workspace / "elsewhere"  # where the sandbox lets it write
    for folder in (h.workspace / "docs", elsewhere):
        folder.mkdir(parents=True)

    async def decide() -> None:
        [asked] = await until_asked(h)
        assert asked.targets == ("./docs/a.txt",)
        (h.workspace / "docs").rmdir()
        (h.workspace / "docs").symlink_to(elsewhere)
        await h.confirm(asked.event_id)

    if hot_s:
        async with driven(h):
            await decide()
    else:
        await h.drive()
        await decide()
        await h.drive()
    assert not (elsewhere / "a.txt").exists()
    assert [a.state.value for a in await approvals(h)] == ["superseded"]
    assert "Issue this call again" in (await results(h))[-1]


@pytest.mark.slow
async def test_an_allow_rule_for_a_folder_does_not_hold_through_a_link_made_meanwhile(
    tmp_path: Path, model_url: str
):
    rules = PermissionPolicy(
        rules=(
            Rule(rule="Edit(./src/**)", policy="always_allow"),
            Rule(rule="Bash(ln:*)", policy="always_allow"),
        )
    )
    batch = {
        "tools": [
            call("Bash", command="ln -s lib src"),
            call("Write", file_path="src/a.txt", content="hello"),
        ]
    }
    h = await house(tmp_path, model_url, script(batch), policy=rules)
    (h.workspace / "lib").mkdir(parents=True)
    await h.drive()
    written = h.workspace / "lib" / "a.txt"
    assert not written.exists()
    [asked] = await approvals(h)
    assert (asked.tool_name, asked.state.value, asked.targets) == ("Write", "pending", ("./lib/a.txt",))
    await h.confirm(asked.event_id)
    await h.drive()
    assert written.read_text() == "hello"  # a human saw where it leads


@pytest.mark.slow
async def test_an_edited_path_does_not_lead_where_nobody_saw_it_to_lead(tmp_path: Path, model_url: str):
    h = await house(
        tmp_path, model_url, script({"tools": [call("Write", file_path="a.txt", content="hello")]})
    )
    await h.drive()
    elsewhere = h.workspace / "elsewhere"
    elsewhere.mkdir()
    (h.workspace / "docs").symlink_to(elsewhere)
    [asked] = await until_asked(h)
    await h.confirm(asked.event_id, updated_input={"file_path": "docs/a.txt", "content": "hello"})
    await h.drive()
    assert not (elsewhere / "a.txt").exists()
    assert not (h.workspace / "a.txt").exists()


# -- plans


def plan(*more: dict[str, Any]) -> str:
    first = {"tools": [call("EnterPlanMode")]}
    return script(first, {"tools": [call("Write", file_path="{plan_file}", content="# one\n")]}, *more)


@pytest.mark.slow
async def test_a_plan_that_is_written_in_the_message_that_shows_it_is_the_one_that_is_shown(
    tmp_path: Path, model_url: str
):
    both = [call("Write", file_path="{plan_file}", content="# two\n"), call("ExitPlanMode")]
    h = await house(tmp_path, model_url, plan({"tools": both}))
    await h.drive()
    [asked] = await until_asked(h)
    assert (asked.kind, asked.input) == ("plan", {"plan": "# two\n"})
    await h.confirm(asked.event_id)
    await h.drive()
    assert "# two" in (await results(h))[-1]


@pytest.mark.slow
async def test_a_plan_that_changed_while_it_waited_is_not_approved(tmp_path: Path, model_url: str):
    h = await house(tmp_path, model_url, plan({"tools": [call("ExitPlanMode")]}), hot_s=60)
    async with driven(h):
        [asked] = await until_asked(h)
        assert asked.input == {"plan": "# one\n"}
        [draft] = (h.root / "config-1" / "plans").glob("*.md")
        draft.write_text("# another\n")
        await h.confirm(asked.event_id)
    [approval] = await approvals(h)
    assert approval.state.value == "superseded"
    assert "plan's file has changed" in (await results(h))[-1]
    assert not any("approved your plan" in text for text in await results(h))


@pytest.mark.slow
@pytest.mark.parametrize("leaving", [True, False])
async def test_plans_are_drafted_unasked_in_plan_mode_only_and_in_the_sessions_own_folder_only(
    leaving: bool, tmp_path: Path, model_url: str
):
    foreign = tmp_path / "claude-resume-other" / "plans" / "x.md"
    own = tmp_path / "config-1" / "plans" / "x.md"
    steps = [{"tools": [call("Write", file_path=str(own), content="# late\n")]}]
    if not leaving:
        steps = [{"tools": [call("Write", file_path=str(foreign), content="# late\n")]}]
    h = await house(tmp_path, model_url, script(*steps), permission_mode="default" if leaving else "plan")
    await h.drive()
    [asked] = await approvals(h)
    assert (asked.tool_name, asked.state.value) == ("Write", "pending")
    assert not own.exists()
    assert not foreign.exists()


# -- inputs that are none

BROKEN: list[Any] = [
    ("Read", {"file_path": "a\0.txt"}),
    ("Bash", {"command": "echo a\0b"}),
    ("Write", {"file_path": "a\ud800.txt", "content": "x"}),
    ("Bash", {"command": "echo \udfff"}),
    ("Glob", {"pattern": "\0"}),
    ("mcp__nobody__tool", {"x": "\ud800"}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "given"), BROKEN)
async def test_an_input_that_cannot_be_kept_is_an_error_to_the_model_and_the_session_goes_on(
    name: str, given: Any, tmp_path: Path, model_url: str
):
    steps = (
        {"tools": [call(name, **given)]},
        {"tools": [call(name, **given)]},
        {"tools": [call("Glob", pattern="*")]},
    )
    h = await house(tmp_path, model_url, script(*steps))
    await h.drive()
    assert (await h.until_idle())["type"] == "end_turn"
    used, done = (
        await h.log("agent.tool_use", "agent.mcp_tool_use"),
        await h.log("agent.tool_result", "agent.mcp_tool_result"),
    )
    assert len(used) == len(done) == 3
    assert [e.payload["is_error"] for e in done] == [True, True, False]
    assert not await approvals(h)


@pytest.mark.slow
@pytest.mark.parametrize("sent", [[1, 2], "text", None, 5])
async def test_an_input_that_is_no_object_is_an_error_to_the_model_and_the_session_goes_on(
    sent: Any, tmp_path: Path
):
    odd = ToolCall.model_construct(name="Read", input=sent)
    steps = (
        Step.model_construct(text="[offline model] This is odd.", tools=(odd,)),
        Step.model_construct(text="And again.", tools=(odd,)),
        Step(text="That is all."),
    )
    scenario = Scenario.model_construct(
        name="odd", description="odd", prompt="odd", match=re.compile("odd"), steps=steps
    )
    async with serving(model_app(OfflineUpstream(Scenarios.model_construct(known=(scenario,))))) as url:
        h = await house(tmp_path, url, "odd")
        await h.drive()
    assert (await h.until_idle())["type"] == "end_turn"
    assert "That is all." in await h.said()
    done = await h.log("agent.tool_result")
    assert [e.payload["is_error"] for e in done] == [True, True]
    assert not [a for a in await approvals(h) if a.state.value == "pending"]
