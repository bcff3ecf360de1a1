"""A form shows exactly what would run, and returns its content unchanged."""

import html
import json
from typing import Any

import pytest
from hypothesis import given
from kodosumi.service.inputs.forms import Model

from claude_hitl_template.domain.canonical_json import digest
from claude_hitl_template.domain.models import Agent, ApprovalState, Decision, Environment, Session, utcnow
from claude_hitl_template.domain.policy import Verdict
from claude_hitl_template.domain.policy.command_segments import JudgedSegment
from claude_hitl_template.domain.policy.tiers import Approvers, Requirement
from claude_hitl_template.panel import forms
from claude_hitl_template.panel.forms import Elements, Filled, Waiting
from claude_hitl_template.presentation import submissions as decide
from tests.unit.panel.html import Reader
from tests.unit.panel.made import PAGES, QUESTIONS, approval, asked
from tests.unit.panel.nasty import inputs, texts, tools


def rendered(elements: Elements, typed: dict[str, Any] | None = None) -> Reader:
    """Renders a form as Kodosumi's panel does, also after an error, when it fills in the previous values."""
    model = Model.model_validate(
        [dict(e) for e in elements], errors={"_global_": ["<b>raw</b>"]} if typed else None
    )
    if typed:
        model.set_data(typed)
    reader = Reader(model.render())
    reader.check(ours=1)
    return reader


def decision(*calls: Any, **more: Any) -> Reader:
    return rendered(forms.decision_form(asked(*calls), utcnow(), {"back": ""}, **more))


@given(tools, inputs(), texts)
def test_no_call_and_no_title_puts_markup_into_a_form(
    tool: str, given_input: dict[str, Any], title: str
) -> None:
    call = approval(tool, given_input, cwd="/" + title.replace("\0", ""))
    reader = rendered(
        forms.decision_form(asked(call, title=title, requester=title), utcnow(), {"back": title}, "/a")
    )
    assert reader.values["calls"] == call.id


@given(inputs())
def test_an_input_that_is_edited_comes_back_the_same_to_the_byte(given_input: dict[str, Any]) -> None:
    call = approval("Odd", given_input)
    sent = decision(call).values[f"{call.id}.input"]
    assert decide.parse_input(as_browsers_send(sent)) == given_input
    assert digest(decide.parse_input(as_browsers_send(sent))) == call.digest


