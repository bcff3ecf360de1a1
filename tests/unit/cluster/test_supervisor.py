"""The supervisor keeps its promises for sessions, whatever happens to their owners. It runs as on a cluster, over a
fake host whose owners start, fail, hang, lie and die as a test requests."""

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import pytest_asyncio

from claude_hitl_template import code_version
from claude_hitl_template.cluster import containers
from claude_hitl_template.cluster.containers import Preflight
from claude_hitl_template.cluster.owner import first_of
from claude_hitl_template.cluster.owner_host import Assignment, CannotStart, Capacity, OwnerLost, Share
from claude_hitl_template.cluster.owner_pool import MOST_SESSIONS, Owner, OwnerPool
from claude_hitl_template.cluster.supervisor import HOLD_S, TICK_S, Supervisor
from claude_hitl_template.config.secret_files import SigningKey
from claude_hitl_template.config.settings import Settings
from claude_hitl_template.domain.events import UserInterrupt
from claude_hitl_template.domain.models import Agent, Environment, Session, Usage
from claude_hitl_template.domain.people import Actor
from claude_hitl_template.domain.policy.floor import BUILT_IN
from claude_hitl_template.errors import ConfigError, Unavailable
from claude_hitl_template.model import tokens
from claude_hitl_template.store.access import Authority
from claude_hitl_template.store.core import CoreStore
from claude_hitl_template.testing.memory_backend import MemoryBackend
from tests.contract.asking import KEY, create, message

SIGNING_KEY = SigningKey(b"k" * 32)
ROOM = Capacity(8.0, 2**40, 8.0, 2**40)
FULL = replace(ROOM, free_cpus=0.0)
IMAGE = "registry.example/worker:1"
TICKS = 50
LONG_S = 600.0


@dataclass
class Fake:
    """A host of owners. Each `drive` awaits the next of `ends`, or runs until it is ended."""

    room: Capacity = ROOM
    alive: dict[str, tuple[str, int] | None] = field(default_factory=dict[str, tuple[str, int] | None])
    assigned: list[Assignment] = field(default_factory=list[Assignment])
    ends: list[str | Exception] = field(default_factory=list[str | Exception])
    starts: list[Exception] = field(default_factory=list[Exception])
    started: list[str] = field(default_factory=list[str])
    ended: list[str] = field(default_factory=list[str])
    early: list[Assignment | None] = field(default_factory=list[Assignment | None])
    asked_for_room: list[str] = field(default_factory=list[str])
    prepared: list[tuple[str, Assignment | None]] = field(default_factory=list[tuple[str, Assignment | None]])
    codes: dict[str, str] = field(default_factory=dict[str, str])
    deaf: set[str] = field(default_factory=set[str])

    def contains(self, environment: Environment) -> bool:
        return environment.image is not None

    async def check(self, environment: Environment) -> None:
        pass

    async def start(
        self, name: str, environment: Environment, share: Share, early: Assignment | None = None
    ) -> None:
        if self.starts:
            raise self.starts.pop(0)
        self.early.append(early)
        self.alive[name] = None
        self.started.append(name)

    async def why_late(self, environment: Environment, limit: str) -> str:
        return f"nothing after {limit}"

    async def answers(self, name: str) -> bool:
        return name in self.alive and name not in self.deaf

    async def prepare(self, name: str, assignment: Assignment | None) -> bool:
        self.prepared.append((name, assignment))
        return assignment is not None

    async def drive(self, name: str, assignment: Assignment) -> str:
        self.alive[name] = assignment.session.id, assignment.session.epoch
        self.assigned.append(assignment)
        if self.ends:
            end = self.ends.pop(0)
            if isinstance(end, Exception):
                raise end
            return end
        await asyncio.Event().wait()
        raise AssertionError

    async def driving(self, name: str) -> tuple[str, int] | None:
        return self.alive.get(name)

    async def code(self, name: str) -> str | None:
        return self.codes.get(name, code_version())

    async def make_room(self, name: str) -> None:
        self.asked_for_room.append(name)

    async def end(self, name: str) -> None:
        if self.alive.pop(name, "none") != "none":
            self.ended.append(name)

    async def names(self) -> set[str]:
        return set(self.alive)

    async def capacity(self) -> Capacity:
        return self.room

    async def tidy(self) -> None:
        pass


class Flaky(CoreStore):
    """A store that is unreachable for some calls; `looked` counts the queries for sessions that have folders."""

    failures = looked = 0

    async def existing(self, session_ids: Sequence[str]) -> list[str]:
        found = await super().existing(session_ids)
        self.looked += 1
        return found

    async def supervised(self):
        if self.failures:
            self.failures -= 1
            raise Unavailable("the ledger does not answer")
        return await super().supervised()


