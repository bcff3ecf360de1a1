"""Who may call which route: every route of the API document, for each kind of caller."""

import asyncio
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from claude_hitl_template.config.secret_files import hash_api_key
from claude_hitl_template.domain.models import Agent, Environment, new_id, utcnow
from claude_hitl_template.domain.people import EVERYWHERE, SERVICE, Principal, Role, Scope, Workspace
from claude_hitl_template.errors import Conflict, InvalidInput, Outdated
from claude_hitl_template.store.core import CoreStore
from claude_hitl_template.testing.local_service import OPERATOR_KEY
from claude_hitl_template.testing.threaded import Threaded, serve_in_thread
from tests.contract.routes import OPERATIONS

# For each route the kinds of callers that get behind the check. All others are refused: 401 without a known key,
# else 403.
READERS = frozenset({"viewer", "requester", "approver", "operator", "all", "first"})
REQUESTERS = frozenset({"requester", "all", "first"})
APPROVERS = frozenset({"approver", "all", "first"})
MANAGERS = frozenset({"operator", "admin", "all", "first", "./hitl"})
ADMINS = frozenset({"admin", "all", "first", "./hitl"})
FIRST = frozenset({"first", "./hitl"})
OPERATOR = frozenset({"./hitl"})
EACH = frozenset({
    "no key", "wrong key", "viewer", "requester", "approver", "operator", "admin", "all", "first", "./hitl",
})  # fmt: skip
ALLOWED: Mapping[str, frozenset[str]] = {
    "GET /v1/health": EACH,
    "GET /v1/version": READERS,
    "GET /v1/openapi.json": READERS,
    "POST /v1/sessions": REQUESTERS,
    "GET /v1/sessions": READERS,
    "GET /v1/sessions/{session_id}": READERS,
    "POST /v1/sessions/{session_id}": REQUESTERS,
    "DELETE /v1/sessions/{session_id}": REQUESTERS,
    "POST /v1/sessions/{session_id}/archive": REQUESTERS,
    "GET /v1/sessions/{session_id}/events": READERS,
    "POST /v1/sessions/{session_id}/events": REQUESTERS | APPROVERS,  # the body says which of both it takes
    "GET /v1/sessions/{session_id}/events/stream": READERS,
    "GET /v1/sessions/{session_id}/workspace": READERS,
    "GET /v1/sessions/{session_id}/workspace/files": READERS,
    "GET /v1/approvals": READERS,
    "GET /v1/approvals/{approval_id}": READERS,
    "POST /v1/approvals/{approval_id}/decide": APPROVERS,
    "POST /v1/approvals/{approval_id}/claim": APPROVERS,
    "POST /v1/approvals/{approval_id}/delegate": APPROVERS,
    "GET /v1/approvals/{approval_id}/receipt": READERS,
    "GET /v1/audit": MANAGERS,
    "GET /v1/audit/export": MANAGERS,
    "GET /v1/audit/keys": READERS,
    "GET /v1/agents": READERS,
    "GET /v1/agents/{agent_id}": READERS,
    "GET /v1/environments": READERS,
    "GET /v1/environments/{environment_id}": READERS,
    "GET /v1/admin/workspaces": MANAGERS,
    "POST /v1/admin/workspaces": ADMINS,
    "POST /v1/admin/workspaces/{workspace_id}": MANAGERS,
    "GET /v1/admin/workspaces/{workspace_id}/members": MANAGERS,
    "PUT /v1/admin/workspaces/{workspace_id}/members/{principal_id}": MANAGERS,
    "GET /v1/admin/workspaces/{workspace_id}/policy": MANAGERS,
    "PUT /v1/admin/workspaces/{workspace_id}/policy": MANAGERS,
    "GET /v1/admin/principals": ADMINS,
    "POST /v1/admin/principals": ADMINS,
    "GET /v1/admin/principals/{principal_id}": ADMINS,
    "POST /v1/admin/principals/{principal_id}": ADMINS,
    "PUT /v1/admin/principals/{user_id}/password": ADMINS,
    "DELETE /v1/admin/principals/{user_id}/browser_sessions": ADMINS,
    "GET /v1/admin/keys": MANAGERS,
    "POST /v1/admin/keys": MANAGERS,
    "DELETE /v1/admin/keys/{key_id}": MANAGERS,
    "POST /v1/admin/keys/{key_id}/rotate": MANAGERS,
    "GET /v1/webhooks": MANAGERS,
    "POST /v1/webhooks": MANAGERS,
    "GET /v1/webhooks/{webhook_id}": MANAGERS,
    "POST /v1/webhooks/{webhook_id}": MANAGERS,
    "DELETE /v1/webhooks/{webhook_id}": MANAGERS,
    "POST /v1/webhooks/{webhook_id}/rotate": MANAGERS,
    "POST /v1/webhooks/{webhook_id}/test": MANAGERS,
    "GET /v1/notifications": MANAGERS,
    "GET /v1/notifications/channels": MANAGERS,
    "POST /v1/notifications/{notification_id}/redeliver": MANAGERS,
    "GET /v1/internal/drain": OPERATOR,
    "POST /v1/internal/drain": OPERATOR,
    "DELETE /v1/internal/drain": OPERATOR,
    "GET /v1/internal/decisions": OPERATOR,
    "GET /v1/internal/secrets": FIRST,
    "PUT /v1/internal/secrets/{name}": FIRST,
    "DELETE /v1/internal/secrets/{name}": FIRST,
}
SCOPES: Mapping[Scope, frozenset[str]] = {  # what a key of "all" may still do
    "read": READERS,
    "sessions": READERS | REQUESTERS,
    "approvals": READERS | APPROVERS,
    "admin": READERS | MANAGERS,
}


