"""Invalid REST input is answered with the right 4xx in the protocol's shape, and changes nothing."""

import copy
import gzip
import json
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from claude_hitl_template.api import openapi
from claude_hitl_template.api.auth import WRONG_KEYS
from claude_hitl_template.domain.models import ApprovalState
from claude_hitl_template.testing.local_service import OPERATOR_KEY
from claude_hitl_template.testing.threaded import Threaded, serve_in_thread
from tests.contract.routes import OPERATIONS

WAIT_S = 90
OPEN = {"/v1/health"}
JSON = {"content-type": "application/json"}
UNREADABLE = [
    "nope",
    "sesn_06h0q5zs4djssv4sajzgg6g67f",
    "x" * 5000,
    "%00",
    "sesn_%00",
    "%ff%fe",
    "%2e%2e",
    "..%2f..%2fetc%2fpasswd",
    "%20",
    "%0d%0a",
    "sesn_%F0%9F%98%80",
    "%E2%80%AE",
    "%27%20OR%201=1--",
]


class Api:
    """A client for raw HTTP."""

    def __init__(self, served: Threaded, key: str) -> None:
        self.served = served
        headers = {"x-api-key": served.service.keys[key]}
        self.http = httpx.Client(base_url=served.service.url, headers=headers, timeout=WAIT_S)

    def create(self, prompt: str | None = None, **more: Any) -> str:
        body = {"agent": "default", "environment_id": "default", **more}
        if prompt:
            body["initial_events"] = [message(prompt)]
        return self.http.post("/v1/sessions", json=body).raise_for_status().json()["id"]

    def send(self, session_id: str, *events: Any, **headers: str) -> httpx.Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        url = f"/v1/sessions/{session_id}/events"
        return self.http.post(url, json={"events": events}, headers=named)

    def confirm(self, session_id: str, event_id: str, result: str, **more: Any) -> httpx.Response:
        return self.send(session_id, confirmation(event_id, result, **more))

    def waiting(self, prompt: str = "Write hello.txt with a greeting") -> tuple[str, str]:
        """A session with a call that waits for a human, parked; returned as (session id, event id)."""
        session_id = self.create(prompt)
        with self.http.stream(
            "GET", f"/v1/sessions/{session_id}/events/stream", headers={"last-event-id": "0"}
        ) as stream:
            for line in stream.iter_lines():
                if line.startswith("data: ") and "requires_action" in line:
                    break
        deadline = time.monotonic() + WAIT_S
        while not (session := self.http.get(f"/v1/sessions/{session_id}").json())["parked"]:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return session_id, session["stop_reason"]["event_ids"][0]

    def state(self, session_id: str) -> Any:
        """Everything that a refused request must not have changed."""
        session = self.http.get(f"/v1/sessions/{session_id}").raise_for_status().json()
        for clock in ("stats", "usage", "parked"):  # these move by themselves
            session.pop(clock)
        events = self.http.get(f"/v1/sessions/{session_id}/events", params={"limit": 1000}).json()
        approvals = self.approvals(session_id)
        sessions = self.http.get("/v1/sessions", params={"limit": 1000, "include_archived": True}).json()
        return session, events, approvals, [s["id"] for s in sessions["data"]]

    def approval(self, session_id: str) -> dict[str, Any]:
        [found] = self.approvals(session_id)["data"]
        return found

    def approvals(self, session_id: str) -> dict[str, Any]:
        """Returns approvals in any state."""
        params = {"session_id": session_id, "states[]": [state.value for state in ApprovalState]}
        return self.http.get("/v1/approvals", params=params).json()


def message(text: str) -> dict[str, Any]:
    return {"type": "user.message", "content": [{"type": "text", "text": text}]}


def confirmation(event_id: str, result: str, **more: Any) -> dict[str, Any]:
    return {"type": "user.tool_confirmation", "tool_use_id": event_id, "result": result, **more}


def refused(answer: httpx.Response, *statuses: int) -> str:
    """Asserts an error in the protocol's shape, and returns its message."""
    assert answer.status_code in (statuses or range(400, 500)), answer.text
    body = answer.json()
    assert set(body) == {"type", "error", "request_id"}
    assert body["request_id"] == answer.headers["request-id"]
    assert body["type"] == "error"
    assert set(body["error"]) == {"type", "message"}
    assert "Traceback" not in answer.text
    return body["error"]["message"]