@pytest_asyncio.fixture
async def store() -> Flaky:
    return Flaky(MemoryBackend())


@pytest.fixture
def host() -> Fake:
    return Fake()


type Make = Callable[..., Supervisor]


@pytest_asyncio.fixture
async def supervise(store: Flaky, host: Fake, tmp_path: Path) -> AsyncIterator[Make]:
    """Starts a supervisor with these settings, over `host` unless it is given another one."""
    made: list[Supervisor] = []

    def make(
        on: Fake = host,
        *,
        lease_s: float = 15.0,
        left_s: float = 600.0,
        silent_s: float = 60.0,
        **settings: object,
    ) -> Supervisor:
        given = Settings(data_dir=tmp_path, **{"spare_owners": 0, **settings})
        known = given.all_environments()
        one = Supervisor(
            given,
            store,
            on,
            SIGNING_KEY,
            environments=known,
            floor=BUILT_IN,
            steady_s=0.0,
            lease_s=lease_s,
            left_s=left_s,
            silent_s=silent_s,
        )
        one.start()
        made.append(one)
        return one

    yield make
    for one in made:
        await one.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.005)


async def until_session(store: CoreStore, session_id: str, condition: Callable[[Session], bool]) -> Session:
    async with asyncio.timeout(30):
        while not condition(found := await store.get_session(session_id)):
            await asyncio.sleep(0.005)
        return found


async def errors(store: CoreStore, session_id: str) -> list[str]:
    page = await store.list_events(session_id, KEY, limit=100, types=["session.error"])
    return [event.payload["error"]["message"] for event in page.data]


# -- starting


async def test_a_session_that_is_to_run_gets_an_owner_with_what_opens_its_own_data_alone(
    store: Flaky, host: Fake, supervise: Make
) -> None:
    supervise()
    session = await create(store)
    await until(lambda: bool(host.assigned))
    given, capability = host.assigned[0], Authority(SIGNING_KEY).check(host.assigned[0].capability)
    assert (given.session.id, given.session.epoch) == (session.id, session.epoch + 1)
    assert (capability.role, capability.session_id, capability.epoch) == (
        "owner",
        session.id,
        given.session.epoch,
    )
    assert tokens.check(SIGNING_KEY.secret, given.token) == (session.id, given.session.epoch)
    assert given.sandbox is not None
    lease = (await store.get_session(session.id)).lease
    assert lease is not None
    assert lease.holder == host.started[0]


async def test_an_owner_that_is_done_is_ended_and_its_lease_is_free(
    store: Flaky, host: Fake, supervise: Make
) -> None:
    host.ends = ["parked"]
    supervise()
    session = await create(store)
    await until(lambda: bool(host.ended))
    assert host.ended == host.started[:1]
    assert host.assigned[0].session.id == session.id


async def test_what_cannot_start_is_said_in_the_session_and_a_message_tries_again(
    store: Flaky, host: Fake, supervise: Make
) -> None:
    host.starts = [CannotStart("the image registry.example/worker:1 is missing")]
    supervise()
    session = await create(store)
    await until_session(store, session.id, lambda found: found.status == "idle")
    assert await errors(store, session.id) == ["the image registry.example/worker:1 is missing"]
    assert not host.assigned
    await store.send_events(session.id, KEY, [message("again")], by=Actor(name="ann"))
    await until(lambda: bool(host.assigned))


async def test_an_owner_that_does_not_answer_in_time_although_there_is_room_cannot_start(
    store: Flaky, host: Fake, supervise: Make
) -> None:
    host.starts = [TimeoutError()]
    supervise(start_timeout_s=7)
    session = await create(store)
    await until_session(store, session.id, lambda found: found.status == "idle")
    assert await errors(store, session.id) == ["nothing after 7 s (HITL_START_TIMEOUT_S)"]


async def test_a_defect_is_said_in_the_session_and_is_not_tried_again_each_second(
    store: Flaky, host: Fake, supervise: Make
) -> None:
    host.starts = [KeyError("a defect")]
    supervise()
    session = await create(store)
    await until_session(store, session.id, lambda found: found.status == "idle")
    assert (
        "failed to start the session (KeyError); ./hitl logs says where"
        in (await errors(store, session.id))[0]
    )


# -- owners that die, hang or lie


