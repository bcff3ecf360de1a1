"""A workspace's rules over REST: two people allow a call, two admins change the rules, and what is wrong is named."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from claude_hitl_template.config.secret_files import hash_api_key
from claude_hitl_template.domain.canonical_json import digest
from claude_hitl_template.domain.models import Agent, Environment, utcnow
from claude_hitl_template.domain.people import Principal, Role
from claude_hitl_template.store.protocol import Call
from claude_hitl_template.testing.threaded import Threaded, serve_in_thread

PUSH = {"command": "git push"}
RULE = {
    "pattern": "Bash(git push:*)",
    "action": "ask",
    "severity": "high",
    "reason": "It leaves the building.",
    "approvers": {"groups": ["release"]},
    "quorum": 2,
}


class Rest:
    """The service with a first key, and keys of ann, ben (of the group release) and zoe, who approve."""

    def __init__(self, served: Threaded, http: httpx.Client, workspace_id: str) -> None:
        self.served, self.http, self.workspace_id = served, http, workspace_id
        self.calls = 0

    @property
    def policy(self) -> str:
        return f"/v1/admin/workspaces/{self.workspace_id}/policy"

    def ask(self, method: str, path: str, body: Any = None, *, who: str = "first") -> httpx.Response:
        return self.http.request(method, path, json=body, headers={"x-api-key": f"{who}-secret"})

    def waiting(self) -> str:
        """The id of an approval of `git push`."""
        return self.served.run(self._waiting())

    async def _waiting(self) -> str:
        store, self.calls = self.served.service.store, self.calls + 1
        session = await store.create_session(
            self.workspace_id, agent=Agent(), environment=Environment(), title=None, metadata={}, initial=[]
        )
        await store.acquire(session.id, "owner", lease_s=600)
        call = Call(
            call_id=f"t{self.calls}", tool_name="Bash", input=PUSH, digest=digest(PUSH), verdict="ask"
        )
        [approval] = await store.open_calls(session.id, 1, [], [call], cwd="/w", expires_at=None)
        return approval.id


@pytest.fixture(scope="module")
def rest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rest]:
    folder = tmp_path_factory.mktemp("rules")
    with serve_in_thread(folder, keys={"first": "first-secret"}, backing="memory", driving=False) as served:
        workspace_id = served.run(_people(served))
        with httpx.Client(base_url=served.service.url, timeout=30) as http:
            yield Rest(served, http, workspace_id)


async def _people(served: Threaded) -> str:
    store = served.service.store
    first = await store.find_identity(hash_api_key("first-secret"))
    assert first is not None
    home = first.workspaces[0].id
    for name, groups in {"ann": ("release",), "ben": ("release",), "zoe": ()}.items():
        person = Principal(
            id=f"user_{name}",
            kind="user",
            name=name,
            created_at=utcnow(),
            roles={home: (Role.APPROVER,)},
            groups=groups,
        )
        await store.add_key(name, hash_api_key(f"{name}-secret"), principal=person)
    return home


@pytest.fixture(autouse=True)
def rules(rest: Rest) -> None:
    """The workspace has RULE."""
    version = rest.ask("GET", rest.policy).json()["version"]
    rest.ask("PUT", rest.policy, {"rules": [RULE], "version": version}).raise_for_status()


def test_two_people_allow_a_call_and_the_first_vote_is_shown(rest: Rest):
    path = f"/v1/approvals/{rest.waiting()}"
    shown = rest.ask("GET", path).json()
    assert (shown["severity"], shown["quorum"], shown["reason"]) == ("high", 2, RULE["reason"])
    refused = rest.ask("POST", f"{path}/decide", {"result": "allow"}, who="zoe")
    assert refused.status_code == 403
    assert refused.json()["error"]["type"] == "permission_error"
    voted = rest.ask("POST", f"{path}/decide", {"result": "allow"}, who="ann").json()
    assert (voted["state"], [vote["name"] for vote in voted["votes"]]) == ("pending", ["ann"])
    allowed = rest.ask("POST", f"{path}/decide", {"result": "allow"}, who="ben").json()
    assert (allowed["state"], allowed["decision"]["decided_by"]) == ("allowed", "ben")
    session = allowed["session_id"]
    events = rest.ask("GET", f"/v1/sessions/{session}/events?types[]=approval.vote").json()["data"]
    assert [event["allowed_by"] for event in events] == [["ann"]]


def test_a_call_is_claimed_and_handed_over(rest: Rest):
    path = f"/v1/approvals/{rest.waiting()}"
    assert rest.ask("POST", f"{path}/claim", {}, who="ann").json()["reviewer"]["name"] == "ann"
    assert rest.ask("POST", f"{path}/claim", {}, who="ben").status_code == 409
    assert rest.ask("POST", f"{path}/claim", {}, who="zoe").status_code == 403
    handed = rest.ask("POST", f"{path}/delegate", {"principal_id": "user_ben"}, who="ann").json()
    assert (handed["assignee"]["name"], handed["reviewer"]) == ("ben", None)
    wrong = rest.ask("POST", f"{path}/delegate", {"group": "legal"}, who="ann")
    assert wrong.json()["error"]["message"].startswith("group: ")
    assert rest.ask("POST", "/v1/approvals/none/claim", {}, who="ann").status_code == 404


def test_of_two_admins_who_change_the_rules_the_second_is_told_the_version(rest: Rest):
    version = rest.ask("GET", rest.policy).json()["version"]
    changed = rest.ask("PUT", rest.policy, {"rules": [], "version": version})
    assert changed.json()["version"] == version + 1
    late = rest.ask("PUT", rest.policy, {"rules": [RULE], "default": "ask", "version": version})
    assert late.status_code == 412
    assert f"the current version is {version + 1}" in late.json()["error"]["message"]
    assert rest.ask("GET", rest.policy).json()["rules"] == []


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"rules": [{**RULE, "quorum": 0}]}, "rules.0.quorum"),
        ({"rules": [{**RULE, "quorum": "2"}]}, "rules.0.quorum"),
        ({"rules": [{**RULE, "approvers": {}}]}, "rules.0.approvers"),
        ({"rules": [{**RULE, "approvers": {"roles": ["boss"]}}]}, "rules.0.approvers.roles.0"),
        ({"rules": [{**RULE, "on_deadline": "allow"}]}, "rules.0.on_deadline"),
        ({"rules": [{**RULE, "pattern": "Bash(a && b)", "action": "allow"}]}, "rules.0"),
        ({"rules": [RULE, {"pattern": "bash", "action": "deny"}]}, "rules.1"),
        ({"rules": [{**RULE, "qorum": 2}]}, "rules.0.qorum"),
        ({"rules": [], "default": "loosen"}, "default"),
        ({"rules": [], "version": -1}, "version"),
        ({"default": "ask"}, "rules"),
    ],
)
def test_what_is_wrong_with_rules_is_named(rest: Rest, body: dict[str, Any], field: str):
    answer = rest.ask("PUT", rest.policy, {"version": 0, **body})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith(f"{field}: ")


def test_rules_of_another_workspace_are_not_found(rest: Rest):
    assert rest.ask("GET", "/v1/admin/workspaces/none/policy").status_code == 404
    assert rest.ask("GET", rest.policy, who="ann").status_code == 403
