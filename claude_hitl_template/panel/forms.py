"""The panel's forms, as lists of Kodosumi's elements. Pure.

All of them are `html` elements with inputs of our own. Kodosumi's own input elements cannot hold text of others: it
writes values, labels and options into the page as they are, and after an error puts back what was typed the same way
(`Model.set_data`), whatever was escaped before. Its file input builds HTML from file names in the browser.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

from claude_hitl_template.domain.models import Agent, Approval, ApprovalState, Environment, Session
from claude_hitl_template.domain.policy import remember_rule
from claude_hitl_template.errors import InvalidInput
from claude_hitl_template.panel.calls import call_view
from claude_hitl_template.panel.markup import STYLE, block, card, facts, fold, line, link, text
from claude_hitl_template.panel.uploads import UPLOAD_SCRIPT
from claude_hitl_template.presentation.text import (
    age,
    asked_questions,
    is_hidden,
    leads_to,
    option_description,
    option_label,
    question_options,
    rule_text,
    size,
    summary,
)

type Elements = list[dict[str, str]]
POLICIES = {
    "risky": "Ask for what is risky: what writes, runs or leaves the machine",
    "everything": "Ask for everything, reading too",
    "plan": "Plan first: it shows a plan before it does anything",
}
# The header of Kodosumi's form page is empty, and a tenth of a phone's screen.
_FORM_STYLE = "<style>body>header.fixed{display:none}</style>"


@dataclass(frozen=True)
class Filled:
    """What was typed before, and what is wrong with it: texts by field name; "" is the form itself."""

    typed: Mapping[str, Any] = field(default_factory=dict[str, Any])
    errors: Mapping[str, str] = field(default_factory=dict[str, str])

    def value(self, name: str, default: str = "") -> str:
        given = self.typed.get(name)
        return default if given is None else str(given)

    def error(self, name: str) -> str:
        return line(self.errors[name], "hitl-error") if name in self.errors else ""


@dataclass(frozen=True)
class Asked:
    """Calls of one session that are decided together, and whose session it is."""

    session: Session
    requester: str
    approvals: tuple[Approval, ...]


def page(*parts: str, back: str = "", action: str = "") -> Elements:
    """One form of the panel, of HTML parts. `back`: the flow that it belongs to. Kodosumi's forms lead nowhere else."""
    ways = [("/admin/flow", "Services"), ("/admin/timeline/view", "Timeline")]
    if back:
        ways = [(f"/admin/status/view/{back}", "Back to the conversation"), *ways]
    leave = f'<div class="hitl-ways">{" · ".join(link(path, label) for path, label in ways)}</div>'
    # Enter in a field presses a form's first button: this one decides nothing.
    to = f' formaction="{escape(action)}"' if action else ""
    nothing = f'<button type="submit" name="nothing" value="1" hidden tabindex="-1"{to}></button>'
    return [{"type": "html", "text": f"{STYLE}{_FORM_STYLE}{block(nothing, leave, *parts)}"}]


def message(said: str, *parts: str) -> Elements:
    return page(card(line(said, "hitl-bold"), kind="hitl-wait"), *parts)


# -- start


