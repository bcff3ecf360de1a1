"""A session's token opens the model as long as its lease holds; the ledger is not asked at each request."""

from collections.abc import AsyncIterator

import httpx
import pytest_asyncio

from claude_hitl_template.api.model_endpoint import REMEMBER_S, build_model_app
from claude_hitl_template.config.secret_files import SigningKey
from claude_hitl_template.domain.models import Agent, Environment, Session
from claude_hitl_template.model import tokens
from claude_hitl_template.model.endpoint import OfflineUpstream
from claude_hitl_template.model.offline import Scenarios
from claude_hitl_template.store.core import CoreStore
from claude_hitl_template.testing.memory_backend import MemoryBackend

SECRET = b"x" * 32
BODY = {
    "model": "claude-opus-4-5",
    "max_tokens": 10,
    "messages": [{"role": "user", "content": "Reply with hello"}],
}


class Counting(CoreStore):
    asked = 0

    async def get_session(self, session_id: str, workspace_id: str | None = None) -> Session:
        self.asked += 1
        return await super().get_session(session_id, workspace_id)


class Scene:
    def __init__(self) -> None:
        self.now, self.store = 0.0, Counting(MemoryBackend())
        app = build_model_app(
            OfflineUpstream(Scenarios.load()), self.store, SigningKey(SECRET), lambda: self.now
        )
        self.http = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://model")

    async def status(self, session_id: str, epoch: int) -> int:
        headers = {"authorization": f"Bearer {tokens.mint(SECRET, session_id, epoch)}"}
        return (await self.http.post("/v1/messages", json=BODY, headers=headers)).status_code


@pytest_asyncio.fixture
async def scene() -> AsyncIterator[Scene]:
    made = Scene()
    async with made.http:
        yield made


async def a_session(store: CoreStore) -> str:
    made = await store.create_session(
        "key_1", agent=Agent(), environment=Environment(), title=None, metadata={}, initial=[]
    )
    return made.id


async def test_the_ledger_is_asked_once_a_second_and_a_lost_lease_opens_nothing_after_it(
    scene: Scene,
) -> None:
    session_id = await a_session(scene.store)
    await scene.store.acquire(session_id, "one", lease_s=15)
    for _ in range(5):
        assert await scene.status(session_id, 1) == 200
    assert scene.store.asked == 1
    await scene.store.drop_lease(session_id, 1)
    await scene.store.acquire(session_id, "another", lease_s=15)
    assert await scene.status(session_id, 2) == 200  # it is not held up by what was found for the one before
    assert await scene.status(session_id, 1) == 403
    assert await scene.status(session_id, 2) == 200
    scene.now += REMEMBER_S
    await scene.store.drop_lease(session_id, 2)
    assert await scene.status(session_id, 2) == 403


async def test_an_owner_that_lost_its_lease_is_refused_within_a_second(scene: Scene) -> None:
    session_id = await a_session(scene.store)
    await scene.store.acquire(session_id, "one", lease_s=15)
    assert await scene.status(session_id, 1) == 200
    await scene.store.drop_lease(session_id, 1)
    scene.now += REMEMBER_S
    assert await scene.status(session_id, 1) == 403


async def test_a_token_of_a_session_that_there_is_not_or_of_a_lease_to_come_opens_nothing(
    scene: Scene,
) -> None:
    session_id = await a_session(scene.store)
    await scene.store.acquire(session_id, "one", lease_s=15)
    assert await scene.status("sesn_none", 1) == 403
    assert await scene.status(session_id, 2) == 403
