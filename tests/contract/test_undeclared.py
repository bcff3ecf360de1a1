"""Every route refuses undeclared input by name, and ignores none of it."""

import copy
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import anthropic
import httpx
import pytest

from claude_hitl_template.testing.local_service import OPERATOR_KEY
from claude_hitl_template.testing.threaded import Threaded, serve_in_thread
from tests.contract.routes import OPERATIONS, parameters, takes_empty

KEY = "key-of-alice"
WAIT_S = 60
ROUTES = sorted(OPERATIONS)
LISTINGS = [route.split()[1] for route in ROUTES if any(p["name"] == "limit" for p in parameters(route))]
BODIES: dict[str, Any] = {
    "POST /v1/sessions": {
        "agent": {
            "type": "agent_with_overrides",
            "id": "default",
            "model": {"id": "default"},
            "tools": [
                {
                    "type": "agent_toolset_20260401",
                    "default_config": {"enabled": True, "permission_policy": {"type": "always_ask"}},
                    "configs": [{"name": "bash", "permission_policy": {"type": "always_ask"}}],
                },
                {
                    "type": "mcp_toolset",
                    "mcp_server_name": "wiki",
                    "default_config": {"permission_policy": {"type": "always_ask"}},
                    "configs": [{"name": "search", "permission_policy": {"type": "always_ask"}}],
                },
            ],
            "mcp_servers": [{"type": "url", "name": "wiki", "url": "https://wiki.example/mcp"}],
            "permission_rules": [{"rule": "Bash(ls)", "policy": "always_ask"}],
        },
        "environment_id": "default",
        "initial_events": [{"type": "user.message", "content": [{"type": "text", "text": "x"}]}],
    },
    "POST /v1/sessions/{session_id}": {"title": "x"},
    "POST /v1/sessions/{session_id}/events": {
        "events": [
            {
                "type": "user.message",
                "content": [
                    {"type": "text", "text": "x"},
                    {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}},
                ],
            },
            {"type": "user.interrupt"},
            {"type": "user.tool_confirmation", "tool_use_id": "x", "result": "allow"},
        ]
    },
    "POST /v1/approvals/{approval_id}/decide": {"result": "allow"},
    "POST /v1/approvals/{approval_id}/claim": {"seconds": 60},
    "POST /v1/approvals/{approval_id}/delegate": {"group": "x"},
    "POST /v1/webhooks": {"url": "https://hooks.example.org/", "events": ["session.created"]},
    "POST /v1/webhooks/{webhook_id}": {"enabled": False},
    "POST /v1/internal/drain": {"grace_s": 0},
    "PUT /v1/internal/secrets/{name}": {"value": "x"},
    "POST /v1/admin/keys": {"name": "x"},
    "POST /v1/admin/workspaces": {"name": "x"},
    "POST /v1/admin/workspaces/{workspace_id}": {"name": "x"},
    "PUT /v1/admin/workspaces/{workspace_id}/members/{principal_id}": {"roles": ["viewer"]},
    "PUT /v1/admin/workspaces/{workspace_id}/policy": {
        "rules": [{"pattern": "Bash", "action": "ask", "approvers": {"groups": ["x"]}}],
        "version": 0,
    },
    "POST /v1/admin/principals": {"kind": "user", "name": "x"},
    "POST /v1/admin/principals/{principal_id}": {"groups": ["x"]},
    "PUT /v1/admin/principals/{user_id}/password": {"password": "x"},
}  # fmt: skip


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Threaded]:
    folder = tmp_path_factory.mktemp("undeclared")
    with serve_in_thread(folder, keys={"alice": KEY}, backing="memory", driving=False) as service:
        yield service


@pytest.fixture(scope="module")
def http(served: Threaded) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served.service.url, headers={"x-api-key": KEY}, timeout=WAIT_S) as client:
        yield client


