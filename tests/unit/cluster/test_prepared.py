"""One CLI is prepared for a session that is expected, on a spare owner, which stays one for its own workspace alone."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from claude_hitl_template.cluster.leftovers import Leftovers
from claude_hitl_template.cluster.owner import PreparedCli
from claude_hitl_template.cluster.owner_host import Assignment
from claude_hitl_template.cluster.owner_pool import Owner, OwnerPool
from claude_hitl_template.cluster.prepared import PreparedSessions
from claude_hitl_template.cluster.supervisor import Supervisor
from claude_hitl_template.config.credentials import Credential
from claude_hitl_template.config.settings import Settings
from claude_hitl_template.domain.models import Agent, Environment, Session
from claude_hitl_template.domain.policy.floor import BUILT_IN, Floor
from claude_hitl_template.errors import EngineError
from claude_hitl_template.store.core import CoreStore
from claude_hitl_template.testing.memory_backend import MemoryBackend
from tests.contract.asking import KEY, create, message
from tests.unit.cluster.test_supervisor import IMAGE, SIGNING_KEY, Fake, until

SERVER = {"name": "docs", "type": "url", "url": "https://docs.example.org/mcp"}


async def _waits(_session: Session, _why: str, _lacking_s: float | None) -> bool:
    return True


class House:
    """A pool with one spare owner, and what prepares a session on it."""

    def __init__(self, folder: Path, *, kept_s: float = 300.0, spare_owners: int = 1) -> None:
        self.settings = Settings(data_dir=folder, spare_owners=spare_owners)
        self.host, self.store = Fake(), CoreStore(MemoryBackend())
        self.pool = OwnerPool(self.settings, self.host, _waits, calm_s=0.0)
        self.supervisor = Supervisor(
            self.settings, self.store, self.host, SIGNING_KEY, environments={}, floor=BUILT_IN
        )
        assign = self.supervisor._unassigned  # pyright: ignore[reportPrivateUsage]
        self.sessions = PreparedSessions(self.store, self.host, self.pool, assign, kept_s=kept_s)

    async def tend(self) -> None:
        """One look of the supervisor, and everything that it begins."""
        before = asyncio.all_tasks()
        await self.pool.tend_spares()
        await asyncio.gather(*(asyncio.all_tasks() - before))
        await self.sessions.tend()
        await asyncio.gather(*(asyncio.all_tasks() - before))

    async def note(self, *sessions: Session) -> None:
        for session in sessions:
            self.sessions.note(session)
        await self.tend()

    async def next(self, **different: Any) -> Session:
        fields: dict[str, Any] = {"workspace_id": KEY, "agent": Agent(), "environment": Environment()}
        fields |= {"title": None, "metadata": {}, "initial": [message()]}
        return await self.store.create_session(**{**fields, **different})


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


async def test_the_next_session_has_the_id_and_the_owner_that_were_prepared(house: House) -> None:
    await house.note(await create(house.store))
    [(name, assignment)] = house.host.prepared
    assert assignment is not None
    session = await house.next()
    assert session.id == assignment.session.id
    assert (await house.pool.take(session, Environment())) == Owner(
        name, Environment(), KEY, prepared=session.id
    )
    assert len(house.host.prepared) == 1


async def test_what_it_is_prepared_with_opens_nothing(house: House) -> None:
    await house.note(await create(house.store))
    [(_, assignment)] = house.host.prepared
    assert assignment is not None
    assert (assignment.token, assignment.capability) == ("", "")
    assert assignment.sandbox is not None
    assert not await house.store.existing([assignment.session.id])


async def test_one_is_prepared_for_each_new_session_and_none_before_the_first(house: House) -> None:
    await house.tend()
    assert not house.host.prepared
    await house.note(await create(house.store))
    for _ in range(3):
        await house.tend()
    assert len(house.host.prepared) == 1


@pytest.mark.parametrize(
    "different",
    [
        {"workspace_id": "key_other"},
        {"agent": Agent(system="another")},
        {"environment": Environment(id="another")},
    ],
    ids=" ".join,
)
async def test_sessions_of_two_kinds_in_turn_are_not_expected(
    house: House, different: dict[str, Any]
) -> None:
    first, second = await create(house.store), await house.next(**different)
    await house.note(first, second)
    assert not house.host.prepared
    await house.note(second)
    assert len(house.host.prepared) == 1


@pytest.mark.parametrize(
    "different",
    [{"agent": Agent(mcp_servers={"docs": SERVER})}, {"environment": Environment(image=IMAGE)}],
    ids=" ".join,
)
async def test_a_cli_that_would_connect_somewhere_or_runs_in_a_container_is_not_prepared(
    house: House, different: dict[str, Any]
) -> None:
    await house.note(await house.next(**different))
    assert not house.host.prepared


async def test_none_is_prepared_while_the_last_new_session_makes_its_first_calls(house: House) -> None:
    pool = OwnerPool(house.settings, house.host, _waits, calm_s=0.05)
    for name in ("first", "second"):
        house.host.alive[name] = None
    session = await create(house.store)
    await pool.give_back(Owner("first", Environment()), KEY)
    await pool.take(session, Environment())
    await pool.give_back(Owner("second", Environment()), KEY)
    assert pool.prepare(session) is None
    await asyncio.sleep(0.06)  # the clock of the event loop
    assert pool.prepare(session) is not None


async def test_without_spare_owners_nothing_is_prepared(tmp_path: Path) -> None:
    house = House(tmp_path, spare_owners=0)
    await house.note(await create(house.store))
    assert not house.host.prepared


async def test_another_workspace_does_not_get_the_owner_that_prepared_a_session(house: House) -> None:
    await house.note(await create(house.store))
    [(name, _)] = house.host.prepared
    stranger = await house.next(workspace_id="key_other")
    owner = await house.pool.take(stranger, Environment())
    assert owner is not None
    assert owner.name != name


async def test_another_session_of_the_workspace_gets_the_owner_once_the_prepared_cli_has_ended(
    house: House,
) -> None:
    await house.note(await create(house.store))
    [(name, _)] = house.host.prepared
    owner = await house.pool.take(await house.next(title="x", agent=Agent(system="another")), Environment())
    assert owner is not None
    assert (owner.name, house.host.prepared[1:]) == (name, [(name, None)])


@pytest.mark.parametrize("slow", ["answers", "prepare"])
async def test_the_session_whose_cli_is_being_ended_gets_no_owner_before_that(
    house: House, monkeypatch: pytest.MonkeyPatch, slow: str
) -> None:
    await house.note(await create(house.store))
    expected, ending, usual = await house.next(), asyncio.Event(), getattr(house.host, slow)

    async def slowly(*given: Any) -> bool:
        await ending.wait()
        return await usual(*given)

    monkeypatch.setattr(house.host, slow, slowly)
    other = asyncio.create_task(house.pool.take(await house.next(title="other"), Environment()))
    await asyncio.sleep(0)
    own = asyncio.create_task(house.pool.take(expected, Environment()))
    done, _ = await asyncio.wait({other, own}, timeout=0.1)
    assert not done
    assert len(house.host.started) == 1
    ending.set()
    assert None not in await asyncio.gather(other, own)


async def test_an_owner_that_rests_is_taken_before_one_that_prepared_another_session(house: House) -> None:
    await house.note(await create(house.store))
    [(name, _)] = house.host.prepared
    house.host.alive["resting"] = None
    await house.pool.give_back(Owner("resting", Environment()), KEY)
    owner = await house.pool.take(await house.next(agent=Agent(system="another")), Environment())
    assert owner == Owner("resting", Environment(), KEY, driven=1)
    assert [given for given, _ in house.host.prepared] == [name]


async def test_a_cli_that_no_session_took_is_ended_with_its_owner(tmp_path: Path) -> None:
    house = House(tmp_path, kept_s=0.2)
    await house.note(await create(house.store))
    [(name, assignment)] = house.host.prepared
    assert assignment is not None
    await asyncio.sleep(0.21)  # the clock of the event loop
    await house.tend()
    assert house.host.prepared[1:] == [(name, None)]
    assert house.host.ended == [name]
    assert house.pool.prepared() == []
    assert (await house.next()).id != assignment.session.id


async def test_one_that_could_not_be_prepared_is_tried_again_after_the_next_new_session(
    house: House,
) -> None:
    tried: list[str] = []

    async def fails(name: str, _assignment: Assignment | None) -> bool:
        tried.append(name)
        return False

    house.host.prepare = fails  # type: ignore[method-assign]
    first = await create(house.store)
    await house.note(first)
    await house.tend()
    assert len(tried) == 1
    assert (await house.next()).id != first.id


async def test_an_owner_that_a_new_session_waits_for_starts_its_cli_without_what_opens_anything(
    tmp_path: Path,
) -> None:
    house = House(tmp_path, spare_owners=0)
    house.supervisor.start()
    session = await create(house.store)
    await until(lambda: bool(house.host.assigned))
    await house.supervisor.close()
    [early] = house.host.early
    [given] = house.host.assigned
    assert early is not None
    assert (early.token, early.capability) == ("", "")
    assert (early.session.id, early.session.epoch) == (session.id, given.session.epoch)


async def test_a_session_that_had_an_owner_or_has_servers_or_files_has_its_cli_started_by_its_own_owner(
    house: House,
) -> None:
    new = await create(house.store)
    assert house.sessions.early(new) is not None
    for other in (
        new.but(epoch=1),
        new.but(uploads=("a manifest",)),
        new.but(agent=Agent(mcp_servers={"docs": SERVER})),
        new.but(environment=Environment(image=IMAGE)),
    ):
        assert house.sessions.early(other) is None


async def test_it_is_taken_only_for_an_assignment_that_it_would_have_been_started_with(house: House) -> None:
    await house.note(await create(house.store))
    [(_, early)] = house.host.prepared
    assert early is not None
    assert early.sandbox is not None
    session = await house.store.acquire((await house.next()).id, "owner", lease_s=15)
    given = replace(early, session=session, token="token", capability="capability")
    credential = Credential(host="example.org", value=SecretStr("secret"))
    prepared = PreparedCli(early, asyncio.create_task(asyncio.sleep(0, EngineError("not asked"))))
    assert prepared.fits(given)
    for other in (
        replace(given, session=session.but(epoch=2)),
        replace(given, session=session.but(id="sesn_other")),
        replace(given, session=session.but(workspace_id="key_other")),
        replace(given, session=session.but(agent=Agent(system="another"))),
        replace(given, session=session.but(environment=Environment(id="another"))),
        replace(given, session=session.but(uploads=("a manifest",))),
        replace(given, session=session.but(workspace="a manifest")),
        replace(given, sandbox=None),
        replace(given, sandbox=replace(early.sandbox, credentials=(credential,))),
        replace(given, floor=Floor(default="always_allow")),
        replace(given, cli_path=Path("/another/claude")),
        replace(given, model_url="http://127.0.0.1:1/model"),
        replace(given, workspace=replace(given.workspace, folder=Path("/another"))),
    ):
        assert not prepared.fits(other)


async def test_a_new_supervisor_ends_the_owner_that_prepared_a_session(house: House) -> None:
    await house.note(await create(house.store))
    [(name, _)] = house.host.prepared
    another = Supervisor(
        house.settings, house.store, house.host, SIGNING_KEY, environments={}, floor=BUILT_IN
    )
    another.start()
    await until(lambda: name in house.host.ended)
    await another.close()


async def test_the_folders_of_a_session_that_never_existed_are_removed_and_files_in_them_are_not(
    tmp_path: Path,
) -> None:
    leftovers = Leftovers(Settings(data_dir=tmp_path))
    for session_id in ("empty", "full"):
        (tmp_path / "workspaces" / session_id).mkdir(parents=True)
    (tmp_path / "workspaces" / "full" / "notes.txt").write_text("private")
    leftovers.remove_empty(["empty", "full", "missing"])
    assert not (tmp_path / "workspaces" / "empty").exists()
    assert (tmp_path / "workspaces" / "full" / "notes.txt").read_text() == "private"