def start_form(
    agent: Agent,
    environments: Mapping[str, Environment],
    max_bytes: int,
    nonce: str,
    filled: Filled = Filled(),
    *,
    sandbox: str = "on",
) -> Elements:
    options = [
        *_labelled("title", "Title", _area("title", filled.value("title"), rows=1), filled),
        *_labelled("model", "Model", _area("model", filled.value("model", agent.model), rows=1), filled),
        *_labelled(
            "system",
            "Further instructions for the agent",
            _area("system", filled.value("system"), rows=3),
            filled,
        ),
    ]
    opened = any(name in filled.errors for name in ("title", "model", "system"))
    return page(
        "<h2>Start a conversation</h2>",
        line("Claude works in a folder of its own, and asks before it does what the policy says."),
        *_without_sandbox(sandbox),
        filled.error(""),
        *_labelled(
            "prompt",
            "What should be done?",
            _area("prompt", filled.value("prompt"), rows=6, required=True),
            filled,
        ),
        *_labelled("agent", "Agent", _select("agent", {agent.id: agent.name}, filled), filled),
        *_labelled(
            "environment",
            "Environment",
            _select("environment", {id_: made.name for id_, made in environments.items()}, filled),
            filled,
        ),
        *_labelled("policy", "Permission policy", _select("policy", POLICIES, filled), filled),
        *_file_field(max_bytes, filled),
        fold("Options", "".join(options), is_open=opened),
        _hidden({"nonce": nonce}),
        '<div class="hitl-bar"><button type="submit" name="do" value="start">Start</button></div>',
    )


def _without_sandbox(sandbox: str) -> list[str]:
    if sandbox == "on":
        return []
    return ['<p class="hitl-error">There is no sandbox: what you allow can do all that the service can.</p>']


def _file_field(max_bytes: int, filled: Filled) -> list[str]:
    label = f"Files for its folder (together up to {size(max_bytes)})"
    return _labelled("files", label, _files(max_bytes, filled.value("files")), filled)


def _files(max_bytes: int, given: str) -> str:
    picker = '<input type="file" id="hitl-pick" multiple>'
    kept = (
        f'<input type="hidden" name="files" id="hitl-files" value="{escape(given)}"><ul id="hitl-list"></ul>'
    )
    return f'<div id="hitl-upload" data-limit="{max_bytes}">{picker}{kept}</div>{UPLOAD_SCRIPT}'


# -- continue


def sessions_list(sessions: Sequence[Session], now: datetime, filled: Filled = Filled()) -> Elements:
    """One's conversations to choose from, the last active first."""
    rows = [
        _row(
            "open",
            session.id,
            text(session.title or session.id),
            f"{state_of(session)} · active {age(session.updated_at.isoformat(), now)} ago",
        )
        for session in sorted(sessions, key=lambda s: s.updated_at, reverse=True)
    ]
    nothing = line("You have no conversation that could go on. Start one.")
    return page("<h2>Continue a conversation</h2>", filled.error(""), *(rows or [nothing]))


def say_form(
    session: Session,
    last_said: str,
    hidden: Mapping[str, str],
    action: str = "",
    filled: Filled = Filled(),
    *,
    max_bytes: int,
    may_watch: bool = False,
) -> Elements:
    """Where a session stands, and the next message to it. `last_said` is HTML."""
    bar = [_button("do", "send", "Send", action)]
    if may_watch:
        bar.append(_button("do", "watch", "Show the conversation", action, kind="hitl-plain"))
    bar.append(_button("do", "end", "End the conversation", action, kind="hitl-plain"))
    return page(
        f"<h2>{text(session.title or 'Next message')}</h2>",
        facts([("session", session.id), ("state", state_of(session))]),
        card(line("Claude said last"), last_said) if last_said else "",
        filled.error(""),
        *_labelled("text", "Your message", _area("text", filled.value("text"), rows=5), filled),
        *_file_field(max_bytes, filled),
        _hidden({"session": session.id, **hidden}),
        _bar(*bar),
        back=hidden.get("back", ""),
        action=action,
    )


def state_of(session: Session) -> str:
    """A session's state in words."""
    if session.archived_at is not None or session.status == "terminated":
        return "ended"
    reason = (session.stop_reason or {}).get("type")
    if session.status == "idle" and reason == "requires_action":
        return "waits for a decision"
    return {"idle": "waits for your next message", "running": "works"}.get(
        session.status, "is being started again"
    )


# -- approvals