@pytest.fixture(scope="module")
def sdk(served: Threaded) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=served.service.url, api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def sessions(http: httpx.Client) -> list[str]:
    body = {"agent": "default", "environment_id": "default"}
    return [http.post("/v1/sessions", json=body).raise_for_status().json()["id"] for _ in range(4)]


def ask(http: httpx.Client, route: str, session_id: str, **options: Any) -> httpx.Response:
    """Sends a request for `route`, with existing ids and a valid key."""
    method, path = route.split()
    known = {"session_id": session_id, "name": "ANTHROPIC_API_KEY"}
    url = re.sub(r"\{(\w+)\}", lambda found: known.get(found[1], "default"), path)
    key = {"x-api-key": OPERATOR_KEY} if "/internal/" in path else {}
    body = {"json": BODIES[route]} if route in BODIES else {}
    options = {**body, **options}
    return http.request(method, url, **{**options, "headers": {**key, **options.get("headers", {})}})


def refused(answer: httpx.Response, name: str) -> str:
    assert answer.status_code == 400, (answer.status_code, answer.text)
    said = answer.json()["error"]
    assert said["type"] == "invalid_request_error"
    assert said["message"].startswith(f"{name}: "), said
    return said["message"]


def test_every_route_is_tried_here_and_the_internal_ones_are_not_in_the_document(http: httpx.Client):
    paths = http.get("/v1/openapi.json").json()["paths"]
    documented = {f"{method.upper()} {path}" for path, methods in paths.items() for method in methods}
    assert sorted(documented) == [route for route in ROUTES if "/v1/internal/" not in route]
    assert {route for route, said in OPERATIONS.items() if "requestBody" in said} == set(BODIES)


# -- queries


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    "name", ["nonsense", "beta", "Limit", "status", "workspace_id", "states[0]", " limit", "é"]
)
def test_every_route_refuses_a_query_parameter_it_does_not_have(
    http: httpx.Client, sessions: list[str], route: str, name: str
):
    answer = ask(http, route, sessions[0], params={name: "1"})
    refused(answer, name)


@pytest.mark.parametrize("route", ROUTES)
def test_every_single_parameter_is_refused_empty_or_repeated(
    http: httpx.Client, sessions: list[str], route: str
):
    for parameter in parameters(route):
        name = parameter["name"]
        if not takes_empty(parameter):
            assert "is empty" in refused(ask(http, route, sessions[0], params={name: ""}), name)
        if not name.endswith("[]"):
            twice = ask(http, route, sessions[0], params=[(name, "1"), (name, "2")])
            assert "more than once" in refused(twice, name)
        else:
            both = ask(http, route, sessions[0], params=[(name, "x"), (name[:-2], "x")])
            assert "use one of them" in refused(both, name[:-2])


def test_a_near_miss_is_told_what_there_is(http: httpx.Client):
    said = refused(http.get("/v1/approvals?status=pending"), "status")
    assert "did you mean states[]?" in said
    assert "limit, page, states[], session_id" in said
    assert "state" in refused(http.get("/v1/approvals?state=pending"), "state")


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda beta, at: beta.agents.list(created_at_gte=at), "created_at[gte]"),
        (lambda beta, at: beta.agents.list(created_at_lte=at), "created_at[lte]"),
        (lambda beta, _: beta.agents.list(include_archived=True), "include_archived"),
        (lambda beta, _: beta.environments.list(include_archived=False), "include_archived"),
        (lambda beta, _: beta.sessions.list(agent_id="default", agent_version=1), "agent_version"),
        (lambda beta, _: beta.sessions.list(deployment_id="x"), "deployment_id"),
        (lambda beta, _: beta.sessions.list(memory_store_id="x"), "memory_store_id"),
        (lambda beta, _: beta.sessions.list(betas=["managed-agents-2099-01-01"]), "anthropic-beta"),
    ],
)  # fmt: skip
def test_what_the_sdk_can_ask_for_and_the_service_has_not_is_refused(
    sdk: anthropic.Anthropic, call: Callable[[Any, datetime], Any], name: str
):
    with pytest.raises(anthropic.BadRequestError) as error:
        list(call(sdk.beta, datetime(2026, 1, 1, tzinfo=UTC)))
    assert error.value.body["error"]["message"].startswith(f"{name}: ")