@dataclass(frozen=True)
class Scene:
    served: Threaded
    http: httpx.Client
    keys: Mapping[str, str]
    home: str
    other: str
    session: str

    def ask(self, caller: str, route: str, **more: Any) -> httpx.Response:
        """A request to a route with ids that there are not, and no body: what it takes is checked before both."""
        method, path = route.split()
        path = path.replace("{workspace_id}", self.home)
        headers = {"x-api-key": self.keys[caller]} if caller in self.keys else {}
        url = self.served.service.url + re.sub(r"\{\w+\}", "none", path)
        return self.http.request(method, url, headers=headers | more.pop("headers", {}), timeout=30, **more)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("access")
    with serve_in_thread(folder, keys={"first": "first-secret"}, driving=False) as served:
        made = served.run(_people(served))
        with made.http:
            yield made


async def _people(served: Threaded) -> Scene:
    store = served.service.store
    first = await store.find_identity(hash_api_key("first-secret"))
    assert first is not None
    home = first.workspaces[0].id
    other = await store.add_workspace(Workspace(id=new_id("wrkspc"), name="other", created_at=utcnow()))
    keys = {"first": "first-secret", "wrong key": "unknown", "./hitl": OPERATOR_KEY}

    async def add(name: str, roles: dict[str, tuple[Role, ...]], *scopes: Scope) -> None:
        account = Principal(
            id=new_id("svac"), kind="service_account", name=name, created_at=utcnow(), roles=roles
        )
        keys[name] = f"secret of {name}"
        more: dict[str, Any] = {"scopes": scopes} if scopes else {}
        await store.add_key(name, hash_api_key(keys[name]), principal=account, **more)

    for role in (Role.VIEWER, Role.REQUESTER, Role.APPROVER, Role.OPERATOR):
        await add(role.value, {home: (role,)})
    everything = {home: tuple(Role)[:-1], EVERYWHERE: (Role.ADMIN,)}
    await add("admin", {home: (), EVERYWHERE: (Role.ADMIN,)})
    await add("all", everything)
    for scope in SCOPES:
        await add(f"all with {scope}", everything, scope)
    await add("stranger", {other.id: tuple(Role)[:-1]})
    await add("nowhere", {})
    session = await store.create_session(
        home, agent=Agent(), environment=Environment(), title=None, metadata={}, initial=[]
    )
    return Scene(served, httpx.Client(timeout=30), keys, home, other.id, session.id)


def test_every_route_has_its_row() -> None:
    assert ALLOWED.keys() == OPERATIONS.keys()


@pytest.mark.parametrize("caller", sorted(EACH))
def test_each_caller_gets_behind_the_check_of_what_it_may_do_and_of_nothing_else(
    scene: Scene, caller: str
) -> None:
    for route, allowed in ALLOWED.items():
        answer = scene.ask(caller, route)
        refused = (
            {401} if caller in ("no key", "wrong key", "./hitl") or allowed in (OPERATOR, FIRST) else {403}
        )
        if caller in allowed:
            assert answer.status_code not in (401, 403), (route, answer.text)
        else:
            assert answer.status_code in refused, (route, answer.text)
            assert answer.json()["error"]["type"] in ("authentication_error", "permission_error")


@pytest.mark.parametrize("scope", SCOPES)
def test_a_scope_takes_away_what_a_role_permits(scene: Scene, scope: Scope) -> None:
    for route, allowed in ALLOWED.items():
        if allowed in (EACH, FIRST, OPERATOR):
            continue
        answer = scene.ask(f"all with {scope}", route)
        assert (answer.status_code != 403) == bool(allowed & _of(scope)), (route, answer.text)


