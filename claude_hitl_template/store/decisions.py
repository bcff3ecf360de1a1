"""A confirmation becomes a decision: compare-and-set, the first writer wins."""

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from claude_hitl_template.domain import events, policy
from claude_hitl_template.domain.events import UserToolConfirmation
from claude_hitl_template.domain.models import Approval, ApprovalState, Decision, Event, Session
from claude_hitl_template.domain.people import Action, Actor, Principal
from claude_hitl_template.domain.policy import Rule, Verdict
from claude_hitl_template.domain.policy.offers import check_granted, granted
from claude_hitl_template.domain.tool_inputs import check_edit
from claude_hitl_template.errors import AlreadyDecided, Forbidden, InvalidInput, NotWaiting, Superseded
from claude_hitl_template.store.outbox import tell_approval
from claude_hitl_template.store.recording import record_approval
from claude_hitl_template.store.session_aggregate import SessionAggregate
from claude_hitl_template.store.votes import Poll, agree, asked_now, hand_on


async def confirm(unit: SessionAggregate, confirmation: UserToolConfirmation, by: Actor) -> list[Event]:
    """Commits what `confirmation` decides; the same decision again is a success without effect. Of a call that needs
    several people an allow before the last is a vote, whose event is returned; a deny decides at once.

    Raises NotWaiting, Forbidden, AlreadyDecided, Superseded, Conflict, InvalidInput.
    """
    people = await _check_permitted(unit, by)
    approval = await unit.tx.approval_of_call(unit.session.id, confirmation.tool_use_id)
    if approval is None:
        raise NotWaiting(
            f"{confirmation.tool_use_id!r} is not a call of this session that waits, or waited, for a decision"
        )
    run_input = _run_input(approval, confirmation)
    if run_input is not None and approval.kind != "question" and run_input != approval.input:
        if approval.kind == "network":
            raise InvalidInput(
                "a host is allowed or denied as it was asked for; deny this one", "updated_input"
            )
        check_edit(approval.tool_name, approval.input, run_input)
        _check_policy(unit.session, approval, run_input)
    decision = Decision(
        result=confirmation.result,
        deny_message=confirmation.deny_message,
        updated_input=run_input if run_input != approval.input else None,
        remember=_remember(approval, confirmation, run_input),
        decided_by=by.name,
        decider_id=by.principal_id,
        decided_at=unit.now,
    )
    if approval.state is not ApprovalState.PENDING:
        return [await _repeated(unit, approval, decision)]
    if approval.expires_at is not None and approval.expires_at < unit.now:  # the sweep has not reached it yet
        approval = await _still_waiting(unit, approval)
    if run_input is not None:
        approval = await asked_now(unit, approval, run_input)
    poll = await Poll.open(unit, approval, by.principal_id, known=people)
    poll.check(by)
    if run_input is not None:
        if decision.remember is not None and approval.requirements:
            raise InvalidInput(
                f"the workspace asks for such a call every time ({approval.requirements[0].rule}); decide it once",
                "remember",
            )
        approval, vote = await agree(unit, poll, by, run_input)
        if vote is not None:
            return [vote]
    return await _decide(unit, approval, decision, run_input, by)


async def _still_waiting(unit: SessionAggregate, approval: Approval) -> Approval:
    """The approval as its deadline leaves it. Raises Superseded if that denied the call."""
    handed = approval.escalated(unit.now)
    if handed is None:
        raise Superseded(f"the call {approval.event_id} stopped waiting: it expired before this decision")
    await hand_on(unit, approval, handed)
    return handed


async def _check_permitted(unit: SessionAggregate, by: Actor) -> dict[str, Principal]:
    """Reads the roles in the transaction of the decision: one that was taken away a moment ago permits nothing.

    Returns the actor by id; {} for the service itself.
    """
    if by.principal_id is None:
        return {}
    people = await unit.tx.people([by.principal_id])
    principal = people.get(by.principal_id)
    if principal is None or not principal.may(Action.DECIDE, unit.session.workspace_id):
        raise Forbidden(f"{by.name} may not decide here; that takes the role approver in this workspace")
    return people


def _check_policy(session: Session, approval: Approval, edited: dict[str, Any]) -> None:
    """A human may widen what is asked for, not what is denied. Links are followed as this machine has them: the owner
    judges again before the call runs. Raises InvalidInput."""
    cwd = Path(approval.cwd)
    workspace = approval.workspace or cwd
    found = policy.evaluate(session.effective_policy(), approval.tool_name, edited, workspace, cwd)
    if found.verdict is Verdict.deny:
        raise InvalidInput(f"this session's policy denies such a call ({found.source})", "updated_input")


async def _decide(
    unit: SessionAggregate,
    approval: Approval,
    decision: Decision,
    run_input: dict[str, Any] | None,
    by: Actor,
) -> list[Event]:
    if run_input is not None:
        decided = approval.to(
            ApprovalState.ALLOWED,
            decision=decision,
            run_input=run_input,
            run_digest=approval.digest_of(run_input),
        )
    else:
        decided = approval.to(ApprovalState.DENIED, decision=decision, closed_at=unit.now)
    await unit.tx.put_approval(decided)
    record_approval(unit.tx, "approval.decided", decided, by, unit.now)
    tell_approval(unit.tx, "approval.decided", decided, unit.now)
    if decision.remember is not None and decision.remember not in unit.session.rules:
        unit.set(rules=(*unit.session.rules, decision.remember))
    sent = await unit.append([_confirmation(approval, decision)])
    if approval.held and run_input is None:
        await unit.tell_later(decided)
    elif approval.kind == "network":
        await unit.open_host(decided)
    await unit.after_decisions()
    unit.wake()
    return sent