@pytest.fixture(scope="module")
def alice(parking: Threaded) -> Iterator[Api]:
    api = Api(parking, "alice")
    yield api
    api.http.close()


@pytest.fixture(scope="module")
def bob(parking: Threaded) -> Iterator[Api]:
    api = Api(parking, "bob")
    yield api
    api.http.close()


@pytest.fixture(scope="module")
def idle(alice: Api) -> str:
    """A session in which nothing happens."""
    return alice.create()


@pytest.fixture(scope="module")
def asked(alice: Api) -> tuple[str, str]:
    """A session with a waiting call, on which no test decides."""
    return alice.waiting()


# -- who calls, and for what


# (method, path) of every route
ROUTES = [(method, path) for method, _, path in (route.partition(" ") for route in OPERATIONS)]


def test_the_table_of_routes_has_all_of_them(parking: Threaded):
    """The application has no mounted or hidden routes in addition to those that the next test requests."""
    hidden = [r for r in parking.service.app.routes if getattr(r, "path", None) is not None]
    assert hidden == []
    served = openapi.describe(parking.service.app)["paths"]
    assert {(method.upper(), path) for path, methods in served.items() for method in methods} == set(ROUTES)
    assert {path for _, path in ROUTES} >= {
        "/v1/health",
        "/v1/sessions",
        "/v1/approvals",
        "/v1/version",
    }


@pytest.mark.takes_long("every route is asked with each kind of wrong key")
def test_no_route_but_health_answers_without_a_known_key(parking: Threaded, idle: str):
    wrong = [
        {},
        {"x-api-key": ""},
        {"x-api-key": "wrong"},
        {"x-api-key": "alice-secret "[:-2]},
        {"x-api-key": "ü".encode()},
        {"authorization": "Bearer"},
        {"authorization": "Bearer wrong"},
        {"authorization": "Basic YWxpY2U6YWxpY2Utc2VjcmV0"},
    ]
    with httpx.Client(base_url=parking.service.url) as http:
        for method, path in ROUTES:
            url = re.sub(r"\{\w+\}", idle, path)
            for headers in wrong:
                answer = http.request(method, url, headers=headers)
                if path in OPEN:
                    assert answer.status_code == 200
                else:
                    refused(answer, 401)


def test_a_key_may_come_as_a_bearer_token(parking: Threaded):
    headers = {"authorization": f"Bearer {parking.service.keys['alice']}"}
    assert httpx.get(f"{parking.service.url}/v1/sessions", headers=headers).status_code == 200


@pytest.mark.parametrize("given_id", UNREADABLE)
def test_unknown_and_unreadable_ids_are_not_found(alice: Api, given_id: str):
    for method, path in ROUTES:
        if "{" not in path:
            continue
        url = re.sub(r"\{\w+\}", given_id, path)
        key = {"x-api-key": OPERATOR_KEY} if "/internal/" in path else {}
        refused(alice.http.request(method, url, json=_well_formed(method, path), headers=key), 404)


def test_another_keys_session_and_approvals_are_not_found(alice: Api, bob: Api, asked: tuple[str, str]):
    session_id, event_id = asked
    approval_id = alice.approval(session_id)["id"]
    before = alice.state(session_id)
    for method, path in ROUTES:
        if "{session_id}" in path or "{approval_id}" in path:
            url = path.replace("{session_id}", session_id).replace("{approval_id}", approval_id)
            refused(bob.http.request(method, url, json=_well_formed(method, path)), 404)
    refused(bob.confirm(session_id, event_id, "allow"), 404)
    assert bob.approvals(session_id)["data"] == []
    assert session_id not in [s["id"] for s in bob.http.get("/v1/sessions?limit=1000").json()["data"]]
    assert alice.state(session_id) == before


def _well_formed(method: str, path: str) -> Any:
    if method == "POST" and path.endswith("/events"):
        return {"events": [message("hello")]}
    if path.endswith("/members/{principal_id}"):
        return {"roles": ["viewer"]}
    if method == "PUT" and path.endswith("/policy"):
        return {"rules": [], "version": 0}
    if path.endswith("/password"):
        return {"password": "a long password"}
    return {"result": "deny"} if path.endswith("/decide") else {}