def inbox(waiting: Sequence[Asked], now: datetime, said: str = "", *, more: bool = False) -> Elements:
    """Every call that waits and that this user may decide, oldest first; one `Asked` a call."""
    rows = [
        _row(
            "open",
            approval.id,
            f"<b>{text(approval.tool_name)}</b> {text(summary(approval.input))}",
            f"waits {age(approval.created_at.isoformat(), now)} · {asked.session.title or asked.session.id} · "
            f"for {asked.requester}",
        )
        for asked in waiting
        for approval in asked.approvals
    ]
    return page(
        "<h2>Approvals</h2>",
        card(line(said, "hitl-bold"), kind="hitl-wait") if said else "",
        *(rows or [line("Nothing waits for a decision of yours.")]),
        line("There are more; these are the oldest.") if more else "",
    )


def decision_form(
    asked: Asked,
    now: datetime,
    hidden: Mapping[str, str],
    action: str = "",
    filled: Filled = Filled(),
) -> Elements:
    """Exactly what would run, and what can be said about it. Calls that are decided already say by whom."""
    waiting = [a for a in asked.approvals if a.state is ApprovalState.PENDING]
    alone = len(waiting) == 1
    parts = [_call(asked, a, now, filled, action, alone=alone) for a in asked.approvals]
    title = (
        "A call waits for you" if alone else f"{len(waiting)} calls wait for you" if waiting else "Decided"
    )
    if not alone and waiting:
        parts.append(_bar(_button("batch", "send", "Send decisions", action), _allow_all(waiting, action)))
    calls = ",".join(a.id for a in asked.approvals)
    return page(
        f"<h2>{title}</h2>",
        filled.error(""),
        *parts,
        _hidden({"session": asked.session.id, "calls": calls, **hidden}),
        back=hidden.get("back", ""),
        action=action,
    )


def _allow_all(waiting: Sequence[Approval], action: str) -> str:
    if any(a.kind not in ("tool", "network") for a in waiting):
        return ""
    return _button("batch", "allow", f"Allow all {len(waiting)}", action, kind="hitl-plain")


def _call(
    asked: Asked, approval: Approval, now: datetime, filled: Filled, action: str, *, alone: bool
) -> str:
    by_subagent = " (asked by a subagent)" if approval.agent_id else ""
    given = approval.input
    if approval.kind == "question" and approval.state is ApprovalState.PENDING and asked_questions(given):
        given = {
            name: value for name, value in given.items() if name != "questions"
        }  # shown with their answers
    shown = f"<h3>{text(approval.tool_name)}{by_subagent}</h3>{call_view(approval.tool_name, given)}"
    elsewhere = leads_to(approval.input, approval.targets)
    head = facts([
        ("folder", approval.cwd),
        *([("leads to", elsewhere)] if elsewhere else []),
        ("session", asked.session.title or asked.session.id),
        ("for", f"{asked.requester}, waiting {age(approval.created_at.isoformat(), now)}"),
        *([("until", approval.expires_at.isoformat(timespec="minutes"))] if approval.expires_at else []),
        ("SHA-256", f"{approval.digest[:16]}…"),
    ])  # fmt: skip
    if approval.state is not ApprovalState.PENDING:
        return card(shown, head, line(fate(approval), "hitl-bold"))
    controls = {"tool": _tool, "network": _host, "question": _questions, "plan": _plan}[approval.kind]
    return card(
        shown, head, filled.error(approval.id), controls(approval, filled, action, alone), kind="hitl-wait"
    )


def fate(approval: Approval) -> str:
    """What became of a call, and who said so."""
    decision = approval.decision
    if decision is None:
        return {
            ApprovalState.PENDING: "Waits for a decision.",
            ApprovalState.EXPIRED: "Expired: nobody decided in time. It never ran.",
            ApprovalState.SUPERSEDED: "Superseded: the session went on without it. It never ran.",
        }.get(approval.state, "Allowed by a remembered rule.")
    word = "Allowed" if decision.result == "allow" else "Denied"
    edited = ", edited," if decision.updated_input and approval.kind == "tool" else ""
    reason = f": {decision.deny_message}" if decision.deny_message else ""
    kept = f"; remembered: {rule_text(decision.remember.model_dump())}" if decision.remember else ""
    when = decision.decided_at.isoformat(sep=" ", timespec="seconds")
    return (
        f"{word}{edited} by {decision.decided_by} at {when}{reason}{kept}. Outcome: {approval.state.value}."
    )


