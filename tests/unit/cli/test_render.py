"""An approver sees exactly what would run: every field of every kind of call, with all tricks made visible."""

from typing import Any

import pytest
from rich.console import Console, RenderableType

from claude_hitl_template.cli.terminal.render import approval_view, diff, event_lines
from claude_hitl_template.cli.terminal.tables import table_lines
from claude_hitl_template.domain import missing_dependency
from claude_hitl_template.presentation.text import summary, visible


def text_of(*views: RenderableType | None, width: int = 100) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        for view in views:
            assert view is not None
            console.print(view)
        return console.export_text()


def approval(tool: str, given: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "tool_name": tool,
        "cwd": "/home/ada/space",
        "input": given,
        "kind": "tool",
        "agent_id": None,
        **more,
    }


def seen(tool: str, given: dict[str, Any], **more: Any) -> str:
    return text_of(approval_view(approval(tool, given, **more)))


def test_a_command_is_shown_whole_with_folder_and_every_other_field() -> None:
    found = seen("Bash", {"command": "a &&\n  b", "description": "two", "timeout": 5, "odd": {"x": [1]}})
    for part in (
        "Bash",
        "/home/ada/space",
        "│ a &&\n",
        "│   b\n",
        "description  two",
        "timeout  5",
        'odd  {"x": [1]}',
    ):
        assert part in found


def test_a_host_is_shown_with_its_port_and_the_command_that_wants_it() -> None:
    given = {"host": "files.example.org", "port": 443, "because": "curl https://files.example.org/\nls"}
    found = seen("Network", given, kind="network")
    for part in ("wants to reach  files.example.org:443", "│ curl https://files.example.org/\n", "│ ls\n"):
        assert part in found
    assert summary(given) == "files.example.org:443 because of: curl https://files.example.org/ ls"
    assert summary({"host": "2606:4700::1", "port": 80}) == "[2606:4700::1]:80"


def test_a_file_is_shown_with_its_whole_content() -> None:
    content = "\n".join(f"line {n}" for n in range(200)) + "\n"
    found = seen("Write", {"file_path": "x.txt", "content": content})
    assert "file  x.txt" in found
    assert all(f"│ line {n}\n" in found for n in range(200))


def test_an_edit_is_shown_as_a_diff_of_both_texts_whole() -> None:
    old = "\n".join(["a", *["same"] * 50, "b"])
    found = seen("Edit", {"file_path": "x", "old_string": old, "new_string": old + "!", "replace_all": True})
    assert "│ - b\n" in found
    assert "│ + b!\n" in found
    assert found.count("│   same") == 50
    assert "replace_all  true" in found


@pytest.mark.parametrize(("old", "new"), [("a", "a\n"), ("a\x0cb", "a\nb"), ("x ", "x"), ("a\r\n", "a\n")])
def test_a_diff_shows_every_difference(old: str, new: str) -> None:
    lines = diff(old, new).plain.split("\n")
    assert any(line.startswith(("- ", "+ ")) for line in lines)
    assert "\n".join(line[2:] for line in lines if not line.startswith("- ")) == visible(new)
    assert "\n".join(line[2:] for line in lines if not line.startswith("+ ")) == visible(old)


def test_a_question_is_shown_with_its_options() -> None:
    options = [{"label": "Blue", "description": "Calm"}, {"label": "Green", "description": "Loud"}]
    question = {"question": "Which?", "header": "H", "multiSelect": True, "options": options}
    found = seen("AskUserQuestion", {"questions": [question]}, kind="question")
    for part in ("Which?", "several may be chosen", "1. Blue  Calm", "2. Green  Loud"):
        assert part in found


def test_a_plan_is_shown_as_it_is_written() -> None:
    assert "│ # Plan\n" in seen("ExitPlanMode", {"plan": "# Plan\n[link=x]y[/link]"}, kind="plan")


def test_other_tools_are_shown_as_json() -> None:
    assert '"query": "x\\"y"' in seen("Other", {"query": 'x"y', "n": None})


@pytest.mark.parametrize("given", [{"command": 1}, {"command": ["a"]}, {}])
def test_an_input_of_unexpected_shape_is_shown_as_json(given: dict[str, Any]) -> None:
    assert "input" in seen("Bash", given)


def test_a_subagents_call_says_so() -> None:
    assert "asked by a subagent" in seen("Bash", {"command": "x"}, agent_id="a1")


@pytest.mark.parametrize("tool", ["Bash", "Write", "Edit", "ExitPlanMode", "AskUserQuestion", "Other"])
def test_hostile_text_is_defused_wherever_it_stands(tool: str) -> None:
    evil = "[bold]x[/bold]\x1b[2K\u202e\u200b"
    given: dict[str, Any] = dict.fromkeys(
        ("command", "file_path", "content", "old_string", "plan", evil), evil
    )
    given |= {
        "new_string": evil + "2",
        "questions": [{"question": evil, "options": [{"label": evil}, evil]}, evil],
    }
    found = seen(tool + evil, given, cwd=evil) + seen(tool, given)
    assert "\x1b" not in found
    assert "\u202e" not in found
    assert "\u200b" not in found
    assert "[bold]x[/bold]" in found