def test_what_is_no_route_or_no_method_is_said_as_json(alice: Api):
    refused(alice.http.get("/v1/nothing"), 404)
    refused(alice.http.get("/"), 404)
    refused(alice.http.put("/v1/sessions"), 405)


def test_too_many_requests_are_told_when_to_come_back(tmp_path: Path):
    with serve_in_thread(
        tmp_path, keys={"a": "one", "b": "two"}, backing="memory", requests_per_minute=3
    ) as served:
        url = f"{served.service.url}/v1/sessions"
        answers = [httpx.get(url, headers={"x-api-key": "one"}) for _ in range(4)]
        assert [a.status_code for a in answers] == [200, 200, 200, 429]
        refused(answers[-1], 429)
        assert 1 <= int(answers[-1].headers["retry-after"]) <= 60
        assert httpx.get(url, headers={"x-api-key": "two"}).status_code == 200


def test_wrong_keys_from_an_address_are_held_up_and_right_ones_never(tmp_path: Path):
    limits = {"wrong_keys_per_minute": WRONG_KEYS}
    with (
        serve_in_thread(tmp_path, keys={"a": "one"}, backing="memory", **limits) as served,
        httpx.Client() as http,
    ):
        root = served.service.url
        tried = ("/v1/sessions", "/v1/internal/drain", "/v1/internal/secrets", "/v1/approvals")

        def wrong(number: int) -> httpx.Response:
            return http.get(root + tried[number % 4], headers={"x-api-key": f"wrong {number}"})

        assert [wrong(number).status_code for number in range(WRONG_KEYS)] == [401] * WRONG_KEYS
        answers = [wrong(number) for number in range(WRONG_KEYS)]  # more than come back while they are sent
        held_up = [answer for answer in answers if answer.status_code == 429]
        assert held_up
        refused(held_up[-1], 429)
        assert 1 <= int(held_up[-1].headers["retry-after"]) <= 60
        assert http.get(f"{root}/v1/sessions", headers={"x-api-key": "one"}).status_code == 200
        assert http.get(f"{root}/v1/health").status_code == 200


# -- bodies

# (bytes of the body, what the error must name)
BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not JSON"),
    "half": (b'{"agent": "default"', "not JSON"),
    "two values": (b"{} {}", "not JSON"),
    "a list": (b"[]", "JSON object"),
    "null": (b"null", "JSON object"),
    "a string": (b'"agent"', "JSON object"),
    "NUL": (b'{"agent": "\\u0000"}', "agent"),
    "NUL in a name": (b'{"a\\u0000": 1}', "its name"),
    "a NUL byte": (b'{"agent": "\x00"}', "not JSON"),
    "a lone surrogate": (b'{"agent": "\\ud800"}', "agent"),
    "a lone surrogate in a name": (b'{"\\udfff": 1}', "its name"),
    "NaN": (b'{"agent": NaN}', "NaN"),
    "Infinity": (b'{"agent": -Infinity}', "Infinity"),
    "a float beyond floats": (b'{"agent": 1e400}', "agent"),
    "an integer of 30 digits": (b'{"agent": ' + b"9" * 30 + b"}", "agent"),
    "an integer of 5000 digits": (b'{"agent": ' + b"9" * 5000 + b"}", "not JSON"),
    "the same name twice": (b'{"agent": "default", "agent": "default"}', "agent: is given twice"),
    "deep lists": (b"[" * 100_000, "not JSON"),
    "deep objects": (b'{"a":' * 100_000, "not JSON"),
    "100 lists": (b'{"agent": ' + b"[" * 100 + b"]" * 100 + b"}", "nested deeper"),
    "latin-1": ('{"agent": "é"}'.encode("latin-1"), "not JSON"),
    "utf-16": ('{"agent": "default"}'.encode("utf-16"), "not JSON"),
    "a byte order mark": (b"\xef\xbb\xbf{}", "not JSON"),
    "overlong utf-8": (b'{"agent": "\xc0\x80"}', "not JSON"),
    "too large": (b'{"agent": "' + b"x" * 10_000_000 + b'"}', "over"),
}
POSTS = (
    "/v1/sessions",
    "/v1/sessions/{session}",
    "/v1/sessions/{session}/events",
    "/v1/approvals/{approval}/decide",
)


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_body_is_refused_by_name_and_changes_nothing(alice: Api, asked: tuple[str, str], name: str):
    body, named = BROKEN[name]
    session_id, _ = asked
    approval_id = alice.approval(session_id)["id"]
    before = alice.state(session_id)
    for path in POSTS:
        answer = alice.http.post(
            path.format(session=session_id, approval=approval_id), content=body, headers=JSON
        )
        assert named in refused(answer, 413 if name == "too large" else 400)
    assert alice.state(session_id) == before


