"""Eight people decide on the same call concurrently, thousands of times: one of them wins, and each answer says who.

`--scale N` is the number of races.
"""

import asyncio
import random
import shutil
from collections.abc import AsyncIterator, Sequence
from itertools import batched
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from claude_hitl_template.domain.events import UserToolConfirmation
from claude_hitl_template.domain.models import Approval, Event
from claude_hitl_template.domain.people import Actor
from claude_hitl_template.errors import AlreadyDecided
from claude_hitl_template.store.core import CoreStore
from claude_hitl_template.store.postgres import PostgresBackend
from claude_hitl_template.store.sqlite import SqliteBackend, sqlite_url
from tests.contract.asking import KEY, asking, log, said

CALLS = 20  # of a session; more would make each decision's look at what still waits a long one
LANES = 4  # races at a time
OPINIONS: Sequence[dict[str, Any]] = (
    {"result": "allow"},
    {"result": "allow"},
    {"result": "allow", "updated_input": {"command": "ls -l"}},
    {"result": "allow", "updated_input": {"command": "ls -a"}},
    {"result": "deny"},
    {"result": "deny"},
    {"result": "deny", "deny_message": "not now"},
    {"result": "deny", "deny_message": "never"},
)


@pytest_asyncio.fixture(params=["sqlite", "postgres"])
async def ledgers(
    request: pytest.FixtureRequest, migrated: Path, tmp_path: Path
) -> AsyncIterator[list[CoreStore]]:
    """Two ledgers on one database. (A service on SQLite has one, but races need two.)"""
    backends: list[SqliteBackend | PostgresBackend]
    if request.param == "sqlite":
        shutil.copy(migrated, tmp_path / "store.db")
        backends = [SqliteBackend(sqlite_url(tmp_path / "store.db")) for _ in range(2)]
    else:
        url = request.getfixturevalue("database")
        backends = [PostgresBackend(url) for _ in range(2)]
    yield [CoreStore(backend) for backend in backends]
    for backend in backends:
        await backend.close()


async def race(ledgers: list[CoreStore], session_id: str, call: str, chance: random.Random) -> Event:
    """Returns the winner's event, which all equal decisions must have received; all others must be refused as too late."""
    opinions = [said(call, **opinion) for opinion in chance.sample(OPINIONS, len(OPINIONS))]
    people = chance.sample(range(len(opinions)), len(opinions))
    answers = await asyncio.gather(
        *(
            ledgers[person % len(ledgers)].send_events(
                session_id,
                KEY,
                [opinion],
                by=Actor(name=f"person {person}"),
                idempotency_key=f"{session_id} {call} {person}",
            )
            for person, opinion in zip(people, opinions, strict=True)
        ),
        return_exceptions=True,
    )
    told = [
        (opinion, answer)
        for opinion, answer in zip(opinions, answers, strict=True)
        if isinstance(answer, list)
    ]
    [won] = {event.id: event for _, [event] in told}.values()
    assert {is_told_by(opinion, won) for opinion, _ in told} == {True}
    assert len(told) == sum(is_told_by(opinion, won) for opinion in opinions)
    late = [answer for answer in answers if not isinstance(answer, list)]
    assert {type(answer) for answer in late} == {AlreadyDecided}
    assert {f"already decided ({won.payload['result']})" in str(answer) for answer in late} == {True}
    return won


def is_told_by(opinion: UserToolConfirmation, event: Event) -> bool:
    """Whether the event contains this decision."""
    fields = ("tool_use_id", "result", "deny_message", "updated_input")
    return [getattr(opinion, name) for name in fields] == [event.payload.get(name) for name in fields]


def agrees(approval: Approval, event: Event) -> bool:
    decision = approval.decision
    return decision is not None and [decision.result, decision.decided_by, decision.deny_message] == [
        event.payload.get(name) for name in ("result", "decided_by", "deny_message")
    ]


async def test_of_eight_decisions_at_once_one_wins_and_all_are_told(ledgers: list[CoreStore], scale: int):
    chance = random.Random("races")
    winners: set[str] = set()

    async def run(session_id: str, calls: Sequence[str]) -> None:
        won = [await race(ledgers, session_id, call, chance) for call in calls]
        assert await log(ledgers[-1], session_id, "user.tool_confirmation") == won
        kept = (await ledgers[0].list_approvals(KEY, limit=CALLS, session_id=session_id)).data
        by_call = {approval.event_id: approval for approval in kept}
        assert [
            call for call, event in zip(calls, won, strict=True) if not agrees(by_call[call], event)
        ] == []
        winners.update(event.payload["decided_by"] for event in won)

    calls = batched((f"t{n}" for n in range(scale)), CALLS)
    for some in batched(calls, LANES):
        sessions = [await asking(ledgers[0], *its) for its in some]
        await asyncio.gather(*(run(session_id, its) for session_id, its in zip(sessions, some, strict=True)))
    assert len(winners) > 1, "it was not a race: the same one was always first"