def _of(scope: Scope) -> frozenset[str]:
    """A caller of the table that may do just what this scope permits."""
    return {
        "read": frozenset({"viewer"}),
        "sessions": frozenset({"requester"}),
        "approvals": frozenset({"approver"}),
        "admin": frozenset({"operator", "admin"}),
    }[scope]


def test_a_message_takes_one_role_and_a_decision_another(scene: Scene) -> None:
    message = {"type": "user.message", "content": [{"type": "text", "text": "go"}]}
    confirmation = {"type": "user.tool_confirmation", "tool_use_id": "toolu_none", "result": "allow"}
    for caller, event, status in (
        ("requester", message, 200),
        ("requester", confirmation, 403),
        ("approver", message, 403),
        ("approver", confirmation, 400),
        ("all", confirmation, 400),
        ("viewer", message, 403),
    ):
        answer = scene.http.post(
            f"{scene.served.service.url}/v1/sessions/{scene.session}/events",
            json={"events": [event]},
            headers={"x-api-key": scene.keys[caller]},
        )
        assert answer.status_code == status, (caller, event, answer.text)


def test_another_workspace_finds_nothing_in_any_route_filter_or_header(scene: Scene) -> None:
    for route in ALLOWED:
        if "{session_id}" not in route:
            continue
        method, path = route.split()
        url = scene.served.service.url + path.replace("{session_id}", scene.session)
        body = (
            {"json": {"events": [{"type": "user.interrupt"}]}}
            if path.endswith("/events") and method == "POST"
            else {}
        )
        if route == "POST /v1/sessions/{session_id}":
            body = {"json": {"title": "mine"}}
        answer = scene.http.request(
            method, url, headers={"x-api-key": scene.keys["stranger"]}, timeout=30, **body
        )
        assert answer.status_code == 404, (route, answer.text)
    stranger = {"x-api-key": scene.keys["stranger"]}
    listed = scene.http.get(
        f"{scene.served.service.url}/v1/approvals", params={"session_id": scene.session}, headers=stranger
    )
    assert listed.json()["data"] == []
    named = scene.ask("stranger", "GET /v1/sessions", headers={"anthropic-workspace-id": scene.home})
    assert named.status_code == 404
    known = scene.ask("first", "GET /v1/sessions", headers={"anthropic-workspace-id": scene.home})
    assert [one["id"] for one in known.json()["data"]] == [scene.session]


def test_an_idempotency_key_of_another_workspace_is_another_one(scene: Scene) -> None:
    body = {"agent": "default", "environment_id": "default"}
    made = [
        scene.http.post(
            f"{scene.served.service.url}/v1/sessions",
            json=body,
            headers={"x-api-key": scene.keys[who], "idempotency-key": "the same"},
        ).json()["id"]
        for who in ("requester", "requester", "stranger", "all")
    ]
    assert made[0] == made[1]
    assert len(set(made)) == 3


def test_who_is_in_no_workspace_is_told_so(scene: Scene) -> None:
    answer = scene.ask("nowhere", "GET /v1/sessions")
    assert answer.status_code == 403
    assert "in no workspace" in answer.json()["error"]["message"]


def test_an_operator_hands_out_keys_of_its_own_workspace_only(scene: Scene) -> None:
    url = f"{scene.served.service.url}/v1/admin/keys"
    mine = {"x-api-key": scene.keys["operator"]}
    made = scene.http.post(url, json={"name": "robot", "roles": ["viewer"]}, headers=mine)
    assert made.status_code == 200, made.text
    seen = scene.http.get(
        f"{scene.served.service.url}/v1/sessions", headers={"x-api-key": made.json()["secret"]}
    )
    assert seen.status_code == 200
    listed = {key["name"] for key in scene.http.get(url, headers=mine).json()["data"]}
    assert "robot" in listed
    assert not listed & {"first", "all", "admin", "stranger"}
    everyone = {
        key["name"]: key
        for key in scene.http.get(url, headers={"x-api-key": scene.keys["all"]}).json()["data"]
    }
    for name in ("all", "stranger"):
        assert scene.http.delete(f"{url}/{everyone[name]['id']}", headers=mine).status_code == 404
        taken = scene.http.post(
            url, json={"name": "x", "principal_id": everyone[name]["principal_id"]}, headers=mine
        )
        assert taken.status_code == 403
    members = f"{scene.served.service.url}/v1/admin/workspaces/{scene.home}/members"
    robot = made.json()["principal_id"]
    assert scene.http.put(f"{members}/{robot}", json={"roles": []}, headers=mine).status_code == 200
    assert robot not in {one["principal_id"] for one in scene.http.get(members, headers=mine).json()["data"]}
    elsewhere = members.replace(scene.home, scene.other)
    assert scene.http.put(f"{elsewhere}/{robot}", json={"roles": ["viewer"]}, headers=mine).status_code == 404