def test_betas_of_other_parts_of_the_protocol_are_taken(sdk: anthropic.Anthropic):
    assert sdk.beta.agents.list(betas=["files-api-2025-04-14", "managed-agents-2026-04-01"]).data


@pytest.mark.parametrize(
    ("path", "query", "name"),
    [
        ("/v1/sessions", "created_at[gt]=1700000000", "created_at[gt]"),
        ("/v1/sessions", "created_at[gt]=12345", "created_at[gt]"),
        ("/v1/sessions", "created_at[gt]=2026-01-01T00:00:00", "created_at[gt]"),
        ("/v1/sessions", "created_at[gt]=2026-01-01%2000:00:00Z", "created_at[gt]"),
        ("/v1/sessions", "created_at[gt]=2026-01-01T00:00Z", "created_at[gt]"),
        ("/v1/sessions", "created_at[gt]=2026-02-30T00:00:00Z", "created_at[gt]"),
        ("/v1/sessions", "created_at[gt]=0000-01-01T00:00:00Z", "created_at[gt]"),
        ("/v1/sessions", "created_at[gt]=12026-01-01T00:00:00Z", "created_at[gt]"),
        ("/v1/sessions", "include_archived=TRUE", "include_archived"),
        ("/v1/sessions", "include_archived=1", "include_archived"),
        ("/v1/agents/default", "version=1_0", "version"),
        ("/v1/agents/default", "version=0", "version"),
        ("/v1/agents/default", "version=%201", "version"),
        ("/v1/agents/default", "version=1.0", "version"),
        ("/v1/approvals", "states[]=Pending", "states"),
        ("/v1/approvals", "states[]=pending&states[]=nonsense", "states"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_by_name(http: httpx.Client, path: str, query: str, name: str):
    refused(http.get(f"{path}?{query}"), name)


# -- headers


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    "header",
    [
        "anthropic-workspace-id",
        "anthropic-user-profile-id",
        "anthropic-organization-id",
        "anthropic-nonsense",
        "if-match",
    ],
)
def test_every_route_refuses_a_header_that_asks_for_what_there_is_not(
    http: httpx.Client, sessions: list[str], route: str, header: str
):
    answer = ask(http, route, sessions[0], headers={header: "x"})
    if header in {parameter["name"] for parameter in parameters(route, "header")}:
        assert answer.status_code == 404, answer.text  # it is taken, and there is no such workspace
    else:
        refused(answer, header)


def test_the_sdk_names_a_workspace(sdk: anthropic.Anthropic, sessions: list[str]):
    workspace: Any = sdk.beta.sessions.retrieve(sessions[0])
    found = sdk.beta.sessions.retrieve(sessions[0], workspace_id=workspace.workspace_id)
    assert found.id == sessions[0]
    with pytest.raises(anthropic.NotFoundError, match="wrkspc_1"):
        sdk.beta.sessions.list(workspace_id="wrkspc_1")


@pytest.mark.parametrize("route", ROUTES)
def test_a_header_that_some_routes_obey_is_refused_by_the_others(
    http: httpx.Client, sessions: list[str], route: str
):
    declared = {parameter["name"].lower() for parameter in parameters(route, "header")}
    assert ("idempotency-key" in declared) == route.startswith("POST")
    for header in {"idempotency-key", "last-event-id"} - declared:
        refused(ask(http, route, sessions[0], headers={header: "0"}), header)
    if "idempotency-key" in declared:
        for wrong in ("", "k" * 256):
            refused(ask(http, route, sessions[0], headers={"idempotency-key": wrong}), "Idempotency-Key")


def test_a_change_that_is_repeated_with_its_key_has_no_further_effect(
    http: httpx.Client, sessions: list[str]
):
    url, key = f"/v1/sessions/{sessions[3]}", {"idempotency-key": "change-once"}
    for title, headers in (("first", key), ("second", {}), ("first", key)):
        assert http.post(url, json={"title": title}, headers=headers).status_code == 200
    assert http.get(url).json()["title"] == "second"
    assert http.post(url, json={"title": "third"}, headers=key).status_code == 409


@pytest.mark.parametrize(
    ("route", "header"), [("GET /v1/sessions", "x-api-key"), ("POST /v1/sessions", "idempotency-key")]
)
def test_a_header_that_is_given_twice_is_refused(
    http: httpx.Client, sessions: list[str], route: str, header: str
):
    method, path = route.split()
    twice = [("x-api-key", KEY), (header, KEY), *([] if header == "x-api-key" else [(header, "other")])]
    with httpx.Client(base_url=http.base_url) as bare:
        answer = bare.request(method, path, headers=twice, json=BODIES.get(route))
    assert "more than once" in refused(answer, header)


# -- bodies


@pytest.mark.parametrize("route", [route for route in ROUTES if route not in BODIES])
def test_a_route_without_a_body_refuses_one(http: httpx.Client, sessions: list[str], route: str):
    for body in (b'{"status": "pending"}', b"[]", b"null", b"x" * 100_000):
        refused(ask(http, route, sessions[0], content=body), "body")


@pytest.mark.parametrize("body", [b"", b"{}", b" { } "])
def test_an_empty_body_is_none(http: httpx.Client, body: bytes):
    assert http.request("GET", "/v1/agents", content=body).status_code == 200


def objects(value: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields every object in a body, with its dotted path."""
    if isinstance(value, dict):
        yield path, value
    for key, item in (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    ):
        yield from objects(item, f"{path}.{key}" if path else str(key))


@pytest.mark.parametrize("route", BODIES)
def test_an_unknown_field_is_refused_by_its_path_at_any_depth(
    http: httpx.Client, sessions: list[str], route: str
):
    for path, _ in objects(BODIES[route]):
        body = copy.deepcopy(BODIES[route])
        dict(objects(body))[path]["nonsense"] = 1
        refused(ask(http, route, sessions[0], json=body), f"{path}.nonsense" if path else "nonsense")


# (what an agent is overridden with, the field that the error names)
TOOLSET: dict[str, Any] = {"type": "agent_toolset_20260401"}
WIKI = {"type": "url", "name": "wiki", "url": "https://wiki.example/mcp"}
WRONG_AGENTS: list[tuple[dict[str, Any], str]] = [
    *(({"type": "agent", name: value}, f"agent.{name}") for name, value in {
        "model": "default", "system": None, "tools": [], "skills": [], "mcp_servers": [], "permission_rules": [],
        "permission_mode": "default",
    }.items()),
    *(({name: None}, f"agent.{name}") for name in (
        "type", "id", "version", "model", "tools", "skills", "mcp_servers", "permission_rules", "permission_mode",
    )),
    ({"version": True}, "agent.version"),
    ({"version": 1.0}, "agent.version"),
    ({"model": {"id": "default", "effort": "high"}}, "agent.model.effort"),
    ({"model": {"id": "default", "speed": "fast"}}, "agent.model.speed"),
    ({"multiagent": None}, "agent.multiagent"),
    ({"tools": [{"type": "custom", "name": "x"}]}, "agent.tools.0"),
    ({"tools": [TOOLSET, TOOLSET]}, "agent.tools.1.type"),
    *(({"tools": [{**TOOLSET, "configs": [config]}]}, f"agent.tools.0.configs.0.{field}") for config, field in (
        ({"name": "bash", "type": "nonsense"}, "type"),
        ({"name": "bash", "type": "read"}, "type"),
        ({"name": "bash", "type": None}, "type"),
        ({"name": "nonsense"}, "name"),
        ({"name": "Bash"}, "name"),
        ({"name": "bash", "enabled": "false"}, "enabled"),
        ({"name": "bash", "enabled": 0}, "enabled"),
        ({"name": "bash", "permission_policy": {"type": "auto"}}, "permission_policy.type"),
        ({"name": "web_fetch", "allowed_domains": ["example.com"]}, "allowed_domains"),
        ({"name": "web_fetch", "max_content_tokens": None}, "max_content_tokens"),
    )),
    ({"tools": [{**TOOLSET, "configs": [{"name": "bash"}, {"name": "bash"}]}]}, "agent.tools.0.configs.1.name"),
    ({"mcp_servers": [WIKI, WIKI]}, "agent.mcp_servers.1.name"),
    ({"mcp_servers": [{**WIKI, "authorization_token": "x"}]}, "agent.mcp_servers.0.authorization_token"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "field"), WRONG_AGENTS)
def test_an_override_that_has_no_effect_is_refused_by_name(
    http: httpx.Client, wrong: dict[str, Any], field: str
):
    agent = {"type": "agent_with_overrides", "id": "default", **wrong}
    body = {"agent": agent, "environment_id": "default"}
    refused(http.post("/v1/sessions", json=body), field)


@pytest.mark.parametrize(
    "body", [{"budget": None}, {"resources": [{}]}, {"vault_ids": ["x"]}, {"title": ["x"]}]
)
def test_what_a_session_cannot_have_is_refused_by_name(http: httpx.Client, body: dict[str, Any]):
    refused(
        http.post("/v1/sessions", json={"agent": "default", "environment_id": "default", **body}),
        next(iter(body)),
    )


# -- cursors


def test_a_cursor_goes_on_in_its_own_listing(http: httpx.Client, sessions: list[str]):
    seen: list[str] = []
    params: dict[str, Any] = {"limit": 1, "order": "asc", "statuses[]": ["idle", "running"]}
    while params.get("page") is not None or not seen:
        answer = http.get("/v1/sessions", params=params).json()
        seen += [s["id"] for s in answer["data"]]
        # The same filter, written in another way; the size of a page may change.
        params = {
            "limit": 2,
            "order": "asc",
            "statuses": ["running", "idle", "idle"],
            "page": answer["next_page"],
        }
    assert seen[:4] == sessions


@pytest.mark.parametrize(
    "changed",
    [
        {"order": "asc"},
        {"statuses[]": ["running"]},
        {"statuses[]": []},
        {"agent_id": "default"},
        {"include_archived": "true"},
        {"created_at[gt]": "2020-01-01T00:00:00Z"},
    ],
)
def test_a_cursor_of_another_order_or_filter_is_refused(
    http: httpx.Client, sessions: list[str], changed: dict[str, Any]
):
    params: dict[str, Any] = {"limit": 1, "statuses[]": ["idle"]}
    page = http.get("/v1/sessions", params=params).json()["next_page"]
    assert http.get("/v1/sessions", params={**params, "order": "desc", "page": page}).status_code == 200
    refused(http.get("/v1/sessions", params={**params, **changed, "page": page}), "page")


def test_a_cursor_of_another_listing_is_refused(http: httpx.Client, sessions: list[str]):
    for title in "abc":
        for session_id in sessions[:2]:
            http.post(f"/v1/sessions/{session_id}", json={"title": title}).raise_for_status()
    first, second = (f"/v1/sessions/{session_id}/events" for session_id in sessions[:2])
    page = http.get(first, params={"limit": 1}).json()["next_page"]
    assert http.get(first, params={"limit": 1, "page": page}).status_code == 200
    for path, more in ((second, {}), (first, {"order": "desc"}), (first, {"types[]": "session.updated"})):
        refused(http.get(path, params={"limit": 1, "page": page, **more}), "page")
    for path in LISTINGS:
        route = f"GET {path}"
        if path != "/v1/sessions/{session_id}/events":
            refused(ask(http, route, sessions[0], params={"page": page}), "page")
