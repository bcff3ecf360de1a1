"""A submitted form becomes the intended decision, or an error that names the field."""

from typing import Any

import pytest

from claude_hitl_template.domain.models import Agent, Environment
from claude_hitl_template.errors import InvalidInput
from claude_hitl_template.presentation.submissions import (
    FormErrors,
    confirmations,
    next_message,
    refusal_errors,
    start,
)
from tests.unit.panel.made import QUESTIONS, approval


def said_about(call: Any, **fields: Any) -> dict[str, Any]:
    """Returns the decision as a REST client would send it. Fields are named without the approval's id."""
    inputs = {f"{call.id}.{name.replace('_', '.')}": value for name, value in fields.items()}
    (found,) = confirmations([call], inputs)
    return found.model_dump(exclude={"type", "tool_use_id"}, exclude_defaults=True)


def errors_of(call: Any, **fields: Any) -> dict[str, str]:
    with pytest.raises(FormErrors) as caught:
        said_about(call, **fields)
    return {name.removeprefix(f"{call.id}."): message for name, message in caught.value.errors.items()}


def test_allow_deny_and_remember() -> None:
    call = approval()
    assert said_about(call, do="allow", reason=None) == {"result": "allow"}
    assert said_about(call, do="remember") == {"result": "allow", "remember": True}
    assert said_about(call, do="deny", reason=" too risky \r\n") == {
        "result": "deny",
        "deny_message": "too risky",
    }
    assert said_about(call, do="deny", reason=None) == {"result": "deny"}


def test_an_edit_is_the_whole_input() -> None:
    call = approval()
    changed = said_about(call, do="edit", input='{"command":\r\n "pwd"}')
    assert changed == {"result": "allow", "updated_input": {"command": "pwd"}}
    assert said_about(call, do="edit", input='{ "command": "ls" }') == {"result": "allow"}


@pytest.mark.parametrize("text", ["", None, "{", "[1]", "ls", '"ls"', '{"command": "ls"} x', "[" * 100_000])
def test_an_edit_that_is_no_json_object_is_an_error_of_that_field(text: str | None) -> None:
    assert "input" in errors_of(approval(), do="edit", input=text)


def test_a_question_is_answered_with_labels_several_and_own_words() -> None:
    call = approval("AskUserQuestion", QUESTIONS)
    found = said_about(call, do="answer", q0="1", q1_o0="on", q1_own="CSV ")
    assert found["answers"] == {"Colour?": "Green", "Formats?": ["HTML", "CSV"]}
    found = said_about(call, do="answer", q0_own="Red", q1_o1="on")
    assert found["answers"] == {"Colour?": "Red", "Formats?": ["PDF"]}


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({"q1_o0": "on"}, "q0"),
        ({"q0": "7", "q1_o0": "on"}, "q0"),
        ({"q0": "-1", "q1_o0": "on"}, "q0"),
        ({"q0": "0", "q0_own": "Red", "q1_o0": "on"}, "q0"),
        ({"q0": "0"}, "q1"),
    ],
)
def test_an_unanswered_question_is_an_error_of_that_question(fields: dict[str, str], wrong: str) -> None:
    assert list(errors_of(approval("AskUserQuestion", QUESTIONS), do="answer", **fields)) == [wrong]


def test_a_plan_is_accepted_or_sent_back_with_comments() -> None:
    call = approval("ExitPlanMode", {"plan": "# Do"})
    assert said_about(call, do="allow") == {"result": "allow"}
    assert said_about(call, do="deny", reason="smaller steps")["deny_message"] == "smaller steps"


@pytest.mark.parametrize(
    ("tool", "choice"),
    [("ExitPlanMode", "remember"), ("AskUserQuestion", "allow"), ("Bash", "answer"), ("Bash", "run")],
)
def test_what_cannot_be_said_about_a_call_is_refused(tool: str, choice: str) -> None:
    assert "do" in errors_of(
        approval(tool, QUESTIONS if tool == "AskUserQuestion" else {"plan": "x"}), do=choice
    )


def test_too_long_a_reason_names_its_field() -> None:
    assert "reason" in errors_of(approval(), do="deny", reason="x" * 10_001)