async def test_an_owner_that_dies_is_replaced(store: Flaky, host: Fake, supervise: Make) -> None:
    host.ends = [OwnerLost("killed")]
    supervise()
    session = await create(store)
    await until(lambda: len(host.assigned) == 2)
    first, second = (given.session for given in host.assigned)
    assert first.id == second.id == session.id
    assert second.epoch > first.epoch


async def test_a_session_whose_owners_always_die_is_given_up_with_a_reason(
    store: Flaky, host: Fake, supervise: Make
) -> None:
    host.ends = [OwnerLost("killed")] * 9
    supervise(max_recoveries=3)
    session = await create(store)
    await until_session(store, session.id, lambda found: found.status == "idle")
    assert len(host.assigned) == 4, "the first, and three that took its turn up again"
    assert "died 3 times in a row; send a message to try again" in (await errors(store, session.id))[0]


async def test_an_owner_that_hangs_without_renewing_its_lease_is_ended_and_replaced(
    store: Flaky, host: Fake, supervise: Make
) -> None:
    supervise(lease_s=0.2)
    await create(store)
    await until(lambda: len(host.assigned) == 2)
    assert host.ended == host.started[:1]


async def test_an_owner_whose_epoch_was_raised_is_ended(store: Flaky, host: Fake, supervise: Make) -> None:
    supervise(lease_s=0.5)
    session = await create(store)
    await until(lambda: bool(host.assigned))
    host.alive["another"] = session.id, host.assigned[0].session.epoch + 1
    await store.acquire(session.id, "another", lease_s=0.5)
    await until(lambda: host.started[0] in host.ended)


# -- owners of an earlier supervisor


async def taken(store: CoreStore, host: Fake, name: str = "earlier") -> Session:
    """Creates a session that the owner `name` of an earlier supervisor drives."""
    session = await store.acquire((await create(store)).id, name, lease_s=600)
    host.alive[name] = session.id, session.epoch
    return session


async def test_an_owner_that_works_is_left_alone_and_its_session_recovered_when_it_is_gone(
    store: Flaky, host: Fake, supervise: Make
) -> None:
    session = await taken(store, host)
    supervise(lease_s=0.5)
    await asyncio.sleep(3 * 0.1)  # some looks at it
    assert host.ended == host.asked_for_room == host.started == []
    del host.alive["earlier"]
    await until(lambda: bool(host.assigned))
    assert host.assigned[0].session.epoch > session.epoch


async def test_an_owner_that_says_it_drives_something_else_is_ended(
    store: Flaky, host: Fake, supervise: Make
) -> None:
    session = await taken(store, host)
    host.alive["earlier"] = session.id, session.epoch + 7
    supervise()
    await until(lambda: bool(host.assigned))
    assert host.ended == ["earlier"]


async def test_an_owner_of_other_code_is_asked_to_park_and_one_of_this_code_is_not(
    store: Flaky, host: Fake, supervise: Make
) -> None:
    await taken(store, host, "of this code")
    await taken(store, host, "of other code")
    host.codes["of other code"] = "0" * 12
    supervise()
    await until(lambda: bool(host.asked_for_room))
    assert host.asked_for_room == ["of other code"]
    assert not host.ended


async def test_owners_that_drive_nothing_are_ended_at_the_start(
    store: Flaky, host: Fake, supervise: Make
) -> None:
    await taken(store, host)
    host.alive["a spare of before"] = None
    supervise()
    await until(lambda: bool(host.ended))
    assert host.ended == ["a spare of before"]


async def test_a_store_that_cannot_be_reached_for_a_while_costs_nothing_but_that(
    store: Flaky, host: Fake, supervise: Make
) -> None:
    store.failures = 2
    supervise()
    await create(store)
    await until(lambda: bool(host.assigned))


# -- room


async def rests(store: Flaky, host: Fake, holder: str) -> None:
    """A session that keeps its owner after a turn."""
    session = await taken(store, host, holder)
    await store.send_events(session.id, KEY, [UserInterrupt(type="user.interrupt")], by=Actor(name="ann"))
    end_id, why = f"end {session.id}", {"type": "end_turn"}
    await store.end_turn(session.id, session.epoch, [], end_id=end_id, usage=Usage(), stop_reason=why)


async def test_an_idle_session_gives_up_its_place_and_the_one_that_gets_it_says_nothing(
    store: Flaky, host: Fake, supervise: Make
) -> None:
    await rests(store, host, "rests")
    host.room = FULL
    supervise()
    session = await create(store)
    await until(lambda: bool(host.asked_for_room))
    host.room = ROOM
    await until(lambda: bool(host.assigned))
    assert await errors(store, session.id) == []
    assert not (await store.get_session(session.id)).waits_for_room


