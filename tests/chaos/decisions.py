"""A ledger in its own process, and people who decide through it while its database fails and recovers."""

import asyncio
import random
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from multiprocessing.sharedctypes import Synchronized
from typing import Any

from claude_hitl_template.domain.models import Event
from claude_hitl_template.domain.people import Actor
from claude_hitl_template.errors import AlreadyDecided, Unavailable
from claude_hitl_template.store.core import CoreStore
from claude_hitl_template.store.postgres import PostgresBackend
from tests import faults
from tests.chaos.crash_runs import Home
from tests.contract.asking import KEY, said

PEOPLE = 8  # of one ledger
PATIENCE_S = 120.0  # how long one decision may take before the test calls it lost
OPINIONS: Sequence[dict[str, Any]] = (
    {"result": "allow"},
    {"result": "allow", "updated_input": {"command": "ls -l"}},
    {"result": "deny", "deny_message": "not now"},
)

type Waiting = Sequence[tuple[str, str]]


def decide_all(home: Home, ledger: int, waiting: Waiting, answers: "Synchronized[int]") -> None:
    """Decides on each (session, call). Notes every answer as `acknowledged` or `refused`, and counts it."""
    faults.install(home.root / "faults")
    asyncio.run(_decide_all(home, ledger, waiting, answers))


async def _decide_all(home: Home, ledger: int, waiting: Waiting, answers: "Synchronized[int]") -> None:
    backend = PostgresBackend(home.url)
    store, queue = CoreStore(backend), iter(waiting)
    await asyncio.gather(*(_person(home, f"{ledger} {n}", store, queue, answers) for n in range(PEOPLE)))
    await backend.close()


async def _person(
    home: Home, name: str, store: CoreStore, queue: Iterator[tuple[str, str]], answers: "Synchronized[int]"
) -> None:
    chance = random.Random(name)
    for session_id, call in queue:
        asked = {"type": "user.tool_confirmation", "tool_use_id": call, **chance.choice(OPINIONS)}
        facts = {"client": name, "session_id": session_id, "asked": asked}
        try:
            event = await _decide(store, session_id, name, asked)
        except AlreadyDecided:
            home.note("refused", at=datetime.now(UTC), **facts)
        else:
            home.note("acknowledged", at=datetime.now(UTC), **facts, event=event.wire())
        with answers.get_lock():
            answers.value += 1


async def _decide(store: CoreStore, session_id: str, name: str, asked: dict[str, Any]) -> Event:
    """Sends a decision, and again with the same key until it is answered, as a good client does."""
    inbound, key = (
        [said(asked["tool_use_id"], **_opinion(asked))],
        f"{name} {session_id} {asked['tool_use_id']}",
    )
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                [event] = await store.send_events(
                    session_id, KEY, inbound, by=Actor(name=name), idempotency_key=key
                )
            except Unavailable:
                await asyncio.sleep(0.05)
            else:
                return event


def _opinion(asked: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in asked.items() if name not in ("type", "tool_use_id")}
