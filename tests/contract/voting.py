"""People of a workspace, its policy, and a session of it whose calls wait for several of them."""

import uuid
from collections.abc import Mapping
from typing import Any

from claude_hitl_template.domain.canonical_json import digest
from claude_hitl_template.domain.models import Agent, Approval, Environment, Event, Session, new_id, utcnow
from claude_hitl_template.domain.people import SERVICE, Actor, Principal, Role, Workspace
from claude_hitl_template.domain.policy.tiers import WorkspacePolicy
from claude_hitl_template.store.core import CoreStore
from claude_hitl_template.store.protocol import Call
from tests.contract.asking import message, said

PUSH: dict[str, Any] = {"command": "git push"}


def rules(*found: dict[str, Any], **more: Any) -> WorkspacePolicy:
    return WorkspacePolicy.model_validate({"rules": found, **more})


def ask_rule(pattern: str = "Bash(git push:*)", **more: Any) -> dict[str, Any]:
    return {"pattern": pattern, "action": "ask", **more}


def release(quorum: int = 2, **more: Any) -> dict[str, Any]:
    """A rule that asks members of the group `release` about `git push`."""
    return ask_rule(approvers={"groups": ["release"]}, quorum=quorum, **more)


class Team:
    """A workspace whose people are called by their first names."""

    def __init__(self, store: CoreStore, workspace_id: str) -> None:
        self.store, self.workspace_id = store, workspace_id
        self.people: dict[str, Actor] = {}

    @classmethod
    async def make(
        cls, store: CoreStore, *rule: dict[str, Any], duties: bool = False, name: str = "team"
    ) -> "Team":
        made = Workspace(id=new_id("wrkspc"), name=name, created_at=utcnow())
        await store.add_workspace(made, by=SERVICE)
        team = cls(store, made.id)
        if duties:
            await store.change_workspace(made.id, {"separation_of_duties": True}, by=SERVICE)
        if rule:
            await team.rule(*rule)
        return team

    async def rule(self, *rule: dict[str, Any]) -> None:
        await self.store.set_policy(self.workspace_id, rules(*rule), by=SERVICE)

    async def person(self, name: str, *groups: str, roles: tuple[Role, ...] = (Role.APPROVER,)) -> Actor:
        person = Principal(
            id=f"user_{name}",
            kind="user",
            name=name,
            created_at=utcnow(),
            roles={self.workspace_id: roles},
            groups=groups,
        )
        await self.store.add_principal(person, by=SERVICE)
        self.people[name] = Actor(name=name, principal_id=person.id)
        return self.people[name]

    async def change(self, name: str, *, store: CoreStore | None = None, **changes: Any) -> None:
        await (store or self.store).change_principal(f"user_{name}", changes, by=SERVICE)

    async def session(self, *, by: Actor = SERVICE, agent: Agent | None = None) -> Session:
        """A session whose owner has epoch 1."""
        session = await self.store.create_session(
            self.workspace_id,
            agent=agent or Agent(),
            environment=Environment(),
            title=None,
            metadata={},
            initial=[message()],
            by=by,
        )
        return await self.store.acquire(session.id, "owner", lease_s=15)

    async def ask(
        self, session: Session, *call_ids: str, given: dict[str, Any] = PUSH, **more: Any
    ) -> list[Approval]:
        body: dict[str, Any] = {
            "verdict": "ask",
            "tool_name": "Bash",
            "input": given,
            "digest": digest(given),
        }
        calls = [Call.model_validate({**body, **more, "call_id": call_id}) for call_id in call_ids]
        return await self.store.open_calls(session.id, 1, [], calls, cwd="/w", expires_at=None)

    async def waiting(self, *, by: Actor = SERVICE, **more: Any) -> Approval:
        """The approval of `git push` in a new session."""
        [approval] = await self.ask(await self.session(by=by), "t1", **more)
        return approval

    async def say(
        self,
        name: str,
        approval: Approval,
        result: str = "allow",
        *,
        store: CoreStore | None = None,
        **more: Any,
    ) -> Approval:
        confirmation = said(approval.event_id, result, **more)
        by = self.people[name]
        return await (store or self.store).decide(approval.id, self.workspace_id, confirmation, by=by)

    async def run(
        self, approval: Approval, given: Mapping[str, Any] = PUSH, *, store: CoreStore | None = None
    ) -> Approval:
        return await (store or self.store).claim(
            approval.session_id, 1, approval.call_id, digest(dict(given)), claim_id=str(uuid.uuid4())
        )

    async def log(self, approval: Approval, *types: str) -> list[Event]:
        page = await self.store.list_events(approval.session_id, self.workspace_id, limit=1000, types=types)
        return page.data

    async def now(self, approval: Approval) -> Approval:
        return await self.store.get_approval(approval.id, self.workspace_id)