@pytest.mark.parametrize(
    ("headers", "named"),
    [
        ({"content-type": "text/plain"}, "Content-Type"),
        ({"content-type": "application/x-www-form-urlencoded"}, "Content-Type"),
        ({"content-type": "multipart/form-data; boundary=x"}, "Content-Type"),
        ({**JSON, "content-encoding": "gzip"}, "Content-Encoding"),
        ({**JSON, "content-encoding": "br"}, "Content-Encoding"),
    ],
)
def test_wrong_headers_are_refused_by_name(alice: Api, idle: str, headers: dict[str, str], named: str):
    plain = json.dumps({"agent": "default", "environment_id": "default"}).encode()
    before = alice.state(idle)
    for body in (plain, gzip.compress(plain), b"\x1f\x8b broken"):
        assert named in refused(alice.http.post("/v1/sessions", content=body, headers=headers), 400)
    assert alice.state(idle) == before


@pytest.mark.parametrize("key", ["", "k" * 256])
def test_a_wrong_idempotency_key_is_refused(alice: Api, idle: str, key: str):
    before = alice.state(idle)
    body = {"agent": "default", "environment_id": "default"}
    headers = {"idempotency-key": key}
    for url, sent in (("/v1/sessions", body), (f"/v1/sessions/{idle}/events", {"events": [message("x")]})):
        assert "Idempotency-Key" in refused(alice.http.post(url, json=sent, headers=headers), 400)
    assert alice.state(idle) == before


@pytest.mark.parametrize("body", [b"zz\r\n{}\r\n0\r\n\r\n", b"-5\r\n{}\r\n", b"5\r\n{}"])
def test_a_broken_chunked_body_ends_in_no_change(alice: Api, idle: str, body: bytes):
    before = alice.state(idle)
    where = httpx.URL(alice.served.service.url)
    key = alice.served.service.keys["alice"]
    head = (
        f"POST {where.path}/v1/sessions/{idle}/events HTTP/1.1\r\nhost: x\r\nx-api-key: {key}\r\n"
        "content-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
    )
    with socket.create_connection((where.host, where.port or 80), timeout=WAIT_S) as raw:
        raw.sendall(head.encode() + body)
        raw.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: raw.recv(65536), b""))
    assert not answer or answer.split()[1] == b"400", answer
    assert alice.state(idle) == before