def as_browsers_send(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n").replace("\n", "\r\n")


@pytest.mark.parametrize(
    "text",
    ['say "hi" & <b>go</b>', "a\r\nb\nc", "naïve 日本 ✓ \U0001f600", "\u202egnp\x1b[2J\x7f\x00", "\n\nlead",
     "</textarea><i>"],
)  # fmt: skip
def test_a_command_comes_back_the_same_whatever_is_in_it(text: str) -> None:
    call = approval("Bash", {"command": text})
    sent = as_browsers_send(decision(call).values[f"{call.id}.input"])
    (said,) = decide.confirmations([call], {f"{call.id}.do": "edit", f"{call.id}.input": sent})
    assert said.updated_input is None
    assert said.result == "allow"


def test_hidden_characters_are_seen_in_the_text_that_is_edited() -> None:
    call = approval("Bash", {"command": "rm \u202e/ \U000e0041"})
    area = decision(call).values[f"{call.id}.input"]
    assert "\\u202e" in area
    assert "\\udb40\\udc41" in area


@given(texts)
def test_what_was_typed_is_put_back_as_it_was_and_as_text(typed: str) -> None:
    call = approval()
    kept = {f"{call.id}.reason": typed, "prompt": typed, "policy": typed, "text": typed, "files": ""}
    filled = Filled(kept, {"": typed, f"{call.id}.reason": typed, "prompt": typed})
    again = rendered(forms.decision_form(asked(call), utcnow(), {}, filled=filled), kept)
    assert again.values[f"{call.id}.reason"] == typed
    places = {"default": Environment(name=typed)}
    start = rendered(forms.start_form(Agent(), places, 1024, "n", filled), kept)
    assert start.values["prompt"] == typed


@pytest.mark.parametrize("sandbox", ["on", "off", "none"])
def test_who_starts_a_conversation_without_a_sandbox_is_told(sandbox: str) -> None:
    shown = str(forms.start_form(Agent(), {"default": Environment()}, 1024, "n", sandbox=sandbox))
    assert ("There is no sandbox" in shown) is (sandbox != "on")


@pytest.mark.parametrize("open_", [True, False])
def test_who_starts_a_conversation_on_a_ray_without_a_token_is_told(open_: bool) -> None:
    shown = str(forms.start_form(Agent(), {"default": Environment()}, 1024, "n", ray_is_open=open_))
    assert ("Ray requires no token" in shown) is open_


@given(texts, texts)
def test_lists_of_sessions_and_approvals_hold_text_only(title: str, command: str) -> None:
    now = utcnow()
    session = Session(id="sesn_1", workspace_id="k", title=title, created_at=now, updated_at=now)
    rendered(forms.sessions_list([session], now))
    rendered(
        forms.approvals_list(
            [asked(approval(given={"command": command}), title=title, requester=title)], now, title
        )
    )
    rendered(
        forms.message_form(session, "", {"back": title}, "/a", Filled({"text": command}), max_bytes=1000)
    )


def test_how_many_calls_wait_is_said_where_a_conversation_starts_or_continues_and_in_the_list() -> None:
    for count, more, said in ((0, False, ""), (3, False, "Approvals (3)"), (100, True, "Approvals (100+)")):
        waiting = Waiting(count, "/e/approvals", has_more=more)
        start = forms.start_form(Agent(), {"default": Environment()}, 1024, "n", waiting=waiting)
        for form in (start, forms.sessions_list([], utcnow(), waiting=waiting)):
            reader = rendered(form)
            links = [attributes["href"] for tag, attributes in reader.elements if tag == "a"]
            assert ("/e/approvals" in links) is bool(count)
            assert said in reader.text
    assert "Approvals (1)" in rendered(forms.approvals_list([asked(approval())], utcnow())).text


def test_a_call_leads_to_its_card_in_the_inbox() -> None:
    call = approval()
    links = [attributes["href"] for tag, attributes in decision(call).elements if tag == "a"]
    assert f"{PAGES}/inbox/a/{call.id}" in links


def test_an_approver_sees_all_that_matters() -> None:
    call = approval(given={"command": "make deploy", "description": "Deploy"}, agent_id="sub")
    seen = decision(call).text
    for part in (
        "make deploy",
        "Deploy",
        "/workspace",
        call.digest,
        "Title",
        "ann",
        "waiting 0s",
        "subagent",
    ):
        assert part in seen


def test_enter_in_a_field_decides_nothing() -> None:
    call = approval()
    buttons = [attributes for tag, attributes in decision(call).elements if tag == "button"]
    assert buttons[0]["name"] == "nothing"
    with pytest.raises(decide.FormErrors, match="Nothing was decided"):
        decide.confirmations([call], {"nothing": "1", f"{call.id}.reason": "no"})


def test_one_call_has_buttons_and_several_have_one_form() -> None:
    one, two = approval(), approval("AskUserQuestion", QUESTIONS)
    names = {a.get("name") for tag, a in decision(one).elements if tag == "button"}
    assert f"{one.id}.do" in names
    batch = decision(one, two)
    assert {"batch"} == {a.get("name") for tag, a in batch.elements if tag == "button"} - {"nothing"}
    assert batch.values["calls"] == f"{one.id},{two.id}"


def test_a_decided_call_says_by_whom_and_asks_no_more() -> None:
    said = Decision(result="deny", deny_message="<no>", decided_by="bob", decided_at=utcnow())
    call = approval(state=ApprovalState.DENIED, decision=said)
    reader = decision(call)
    assert "Denied by bob" in reader.text
    assert "<no>" in reader.text
    assert f"{call.id}.do" not in {a.get("name") for _, a in reader.elements}


def test_the_rule_that_would_be_remembered_is_shown() -> None:
    assert "Bash(ls)" in decision(approval()).text


def test_of_a_line_the_command_that_asks_is_shown_and_would_be_remembered() -> None:
    segments = (
        JudgedSegment(start=0, end=10, verdict=Verdict.allow, source="Bash(git status)"),
        JudgedSegment(start=14, end=22, verdict=Verdict.ask, source="default"),
    )
    call = approval(given={"command": "git status && rm -rf x"}, segments=segments)
    shown = decision(call).text
    assert "Remembered, such calls run unasked in this session: Bash(rm -rf x)" in shown
    assert "asks" in shown


def test_who_must_agree_is_shown_and_such_a_call_is_not_remembered() -> None:
    two = Requirement(
        rule="Bash(git push:*)", severity="high", approvers=Approvers(groups=("release",)), quorum=2
    )
    shown = decision(approval(requirements=(two,))).text
    assert "2 of the group release" in shown
    assert "0 of 2" in shown
    assert "Remembered" not in shown


def test_all_names_in_forms_are_ours() -> None:
    hostile = {"questions": [{"question": '"><b>', "options": [{"label": "'x"}], "multiSelect": True}]}
    reader = decision(approval("AskUserQuestion", hostile))
    for _, attributes in reader.elements:
        name = attributes.get("name") or ""
        assert html.escape(name) == name
    assert json.dumps(sorted(reader.values))


HOST = {"host": "files.example.org", "port": 443, "because": "curl <b>https://files.example.org/</b>"}


def test_a_host_is_shown_with_port_and_command_and_decided_for_now_or_for_the_session() -> None:
    call = approval("Network", HOST, kind="network", folder=".", held=True)
    shown = str(forms.decision_form(asked(call), utcnow(), {"back": ""}))
    for part in ("files.example.org:443", "curl &lt;b&gt;", "Allow for now", "Allow for this session", "Network(files.example.org:443)"):  # fmt: skip  # noqa: E501
        assert part in shown
    assert "Allow this instead" not in shown
    inputs = {f"{call.id}.do": "remember"}
    [said] = decide.confirmations([call], inputs)
    assert (said.result, said.remember) == ("allow", True)


def test_hosts_and_calls_are_allowed_together() -> None:
    calls = [approval("Network", HOST, kind="network", folder="."), approval()]
    assert "Allow all 2" in str(forms.decision_form(asked(*calls), utcnow(), {"back": ""}))
    assert len(decide.confirmations(calls, {"batch": "allow"})) == 2