# -- what can be said about a call


def _tool(approval: Approval, filled: Filled, action: str, alone: bool) -> str:
    name = approval.id
    remembered = _remembered(approval)
    edited = filled.value(f"{name}.input", editable(approval.input))
    editor = _area(f"{name}.input", edited, rows=min(edited.count("\n") + 2, 20))
    edit_button = _button(f"{name}.do", "edit", "Allow this instead", action) if alone else ""
    edit = fold(
        "Edit",
        "".join(
            [*_labelled(f"{name}.input", "The input that runs instead, as JSON", editor, filled), edit_button]
        ),
        is_open=f"{name}.input" in filled.errors or filled.typed.get(f"{name}.do") == "edit",
    )
    reason = _reason(name, "If you deny: why? The agent is told", filled)
    if alone:
        bar = _bar(
            _button(f"{name}.do", "allow", "Allow", action),
            _button(f"{name}.do", "remember", "Allow and remember", action, kind="hitl-plain")
            if remembered
            else "",
            _button(f"{name}.do", "deny", "Deny", action, kind="hitl-deny"),
        )
        rule = line(f"Remembered, such calls run unasked in this session: {remembered}") if remembered else ""
        return f"{reason}{bar}{rule}{edit}"
    choices = {"allow": "Allow", "edit": "Allow as edited below", "deny": "Deny", "later": "Not now"}
    if remembered:
        choices = {"allow": "Allow", "remember": f"Allow and remember {remembered}", **choices}
    return f"{_radios(f'{name}.do', choices, filled)}{reason}{edit}"


def _host(approval: Approval, filled: Filled, action: str, alone: bool) -> str:
    name = approval.id
    reason = _reason(name, "If you deny: why? The agent is told", filled)
    rule = _remembered(approval)
    choices = {"allow": "Allow for now", "remember": "Allow for this session", "deny": "Deny"}
    if not rule:
        del choices["remember"]
    said = (
        line(f"For now: until the turn ends in which the agent is told. For this session: {rule}")
        if rule
        else ""
    )
    return f"{reason}{_verdict(name, choices, filled, action, alone)}{said}"


def _questions(approval: Approval, filled: Filled, action: str, alone: bool) -> str:
    name = approval.id
    asked = asked_questions(approval.input)
    fields = "".join(_question(name, number, q, filled) for number, q in enumerate(asked))
    reason = _reason(name, "If you decline: why?", filled)
    return f"{fields}{reason}{_verdict(name, {'answer': 'Answer', 'deny': 'Decline'}, filled, action, alone)}"


def _question(name: str, number: int, asked: Mapping[str, Any], filled: Filled) -> str:
    group, several = f"{name}.q{number}", bool(asked.get("multiSelect"))
    choices: list[str] = []
    for position, option in enumerate(question_options(asked)):
        kind = "checkbox" if several else "radio"
        field_name, value = (f"{group}.o{position}", "on") if several else (group, str(position))
        more = option_description(option)
        label = f"{text(option_label(option))}{f' <span class=hitl-dim>{text(more)}</span>' if more else ''}"
        choices.append(_choice(kind, field_name, value, label, filled))
    own = _area(f"{group}.own", filled.value(f"{group}.own"), rows=1)
    also = "Also, in your own words" if several else "Or in your own words"
    return (
        f"<p><b>{text(str(asked.get('question', '')))}</b></p>{''.join(choices)}"
        f"<label>{also}{own}</label>{filled.error(group)}"
    )


