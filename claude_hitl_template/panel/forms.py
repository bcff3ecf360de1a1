"""The panel's forms, as lists of Kodosumi's elements. Pure.

Every form is one `html` element with inputs of our own, written by a template. Kodosumi's own input elements cannot hold
text from others: they write values, labels and options into the page as they are, and after an error put back what was
typed in the same way (`Model.set_data`). Its file input builds HTML from file names in the browser.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from claude_hitl_template.domain.models import Agent, Approval, ApprovalState, Environment, Session
from claude_hitl_template.domain.policy.offers import granted
from claude_hitl_template.errors import InvalidInput
from claude_hitl_template.panel.markup import render
from claude_hitl_template.presentation.approvals import approval_parts
from claude_hitl_template.presentation.sessions import POLICIES, card_url, editable, fate, state_of
from claude_hitl_template.presentation.text import (
    age,
    leads_to,
    rule_text,
    size,
    summary,
)
from claude_hitl_template.presentation.tools import tool_view
from claude_hitl_template.presentation.views import Question, ToolView

type Elements = list[dict[str, str]]
_MAX_ROWS = 20  # of the text area in which an input is edited


@dataclass(frozen=True)
class Filled:
    """The values typed before, and the errors in them: messages by field name; "" is the form itself."""

    typed: Mapping[str, Any] = field(default_factory=dict[str, Any])
    errors: Mapping[str, str] = field(default_factory=dict[str, str])

    def value(self, name: str, default: str = "") -> str:
        given = self.typed.get(name)
        return default if given is None else str(given)

    def error(self, name: str) -> str:
        return self.errors.get(name, "")


@dataclass(frozen=True)
class CallGroup:
    """Calls of one session that are decided together. `requester` is the name of the session's owner; `pages_url`: where
    browsers reach the inbox."""

    session: Session
    requester: str
    approvals: tuple[Approval, ...]
    pages_url: str


@dataclass(frozen=True)
class Waiting:
    """How many calls wait for a user: `count`, or more if `has_more`. `path`: of the entry where they are decided."""

    count: int
    path: str
    has_more: bool = False

    @property
    def text(self) -> str:
        """As a heading and a link say it."""
        return f"Approvals ({self.count}{'+' if self.has_more else ''})" if self.count else "Approvals"


@dataclass(frozen=True)
class _Call:
    """One call in a decision form. `fate` is "" while it waits; `rule` is what "allow and remember" would record.

    `questions` are those to answer, each with the beginning of the names of its inputs.
    """

    approval: Approval
    inbox: str
    view: ToolView
    facts: Sequence[tuple[str, str]]
    fate: str
    rule: str
    questions: Sequence[tuple[str, Question]]
    edited: str
    rows: int


def _page(
    template: str,
    filled: Filled | None = None,
    *,
    back: str = "",
    action: str = "",
    waiting: Waiting | None = None,
    **context: Any,
) -> Elements:
    """One form.

    Args:
        template: Extends `form.html.j2`.
        filled: What was typed before.
        back: The flow that the form belongs to.
        action: Where the form is sent; "" for its own address. A lock's own address is gone once its flow has ended.
        waiting: Is shown as a link, if any call waits.
        context: The variables of the template.
    """
    given = {"filled": filled or Filled(), "back": back, "action": action, "waiting": waiting}
    html = render(template, **given, **context)
    return [{"type": "html", "text": str(html)}]


def message(said: str) -> Elements:
    """A page with one message."""
    return _page("message.html.j2", said=said)


# -- start and continue


def start_form(
    agent: Agent,
    environments: Mapping[str, Environment],
    max_bytes: int,
    nonce: str,
    filled: Filled = Filled(),
    *,
    sandbox: str = "on",
    ray_is_open: bool = False,
    waiting: Waiting | None = None,
) -> Elements:
    """The form that starts a conversation.

    Args:
        agent: The agent of new conversations.
        environments: By id; the first is the default.
        max_bytes: Of all uploaded files together.
        nonce: Identifies this form: sent twice, it acts once.
        filled: What was typed before.
        sandbox: "on", "off" or "none".
        ray_is_open: Whether Ray requires no token.
        waiting: The calls that wait for this user.
    """
    return _page(
        "start.html.j2",
        filled,
        waiting=waiting,
        agent=agent,
        environments={id_: environment.name for id_, environment in environments.items()},
        policies=POLICIES,
        max_bytes=max_bytes,
        limit=size(max_bytes),
        hidden={"nonce": nonce},
        has_sandbox=sandbox == "on",
        ray_is_open=ray_is_open,
    )


def sessions_list(
    sessions: Sequence[Session], now: datetime, filled: Filled = Filled(), *, waiting: Waiting | None = None
) -> Elements:
    """A user's conversations to choose from, the last active one first. `waiting`: the calls that wait for the user."""
    newest_first = sorted(sessions, key=lambda session: session.updated_at, reverse=True)
    rows = [
        (
            session.id,
            session.title or session.id,
            f"{state_of(session)} · active {age(session.updated_at.isoformat(), now)} ago",
        )
        for session in newest_first
    ]
    return _page("sessions.html.j2", filled, waiting=waiting, rows=rows)


