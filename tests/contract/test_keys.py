"""API keys are created, listed, replaced and revoked; a revoked or replaced key is refused, and its sessions stay."""

import json
import re
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from claude_hitl_template.config.secret_files import hash_api_key
from claude_hitl_template.domain.models import Agent, Environment
from claude_hitl_template.errors import Conflict, NotFound
from claude_hitl_template.store.core import CoreStore
from claude_hitl_template.testing.local_service import OPERATOR_KEY
from claude_hitl_template.testing.threaded import Threaded, serve_in_thread
from tests.contract.asking import key_of
from tests.contract.routes import OPERATIONS

NEW_SESSION = {"agent": "default", "environment_id": "default"}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Threaded]:
    folder = tmp_path_factory.mktemp("keys")
    with serve_in_thread(folder, keys={"alice": "first"}, driving=False) as one:
        yield one


@pytest.fixture
def operator(served: Threaded) -> Iterator[httpx.Client]:
    with _client(served, OPERATOR_KEY) as client:
        yield client


def _client(served: Threaded, key: str) -> httpx.Client:
    # It is not encrypted: `verify` would only read all authorities, for each client.
    return httpx.Client(base_url=served.service.url, headers={"x-api-key": key}, timeout=30, verify=False)


def made(operator: httpx.Client, name: str = "bob") -> dict[str, Any]:
    answer = operator.post("/v1/admin/keys", json={"name": name})
    assert answer.status_code == 200, answer.text
    return answer.json()


def listed(operator: httpx.Client, key_id: str) -> dict[str, Any]:
    (found,) = [k for k in operator.get("/v1/admin/keys").json()["data"] if k["id"] == key_id]
    return found


def stops_working(client: httpx.Client, within_s: float = 1.0) -> None:
    deadline = time.monotonic() + within_s
    while client.get("/v1/sessions").status_code not in (401, 429):  # so many wrong keys are held up
        assert time.monotonic() < deadline


def test_a_key_is_shown_once_and_recognised_by_its_beginning(
    served: Threaded, operator: httpx.Client
) -> None:
    key = made(operator, "  bob  ")
    assert re.fullmatch(r"hitl_[\w-]{43}", key["secret"])
    assert key["secret"].startswith(key["prefix"])
    assert len(key["prefix"]) == 11
    with _client(served, key["secret"]) as bob:
        assert bob.post("/v1/sessions", json=NEW_SESSION).status_code == 200
    found = listed(operator, key["id"])
    assert (found["name"], found["first"], found["revoked_at"]) == ("bob", False, None)
    assert "secret" not in found
    whole = operator.get("/v1/admin/keys").text
    assert key["secret"] not in whole
    assert hash_api_key(key["secret"]) not in whole


def test_a_request_that_is_repeated_makes_one_key(served: Threaded, operator: httpx.Client) -> None:
    once, path = {"idempotency-key": "once"}, "/v1/admin/keys"
    key, again = (operator.post(path, json={"name": "carol"}, headers=once).json() for _ in range(2))
    assert key == again
    assert operator.post(path, json={"name": "another"}, headers=once).status_code == 409
    rotated, again = (operator.post(f"{path}/{key['id']}/rotate", headers=once).json() for _ in range(2))
    assert rotated == again
    assert rotated["secret"] != key["secret"]
    with _client(served, rotated["secret"]) as carol:
        assert carol.get("/v1/sessions").status_code == 200


def test_no_secret_of_a_key_is_in_the_database(served: Threaded, operator: httpx.Client) -> None:
    secret = made(operator)["secret"]
    files = [path for path in served.service.folder.iterdir() if path.name.startswith("hitl.sqlite3")]
    assert files
    for path in files:
        assert secret.encode() not in path.read_bytes()


def test_a_revoked_key_opens_no_route_within_a_second_and_another_still_does(
    served: Threaded, operator: httpx.Client
) -> None:
    key = made(operator)
    with _client(served, key["secret"]) as bob, _client(served, "first") as alice:
        assert bob.get("/v1/sessions").status_code == 200
        assert operator.delete(f"/v1/admin/keys/{key['id']}").json()["revoked_at"]
        stops_working(bob)
        for route, operation in OPERATIONS.items():
            method, path = route.split()
            if operation["security"]:
                answer = bob.request(method, re.sub(r"\{\w+\}", "x", path))
                assert answer.status_code in (401, 429), route
        assert alice.get("/v1/sessions").status_code == 200
    again = operator.delete(f"/v1/admin/keys/{key['id']}")
    assert again.json()["revoked_at"] == listed(operator, key["id"])["revoked_at"]


@pytest.mark.takes_long("a stream looks at its key every two seconds")
@pytest.mark.parametrize("what", ["revoke", "rotate"])
def test_streams_of_a_key_end_within_five_seconds(
    served: Threaded, operator: httpx.Client, what: str
) -> None:
    key = made(operator)
    with _client(served, key["secret"]) as bob:
        session = bob.post("/v1/sessions", json=NEW_SESSION).json()["id"]
        with bob.stream("GET", f"/v1/sessions/{session}/events/stream") as stream:
            lines = stream.iter_lines()
            assert next(lines) == ": connected"
            begun = time.monotonic()
            path = f"/v1/admin/keys/{key['id']}"
            assert (
                operator.delete(path) if what == "revoke" else operator.post(f"{path}/rotate")
            ).status_code == 200
            said = [line for line in lines if line.startswith(("event: error", "data: {"))]
            assert said[-2] == "event: error"
            assert json.loads(said[-1].removeprefix("data: "))["error"]["type"] == "authentication_error"
            assert time.monotonic() - begun < 5


