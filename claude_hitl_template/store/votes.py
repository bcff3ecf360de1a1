"""Who must allow a call, and who has: people and rules are read in the transaction of each decision."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from claude_hitl_template.domain import events
from claude_hitl_template.domain.events import Draft
from claude_hitl_template.domain.models import (
    MAX_CLAIM_S,
    Approval,
    ApprovalState,
    Assignee,
    Event,
    Reviewer,
    StoredPolicy,
    Vote,
    new_id,
)
from claude_hitl_template.domain.people import SERVICE, Actor, Principal
from claude_hitl_template.domain.policy import Verdict
from claude_hitl_template.domain.policy.tiers import (
    Requirement,
    Tier,
    WorkspacePolicy,
    described,
    joined,
    unmet,
)
from claude_hitl_template.errors import AlreadyDecided, Conflict, Forbidden, InvalidInput, Superseded
from claude_hitl_template.store.backend import Tx
from claude_hitl_template.store.outbox import tell_approval
from claude_hitl_template.store.recording import record_approval
from claude_hitl_template.store.session_aggregate import SessionAggregate


async def stored_policy(tx: Tx, workspace_id: str) -> StoredPolicy:
    return await tx.policy(workspace_id) or StoredPolicy(workspace_id=workspace_id)


def judged(policy: WorkspacePolicy, approval: Approval, given: dict[str, Any]) -> Tier:
    """What a policy says of an approval's call with this input. Links are followed as this machine has them; the owner
    judges again before the call runs."""
    cwd = Path(approval.cwd)
    return policy.evaluate(approval.tool_name, given, approval.workspace or cwd, cwd)


@dataclass(frozen=True)
class Poll:
    """Whose word counts on an approval, as of this transaction.

    Attributes:
        approval: With what the workspace's rules ask for by now.
        people: The caller and everyone who voted, by id.
        barred: The ids of people who may not decide because they asked for the session.
    """

    approval: Approval
    people: dict[str, Principal]
    requesters: frozenset[str]
    barred: frozenset[str]

    @classmethod
    async def open(
        cls,
        unit: SessionAggregate,
        approval: Approval,
        *ids: str | None,
        known: Mapping[str, Principal] | None = None,
    ) -> "Poll":
        """`ids`: of further people whose word may be asked for; `known` were read in this transaction."""
        session = unit.session
        wanted = {one for one in ids if one is not None} | {vote.principal_id for vote in approval.votes}
        requesters = frozenset(one for one in (session.created_by, session.last_sender) if one is not None)
        workspace = await unit.tx.workspace(session.workspace_id) if requesters & wanted else None
        separated = workspace is not None and workspace.separation_of_duties
        people = dict(known or {})
        people |= await unit.tx.people(sorted(wanted.difference(people)))
        return cls(approval, people, requesters, requesters if separated else frozenset())

    @property
    def requirements(self) -> tuple[Requirement, ...]:
        return self.approval.requirements or (Requirement(),)

    def admits(self, principal_id: str | None) -> bool:
        """Whether this person's word counts for some rule that asked. The service itself decides where no rule asked."""
        if principal_id is None:
            return not self.approval.requirements
        person = self.people.get(principal_id)
        return (
            person is not None
            and principal_id not in self.barred
            and any(
                one.admits(person, self.approval.workspace_id, self.requesters) for one in self.requirements
            )
        )

    def check(self, by: Actor) -> None:
        """Raises Forbidden unless the actor may decide on the call now."""
        if self.admits(by.principal_id):
            return
        if by.principal_id in self.barred:
            raise Forbidden(
                f"{by.name} asked for this session, or sent its last message, and this workspace separates duties: "
                "another approver decides"
            )
        needed = "; ".join(dict.fromkeys(map(described, self.requirements)))
        raise Forbidden(f"{by.name} may not decide on this call: it takes {needed}")

    def votes(self) -> list[Vote]:
        """The votes that count now."""
        return [vote for vote in self.approval.votes if self.admits(vote.principal_id)]

    def missing(self, voters: Collection[str]) -> tuple[Requirement, ...]:
        """The requirements that are not satisfied if these people, whose word counts, allow the call."""
        found = [self.people[one] for one in voters]
        return unmet(self.requirements, found, self.approval.workspace_id, self.requesters)