def test_a_batch_decides_what_was_chosen_and_leaves_the_rest() -> None:
    one, two, three = approval(), approval(), approval()
    inputs = {f"{one.id}.do": "allow", f"{two.id}.do": "later", f"{three.id}.do": "deny", "batch": "send"}
    found = confirmations([one, two, three], inputs)
    assert [(c.tool_use_id, c.result) for c in found] == [(one.event_id, "allow"), (three.event_id, "deny")]


def test_allow_all_allows_what_was_not_chosen_otherwise() -> None:
    one, two, question = approval(), approval(), approval("AskUserQuestion", QUESTIONS)
    found = confirmations([one, two, question], {"batch": "allow", f"{two.id}.do": "deny"})
    assert [c.result for c in found] == ["allow", "deny"]


def test_one_error_in_a_batch_decides_nothing() -> None:
    one, two = approval(), approval()
    with pytest.raises(FormErrors) as caught:
        confirmations([one, two], {f"{one.id}.do": "allow", f"{two.id}.do": "edit", f"{two.id}.input": "{"})
    assert list(caught.value.errors) == [f"{two.id}.input"]


@pytest.mark.parametrize("text", [None, "", "  \r\n", "x" * 1_000_001])
def test_an_empty_and_an_endless_message_name_their_field(text: str | None) -> None:
    with pytest.raises(FormErrors) as caught:
        next_message({"text": text})
    assert list(caught.value.errors) == ["text"]


HERE = {"default": Environment(), "data": Environment(id="data", image="localhost/worker:data")}


def test_policies_become_rules() -> None:
    def chosen(policy: str) -> Agent:
        return start({"prompt": "go", "policy": policy}, Agent(), HERE).agent

    assert (chosen("risky").policy.default, chosen("risky").permission_mode) == (None, "default")
    assert chosen("everything").policy.default == "always_ask"
    assert chosen("plan").permission_mode == "plan"


def test_options_are_taken_and_their_absence_keeps_the_defaults() -> None:
    bare = start({"prompt": "a\r\nb", "model": None, "title": None, "system": None}, Agent(model="m"), HERE)
    assert (bare.agent, bare.title, bare.message.content[0].model_dump()["text"]) == (
        Agent(model="m"),
        "a b",
        "a\nb",
    )
    full = start(
        {"prompt": "go", "model": "opus", "title": " My\ntitle ", "system": "Be kind"}, Agent(), HERE
    )
    assert (full.agent.model, full.agent.system, full.title) == ("opus", "Be kind", "My title")


def test_a_conversation_starts_in_the_environment_that_was_chosen_and_else_in_the_first() -> None:
    for chosen, expected in ((None, "default"), ("", "default"), ("data", "data")):
        assert start({"prompt": "go", "environment": chosen}, Agent(), HERE).environment.id == expected


def test_every_wrong_field_of_a_start_is_named() -> None:
    with pytest.raises(FormErrors) as caught:
        start(
            {"prompt": " ", "policy": "none", "agent": "other", "environment": "other", "title": "x" * 501},
            Agent(),
            HERE,
        )
    assert set(caught.value.errors) == {"prompt", "policy", "agent", "environment", "title"}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{}", "command"),
        ('{"command": 5}', "command"),
        ('{"command": "ls", "cwd": "/"}', "cwd"),
        ('{"command": "ls\\u0000rm"}', "NUL"),
    ],
)
def test_an_edit_that_the_tool_would_refuse_is_an_error_of_that_field(text: str, named: str) -> None:
    assert named in errors_of(approval(), do="edit", input=text)["input"]


def test_what_the_service_refuses_of_an_edit_is_shown_at_the_edit() -> None:
    call = approval()
    found = confirmations([call], {f"{call.id}.do": "edit", f"{call.id}.input": '{"command": "git push"}'})
    shown = refusal_errors([call], found, InvalidInput("denied", "updated_input"))
    assert isinstance(shown, FormErrors)
    assert "denied" in shown.errors[f"{call.id}.input"]
    other = InvalidInput("no", "remember")
    assert refusal_errors([call], found, other) is other