def test_a_replaced_secret_stops_working_and_the_keys_sessions_stay(
    served: Threaded, operator: httpx.Client
) -> None:
    key = made(operator)
    with _client(served, key["secret"]) as before:
        session = before.post("/v1/sessions", json=NEW_SESSION).json()["id"]
        rotated = operator.post(f"/v1/admin/keys/{key['id']}/rotate").json()
        assert (rotated["id"], rotated["name"]) == (key["id"], "bob")
        assert rotated["secret"] != key["secret"]
        with _client(served, rotated["secret"]) as after:
            assert after.get(f"/v1/sessions/{session}").status_code == 200
        stops_working(before)
    former = [k for k in operator.get("/v1/admin/keys").json()["data"] if k["name"] == "bob, replaced"]
    assert former[-1]["revoked_at"]


def test_the_first_key_is_replaced_and_kept_for_the_command_line(
    served: Threaded, operator: httpx.Client
) -> None:
    """Runs last of the tests that use this key."""
    (first,) = [k for k in operator.get("/v1/admin/keys").json()["data"] if k["first"]]
    refused = operator.delete(f"/v1/admin/keys/{first['id']}")
    assert refused.status_code == 409
    assert "./hitl keys rotate" in refused.json()["error"]["message"]
    with _client(served, "first") as before:
        session = before.post("/v1/sessions", json=NEW_SESSION).json()["id"]
        secret = operator.post(f"/v1/admin/keys/{first['id']}/rotate").json()["secret"]
        stops_working(before)
        assert before.get("/v1/internal/secrets").status_code in (401, 429)
    with _client(served, secret) as after:
        assert after.get(f"/v1/sessions/{session}").status_code == 200
        assert after.get("/v1/internal/secrets").status_code == 200
    assert (served.service.folder / "api-key").read_text() == secret
    try:
        assert operator.get("/v1/admin/keys").json()["data"][0]["first"]
    finally:
        served.run(served.service.store.set_first_key(hash_api_key("another")))


NAMES = {
    "empty": "",
    "blank": "   ",
    "long": "x" * 101,
    "two lines": "a\nb",
    "hidden": "\u202ea",
    "number": 7,
    "null": None,
    "list": ["a"],
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES.keys())
def test_a_name_that_is_none_is_refused(operator: httpx.Client, name: object) -> None:
    answer = operator.post("/v1/admin/keys", json={"name": name})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith("name: ")


@pytest.mark.parametrize("key_id", ["key_none", "first", "%00", "..%2f..", "x" * 300, "🔑"])
def test_an_unknown_id_is_not_found(operator: httpx.Client, key_id: str) -> None:
    assert operator.delete(f"/v1/admin/keys/{key_id}").status_code in (400, 404)
    assert operator.post(f"/v1/admin/keys/{key_id}/rotate").status_code in (400, 404)


# -- the Store's rules, on every backend


async def test_rules_of_keys(store: CoreStore) -> None:
    key = await store.add_key("bob", "hash-1", "hitl_abc")
    role = await store.add_key("panel: ann", "panel:1")
    assert await store.list_keys() == [key]
    for change in (store.revoke_key(role.id), store.rotate_key(role.id, "x"), store.revoke_key("key_none")):
        with pytest.raises(NotFound):
            await change
    rotated = await store.rotate_key(key.id, "hash-2", "hitl_def")
    assert rotated == await store.rotate_key(key.id, "hash-2", "hitl_def")
    assert (rotated.id, rotated.prefix) == (key.id, "hitl_def")
    assert key_of(await store.find_identity("hash-1")) is None
    assert key_of(await store.find_identity("hash-2")) == rotated == await store.get_key(key.id)
    for taken in ("hash-1", "panel:1"):
        with pytest.raises(Conflict):
            await store.rotate_key(key.id, taken)
    assert (await store.add_key("again", "hash-1")).revoked_at is not None
    assert key_of(await store.find_identity("hash-1")) is None
    revoked = await store.revoke_key(key.id)
    assert revoked == await store.revoke_key(key.id)
    assert key_of(await store.find_identity("hash-2")) is None
    with pytest.raises(Conflict, match="revoked"):
        await store.rotate_key(key.id, "hash-3")


async def test_the_first_key_is_one_and_what_it_was_before_never_comes_back(store: CoreStore) -> None:
    first = await store.set_first_key("hash-1")
    assert first.first
    assert await store.set_first_key("hash-1") == first
    session = await store.create_session(
        first.id, agent=Agent(), environment=Environment(), title=None, metadata={}, initial=[]
    )
    second = await store.set_first_key("hash-2")
    assert second.id == first.id
    assert (await store.get_session(session.id, second.id)).id == session.id
    assert key_of(await store.find_identity("hash-1")) is None
    assert (await store.set_first_key("hash-1")).revoked_at is not None
    assert key_of(await store.find_identity("hash-1")) is None
    assert key_of(await store.find_identity("hash-2")) == second
    with pytest.raises(Conflict, match="keys rotate"):
        await store.revoke_key(first.id)
    other = await store.add_key("bob", "hash-3")
    assert (await store.set_first_key("hash-3")).id == other.id
    assert [key.id for key in await store.list_keys() if key.first] == [other.id]
    assert key_of(await store.find_identity("hash-2")) is not None


async def test_the_first_key_of_an_earlier_version_is_found_by_its_name(store: CoreStore) -> None:
    made = await store.add_key("first key", "hash-1")
    assert not made.first
    assert (await store.set_first_key("hash-2")).id == made.id
    assert key_of(await store.find_identity("hash-1")) is None
