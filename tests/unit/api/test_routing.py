"""What a route's signature declares is all that it takes, without anything else to be kept up to date."""

import json
from types import SimpleNamespace
from typing import Annotated, Any

import pytest
from fastapi import APIRouter, Depends, FastAPI, Header, Query
from pydantic import Field
from starlette.testclient import TestClient

from claude_hitl_template.api import problems
from claude_hitl_template.api.auth import Access, Authenticator
from claude_hitl_template.api.parameters import Flag, Limit, Omitted
from claude_hitl_template.api.routing import Route, api_router, errors
from claude_hitl_template.api.strict_json import Body
from claude_hitl_template.errors import Unauthorized

MAX_BYTES = 200


class Note(Body):
    text: Annotated[str, Field(min_length=1)]
    count: int = 1


async def _check(_: Authenticator, request: Any) -> None:
    if request.headers.get("x-api-key") != "right":
        raise Unauthorized("a wrong key")


ACCESS = Access(_check)
router = api_router("notes", ACCESS)


async def _shared(loud: Flag = False) -> bool:
    return loud


@router.get("/notes/{note_id}")
async def get_note(
    note_id: str,
    loud: Annotated[bool, Depends(_shared)],
    limit: Limit = 20,
    kinds: Annotated[list[str] | Omitted, Query(alias="kinds[]")] = None,
    idempotency_key: Annotated[str | Omitted, Header(alias="Idempotency-Key")] = None,
) -> dict[str, Any]:
    """Answers what arrived."""
    return {"id": note_id, "loud": loud, "limit": limit, "kinds": kinds, "key": idempotency_key}


@router.post("/notes", responses=errors(413))
async def post_note(body: Note) -> dict[str, Any]:
    """Answers what arrived."""
    return body.model_dump()


@pytest.fixture
def http() -> TestClient:
    app = FastAPI()
    app.state.authenticator = None
    app.state.service = SimpleNamespace(max_request_bytes=MAX_BYTES)
    app.include_router(router)
    problems.install(app)
    return TestClient(app, headers={"x-api-key": "right"})


def refused(answer: Any, status: int = 400) -> str:
    assert answer.status_code == status, answer.text
    return answer.json()["error"]["message"]


def test_a_route_gets_what_its_signature_declares(http: TestClient):
    headers = {"idempotency-key": "k"}
    for query in ("kinds[]=a&kinds[]=b", "kinds=a&kinds=b"):
        found = http.get(f"/notes/1?limit=5&loud=true&{query}", headers=headers).json()
        assert found == {"id": "1", "loud": True, "limit": 5, "kinds": ["a", "b"], "key": "k"}
    assert http.post("/notes", json={"text": "x"}).json() == {"text": "x", "count": 1}
    assert http.post("/notes", content=b'{"text": "x"}').status_code == 200  # without a Content-Type


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("volume=1", "volume: no such parameter. This route takes limit, kinds[], loud"),
        ("limits=1", "limits: no such parameter; did you mean limit?"),
        ("limit=5&limit=6", "limit: is given more than once"),
        ("limit=", "limit: is empty"),
        ("limit=1_0", "limit: a whole number"),
        ("limit=1001", "limit: Input should be less than or equal to 1000"),
        ("loud=1", "loud: true or false"),
        ("kinds[]=a&kinds=b", "kinds: is also given as kinds[]"),
    ],
)
def test_a_parameter_that_the_signature_does_not_have_is_refused_by_name(
    http: TestClient, query: str, message: str
):
    assert refused(http.get(f"/notes/1?{query}")).startswith(message)


def test_a_header_and_a_body_that_the_signature_does_not_have_are_refused(http: TestClient):
    assert refused(http.post("/notes", json={"text": "x"}, headers={"idempotency-key": "k"}))
    assert refused(http.request("GET", "/notes/1", content=b"[]")).startswith("body: ")
    assert http.request("GET", "/notes/1", content=b" {} ").status_code == 200


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the body is not JSON"),
        (b"[]", "a JSON object"),
        (b'{"text": "x", "text": "y"}', "text: is given twice"),
        (b'{"text": "x", "count": NaN}', "the body is not JSON: NaN"),
        (b'{"text": "\\ud800"}', "text: contains a lone surrogate"),
        (b'{"text": ""}', "text: "),
        (b'{"text": "x", "count": "1"}', "count: "),
        (b'{"text": "x", "size": 1}', "size: "),
    ],
)
def test_a_body_is_strict_json_of_the_declared_model(http: TestClient, body: bytes, message: str):
    assert refused(http.post("/notes", content=body)).startswith(message)


def test_a_body_that_is_too_large_is_refused(http: TestClient):
    assert refused(http.post("/notes", content=json.dumps({"text": "x" * MAX_BYTES}).encode()), 413)


def test_a_stranger_learns_only_that_the_key_is_wrong(http: TestClient):
    for answer in (
        http.post("/notes", content=b"{" * MAX_BYTES * 2, headers={"x-api-key": "wrong"}),
        http.get("/notes/1?volume=1", headers={"x-api-key": "wrong"}),
    ):
        assert refused(answer, 401) == "a wrong key"


async def test_the_body_of_a_stranger_is_not_read(http: TestClient):
    sent: list[Any] = []

    async def receive() -> Any:
        raise AssertionError("the body was read")

    async def send(message: Any) -> None:
        sent.append(message)

    scope: dict[str, Any] = {
        "type": "http", "method": "POST", "path": "/notes", "query_string": b"", "headers": [],
    }  # fmt: skip
    await http.app(scope, receive, send)
    assert sent[0]["status"] == 401


def test_a_route_that_does_not_say_who_may_call_it_is_a_defect():
    open_to_all = APIRouter(route_class=Route)
    with pytest.raises(AssertionError, match="does not say who may call it"):
        open_to_all.get("/notes")(post_note)


def test_an_access_that_no_route_checked_answers_nothing():
    app = FastAPI(dependencies=[Depends(ACCESS)])
    app.get("/notes")(lambda: "open")
    with pytest.raises(KeyError):
        TestClient(app, headers={"x-api-key": "right"}).get("/notes")