def _confirmation(approval: Approval, decision: Decision) -> events.Draft:
    body: dict[str, Any] = {"decided_by": decision.decided_by}
    if decision.updated_input is not None:
        body["updated_input"] = decision.updated_input
    if approval.votes and decision.result == "allow":
        body["allowed_by"] = [vote.name for vote in approval.votes]
    if decision.remember is not None:
        body["remember"] = decision.remember.model_dump(mode="json")
    return events.draft(
        "user.tool_confirmation",
        _confirmation_id(approval),
        tool_use_id=approval.event_id,
        result=decision.result,
        deny_message=decision.deny_message,
        **body,
    )


def _confirmation_id(approval: Approval) -> str:
    return f"sevt_decision_{approval.id}"


async def _repeated(unit: SessionAggregate, approval: Approval, decision: Decision) -> Event:
    if approval.state in (ApprovalState.SUPERSEDED, ApprovalState.EXPIRED) and approval.decision is None:
        raise Superseded(
            f"the call {approval.event_id} stopped waiting: it was {approval.state.value} before this decision"
        )
    if approval.decision is None or not _same(approval.decision, decision):
        first = approval.decision
        by = f" by {first.decided_by} at {first.decided_at.isoformat()}" if first else ""
        raise AlreadyDecided(
            f"the call {approval.event_id} was already decided ({first.result if first else approval.state.value}){by}"
        )
    event = await unit.tx.event(unit.session.id, _confirmation_id(approval))
    if event is None:  # decided by a standing rule, which sends no confirmation
        raise AlreadyDecided(f"the call {approval.event_id} was already allowed by a remembered rule")
    return event


def _same(first: Decision, second: Decision) -> bool:
    def essence(decision: Decision) -> tuple[Any, ...]:
        return decision.result, decision.deny_message, decision.updated_input, decision.remember

    return essence(first) == essence(second)


def _run_input(approval: Approval, confirmation: UserToolConfirmation) -> dict[str, Any] | None:
    """The input that may run, None when the answer is no. Raises InvalidInput where the parts contradict."""
    if confirmation.result == "deny":
        for name in ("updated_input", "answers"):
            if getattr(confirmation, name) is not None:
                raise InvalidInput("goes with result allow only", name)
        if confirmation.remember:
            raise InvalidInput("goes with result allow only", "remember")
        return None
    if confirmation.deny_message is not None:
        raise InvalidInput("goes with result deny only", "deny_message")
    given = dict(approval.input) if confirmation.updated_input is None else confirmation.updated_input
    if approval.kind == "question":
        return _answered(approval, given, confirmation.answers)
    if confirmation.answers is not None:
        raise InvalidInput("this call is not a question; only AskUserQuestion takes answers", "answers")
    return given


def _answered(
    approval: Approval, given: dict[str, Any], answers: dict[str, str | list[str]] | None
) -> dict[str, Any]:
    """The question's input with an answer to each of its questions; several choices are joined with ", "."""
    asked = [str(q.get("question", "")) for q in approval.input.get("questions", []) if isinstance(q, dict)]
    raw: Any = answers if answers is not None else given.get("answers") or {}
    if not isinstance(raw, dict):
        raise InvalidInput("an object from question text to answer", "answers")
    missing = [q for q in asked if not raw.get(q)]
    if missing:
        raise InvalidInput(
            f"this call is a question; give an answer to {missing[0]!r} (its text is the key)", "answers"
        )
    unknown = [q for q in raw if q not in asked]
    if unknown:
        raise InvalidInput(f"{unknown[0]!r} was not asked", "answers")
    odd = [q for q, a in raw.items() if not isinstance(a, str) and not _is_texts(a)]
    if odd:
        raise InvalidInput(f"the answer to {odd[0]!r} is a text, or a list of texts", "answers")
    edited = [name for name in given if name != "answers" and given[name] != approval.input.get(name)]
    if edited:
        raise InvalidInput("a question is answered, and cannot be edited", f"updated_input.{edited[0]}")
    joined = {q: a if isinstance(a, str) else ", ".join(a) for q, a in raw.items()}
    return {**approval.input, "answers": joined}


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _remember(
    approval: Approval, confirmation: UserToolConfirmation, run_input: dict[str, Any] | None
) -> Rule | None:
    if not confirmation.remember or run_input is None:
        return None
    if approval.kind not in ("tool", "network"):
        raise InvalidInput("a question or a plan is asked every time; it cannot be remembered", "remember")
    workspace = Path(approval.cwd)
    if approval.folder not in (None, "."):
        raise InvalidInput(
            f"the call runs in {approval.cwd}, and rules are remembered for the session's own folder; decide it once",
            "remember",
        )
    segments = approval.segments if run_input == approval.input else ()
    if confirmation.remember is True:
        return granted(approval.tool_name, run_input, workspace, segments)
    try:
        rule = Rule(rule=confirmation.remember, policy="always_allow")
    except ValidationError as error:
        raise InvalidInput(str(error.errors()[0]["msg"]), "remember") from error
    check_granted(rule, approval.tool_name, run_input, workspace, segments)
    return rule