async def test_a_session_that_lacks_room_says_so_once_and_the_one_that_rests_longest_is_asked_to_park(
    store: Flaky, host: Fake, supervise: Make
) -> None:
    for n in range(2):
        await rests(store, host, f"rests {n}")
    host.room = FULL
    supervise(silent_s=0.0)
    session = await create(store)
    await until(lambda: len(host.asked_for_room) >= 2)
    assert set(host.asked_for_room) == {"rests 0"}
    assert len(await errors(store, session.id)) == 1
    assert "no room for the session yet: 0 CPUs are free" in (await errors(store, session.id))[0]
    host.room = ROOM
    await until(lambda: bool(host.assigned))


async def test_what_can_never_have_room_is_given_up(store: Flaky, host: Fake, supervise: Make) -> None:
    host.room = Capacity(0.1, 2**40, 0.1, 2**40)
    supervise(session_cpus=2.0)
    session = await create(store)
    await until_session(store, session.id, lambda found: found.status == "idle")
    assert "the cluster has 0.1 CPUs" in (await errors(store, session.id))[0]


async def test_an_interrupted_session_waits_for_room_no_more(
    store: Flaky, host: Fake, supervise: Make
) -> None:
    host.room = FULL
    one = supervise()
    session = await create(store)
    await until_session(store, session.id, lambda found: found.waits_for_room)
    await store.send_events(session.id, KEY, [UserInterrupt(type="user.interrupt")], by=Actor(name="ann"))
    await store.archive_session(session.id, KEY)
    assert not (await store.get_session(session.id)).waits_for_room
    one.check_health()


# -- spares


async def test_a_session_is_given_the_spare_owner(store: Flaky, host: Fake, supervise: Make) -> None:
    supervise(spare_owners=1)
    await until(lambda: bool(host.started))
    await create(store)
    await until(lambda: bool(host.assigned))
    assert host.alive[host.started[0]] is not None


async def test_a_spare_that_does_not_answer_is_ended_and_another_owner_started(
    store: Flaky, host: Fake, supervise: Make
) -> None:
    supervise(spare_owners=1)
    await until(lambda: bool(host.started))
    host.deaf.add(host.started[0])
    await create(store)
    await until(lambda: bool(host.assigned))
    assert host.ended == host.started[:1]


async def test_spares_make_room_for_sessions(store: Flaky, host: Fake, supervise: Make) -> None:
    supervise(spare_owners=1, session_cpus=1.0)
    await until(lambda: bool(host.started))
    host.deaf.add(host.started[0])
    host.room = FULL
    session = await create(store)
    await until_session(store, session.id, lambda found: found.waits_for_room)
    assert host.ended == host.started[:1]


async def test_a_spare_that_cannot_start_is_tried_again_after_a_pause_and_not_at_each_tick(
    tmp_path: Path, host: Fake
) -> None:
    host.starts = [CannotStart("no image")] * TICKS
    pool, before = (
        OwnerPool(Settings(data_dir=tmp_path, spare_owners=1), host, _waits),
        asyncio.all_tasks(),
    )
    for _ in range(TICKS):
        await pool.tend_spares()
        await asyncio.gather(*(asyncio.all_tasks() - before))
    assert len(host.starts) == TICKS - 1


async def _waits(_session: Session, _why: str, _lacking_s: float | None) -> bool:
    return True


# -- owners that drive several sessions, one after another


@dataclass
class Park(Fake):
    """A host whose owners park when `rest` is set, and leave their sessions idle as after a turn."""

    store: CoreStore | None = None
    rest: asyncio.Event = field(default_factory=asyncio.Event)

    async def drive(self, name: str, assignment: Assignment) -> str:
        session = assignment.session
        self.alive[name] = session.id, session.epoch
        self.assigned.append(assignment)
        await self.work(session)
        assert self.store is not None
        await self.store.release(session.id, session.epoch)
        return "parked"

    async def work(self, session: Session) -> None:
        await self.rest.wait()
        await self.turn(session)

    async def turn(self, session: Session) -> None:
        assert self.store is not None
        [message] = (await self.store.snapshot(session.id, session.epoch)).queued
        await self.store.begin_turn(session.id, session.epoch, message.id)
        await self.store.end_turn(
            session.id, session.epoch, [], end_id=session.id, usage=Usage(), stop_reason={"type": "end_turn"}
        )

    async def capacity(self) -> Capacity:
        return replace(self.room, free_cpus=self.room.cpus - len(self.alive))


async def several(store: CoreStore, keys: Sequence[str]) -> None:
    for key in keys:
        await store.create_session(
            key, agent=Agent(), environment=Environment(), title=None, metadata={}, initial=[message()]
        )