# (fields of POST /v1/sessions in addition to the required ones, the field that the error names)
WRONG_SESSIONS: list[tuple[dict[str, Any], str]] = [
    ({"agent": None}, "agent"),
    ({"agent": 7}, "agent"),
    ({"agent": {"type": "agent"}}, "agent.id"),
    ({"agent": {"type": "human", "id": "default"}}, "agent.type"),
    ({"agent": {"type": "agent", "id": "default", "version": 2}}, "agent.version"),
    ({"agent": {"type": "agent", "id": "default", "model": {"id": ""}}}, "agent.model.id"),
    ({"agent": {"type": "agent", "id": "default", "system": "x" * 100_001}}, "agent.system"),
    (
        {"agent": {"type": "agent", "id": "default", "tools": [{"type": "mcp_toolset"}]}},
        "agent.tools.0.mcp_server_name",
    ),
    (
        {
            "agent": {
                "type": "agent",
                "id": "default",
                "permission_rules": [{"rule": "Bash(", "policy": "always_ask"}],
            }
        },
        "agent.permission_rules.0",
    ),
    (
        {"agent": {"type": "agent", "id": "default", "permission_mode": "bypassPermissions"}},
        "agent.permission_mode",
    ),
    ({"environment_id": None}, "environment_id"),
    ({"environment_id": ["default"]}, "environment_id"),
    ({"title": 1}, "title"),
    ({"title": "x" * 501}, "title"),
    ({"tittle": "x"}, "tittle"),
    ({"metadata": "x"}, "metadata"),
    ({"metadata": {"a": 1}}, "metadata.a"),
    ({"metadata": {"k" * 65: "v"}}, "metadata." + "k" * 65),
    ({"metadata": {"k": "v" * 513}}, "metadata.k"),
    ({"metadata": {str(i): "v" for i in range(17)}}, "metadata"),
    ({"initial_events": {}}, "initial_events"),
    ({"initial_events": [{"type": "user.interrupt"}]}, "initial_events.0.type"),
    ({"initial_events": [message("x")] * 51}, "initial_events"),
    ({"resources": [{}]}, "resources"),
    ({"vault_ids": ["vlt_1"]}, "vault_ids"),
    ({"budget": {}}, "budget"),
]
WRONG_EVENTS: list[tuple[Any, str]] = [
    (7, "events.0"),
    (None, "events.0"),
    ({}, "events.0"),
    ({"type": "user.nonsense"}, "events.0"),
    ({"type": "agent.message", "content": []}, "events.0"),
    ({"type": "user.message"}, "events.0.content"),
    ({"type": "user.message", "content": "hello"}, "events.0.content"),
    ({"type": "user.message", "content": []}, "events.0.content"),
    ({"type": "user.message", "content": [{"type": "text", "text": ""}]}, "events.0.content.0.text"),
    ({"type": "user.message", "content": [{"type": "text", "text": 1}]}, "events.0.content.0.text"),
    (message("x" * 1_000_001), "events.0.content.0.text"),
    ({"type": "user.message", "content": [{"type": "document"}]}, "events.0.content.0"),
    ({**message("x"), "decided_by": "me"}, "events.0.decided_by"),
    ({"type": "user.interrupt", "session_thread_id": "sthr_1"}, "events.0.session_thread_id"),
    ({"type": "user.tool_confirmation", "result": "allow"}, "events.0.tool_use_id"),
    (confirmation("", "allow"), "events.0.tool_use_id"),
    (confirmation("x", "yes"), "events.0.result"),
    (confirmation("x", "allow", updated_input=[]), "events.0.updated_input"),
    (confirmation("x", "allow", answers={"q": 1}), "events.0.answers.q"),
    (confirmation("x", "allow", remember={}), "events.0.remember"),
    (confirmation("x", "deny", deny_message="x" * 10_001), "events.0.deny_message"),
    (confirmation("x", "allow", approved=True), "events.0.approved"),
]
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "!!"}}


@pytest.mark.parametrize(("wrong", "field"), WRONG_SESSIONS)
def test_a_wrong_session_is_refused_by_field(alice: Api, idle: str, wrong: dict[str, Any], field: str):
    before = alice.state(idle)
    body = {"agent": "default", "environment_id": "default", **wrong}
    assert refused(alice.http.post("/v1/sessions", json=body), 400).startswith(f"{field}: ")
    assert alice.state(idle) == before


@pytest.mark.parametrize(
    ("wrong", "field"),
    [*WRONG_EVENTS, ({"type": "user.message", "content": [IMAGE]}, "events.0.content.0.source.data")],
)
def test_a_wrong_event_is_refused_by_field_with_all_that_came_with_it(
    alice: Api, asked: tuple[str, str], wrong: Any, field: str
):
    session_id, _ = asked
    before = alice.state(session_id)
    assert refused(alice.send(session_id, wrong), 400).startswith(f"{field}: ")
    refused(alice.send(session_id, message("a good one before"), wrong), 400)
    assert alice.state(session_id) == before


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"title": 1}, "title"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"metadata": {str(i): "v" for i in range(17)}}, "metadata"),
        ({"agent": {}}, "agent"),
        ({"status": "running"}, "status"),
    ],
)
def test_a_wrong_change_is_refused_by_field(alice: Api, idle: str, body: Any, field: str):
    before = alice.state(idle)
    assert refused(alice.http.post(f"/v1/sessions/{idle}", json=body), 400).startswith(f"{field}: ")
    assert alice.state(idle) == before


