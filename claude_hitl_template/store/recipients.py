"""Which channels get a notice: those of the workspace, and those of people whom it concerns."""

from collections.abc import Mapping
from dataclasses import dataclass

from claude_hitl_template.domain.models import Approval, Session
from claude_hitl_template.domain.notices import ASKING, Channel, Notice
from claude_hitl_template.domain.people import Action, Principal
from claude_hitl_template.domain.policy.tiers import Requirement


@dataclass(frozen=True)
class Concerned:
    """What decides whom a notice concerns: its session, its approval, the people who have channels, and whether the
    workspace separates duties."""

    session: Session | None
    approval: Approval | None
    people: Mapping[str, Principal]
    separated: bool

    def gets(self, notice: Notice, channel: Channel) -> bool:
        if not channel.wants(notice):
            return False
        if channel.principal_id is None:
            return True
        person = self.people.get(channel.principal_id)
        if person is None or not person.may(Action.READ, notice.workspace_id):
            return False
        if notice.kind in ASKING:
            return self._is_asked(notice, person)
        return person.id in self._requesters or (
            self.approval is not None and self._may_decide(person, self.approval)
        )

    def _is_asked(self, notice: Notice, person: Principal) -> bool:
        approval = self.approval
        if approval is None or not self._may_decide(person, approval):
            return False
        if person.id in {vote.principal_id for vote in approval.votes}:
            return False
        assignee = approval.assignee
        if notice.kind != "approval.delegated" or assignee is None:
            return True
        return person.id == assignee.principal_id or assignee.group in person.groups

    def _may_decide(self, person: Principal, approval: Approval) -> bool:
        """As `votes.Poll` has it: not the barred requester, and among the approvers of some rule that asked."""
        if self.separated and person.id in self._requesters:
            return False
        asked = approval.requirements or (Requirement(),)
        return any(one.admits(person, approval.workspace_id, self._requesters) for one in asked)

    @property
    def _requesters(self) -> frozenset[str]:
        if self.session is None:
            return frozenset()
        return frozenset(filter(None, (self.session.created_by, self.session.last_sender)))