@pytest.mark.parametrize(
    ("keys", "started"), [([KEY] * 9, 2), ([f"key_{n}" for n in range(9)], 9)], ids=["one key", "nine keys"]
)
async def test_an_owner_whose_session_parked_drives_the_next_one_of_the_same_key(
    store: Flaky, supervise: Make, keys: Sequence[str], started: int
) -> None:
    parks = Park(replace(ROOM, cpus=2.0), store=store)
    supervise(parks, session_cpus=1.0)
    await several(store, keys)
    await until(lambda: len(parks.assigned) == 2)
    parks.rest.set()
    await until(lambda: len(parks.assigned) == 9 and not parks.alive)
    assert len(parks.started) == started
    assert await store.supervised() == []


async def test_an_owner_of_a_container_and_one_that_has_driven_many_are_not_used_again(
    tmp_path: Path,
) -> None:
    host = Fake()
    pool = OwnerPool(Settings(data_dir=tmp_path, spare_owners=5), host, _waits)
    contained = Environment(image=IMAGE)
    for owner in (Owner("contained", contained), Owner("worn", Environment(), KEY, MOST_SESSIONS - 1)):
        host.alive[owner.name] = None
        await pool.give_back(owner, KEY)
    assert host.ended == ["contained", "worn"]


async def test_sessions_one_after_another_start_no_owner_but_the_first_two(
    store: Flaky, tmp_path: Path
) -> None:
    host = Fake()
    pool = OwnerPool(Settings(data_dir=tmp_path, spare_owners=1), host, _waits)
    session = await create(store)
    before = asyncio.all_tasks()
    for _ in range(6):
        owner = await pool.take(session, Environment())
        assert owner is not None
        await pool.tend_spares()
        await asyncio.gather(*(asyncio.all_tasks() - before))  # the spare is ready before the session parks
        await pool.give_back(owner, KEY)
    assert len(host.started) == 2
    assert host.ended == []


@dataclass
class Slow(Fake):
    """A host whose owners are ready when `ready` is set."""

    ready: asyncio.Event = field(default_factory=asyncio.Event)

    async def start(
        self, name: str, environment: Environment, share: Share, early: Assignment | None = None
    ) -> None:
        await super().start(name, environment, share, early)
        await self.ready.wait()


async def test_an_owner_rests_for_a_time_beside_the_spare_for_its_own_workspace_alone(
    store: Flaky, tmp_path: Path
) -> None:
    host = Fake()
    pool = OwnerPool(Settings(data_dir=tmp_path, spare_owners=1), host, _waits, rest_s=0.05)
    host.alive = {"first": None, "second": None, "third": None}
    for name in ("first", "second", "third"):
        await pool.give_back(Owner(name, Environment()), KEY)
    assert host.ended == ["third"]
    session = await create(store)
    stranger = await pool.take(session.but(workspace_id="key_other"), Environment())
    assert stranger is not None
    assert stranger.name not in ("first", "second")
    own = await pool.take(session, Environment())
    assert own == Owner("second", Environment(), KEY, driven=1)
    await pool.give_back(own, KEY)
    await asyncio.sleep(0.06)  # it is time itself that ends it
    await pool.tend_spares()
    assert host.ended == ["third", "second"]


async def test_an_owner_that_is_given_back_while_a_spare_starts_leaves_no_second_spare(
    tmp_path: Path,
) -> None:
    host, going = Slow(), asyncio.all_tasks()
    pool = OwnerPool(Settings(data_dir=tmp_path, spare_owners=1), host, _waits, rest_s=0.05)
    await pool.tend_spares()
    await until(lambda: bool(host.started))
    host.alive["back"] = None
    await pool.give_back(Owner("back", Environment()), KEY)
    host.ready.set()
    await asyncio.gather(*(asyncio.all_tasks() - going))
    assert host.ended == []
    await asyncio.sleep(0.06)  # it is time itself that ends it
    await pool.tend_spares()
    assert host.ended == host.started
    assert set(host.alive) == {"back"}


@dataclass
class Lingers(Park):
    """A host whose owners return a while after they gave their lease up."""

    back: asyncio.Event = field(default_factory=asyncio.Event)

    async def drive(self, name: str, assignment: Assignment) -> str:
        how = await super().drive(name, assignment)
        await self.back.wait()
        return how