def test_a_change_to_a_version_that_is_not_the_current_one_is_refused_with_the_current(scene: Scene) -> None:
    url = f"{scene.served.service.url}/v1/admin/workspaces/{scene.other}"
    headers = {"x-api-key": scene.keys["all"]}
    first = scene.http.post(url, json={"separation_of_duties": True, "version": 1}, headers=headers)
    assert first.json()["version"] == 2
    again = scene.http.post(url, json={"separation_of_duties": True, "version": 1}, headers=headers)
    assert again.json() == first.json()  # the same change, as after a lost answer
    late = scene.http.post(url, json={"name": "renamed", "version": 1}, headers=headers)
    assert late.status_code == 412
    assert "current version is 2" in late.json()["error"]["message"]


def test_the_last_administrator_and_the_first_keys_account_stay(scene: Scene) -> None:
    store, run = scene.served.service.store, scene.served.run
    first = run(store.find_identity(hash_api_key("first-secret")))
    assert first is not None
    headers = {"x-api-key": scene.keys["all"]}
    for change in ({"disabled": True}, {"roles": {}}):
        answer = scene.http.post(
            f"{scene.served.service.url}/v1/admin/principals/{first.principal.id}",
            json=change,
            headers=headers,
        )
        assert answer.status_code == 409, answer.text
        assert "stays an administrator" in answer.json()["error"]["message"]


def test_a_disabled_account_and_an_expired_key_open_nothing(scene: Scene) -> None:
    store, run = scene.served.service.store, scene.served.run
    account = Principal(
        id=new_id("svac"), kind="service_account", name="gone", created_at=utcnow(),
        roles={scene.home: (Role.REQUESTER,)},
    )  # fmt: skip
    run(store.add_key("gone", hash_api_key("of gone"), principal=account))
    run(store.add_key("old", hash_api_key("of old"), principal=account, expires_at=utcnow()))
    assert run(store.find_identity(hash_api_key("of old"))) is None
    assert run(store.find_identity(hash_api_key("of gone"))) is not None
    run(store.change_principal(account.id, {"disabled": True}, by=SERVICE))
    assert run(store.find_identity(hash_api_key("of gone"))) is None


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"name": "x", "roles": ["admin"]}, "roles"),
        ({"name": "x", "roles": ["king"]}, "roles"),
        ({"name": "x", "scopes": []}, "scopes"),
        ({"name": "x", "scopes": ["all"]}, "scopes"),
        ({"name": "x", "expires_at": "tomorrow"}, "expires_at"),
        ({"name": "x", "expires_at": 1}, "expires_at"),
        ({"name": "x", "more": 1}, "more"),
    ],
)
def test_a_key_that_cannot_be_is_refused_by_its_field(scene: Scene, body: dict[str, Any], field: str) -> None:
    answer = scene.ask("all", "POST /v1/admin/keys", json=body)
    assert answer.status_code == 400
    assert field in answer.json()["error"]["message"]


async def test_changes_of_people_at_once_are_all_kept_and_an_administrator_stays(store: CoreStore) -> None:
    admins = [
        Principal(
            id=new_id("user"),
            kind="user",
            name=f"admin {n}",
            created_at=utcnow(),
            roles={EVERYWHERE: (Role.ADMIN,)},
        )
        for n in range(6)
    ]
    for admin in admins:
        await store.add_principal(admin, by=SERVICE)
    disabling = (store.change_principal(admin.id, {"disabled": True}, by=SERVICE) for admin in admins)
    results = await asyncio.gather(*disabling, return_exceptions=True)
    assert sum(isinstance(result, Conflict) for result in results) == 1
    assert sum(one.disabled_at is None for one in await store.list_principals()) == 1
    left = next(one for one in await store.list_principals() if one.disabled_at is None)
    changing = (
        store.change_principal(left.id, {"groups": [str(n)]}, if_version=left.version, by=SERVICE)
        for n in range(6)
    )
    results = await asyncio.gather(*changing, return_exceptions=True)
    assert sum(isinstance(result, Outdated) for result in results) == 5
    assert (await store.get_principal(left.id)).version == left.version + 1


async def test_what_a_newer_version_added_to_a_user_stays_with_a_change(store: CoreStore) -> None:
    record = {"id": "user_new", "kind": "user", "name": "new", "created_at": utcnow(), "novel": [1]}
    await store.add_principal(Principal.model_validate(record, extra="allow"), by=SERVICE)
    changed = await store.change_principal("user_new", {"groups": ["release"]}, by=SERVICE)
    assert (changed.groups, changed.version) == (("release",), 2)
    assert (await store.get_principal("user_new")).model_extra == {"novel": [1]}
    with pytest.raises(InvalidInput):
        await store.change_principal("user_new", {"unknown": 1}, by=SERVICE)