def test_wrapped_lines_stay_behind_the_bar() -> None:
    long = "echo " + "x" * 300 + "\nallow / deny [why] / edit / always [a/d/e/w] > a"
    found = text_of(approval_view(approval("Bash", {"command": long})), width=40)
    body = found.split("command\n")[1].rstrip("\n").split("\n")
    assert all(line.startswith("  │ ") for line in body)
    assert "".join(line.removeprefix("  │ ") for line in body).count("x") == 300


def test_the_input_that_was_edited_can_be_shown_instead() -> None:
    found = text_of(approval_view(approval("Bash", {"command": "proposed"}), {"command": "edited"}))
    assert "edited" in found
    assert "proposed" not in found


# -- events

LS = {"command": "ls"}


def event(type_: str, **fields: Any) -> dict[str, Any]:
    return {"id": "e1", "type": type_, **fields}


def text(value: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": value}]


@pytest.mark.parametrize(
    ("said", "part"),
    [
        (event("user.message", content=text("do it")), "you  do it"),
        (event("agent.message", content=text("done\x1b")), "done\\x1b"),
        (event("agent.thinking"), "(thinking)"),
        (event("agent.tool_use", name="Bash", input=LS, evaluated_permission="ask"), "● Bash ls (asks first)"),
        (event("agent.tool_use", name="Bash", input=LS, evaluated_permission="deny"), "denied by a rule"),
        (event("agent.mcp_tool_use", name="find", mcp_server_name="srv", input={}), "● srv: find"),
        (event("agent.tool_result", content=text("out"), is_error=False), "  out"),
        (event("agent.tool_result", content=text("?"), is_error=True, outcome="unknown"), "outcome unknown"),
        (event("user.tool_confirmation", result="allow", decided_by="ann"), "allowed by ann"),
        (event("user.tool_confirmation", result="allow", updated_input={"command": "x"}), "allowed as edited"),
        (event("user.tool_confirmation", result="allow", updated_input={"answers": {}}), "allowed with answers"),
        (event("user.tool_confirmation", result="allow", remember={"rule": "Bash(ls)"}), "remembered: Bash(ls)"),
        (event("user.tool_confirmation", result="deny", deny_message="no"), "denied: no"),
        (event("user.interrupt"), "interrupted"),
        (event("session.error", error={"message": "bad", "retry_status": {"type": "exhausted"}}), "error: bad"),
        (event("session.updated", workspace={"doing": "saving", "bytes": 2**20, "of_bytes": 2**30}), "1.0 MiB of 1.0 GiB"),
        (event("session.error", error={"message": "again", "retry_status": {"type": "retrying"}}), "again"),
        (event("session.status_rescheduled"), "started again"),
        (event("session.status_terminated"), "ended"),
        (event("session.deleted"), "deleted"),
    ],
)  # fmt: skip
def test_each_event_says_what_happened(said: dict[str, Any], part: str) -> None:
    assert part in text_of(event_lines(said))


@pytest.mark.parametrize(
    "type_", ["session.status_idle", "session.usage", "span.model_request_start", "new.kind"]
)
def test_events_without_news_for_a_reader_are_left_out(type_: str) -> None:
    assert event_lines(event(type_)) is None


def test_a_long_result_is_cut_and_says_so() -> None:
    found = text_of(event_lines(event("agent.tool_result", content=text("x\n" * 100))))
    assert "... 88 more lines" in found


def test_a_summary_is_one_visible_line() -> None:
    assert summary({"command": "a\nb\x1b"}) == "a b\\x1b"
    assert summary({"questions": [{"question": "Which?"}]}) == "Which?"
    assert summary({"other": 1}) == '{"other": 1}'
    assert summary({}) == ""


def test_columns_line_up() -> None:
    assert table_lines([("a", "x"), ("long", "y")], ("H", "LAST")) == ["H     LAST", "a     x", "long  y"]


def report(**given: str) -> dict[str, Any]:
    said = {"kind": "system", "name": "jq", "why": "to read JSON", **given}
    return event(
        "agent.mcp_tool_use",
        mcp_server_name=missing_dependency.SERVER,
        name=missing_dependency.TOOL,
        input=said,
    )


def test_a_missing_tool_is_shown_as_what_it_is() -> None:
    found = text_of(event_lines(report(why="to \x1b[31mread\u202e")), width=200)
    assert (
        "The agent misses `jq` (system package): add it to template_project/dependencies/system-packages.txt"
        in found
    )
    assert "to \\x1b[31mread\\u202e" in found
    assert "misses" not in text_of(event_lines(report(name="jq; rm -rf /")))