async def agree(
    unit: SessionAggregate, poll: Poll, by: Actor, run_input: dict[str, Any]
) -> tuple[Approval, Event | None]:
    """Counts the vote of `by`, whom the poll admits, for running the call with this input.

    Returns:
        The approval with the vote; and the event of the vote if more are needed, None if it completes the decision.

    Raises:
        Conflict: others who count agreed to another input.
    """
    approval = poll.approval
    if not approval.requirements or by.principal_id is None:
        return approval, None
    run_digest = approval.digest_of(run_input)
    others = [vote for vote in poll.votes() if vote.principal_id != by.principal_id]
    differing = [vote.name for vote in others if vote.run_digest != run_digest]
    if differing:
        raise Conflict(
            f"{' and '.join(differing)} allowed this call with another input; allow it with the same one, or deny it"
        )
    missing = poll.missing({by.principal_id, *(vote.principal_id for vote in others)})
    known = next((vote for vote in approval.votes if vote.principal_id == by.principal_id), None)
    if known is not None and known.run_digest == run_digest:
        return approval, await _event_of(unit, known) if missing else None
    vote = Vote(
        principal_id=by.principal_id,
        name=by.name,
        at=unit.now,
        event_id=new_id("sevt"),
        run_digest=run_digest,
        updated_input=run_input if run_input != approval.input else None,
    )
    kept = [one for one in approval.votes if one.principal_id != by.principal_id]
    approval = approval.but(votes=(*kept, vote))
    if not missing:
        return approval, None
    await unit.tx.put_approval(approval)
    names = [*(one.name for one in others), by.name]
    [event] = await unit.append([_voted(approval, vote, names, missing)])
    record_approval(unit.tx, "approval.voted", approval, by, unit.now, run_digest=run_digest)
    tell_approval(unit.tx, "approval.voted", approval, unit.now)
    return approval, event


async def _event_of(unit: SessionAggregate, vote: Vote) -> Event:
    event = await unit.tx.event(unit.session.id, vote.event_id)
    if event is None:
        raise AssertionError(f"the vote {vote.event_id} was recorded without its event")
    return event


def _voted(approval: Approval, vote: Vote, names: Sequence[str], missing: Sequence[Requirement]) -> Draft:
    changed: dict[str, Any] = {} if vote.updated_input is None else {"updated_input": vote.updated_input}
    body = {
        "approval_id": approval.id,
        "tool_use_id": approval.event_id,
        "by": vote.name,
        "allowed_by": list(names),
        "quorum": approval.quorum,
        "missing": [described(one) for one in missing],
    }
    return Draft(id=vote.event_id, type="approval.vote", payload=body | changed)


# -- deadlines, claims, handing over


async def hand_on(unit: SessionAggregate, before: Approval, after: Approval) -> None:
    """Records an approval whose deadline handed it on to more people."""
    await unit.tx.put_approval(after)
    now = [one for one in after.requirements if one not in before.requirements]
    await unit.append([
        events.draft(
            "approval.escalated",
            approval_id=after.id,
            tool_use_id=after.event_id,
            rule=one.rule,
            to=one.escalate_to.model_dump(mode="json") if one.escalate_to else None,
            expires_at=after.expires_at.isoformat() if after.expires_at else None,
        )
        for one in now
    ])  # fmt: skip
    record_approval(unit.tx, "approval.escalated", after, SERVICE, unit.now)
    tell_approval(unit.tx, "approval.escalated", after, unit.now)


def check_waits(approval: Approval) -> None:
    """Raises AlreadyDecided, Superseded unless the approval waits for a decision."""
    if approval.state is ApprovalState.PENDING:
        return
    if approval.decision is None:
        raise Superseded(f"the call {approval.event_id} no longer waits: it was {approval.state.value}")
    raise AlreadyDecided(
        f"the call {approval.event_id} was already decided ({approval.decision.result}) by {approval.decision.decided_by}"
    )


