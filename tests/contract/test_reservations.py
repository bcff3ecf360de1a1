"""An id that is reserved for a session to come is taken by one session, and only by one of the kind that it is for."""

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from claude_hitl_template.domain.models import Agent, Environment, Networking, Session, new_id, utcnow
from claude_hitl_template.domain.policy import PermissionPolicy
from claude_hitl_template.store.connect import migrate
from claude_hitl_template.store.core import CoreStore
from claude_hitl_template.store.postgres import PostgresBackend
from claude_hitl_template.store.sqlite import SqliteBackend, sqlite_url
from claude_hitl_template.testing.clock import FakeClock
from claude_hitl_template.testing.memory_backend import MemoryBackend
from tests.contract.asking import KEY, message

LASTS_S = 300.0
AT_ONCE = 12


def to_come(**different: Any) -> Session:
    now = utcnow()
    fields: dict[str, Any] = {"workspace_id": KEY, "agent": Agent(), "environment": Environment()}
    return Session(**{"id": new_id("sesn"), "created_at": now, "updated_at": now, **fields, **different})


async def created(store: CoreStore, **different: Any) -> str:
    fields: dict[str, Any] = {"agent": Agent(), "environment": Environment(), "title": None, "metadata": {}}
    fields |= {"workspace_id": KEY, "initial": [message("go")], **different}
    return (await store.create_session(**fields)).id


async def test_the_next_session_of_the_kind_has_the_reserved_id_and_the_one_after_it_another(
    backend: Any, clock: FakeClock
):
    store, reserved = CoreStore(backend, clock), to_come()
    await store.reserve(reserved, lasts_s=LASTS_S)
    assert await created(store, title="any", metadata={"k": "v"}) == reserved.id
    assert await created(store) != reserved.id


@pytest.mark.parametrize(
    "different",
    [
        {"workspace_id": "key_2"},
        {"agent": Agent(system="another")},
        {"agent": Agent(model="another")},
        {"agent": Agent(policy=PermissionPolicy(default="always_deny"))},
        {"environment": Environment(id="another")},
        {"environment": Environment(networking=Networking(type="unrestricted"))},
    ],
    ids=" ".join,
)
async def test_a_session_of_another_kind_does_not_take_it(
    backend: Any, clock: FakeClock, different: dict[str, Any]
):
    store, reserved = CoreStore(backend, clock), to_come()
    await store.reserve(reserved, lasts_s=LASTS_S)
    assert await created(store, **different) != reserved.id
    assert await created(store) == reserved.id


async def test_it_ends_with_its_time(backend: Any, clock: FakeClock):
    store, reserved = CoreStore(backend, clock), to_come()
    await store.reserve(reserved, lasts_s=LASTS_S)
    clock.now += timedelta(seconds=LASTS_S + 1)
    assert await created(store) != reserved.id


async def test_a_later_one_of_the_kind_replaces_it(backend: Any, clock: FakeClock):
    store, first, second = CoreStore(backend, clock), to_come(), to_come()
    await store.reserve(first, lasts_s=LASTS_S)
    await store.reserve(second, lasts_s=LASTS_S)
    assert {await created(store), await created(store)} & {first.id, second.id} == {second.id}


async def test_a_call_that_is_repeated_after_the_id_was_taken_offers_it_to_no_other_session(
    backend: Any, clock: FakeClock
):
    store, reserved = CoreStore(backend, clock), to_come()
    await store.reserve(reserved, lasts_s=LASTS_S)
    taken = await created(store)
    await store.reserve(reserved, lasts_s=LASTS_S)
    assert taken == reserved.id != await created(store)


async def test_a_repeated_creation_returns_the_session_that_took_it_and_takes_no_other(
    backend: Any, clock: FakeClock
):
    store, first, second = CoreStore(backend, clock), to_come(), to_come()
    await store.reserve(first, lasts_s=LASTS_S)
    taken = await created(store, idempotency_key="once")
    await store.reserve(second, lasts_s=LASTS_S)
    assert taken == first.id == await created(store, idempotency_key="once")
    assert await created(store) == second.id


@pytest_asyncio.fixture(params=["memory", "sqlite", "postgres"])
async def stores(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[list[CoreStore]]:
    """Two stores over one database; one where there cannot be several."""
    if request.param == "memory":
        yield [CoreStore(MemoryBackend())]
        return
    on_postgres = request.param == "postgres"
    url = request.getfixturevalue("database") if on_postgres else sqlite_url(tmp_path / "one.db")
    await asyncio.to_thread(migrate, url)
    backends = [PostgresBackend(url), PostgresBackend(url)] if on_postgres else [SqliteBackend(url)]
    yield [CoreStore(backend) for backend in backends]
    for backend in backends:
        await backend.close()


async def test_of_many_creations_at_once_one_takes_it_while_it_is_replaced(stores: list[CoreStore]):
    offered: list[str] = []

    async def offer() -> None:
        reserved = to_come()
        offered.append(reserved.id)
        await stores[0].reserve(reserved, lasts_s=LASTS_S)

    await offer()
    made: list[str] = []
    for _ in range(4):
        creations = [created(stores[number % len(stores)]) for number in range(AT_ONCE)]
        *ids, _ = await asyncio.gather(*creations, offer())
        made += map(str, ids)
    assert len(set(made)) == len(made)
    assert 1 <= len(set(made) & set(offered)) <= len(offered)
