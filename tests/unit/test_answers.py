"""Headers of every answer: an id that is in the log, too, and whether the request may be repeated."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
import structlog
from structlog.testing import capture_logs

from claude_hitl_template.api import auth
from claude_hitl_template.api.app import Service, build_app
from claude_hitl_template.api.request_ids import with_request_ids
from claude_hitl_template.config.secret_files import SecretFiles, hash_api_key
from claude_hitl_template.domain.events import UserMessage
from claude_hitl_template.domain.models import Agent, Environment, ImageFacts
from claude_hitl_template.domain.policy.floor import BUILT_IN
from claude_hitl_template.errors import (
    Conflict,
    HitlError,
    RateLimited,
    StaleOwner,
    StoreUnreachable,
    Unavailable,
)
from claude_hitl_template.store.core import CoreStore
from claude_hitl_template.store.protocol import Call
from claude_hitl_template.testing.memory_backend import MemoryBackend

KEY = "key-of-alice"
FACTS = {
    "version": "1",
    "model": "offline",
    "code": "c0de",
    "commit": "0123",
    "dirty": True,
    "package": "gcs://x.zip",
}
GIVEN = {"command": "ls"}


class Watched:
    """A store that records its calls, and fails as the test requests."""

    def __init__(self) -> None:
        self.store, self.asked = CoreStore(MemoryBackend()), list[str]()
        self.failure: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        async def call(*args: Any, **kwargs: Any) -> Any:
            self.asked.append(name)
            if self.failure is not None and name != "find_identity":
                raise self.failure
            return await getattr(self.store, name)(*args, **kwargs)

        return call


async def _none(_: Any) -> ImageFacts | None:
    return None


async def _drained(_: float) -> int:
    return 0


async def _nothing() -> None:
    pass


async def _long() -> float:
    return 0.0


@pytest.fixture
def watched() -> Watched:
    return Watched()


@pytest_asyncio.fixture
async def http(watched: Watched, tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    await watched.store.add_key("alice", hash_api_key(KEY))
    store: Any = watched
    app = build_app(
        Service(
            store=store, agent=Agent(), floor=BUILT_IN, environments={"default": Environment()}, image_facts=_none,
            facts=lambda: dict(FACTS), drain=_drained, undrain=_nothing, drained_s=_long,
            operator_key="operator",
            secret_files=SecretFiles(tmp_path), max_request_bytes=100_000, requests_per_minute=10_000,
        )
    )  # fmt: skip
    transport = httpx.ASGITransport(with_request_ids(app), raise_app_exceptions=False)
    async with httpx.AsyncClient(
        transport=transport, base_url="http://service", headers={"x-api-key": KEY}
    ) as client:
        yield client


async def asked(watched: Watched) -> str:
    """Returns the id of an approval that waits."""
    store = watched.store
    key = await store.add_key("alice", hash_api_key(KEY))
    first = UserMessage.model_validate({"type": "user.message", "content": [{"type": "text", "text": "go"}]})
    session = await store.create_session(
        key.id, agent=Agent(), environment=Environment(), title=None, metadata={}, initial=[first]
    )
    await store.acquire(session.id, "owner", lease_s=15)
    call = Call(call_id="toolu_1", tool_name="Bash", input=GIVEN, digest="0" * 64, verdict="ask")
    [approval] = await store.open_calls(session.id, 1, [], [call], cwd="/w", expires_at=None)
    return approval.id


def is_error(answer: httpx.Response, status: int) -> None:
    body = answer.json()
    assert (answer.status_code, body["type"]) == (status, "error")
    assert body["request_id"] == answer.headers["request-id"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/health", 200),
        ("GET", "/v1/version", 200),
        ("GET", "/v1/sessions", 200),
        ("GET", "/v1/sessions?nonsense=1", 400),
        ("GET", "/v1/sessions/nope", 404),
        ("GET", "/v1/nothing", 404),
        ("GET", "/", 404),
        ("GET", "/nothing%0Aelse", 404),
        ("PUT", "/v1/sessions", 405),
        ("POST", "/v1/sessions", 400),
        ("POST", "/v1/internal/drain", 401),
        ("HEAD", "/v1/sessions", 405),
        ("OPTIONS", "/v1/sessions", 405),
    ],
)
async def test_every_answer_has_an_id_that_the_log_names(
    http: httpx.AsyncClient, method: str, path: str, status: int
):
    with capture_logs(processors=[structlog.contextvars.merge_contextvars]) as lines:
        answer = await http.request(method, path)
        again = await http.request(method, path)
    assert answer.status_code == status
    assert answer.headers["request-id"] != again.headers["request-id"]
    if status >= 400 and method != "HEAD":
        is_error(answer, status)
    [line] = [line for line in lines if line.get("request_id") == answer.headers["request-id"]]
    assert (line["event"], line["method"], line["status"]) == ("request", method, status)
    assert line["path"] == path.partition("?")[0]


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PATCH", "/v1/sessions", "GET, POST"),
        ("PUT", "/v1/sessions/sesn_none", "DELETE, GET, POST"),
        ("DELETE", "/v1/agents", "GET"),
        ("PUT", "/v1/internal/drain", "DELETE, GET, POST"),
    ],
)
async def test_a_wrong_method_is_told_which_ones_there_are(
    http: httpx.AsyncClient, method: str, path: str, allowed: str
):
    answer = await http.request(method, path)
    is_error(answer, 405)
    assert answer.headers.get_list("allow") == [allowed]
    assert allowed in answer.json()["error"]["message"]


async def test_a_defect_is_a_500_whose_traceback_the_log_has_under_its_id(
    http: httpx.AsyncClient, watched: Watched
):
    watched.failure = KeyError("a defect")
    with capture_logs(processors=[structlog.contextvars.merge_contextvars]) as lines:
        answer = await http.get("/v1/sessions")
    is_error(answer, 500)
    assert "defect" not in answer.text
    assert answer.headers["x-should-retry"] == "false"
    [line] = [line for line in lines if line["log_level"] == "error"]
    assert line["request_id"] == answer.headers["request-id"]
    assert line["exc_info"] is watched.failure


@pytest.mark.parametrize(
    ("failure", "status", "headers"),
    [
        (Conflict("another"), 409, {"x-should-retry": "false"}),
        (StaleOwner("a defect"), 500, {"x-should-retry": "false"}),
        (Unavailable("away"), 503, {"retry-after": "5"}),
        (StoreUnreachable("away"), 503, {"retry-after": "5"}),
        (RateLimited("slowly", 7), 429, {"retry-after": "7"}),
    ],
)
async def test_a_failure_says_whether_asking_again_is_right(
    http: httpx.AsyncClient, watched: Watched, failure: HitlError, status: int, headers: Mapping[str, str]
):
    watched.failure = failure
    answer = await http.get("/v1/sessions")
    is_error(answer, status)
    given = {name: answer.headers.get(name) for name in ("x-should-retry", "retry-after")}
    assert given == {**dict.fromkeys(given), **headers}


async def test_what_fails_outside_of_the_application_has_an_id_too():
    async def broken(*_: object) -> None:
        raise RuntimeError("a defect")

    with capture_logs(processors=[structlog.contextvars.merge_contextvars]) as lines:
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(with_request_ids(broken)), base_url="http://service"
        ) as client:
            answer = await client.get("/x")
    is_error(answer, 500)
    assert {line["request_id"] for line in lines} == {answer.headers["request-id"]}


async def test_requests_at_the_same_time_have_ids_of_their_own(http: httpx.AsyncClient):
    answers = await asyncio.gather(*(http.get(f"/v1/sessions/none_{number}") for number in range(20)))
    assert len({answer.headers["request-id"] for answer in answers}) == 20
    for answer in answers:
        is_error(answer, 404)


async def test_a_stranger_is_not_told_which_commit_runs(http: httpx.AsyncClient):
    shown = (await http.get("/v1/health", headers={"x-api-key": ""})).json()
    assert shown == {"status": "ok", "version": "1", "model": "offline", "code": "c0de", "ray": None}
    assert (await http.get("/v1/version")).json() == FACTS


async def test_a_decision_over_rest_is_one_call_of_the_ledger(
    http: httpx.AsyncClient, watched: Watched, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(auth, "REMEMBER_S", 600.0)
    approval_id = await asked(watched)
    await http.get("/v1/version")  # the key is known from now on
    for _ in range(2):  # the same decision again, too
        watched.asked.clear()
        answer = await http.post(f"/v1/approvals/{approval_id}/decide", json={"result": "allow"})
        assert (answer.status_code, answer.json()["state"]) == (200, "allowed")
        assert watched.asked == ["decide"]
    assert (
        await http.post(f"/v1/approvals/{approval_id}/decide", json={"result": "deny"})
    ).status_code == 409
    assert (await http.post("/v1/approvals/nope/decide", json={"result": "deny"})).status_code == 404


async def test_the_inbox_shows_what_waits_unless_states_say_otherwise(
    http: httpx.AsyncClient, watched: Watched
):
    async def listed(**params: Any) -> list[str]:
        return [a["id"] for a in (await http.get("/v1/approvals", params=params)).json()["data"]]

    approval_id = await asked(watched)
    assert await listed() == await listed(**{"states[]": "pending"}) == [approval_id]
    await http.post(f"/v1/approvals/{approval_id}/decide", json={"result": "allow"})
    assert await listed() == []
    assert await listed(**{"states[]": ["pending", "allowed"]}) == [approval_id]
