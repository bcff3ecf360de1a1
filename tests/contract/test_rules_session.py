"""A workspace's rules hold for sessions on the real CLI, which waits hot or is parked: a call that the agent's policy allows
waits for two people, and one that the workspace denies reaches no one."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from claude_hitl_template.config.secret_files import hash_api_key
from claude_hitl_template.domain.models import utcnow
from claude_hitl_template.domain.people import SERVICE, Principal, Role
from claude_hitl_template.domain.policy.tiers import WorkspacePolicy
from claude_hitl_template.testing.threaded import Threaded
from tests.contract.test_anthropic_sdk import Client

WRITE = "Write hello.txt with a greeting"
TWO = {"pattern": "Write(*.txt)", "action": "ask", "quorum": 2, "approvers": {"groups": ["release"]}}
DENY = {"pattern": "Write(*.txt)", "action": "deny"}


class Workspace:
    """The workspace of alice's key in a running service, and two more approvers, ann and ben, of the group release."""

    def __init__(self, served: Threaded) -> None:
        self.served, self.client = served, Client(served)
        self.id = served.run(self._people())

    async def _people(self) -> str:
        store = self.served.service.store
        alice = await store.find_identity(hash_api_key(self.served.service.keys["alice"]))
        assert alice is not None
        home = alice.workspaces[0].id
        for name in ("ann", "ben"):
            if await store.find_principal(name=name) is not None:
                continue  # of an earlier test
            person = Principal(
                id=f"user_{name}",
                kind="user",
                name=name,
                created_at=utcnow(),
                roles={home: (Role.APPROVER,)},
                groups=("release",),
            )
            await store.add_key(name, hash_api_key(f"{name}-secret"), principal=person)
        return home

    def rules(self, *rule: dict[str, Any]) -> None:
        policy = WorkspacePolicy.model_validate({"rules": rule})
        self.served.run(self.served.service.store.set_policy(self.id, policy, by=SERVICE))

    def begun(self) -> str:
        """A session whose agent may write hello.txt without asking."""
        agent = {
            "type": "agent_with_overrides",
            "id": "default",
            "permission_rules": [{"rule": "Write(./hello.txt)", "policy": "always_allow"}],
        }
        return self.client.create(WRITE, agent=agent)

    def allow(self, name: str, session_id: str, event_id: str) -> dict[str, Any]:
        body = {"events": [{"type": "user.tool_confirmation", "tool_use_id": event_id, "result": "allow"}]}
        answer = httpx.post(
            f"{self.served.service.url}/v1/sessions/{session_id}/events",
            json=body,
            headers={"x-api-key": f"{name}-secret"},
            timeout=30,
        )
        return answer.raise_for_status().json()["data"][0]


@pytest.fixture(params=["hot", "parking"])
def workspace(request: pytest.FixtureRequest) -> Iterator[Workspace]:
    served: Threaded = request.getfixturevalue(request.param)
    made = Workspace(served)
    yield made
    made.rules()
    made.client.close()


def test_what_the_agent_may_do_waits_for_two_people_of_the_workspaces_rule(workspace: Workspace):
    client = workspace.client
    workspace.rules(TWO)
    session_id = workspace.begun()
    [event_id] = client.asked(session_id)
    assert workspace.allow("ann", session_id, event_id)["type"] == "approval.vote"
    assert client.asked(session_id) == [event_id]
    assert not client.wrote(session_id, "hello.txt")
    assert workspace.allow("ben", session_id, event_id)["decided_by"] == "ben"
    client.finished(session_id)
    assert client.wrote(session_id, "hello.txt")


def test_what_the_workspace_denies_reaches_no_human_and_does_not_run(workspace: Workspace):
    client = workspace.client
    workspace.rules(DENY)
    session_id = workspace.begun()
    client.finished(session_id)
    assert not client.wrote(session_id, "hello.txt")
    approvals = client.http.get("/v1/approvals", params={"session_id": session_id, "states[]": "pending"})
    assert approvals.json()["data"] == []
    [use] = [event for event in client.raw_log(session_id) if event["type"] == "agent.tool_use"]
    assert use["evaluated_permission"] == "deny"
