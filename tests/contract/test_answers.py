"""Request ids, refusals and a service under load, seen through the official SDK, curl and the CLI's model endpoint."""

import sqlite3
from collections.abc import Iterator

import anthropic
import httpx
import pytest

from claude_hitl_template.testing.threaded import Threaded, serve_in_thread

KEY = "key-of-alice"
WAIT_S = 60


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Threaded]:
    with serve_in_thread(tmp_path_factory.mktemp("answers"), keys={"alice": KEY}, driving=False) as service:
        yield service


@pytest.fixture(scope="module")
def sdk(served: Threaded) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=served.service.url, api_key=KEY, max_retries=2) as client:
        yield client


def test_the_sdk_shows_the_id_of_an_answer_and_of_an_error(sdk: anthropic.Anthropic):
    made = sdk.beta.sessions.create(agent="default", environment_id="default")
    assert made._request_id
    assert made._request_id.startswith("req_")
    with pytest.raises(anthropic.NotFoundError) as missing:
        sdk.beta.sessions.retrieve("sesn_none")
    assert missing.value.request_id == missing.value.body["request_id"]


def test_the_sdk_does_not_repeat_a_conflict(sdk: anthropic.Anthropic):
    made = sdk.beta.sessions.create(agent="default", environment_id="default")
    sdk.beta.sessions.archive(made.id)
    with pytest.raises(anthropic.ConflictError) as conflict:
        sdk.beta.sessions.update(made.id, title="x")
    assert conflict.value.response.headers["x-should-retry"] == "false"
    assert conflict.value.response.request.headers["x-stainless-retry-count"] == "0"


def test_a_stream_has_an_id(served: Threaded, sdk: anthropic.Anthropic):
    made = sdk.beta.sessions.create(agent="default", environment_id="default")
    url = f"{served.service.url}/v1/sessions/{made.id}/events/stream"
    with httpx.stream("GET", url, headers={"x-api-key": KEY}, timeout=WAIT_S) as stream:
        assert stream.status_code == 200
        assert stream.headers["request-id"].startswith("req_")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/model/v1/messages", 403),
        ("POST", "/model/v1/nothing", 404),
        ("GET", "/model/v1/messages", 405),
        ("GET", "/nothing", 404),
        ("GET", "/../elsewhere", 404),
    ],
)
def test_what_stands_beside_the_api_answers_in_its_shape(
    served: Threaded, method: str, path: str, status: int
):
    answer = httpx.request(method, f"{served.service.url}{path}", json={} if method == "POST" else None)
    assert answer.status_code == status
    assert answer.json()["type"] == "error"
    assert answer.json()["request_id"] == answer.headers["request-id"]


def test_health_waits_for_nobodys_write(served: Threaded):
    with sqlite3.connect(served.service.folder / "hitl.sqlite3", isolation_level=None) as database:
        database.execute("BEGIN IMMEDIATE")
        answer = httpx.get(f"{served.service.url}/v1/health", timeout=WAIT_S)
        database.execute("ROLLBACK")
    database.close()
    assert (answer.status_code, answer.json()["status"]) == (200, "ok")


@pytest.mark.parametrize("base", ["/v1", "/v1/"])
def test_a_base_address_with_v1_is_told_that_it_goes_without(served: Threaded, base: str):
    with (
        anthropic.Anthropic(base_url=f"{served.service.url}{base}", api_key=KEY, max_retries=0) as client,
        pytest.raises(anthropic.NotFoundError, match="/v1 twice"),
    ):
        client.beta.sessions.list()