def test_too_few_and_too_many_events_are_refused(alice: Api, idle: str):
    before = alice.state(idle)
    for events in ([], [message("x")] * 101):
        assert refused(alice.send(idle, *events), 400).startswith("events: ")
    assert alice.state(idle) == before


def test_an_unknown_agent_or_environment_is_not_found(alice: Api, idle: str):
    before = alice.state(idle)
    for wrong in ({"agent": "other"}, {"environment_id": "other"}, {"environment_id": "\u202e"}):
        body = {"agent": "default", "environment_id": "default", **wrong}
        refused(alice.http.post("/v1/sessions", json=body), 404)
    assert alice.state(idle) == before


@pytest.mark.parametrize("body", [{"grace_s": "soon"}, {"grace_s": None}, {"grace_s": [1]}])
def test_a_wrong_grace_is_refused(alice: Api, body: Any):
    headers = {"x-api-key": OPERATOR_KEY}
    assert "grace_s" in refused(alice.http.post("/v1/internal/drain", json=body, headers=headers), 400)


@pytest.mark.parametrize("key", ["", "alice-secret", "é"])
def test_no_api_key_drains_the_service(alice: Api, key: str):
    headers = {"x-api-key": key.encode()}
    refused(alice.http.post("/v1/internal/drain", json={}, headers=headers), 401)


# -- queries

LIMITS = ("0", "-1", "x", "", "1001", "1e3", "1.0", "٣", "0000001000000", "000000001" + "0" * 4000)
SESSION_QUERIES: list[tuple[str, str]] = [
    *((f"limit={limit}", "limit") for limit in LIMITS),
    ("page=garbage", "page"),
    ("page=%00", "page"),
    ("page=c2Vzc2lvbnM", "page"),
    ("page=%F0%9F%98%80", "page"),
    ("order=up", "order"),
    ("order=", "order"),
    ("statuses=waiting", "statuses"),
    ("statuses[]=idle&statuses[]=IDLE", "statuses"),
    ("created_at[gt]=yesterday", "created_at[gt]"),
    ("created_at[gte]=2026-01-01T00:00:00", "created_at[gte]"),
    ("created_at[lt]=0001-01-01T00:00:00%2B23:59", "created_at[lt]"),
    ("created_at[lte]=9999-12-31T23:59:59-23:59", "created_at[lte]"),
    ("created_at[lte]=1e300", "created_at[lte]"),
    ("include_archived=perhaps", "include_archived"),
    ("agent_id=%00", "agent_id"),
    ("deployment_id=x", "deployment_id"),
]
QUERIES: list[tuple[str, str, str]] = [
    *(("/v1/sessions", query, field) for query, field in SESSION_QUERIES),
    ("/v1/sessions/{idle}/events", "types=agent.nonsense", "types"),
    ("/v1/sessions/{idle}/events", "types[]=%00", "types"),
    ("/v1/sessions/{idle}/events", "limit=0", "limit"),
    ("/v1/sessions/{idle}/events", "page=garbage", "page"),
    ("/v1/sessions/{idle}/events", "order=random", "order"),
    ("/v1/sessions/{idle}/events", "created_at[gt]=soon", "created_at[gt]"),
    ("/v1/sessions/{idle}/events/stream", "event_deltas=agent.tool_use", "event_deltas"),
    ("/v1/sessions/{idle}/events/stream", "event_deltas[]=", "event_deltas"),
    ("/v1/approvals", "states=waiting", "states"),
    ("/v1/approvals", "limit=x", "limit"),
    ("/v1/approvals", "page=c2Vzc2lvbnM", "page"),
    ("/v1/approvals", "session_id=%00", "session_id"),
    ("/v1/agents", "limit=x", "limit"),
    ("/v1/agents", "page=x", "page"),
    ("/v1/agents/default", "version=latest", "version"),
    ("/v1/environments", "limit=0", "limit"),
]


@pytest.mark.parametrize(("path", "query", "field"), QUERIES)
def test_a_wrong_query_is_refused_by_field(alice: Api, idle: str, path: str, query: str, field: str):
    answer = alice.http.get(f"{path.format(idle=idle)}?{query}")
    assert refused(answer, 400).startswith(field)


