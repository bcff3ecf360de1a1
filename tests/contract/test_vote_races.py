"""People allow, deny and edit one call at once, lose and regain their group meanwhile, and the call tries to run all along:
it never runs with fewer than its rule asks for, and is never blocked when enough of them agree.
"""

import asyncio
import random
import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from claude_hitl_template.domain.models import Approval, ApprovalState
from claude_hitl_template.errors import HitlError
from claude_hitl_template.store.core import CoreStore
from claude_hitl_template.store.postgres import PostgresBackend
from claude_hitl_template.store.sqlite import SqliteBackend, sqlite_url
from claude_hitl_template.testing.memory_backend import MemoryBackend
from tests.contract.voting import PUSH, Team, release

S = ApprovalState
EDITED = {"command": "git push -n"}
PEOPLE = 5
LANES = 4  # races at a time, each among people of its own
CALLS = 20  # of a session
FAST = {"memory": 400, "sqlite": 40, "postgres": 20}
MANY = {"memory": 1_000, "sqlite": 1_000, "postgres": 1_000}  # with each of two quorums: six thousand in all
RACES = [
    *(pytest.param(name, count, id=f"{name}-fast") for name, count in FAST.items()),
    *(pytest.param(name, count, id=f"{name}-slow", marks=pytest.mark.slow) for name, count in MANY.items()),
]


@pytest_asyncio.fixture
async def ledgers(
    request: pytest.FixtureRequest, kind: str, migrated: Path, tmp_path: Path
) -> AsyncIterator[list[CoreStore]]:
    """Two ledgers on one database; in memory there is one."""
    if kind == "memory":
        yield [CoreStore(MemoryBackend())]
        return
    backends: list[SqliteBackend | PostgresBackend]
    if kind == "sqlite":
        shutil.copy(migrated, tmp_path / "store.db")
        backends = [SqliteBackend(sqlite_url(tmp_path / "store.db")) for _ in range(2)]
    else:
        url = request.getfixturevalue("database")
        backends = [PostgresBackend(url) for _ in range(2)]
    yield [CoreStore(backend) for backend in backends]
    for backend in backends:
        await backend.close()


@dataclass
class Race:
    """What was tried on one call, in a time that counts steps."""

    ledgers: list[CoreStore]
    team: Team
    approval: Approval
    quorum: int
    chance: random.Random
    step: int = 0
    began: dict[str, int] = field(default_factory=dict[str, int])  # the first try of a person to allow it
    agreed: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    lost: dict[str, int] = field(default_factory=dict[str, int])  # when a person had certainly lost the group
    denied: int = 0
    ran: int = 0

    async def run(self) -> None:
        """Everything at once; each of it a moment later than the one before, or not."""
        names = [f"{self.team.workspace_id}p{n}" for n in range(PEOPLE)]
        voters = self.chance.sample(names, self.chance.randint(1, PEOPLE))
        tries = [self._allow(name, self.chance.choice((PUSH, PUSH, PUSH, EDITED))) for name in voters]
        tries += [self._allow(name, PUSH) for name in voters[:1]]  # twice
        tries += [self._lose(name) for name in self.chance.sample(names, self.chance.randint(0, 2))]
        if self.chance.random() < 0.2:
            tries.append(self._deny(self.chance.choice(names)))
        tries += [self._claim(given) for given in (PUSH, EDITED)]
        self.chance.shuffle(tries)
        async with asyncio.TaskGroup() as together:
            for one in tries:
                together.create_task(one)
        await self._claim(PUSH)
        await self._claim(EDITED)
        await self._check()
        for name in self.lost:
            await self.team.change(name, groups=("release",))

    async def _moment(self) -> CoreStore:
        for _ in range(self.chance.randint(0, 12)):
            await asyncio.sleep(0)
        self.step += 1
        return self.chance.choice(self.ledgers)

    async def _allow(self, name: str, given: dict[str, Any]) -> None:
        store = await self._moment()
        more: dict[str, Any] = {} if given == PUSH else {"updated_input": given}
        self.began.setdefault(name, self.step)
        try:
            await self.team.say(name, self.approval, store=store, **more)
        except HitlError:
            return
        self.agreed[name] = given

    async def _deny(self, name: str) -> None:
        try:
            await self.team.say(name, self.approval, "deny", store=await self._moment())
        except HitlError:
            return
        self.denied += 1

    async def _lose(self, name: str) -> None:
        store = await self._moment()
        await self.team.change(name, store=store, groups=())
        self.step += 1
        self.lost[name] = self.step

    async def _claim(self, given: dict[str, Any]) -> None:
        try:
            await self.team.run(self.approval, given, store=await self._moment())
        except HitlError:
            return
        self.ran += 1

    async def _check(self) -> None:
        found = await self.team.now(self.approval)
        may_run = found.state is S.CLAIMED
        assert found.state in (S.PENDING, S.DENIED, S.CLAIMED)
        assert (self.ran, self.denied) == (int(may_run), int(found.state is S.DENIED)), found.state
        if may_run:
            assert found.decision is not None
            final = found.decision.decided_by
            counted = {
                vote.name
                for vote in found.votes
                if vote.run_digest == found.run_digest
                and not self.lost.get(vote.name, self.began[final] + 1) < self.began[final]
            }
            assert len(counted) >= self.quorum, f"it ran with {counted}, of {found.votes}"
        steady = [given for name, given in self.agreed.items() if name not in self.lost]
        enough = max(steady.count(PUSH), steady.count(EDITED)) >= self.quorum
        assert found.state is not S.PENDING or not enough, f"{self.agreed} agreed, {self.lost} left"


async def races(ledgers: list[CoreStore], count: int, quorum: int, seed: str) -> list[Race]:
    """So many races of one lane, one after the other."""
    chance, ran = random.Random(seed), list[Race]()
    team = await Team.make(ledgers[0], release(quorum), name=seed)
    for n in range(PEOPLE):
        await team.person(f"{team.workspace_id}p{n}", "release")
    while len(ran) < count:
        calls = [f"t{n}" for n in range(min(CALLS, count - len(ran)))]
        for approval in await team.ask(await team.session(), *calls):
            race = Race(ledgers, team, approval, quorum, chance)
            await race.run()
            ran.append(race)
    return ran


@pytest.mark.parametrize(("kind", "count"), RACES)
@pytest.mark.parametrize("quorum", [2, 3])
async def test_a_call_never_runs_with_fewer_and_is_never_blocked_with_enough(
    ledgers: list[CoreStore], count: int, quorum: int
):
    async with asyncio.TaskGroup() as together:
        lanes = [
            together.create_task(races(ledgers, count // LANES, quorum, f"lane {lane} of {quorum}"))
            for lane in range(LANES)
        ]
    found = [race for lane in lanes for race in lane.result()]
    assert any(race.ran for race in found)
    assert any(not race.ran and not race.denied for race in found), "there were always enough"