async def test_an_owner_that_gave_its_lease_up_and_is_about_to_return_is_used_again(
    store: Flaky, supervise: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    lingers, get_session, seen = Lingers(store=store), store.get_session, asyncio.Event()

    async def get(session_id: str, workspace_id: str | None = None) -> Session:
        found = await get_session(session_id, workspace_id)
        if found.lease is None and lingers.assigned:
            seen.set()
        return found

    monkeypatch.setattr(store, "get_session", get)
    lingers.rest.set()
    supervise(lingers, lease_s=0.2)
    await several(store, [KEY])
    await seen.wait()
    lingers.back.set()
    await several(store, [KEY])
    await until(lambda: len(lingers.assigned) == 2)
    assert len(lingers.started) == 1


@dataclass
class Warm(Park):
    """A host of which one owner gets ready. It keeps its session after a turn, until it is asked to park."""

    async def start(
        self, name: str, environment: Environment, share: Share, early: Assignment | None = None
    ) -> None:
        if self.started:
            await asyncio.Event().wait()
        await super().start(name, environment, share, early)

    async def work(self, session: Session) -> None:
        self.rest.clear()
        await self.turn(session)
        await self.rest.wait()

    async def make_room(self, name: str) -> None:
        await super().make_room(name)
        self.rest.set()


async def test_an_idle_session_gives_its_owner_to_one_that_waits_for_its_turn_to_start(
    store: Flaky, supervise: Make
) -> None:
    warm = Warm(replace(ROOM, cpus=2.0), store=store)
    supervise(warm, session_cpus=0.25)
    await several(store, [KEY])
    await until(lambda: len(warm.assigned) == 1)
    await several(store, [KEY] * 4)  # two of them start, and two wait for that
    await until(lambda: len(warm.assigned) == 3)
    assert set(warm.asked_for_room) == set(warm.started)
    last = warm.assigned[-1].session.id
    idle = await until_session(store, last, lambda session: session.status == "idle")
    assert idle.lease is not None  # nothing waits for its owner


class FailsLater(Fake):
    """A host on which owners do not start, as it turns out in a while."""

    def __init__(self) -> None:
        super().__init__(replace(ROOM, cpus=2.0))
        self.known, self.tried = asyncio.Event(), 0

    async def start(
        self, name: str, environment: Environment, share: Share, early: Assignment | None = None
    ) -> None:
        self.tried += 1
        await self.known.wait()
        raise CannotStart("it does not start")


async def test_no_owner_is_started_while_others_are_given_back_sooner(store: Flaky, tmp_path: Path) -> None:
    host = FailsLater()
    pool = OwnerPool(
        Settings(data_dir=tmp_path, spare_owners=1), host, _waits, queue_s=LONG_S, start_s=LONG_S
    )
    sessions = [await create(store) for _ in range(4)]
    taking = [asyncio.create_task(pool.take(one, Environment())) for one in sessions]
    await until(lambda: host.tried == 2)
    free = Owner("free", Environment())
    await pool.give_back(free, KEY)
    assert await taking[2] == replace(free, workspace_id=KEY, driven=1)
    host.known.set()
    await asyncio.wait(taking[:2])
    for _ in range(TICKS):  # the turn of the last one comes
        await asyncio.sleep(0)
    assert host.tried == 2
    assert pool.wanted([free]) == [free]  # an idle one is asked for meanwhile
    await pool.give_back(free, KEY)
    assert await taking[3] == replace(free, workspace_id=KEY, driven=1)
    assert [type(one.exception()) for one in taking[:2]] == [CannotStart, CannotStart]
    await pool.tend_spares()
    for _ in range(TICKS):
        await asyncio.sleep(0)
    assert host.tried == 2  # and no spare one is


@pytest.mark.parametrize(("prepared", "starts"), [(False, 1), (True, 2)])
async def test_a_session_whose_cli_starts_in_a_spare_owner_counts_among_those_that_start(
    store: Flaky, tmp_path: Path, prepared: bool, starts: int
) -> None:
    host, spare = FailsLater(), Owner("spare", Environment())
    pool = OwnerPool(
        Settings(data_dir=tmp_path, spare_owners=1), host, _waits, queue_s=LONG_S, calm_s=0, start_s=LONG_S
    )
    host.alive["spare"] = None
    await pool.give_back(spare, KEY)
    sessions = [await create(store) for _ in range(3)]
    if prepared:
        pool.prepare(sessions[0])
    first = await pool.take(sessions[0], Environment())
    assert first is not None
    assert first.name == "spare"
    taking = [asyncio.create_task(pool.take(one, Environment())) for one in sessions[1:]]
    await until(lambda: host.tried == starts)
    for _ in range(TICKS):
        await asyncio.sleep(0)
    assert host.tried == starts
    for task in taking:
        task.cancel()
    await asyncio.wait(taking)


async def test_a_session_that_waits_for_its_turn_to_start_says_so(
    store: Flaky, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = Park(replace(ROOM, cpus=2.0), store=store)
    pool = OwnerPool(Settings(data_dir=tmp_path), host, waiting := Waiting(), queue_s=0.01)
    blocked = asyncio.Event()

    async def never(*_: object) -> None:
        await blocked.wait()

    monkeypatch.setattr(host, "start", never)
    sessions = [await create(store) for _ in range(3)]
    taking = [asyncio.create_task(pool.take(session, Environment())) for session in sessions]
    await until(lambda: bool(waiting.said))
    assert {session_id for session_id, _, _ in waiting.said} == {sessions[2].id}
    assert waiting.said[0][1:] == ("3 sessions start at once", None)
    blocked.set()
    assert all(await asyncio.gather(*taking))


class NoStart(Fake):
    """A host on which no owner gets ready, so that sessions wait for one that another gives back."""

    async def start(
        self, name: str, environment: Environment, share: Share, early: Assignment | None = None
    ) -> None:
        await asyncio.Event().wait()


async def test_a_session_that_an_owner_rests_for_does_not_wait_for_a_spare_that_starts(
    store: Flaky, tmp_path: Path
) -> None:
    host, session = NoStart(), await create(store)
    pool = OwnerPool(Settings(data_dir=tmp_path, spare_owners=1), host, _waits)
    for name, workspace_id in (("spare", "key_other"), ("resting", KEY)):
        host.alive[name] = None
        await pool.give_back(Owner(name, Environment()), workspace_id)
    await pool.take(session.but(workspace_id="key_other"), Environment())
    await pool.tend_spares()
    async with asyncio.timeout(30):
        assert await pool.take(session, Environment()) == Owner("resting", Environment(), KEY, driven=1)


async def test_a_session_that_a_human_decided_on_gets_an_owner_before_those_that_began_earlier(
    store: Flaky, tmp_path: Path
) -> None:
    host, waiting = NoStart(replace(ROOM, cpus=2.0)), Waiting()
    pool = OwnerPool(Settings(data_dir=tmp_path, spare_owners=0), host, waiting, queue_s=0.01)
    fresh = [await create(store) for _ in range(4)]
    decided = (await create(store)).but(deferred="toolu_1")
    taking = {one.id: asyncio.create_task(pool.take(one, Environment())) for one in (*fresh, decided)}
    await until(lambda: decided.id in {session_id for session_id, _, _ in waiting.said})
    await pool.give_back(Owner("free", Environment()), decided.workspace_id)
    assert (await taking[decided.id]) == Owner("free", Environment(), decided.workspace_id, driven=1)
    assert not any(taking[one.id].done() for one in fresh)
    for task in taking.values():
        task.cancel()
    await asyncio.wait(taking.values())


class Waiting:
    def __init__(self) -> None:
        self.said: list[tuple[str, str, float | None]] = []

    async def __call__(self, session: Session, reason: str, lacking_s: float | None) -> bool:
        self.said.append((session.id, reason, lacking_s))
        return True


# -- stopping


async def test_a_stop_that_is_taken_back_leaves_a_service_that_starts_sessions(
    store: Flaky, host: Fake, supervise: Make
) -> None:
    one = supervise()
    assert await one.drained_s() == 0
    assert await one.drain(0.0) == 0
    assert 0 < await one.drained_s() <= HOLD_S
    await create(store)
    await asyncio.sleep(2 * TICK_S)
    assert not host.started, "it was to start nothing"
    await one.undrain()
    await until(lambda: bool(host.assigned))
    assert await one.drained_s() == 0


async def test_a_stop_whose_caller_is_gone_ends_by_itself(store: Flaky, host: Fake, supervise: Make) -> None:
    await supervise().drain(-HOLD_S)
    await create(store)
    await until(lambda: bool(host.assigned))


async def test_a_drain_waits_until_what_runs_has_come_to_rest(
    store: Flaky, host: Fake, supervise: Make
) -> None:
    one = supervise()
    session = await create(store)
    await until(lambda: bool(host.assigned))
    draining = asyncio.create_task(one.drain(20.0))
    await asyncio.sleep(0.3)
    assert not draining.done()
    given = host.assigned[0].session
    await store.send_events(session.id, KEY, [UserInterrupt(type="user.interrupt")], by=Actor(name="ann"))
    await store.end_turn(
        given.id, given.epoch, [], end_id="end", usage=Usage(), stop_reason={"type": "end_turn"}
    )
    assert await draining == 0


async def test_the_supervisor_that_is_closed_leaves_nothing_running(
    store: Flaky, host: Fake, supervise: Make
) -> None:
    before = asyncio.all_tasks()
    one = supervise(spare_owners=1)
    await create(store)
    await until(lambda: bool(host.assigned))
    await one.close()
    assert asyncio.all_tasks() <= before
    assert host.ended == [given for given in host.started if given in host.ended]
    with pytest.raises(asyncio.CancelledError):
        one.check_health()


# -- what is left on the machine


async def test_a_deleted_session_leaves_no_folder_and_what_other_stores_have_here_stays(
    store: Flaky, host: Fake, supervise: Make, tmp_path: Path
) -> None:
    session, kept = await create(store, first=None), await create(store, first=None)
    for name in (session.id, kept.id, "sesn_of_another_store"):
        (tmp_path / "workspaces" / name).mkdir(parents=True)
        (tmp_path / "workspaces" / name / "notes.txt").write_text("private")
        (tmp_path / "saved").mkdir(exist_ok=True)
        (tmp_path / "saved" / name).write_text("{}")
        (tmp_path / "run" / f"{name}-1" / "config").mkdir(parents=True)  # of an owner that was ended just now
    supervise(left_s=0.05)
    await until(lambda: store.looked > 0)
    await store.delete_session(session.id, KEY)
    await until(lambda: not (tmp_path / "run" / f"{session.id}-1").exists())
    assert not (tmp_path / "workspaces" / session.id).exists()
    assert not (tmp_path / "saved" / session.id).exists()
    for name in (kept.id, "sesn_of_another_store"):
        assert (tmp_path / "workspaces" / name / "notes.txt").read_text() == "private"
        assert (tmp_path / "saved" / name).exists()
        assert (tmp_path / "run" / f"{name}-1").exists()


async def test_the_folder_of_an_owner_that_was_killed_is_removed_and_that_of_one_at_work_is_not(
    store: Flaky, host: Fake, supervise: Make, tmp_path: Path
) -> None:
    session = await taken(store, host)
    at_work, killed = (tmp_path / "run" / f"{session.id}-{session.epoch - n}" for n in (0, 1))
    for folder in (at_work, killed):
        (folder / "config").mkdir(parents=True)
        (folder / "config" / "transcript.jsonl").write_text("private")
        os.utime(folder, (0, 0))
    supervise(left_s=0.05)
    await until(lambda: not killed.exists())
    assert at_work.exists()


# -- an owner's process


async def test_an_owner_ends_when_nothing_watches_what_it_uses_any_more() -> None:
    ended = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async def watch() -> None:
        raise OSError("the process table cannot be read")

    with pytest.raises(OSError, match="process table"):
        await first_of(work(), watch())
    assert ended.is_set()


async def test_an_owner_that_is_done_ends_its_watch() -> None:
    ended = asyncio.Event()

    async def watch() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    await first_of(asyncio.sleep(0.01), watch())
    assert ended.is_set()


@pytest.mark.takes_long("a process imports most of the service")
def test_the_supervisor_and_the_local_service_know_no_ray() -> None:
    code = (
        "import sys\n"
        "import claude_hitl_template.cluster.supervisor, claude_hitl_template.testing.local_service\n"
        "print(sorted({'ray', 'kodosumi'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# -- images


@pytest.fixture
def pulls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Replaces podman by a program without images or a registry; returns a function that counts its pulls."""
    log = tmp_path / "pulls"
    log.touch()
    program = tmp_path / "podman"
    program.write_text(
        "#!/bin/sh\ncase $1 in\n"
        """info) echo '{"store": {"graphDriverName": "overlay"}}' ;;\n"""
        "image) echo 'Error: image not known' >&2; exit 125 ;;\n"
        f"pull) echo pull >> {log}; echo 'Error: no route to the registry' >&2; exit 125 ;;\nesac\n"
    )
    program.chmod(0o755)
    ids = tmp_path / "ids"
    ids.write_text("ray:200000:65536\n")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("LOGNAME", "ray")
    monkeypatch.setattr(os, "getuid", lambda: 2000)
    monkeypatch.setattr(containers, "SUBORDINATE_IDS", (ids,))
    return lambda: len(log.read_text().splitlines())


async def test_an_image_that_does_not_come_is_pulled_once_however_often_it_is_asked_for(
    pulls: Callable[[], int],
) -> None:
    preflight = Preflight()
    for _ in range(TICKS):
        with pytest.raises(ConfigError, match="no route to the registry"):
            await asyncio.to_thread(preflight.check, IMAGE)
    assert pulls() == 1