def message_form(
    session: Session,
    last_message: str,
    hidden: Mapping[str, str],
    action: str = "",
    filled: Filled = Filled(),
    *,
    max_bytes: int,
    may_watch: bool = False,
) -> Elements:
    """The state of a session, and the next message to it.

    Args:
        session: The session that the message is for.
        last_message: The agent's last message, as Markdown; "" if there is none.
        hidden: Hidden fields. `back` is the flow that the form belongs to.
        action: As in `_page`.
        filled: What was typed before.
        max_bytes: Of all uploaded files together.
        may_watch: Whether the form offers to show the conversation.
    """
    return _page(
        "message_form.html.j2",
        filled,
        back=hidden.get("back", ""),
        action=action,
        title=session.title or "Next message",
        pairs=[("session", session.id), ("state", state_of(session))],
        last_message=last_message,
        hidden={"session": session.id, **hidden},
        max_bytes=max_bytes,
        limit=size(max_bytes),
        may_watch=may_watch,
    )


# -- approvals


def approvals_list(
    waiting: Sequence[CallGroup], now: datetime, said: str = "", *, more: bool = False
) -> Elements:
    """Every call that waits and that this user may decide.

    Args:
        waiting: One group per call, the oldest first.
        now: The time of the page.
        said: A message above the list.
        more: Whether there are calls that the list leaves out.
    """
    rows = [
        (
            approval.id,
            approval.tool_name,
            summary(approval.input),
            f"waits {age(approval.created_at.isoformat(), now)} · {group.session.title or group.session.id} · "
            f"for {group.requester}",
        )
        for group in waiting
        for approval in group.approvals
    ]
    title = Waiting(len(rows), "", has_more=more).text
    return _page("approvals.html.j2", title=title, rows=rows, said=said, more=more)


def decision_form(
    group: CallGroup,
    now: datetime,
    hidden: Mapping[str, str],
    action: str = "",
    filled: Filled = Filled(),
) -> Elements:
    """The form that shows exactly what would run, with the choices for each call, or who decided it already.

    Args:
        group: The calls.
        now: The time of the page.
        hidden: Hidden fields. `back` is the flow that the form belongs to.
        action: As in `_page`.
        filled: What was typed before.
    """
    waiting = [a for a in group.approvals if a.state is ApprovalState.PENDING]
    several = f"{len(waiting)} calls wait for you" if waiting else "Decided"
    calls = ",".join(a.id for a in group.approvals)
    return _page(
        "decision.html.j2",
        filled,
        back=hidden.get("back", ""),
        action=action,
        title="A call waits for you" if len(waiting) == 1 else several,
        items=[_call(group, approval, now, filled) for approval in group.approvals],
        undecided=len(waiting),
        may_allow_all=all(a.kind in ("tool", "network") for a in waiting),
        hidden={"session": group.session.id, "calls": calls, **hidden},
    )


def _call(group: CallGroup, approval: Approval, now: datetime, filled: Filled) -> _Call:
    view = tool_view(approval.tool_name, approval.input)
    before = approval_parts(approval.model_dump(mode="json", by_alias=False))
    view = replace(view, parts=(*before, *view.parts))
    is_pending = approval.state is ApprovalState.PENDING
    questions: list[Question] = []
    if approval.kind == "question" and is_pending:  # shown with their choices instead
        questions = [part for part in view.parts if isinstance(part, Question)]
        view = replace(view, parts=tuple(part for part in view.parts if not isinstance(part, Question)))
    edited = filled.value(f"{approval.id}.input", editable(approval.input))
    return _Call(
        approval=approval,
        inbox=card_url(group.pages_url, approval.id),
        view=view,
        facts=_facts(group, approval, now),
        fate="" if is_pending else fate(approval),
        rule=_rule(approval),
        questions=[(f"{approval.id}.q{number}", asked) for number, asked in enumerate(questions)],
        edited=edited,
        rows=min(edited.count("\n") + 2, _MAX_ROWS),
    )


def _facts(group: CallGroup, approval: Approval, now: datetime) -> list[tuple[str, str]]:
    elsewhere = leads_to(approval.input, approval.targets)
    return [
        ("folder", approval.cwd),
        *([("leads to", elsewhere)] if elsewhere else []),
        ("session", group.session.title or group.session.id),
        ("for", f"{group.requester}, waiting {age(approval.created_at.isoformat(), now)}"),
        *([("until", approval.expires_at.isoformat(timespec="minutes"))] if approval.expires_at else []),
        ("SHA-256", approval.digest),
    ]


def _rule(approval: Approval) -> str:
    """The rule that "allow and remember" would record; "" if no rule can cover such calls."""
    if approval.folder not in (None, ".") or approval.requirements:
        return ""
    try:
        rule = granted(approval.tool_name, approval.input, Path(approval.cwd), approval.segments)
        return rule_text(rule.model_dump())
    except InvalidInput:
        return ""