@pytest.mark.parametrize("cursor", ["x", "", "-1", "1.5", "99", "٣", "0" * 18 + "9" * 30, "0" * 5000])
def test_a_wrong_last_event_id_is_refused(alice: Api, idle: str, cursor: str):
    answer = alice.http.get(f"/v1/sessions/{idle}/events/stream", headers={"last-event-id": cursor.encode()})
    assert refused(answer, 400).startswith("Last-Event-ID")


# -- decisions


def test_deciding_twice_is_once_and_another_decision_is_told_who_was_first(alice: Api):
    session_id, event_id = alice.waiting()
    approval_id = alice.approval(session_id)["id"]
    first = alice.confirm(session_id, event_id, "deny", deny_message="no")
    before = alice.state(session_id)[2]
    again = alice.confirm(session_id, event_id, "deny", deny_message="no")
    assert (first.status_code, again.status_code) == (200, 200)
    assert first.json() == again.json()
    for other in (
        alice.confirm(session_id, event_id, "allow"),
        alice.confirm(session_id, event_id, "deny", deny_message="another reason"),
        alice.http.post(f"/v1/approvals/{approval_id}/decide", json={"result": "allow"}),
    ):
        assert "already decided (deny) by alice" in refused(other, 409)
    assert alice.state(session_id)[2] == before
    assert before["data"][0]["state"] == "denied"


def test_a_decision_by_approval_id_is_the_same_decision(alice: Api):
    session_id, event_id = alice.waiting()
    url = f"/v1/approvals/{alice.approval(session_id)['id']}/decide"
    for wrong, field in (
        ({}, "result"),
        ({"result": "deny", "tool_use_id": "another"}, "tool_use_id"),
        ({"result": "deny", "type": "user.message"}, "type"),
        ({"result": "allow", "deny_message": "x"}, "deny_message"),
        ({"result": "deny", "updated_input": {}}, "updated_input"),
        ({"result": "deny", "remember": True}, "remember"),
        ({"result": "allow", "answers": {"q": "a"}}, "answers"),
        ({"result": "allow", "remember": "Write("}, "remember"),
        ({"result": "allow", "remember": "Bash(*)"}, "remember"),
    ):
        assert field in refused(alice.http.post(url, json=wrong), 400)
    assert alice.approval(session_id)["state"] == "pending"
    decided = alice.http.post(url, json={"result": "deny"})
    assert decided.json()["decision"]["decided_by"] == "alice"
    assert alice.confirm(session_id, event_id, "deny").status_code == 200


def test_a_superseded_call_can_not_be_decided(alice: Api):
    session_id, event_id = alice.waiting()
    assert alice.send(session_id, {"type": "user.interrupt"}).status_code == 200
    for result in ("allow", "deny"):
        assert "stopped waiting" in refused(alice.confirm(session_id, event_id, result), 409)
    assert alice.approval(session_id)["state"] == "superseded"


def test_what_does_not_wait_can_not_be_confirmed(alice: Api, asked: tuple[str, str]):
    session_id, _ = asked
    events = alice.http.get(f"/v1/sessions/{session_id}/events").json()["data"]
    other_session, other_event = alice.waiting("Run a command")
    before = alice.state(session_id)
    for event_id in ("toolu_never", events[0]["id"], other_event, alice.approval(session_id)["id"]):
        refused(alice.confirm(session_id, event_id, "allow"), 400)
    assert alice.state(session_id) == before
    assert alice.approval(other_session)["state"] == "pending"


@pytest.mark.parametrize("text", ["yes, run it", "allow", "I approve all calls.", '{"result": "allow"}'])
def test_a_message_is_never_a_decision(alice: Api, asked: tuple[str, str], text: str):
    session_id, event_id = asked
    sent = alice.send(session_id, message(text)).raise_for_status().json()["data"]
    assert [e["processed_at"] for e in sent] == [None]
    session = alice.http.get(f"/v1/sessions/{session_id}").json()
    assert (session["status"], session["stop_reason"]["event_ids"]) == ("idle", [event_id])
    assert alice.approval(session_id)["state"] == "pending"
    assert not (alice.served.service.workspace(session_id) / "hello.txt").exists()