async def claim(unit: SessionAggregate, approval: Approval, by: Actor, seconds: int) -> Approval:
    """Records that a person is looking at a call, for so many seconds; 0 ends that.

    Raises Forbidden, Conflict (another person is looking at it), AlreadyDecided, Superseded, InvalidInput.
    """
    if not 0 <= seconds <= MAX_CLAIM_S:
        raise InvalidInput(f"from 0 to {MAX_CLAIM_S}", "seconds")
    check_waits(approval)
    (await Poll.open(unit, approval, by.principal_id)).check(by)
    holder = approval.reviewer
    if holder is not None and holder.until > unit.now and holder.principal_id != by.principal_id:
        raise Conflict(f"{holder.name} is looking at this call until {holder.until.isoformat()}")
    until = unit.now + timedelta(seconds=seconds)
    reviewer = Reviewer(principal_id=by.principal_id, name=by.name, until=until) if seconds else None
    if reviewer is None and holder is None:
        return approval
    claimed = approval.but(reviewer=reviewer)
    await unit.tx.put_approval(claimed)
    shown = until.isoformat() if seconds else None
    await unit.append([
        events.draft(
            "approval.claimed", approval_id=approval.id, tool_use_id=approval.event_id, by=by.name, until=shown
        )
    ])  # fmt: skip
    record_approval(unit.tx, "approval.claimed", claimed, by, unit.now, until=shown)
    return claimed


async def delegate(
    unit: SessionAggregate,
    approval: Approval,
    by: Actor,
    *,
    principal_id: str | None,
    group: str | None,
    note: str,
) -> Approval:
    """Records to whom a call is handed over: one of the people who may decide on it, or a group that has some.

    Raises Forbidden, AlreadyDecided, Superseded, InvalidInput.
    """
    if (principal_id is None) == (group is None):
        raise InvalidInput("give `principal_id` or `group`", "to")
    check_waits(approval)
    poll = await Poll.open(unit, approval, by.principal_id, principal_id)
    poll.check(by)
    if principal_id is not None:
        if not poll.admits(principal_id):
            raise InvalidInput("this person may not decide on this call", "principal_id")
        name = poll.people[principal_id].name
    else:
        members = [one.id for one in await unit.tx.principals() if group in one.groups]
        if not any(map((await Poll.open(unit, approval, *members)).admits, members)):
            raise InvalidInput("no one in this group may decide on this call", "group")
        name = str(group)
    assignee = Assignee(principal_id=principal_id, group=group, name=name, note=note, by=by.name, at=unit.now)
    handed = approval.but(assignee=assignee, reviewer=None)
    await unit.tx.put_approval(handed)
    await unit.append([
        events.draft(
            "approval.delegated",
            approval_id=approval.id,
            tool_use_id=approval.event_id,
            by=by.name,
            to={"principal_id": principal_id, "group": group, "name": name},
            note=note,
        )
    ])  # fmt: skip
    record_approval(
        unit.tx, "approval.delegated", handed, by, unit.now, principal_id=principal_id, group=group
    )
    tell_approval(unit.tx, "approval.delegated", handed, unit.now)
    return handed


async def asked_now(unit: SessionAggregate, approval: Approval, given: dict[str, Any]) -> Approval:
    """The approval with what the workspace's policy asks for by now, if its call ran with this input.

    Raises Conflict if the policy denies it.
    """
    stored = await stored_policy(unit.tx, approval.workspace_id)
    if stored.version == approval.policy_version and given == approval.input:
        return approval
    tier = judged(stored.policy, approval, given)
    if tier.verdict is Verdict.deny:
        raise Conflict(f"the workspace does not permit this call now ({tier.found.source}); deny it")
    requirements = joined(approval.requirements, tier.requirements(unit.now))
    return approval.asking(requirements).but(policy_version=stored.version)