def _plan(approval: Approval, filled: Filled, action: str, alone: bool) -> str:
    name = approval.id
    comments = _reason(name, "If you send it back: comments", filled)
    return f"{comments}{_verdict(name, {'allow': 'Accept the plan', 'deny': 'Send it back'}, filled, action, alone)}"


def _verdict(name: str, choices: Mapping[str, str], filled: Filled, action: str, alone: bool) -> str:
    if not alone:
        return _radios(f"{name}.do", {**choices, "later": "Not now"}, filled)
    return _bar(
        *(
            _button(f"{name}.do", value, label, action, kind="hitl-deny" if value == "deny" else "")
            for value, label in choices.items()
        )
    )


def _remembered(approval: Approval) -> str:
    """The rule that would be remembered; "" where no rule can stand for such calls."""
    if approval.folder not in (None, "."):
        return ""
    try:
        return rule_text(remember_rule(approval.tool_name, approval.input, Path(approval.cwd)).model_dump())
    except InvalidInput:
        return ""


def editable(given: Mapping[str, Any]) -> str:
    """A call's input as JSON to edit. Hidden characters are JSON escapes, and a browser changes none of it."""
    shown = json.dumps(given, ensure_ascii=False, indent=2)
    return "".join(_json_escape(char) if is_hidden(char) else char for char in shown)


def _json_escape(char: str) -> str:
    return f"\\u{ord(char):04x}" if ord(char) < 0x10000 else json.dumps(char)[1:-1]


# -- parts of forms


def _labelled(name: str, label: str, control: str, filled: Filled) -> list[str]:
    return [f"<label>{text(label)}{control}</label>", filled.error(name)]


def _area(name: str, value: str, *, rows: int, required: bool = False) -> str:
    """The line break after the tag is HTML's own: a first one in the text would be lost without it."""
    must = " required" if required else ""
    return (
        f'<textarea name="{escape(name)}" rows="{rows}" spellcheck="false"{must}>\n{escape(value)}</textarea>'
    )


def _reason(name: str, label: str, filled: Filled) -> str:
    control = _area(f"{name}.reason", filled.value(f"{name}.reason"), rows=1)
    return "".join(_labelled(f"{name}.reason", label, control, filled))


def _select(name: str, choices: Mapping[str, str], filled: Filled) -> str:
    chosen = filled.value(name)
    options = "".join(
        f'<option value="{escape(value)}"{" selected" if value == chosen else ""}>{text(label)}</option>'
        for value, label in choices.items()
    )
    return f'<select name="{escape(name)}">{options}</select>'


def _radios(name: str, choices: Mapping[str, str], filled: Filled) -> str:
    return "".join(_choice("radio", name, value, text(label), filled) for value, label in choices.items())


def _choice(kind: str, name: str, value: str, label: str, filled: Filled) -> str:
    """`label` is HTML."""
    checked = " checked" if filled.value(name) == value else ""
    control = f'<input type="{kind}" name="{escape(name)}" value="{escape(value)}"{checked}>'
    return f'<label class="hitl-choice">{control}<div>{label}</div></label>'


def _button(name: str, value: str, label: str, action: str, kind: str = "") -> str:
    """`action` is where the form goes: a lock's own address is gone once its flow has ended."""
    to = f' formaction="{escape(action)}"' if action else ""
    return f'<button type="submit" class="{kind}" name="{escape(name)}" value="{escape(value)}"{to}>{text(label)}</button>'


def _row(name: str, value: str, title: str, below: str) -> str:
    """`title` is HTML, `below` is text."""
    return f'<button type="submit" class="hitl-row" name="{name}" value="{escape(value)}">{title}{line(below)}</button>'


def _bar(*buttons: str) -> str:
    return f'<div class="hitl-bar">{"".join(buttons)}</div>'


def _hidden(values: Mapping[str, str]) -> str:
    return "".join(
        f'<input type="hidden" name="{escape(name)}" value="{escape(value)}">'
        for name, value in values.items()
    )