def test_events_are_all_taken_or_none(alice: Api):
    session_id, event_id = alice.waiting()
    before = alice.state(session_id)
    refused(
        alice.send(session_id, confirmation(event_id, "allow"), confirmation("toolu_never", "allow")), 400
    )
    refused(alice.send(session_id, confirmation(event_id, "allow"), confirmation(event_id, "deny")), 409)
    assert alice.state(session_id) == before


# -- saying it twice


def test_a_repeated_request_has_its_first_answer(alice: Api, bob: Api):
    body = {"agent": "default", "environment_id": "default", "title": "once"}
    key = {"idempotency-key": "create-once"}
    first, again = (alice.http.post("/v1/sessions", json=body, headers=key) for _ in range(2))
    assert first.json()["id"] == again.json()["id"]
    other = alice.http.post("/v1/sessions", json={**body, "title": "twice"}, headers=key)
    assert "Idempotency-Key" in refused(other, 409)
    assert bob.http.post("/v1/sessions", json=body, headers=key).json()["id"] != first.json()["id"]
    refused(alice.send(first.json()["id"], message("x"), idempotency_key="create-once"), 409)


def test_repeated_events_are_queued_once(alice: Api):
    session_id, _ = alice.waiting()
    first, again = (alice.send(session_id, message("once"), idempotency_key="send-once") for _ in range(2))
    assert first.json() == again.json()
    refused(alice.send(session_id, message("twice"), idempotency_key="send-once"), 409)
    events = alice.http.get(f"/v1/sessions/{session_id}/events", params={"types": "user.message"}).json()[
        "data"
    ]
    assert [e["content"][0]["text"] for e in events][1:] == ["once"]


# -- anything at all

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(), max_size=8)
    | st.sampled_from(["default", "user.message", "allow", "\x00", "\ud800", "x" * 2000])
)
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
GOOD: dict[str, Any] = {
    "/v1/sessions": {
        "agent": {
            "type": "agent_with_overrides",
            "id": "default",
            "model": "default",
            "tools": [{"type": "agent_toolset_20260401", "configs": [{"name": "bash", "enabled": True}]}],
            "permission_rules": [{"rule": "Bash(ls)", "policy": "always_ask"}],
        },
        "environment_id": "default",
        "title": "fuzz",
        "metadata": {"a": "b"},
    },
    "/v1/sessions/{session}": {"title": "fuzz", "metadata": {"a": None}},
    "/v1/sessions/{session}/events": {
        "events": [
            {"type": "user.message", "content": [{"type": "text", "text": "fuzz"}]},
            {
                "type": "user.tool_confirmation",
                "tool_use_id": "toolu_never",
                "result": "deny",
                "deny_message": "x",
            },
        ]
    },
    "/v1/approvals/{approval}/decide": {
        "result": "never",
        "updated_input": {"a": {}},
        "answers": {"q": ["a"]},
    },
}


@st.composite
def mutated(draw: st.DrawFn) -> tuple[str, Any]:
    """Returns a path and a body in which one part was replaced by an arbitrary value."""
    path = draw(st.sampled_from(sorted(GOOD)))
    body = copy.deepcopy(GOOD[path])
    at, key = {"root": body}, "root"
    while isinstance(inside := at[key], dict | list) and inside and draw(st.booleans()):
        at, key = (
            inside,
            draw(st.sampled_from(list(inside) if isinstance(inside, dict) else range(len(inside)))),
        )
    at[key] = draw(ANYTHING)
    return path, at["root"] if key == "root" else body


@pytest.mark.takes_long("a fuzzer makes 150 bodies for each kind of request")
@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(case=mutated())
def test_nothing_that_is_json_is_a_failure_of_the_service(
    alice: Api, asked: tuple[str, str], case: tuple[str, Any]
):
    path, body = case
    session_id, _ = asked
    approval_id = alice.approval(session_id)["id"]
    raw = json.dumps(body).encode()
    answer = alice.http.post(path.format(session=session_id, approval=approval_id), content=raw, headers=JSON)
    if answer.status_code != 200:
        refused(answer)
    answer.json()
    assert alice.approval(session_id)["state"] == "pending"
