"""Several ledgers on one Postgres keep the promises of one; an outage of the database only delays calls."""

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import partial
from typing import Any

import psutil
import psycopg
import pytest
import pytest_asyncio

from claude_hitl_template.domain.canonical_json import digest
from claude_hitl_template.domain.events import agent_message
from claude_hitl_template.domain.models import ApprovalState
from claude_hitl_template.domain.people import Actor
from claude_hitl_template.errors import AlreadyDecided, HitlError, NotFound, NotWaiting, StoreUnreachable
from claude_hitl_template.store.core import CoreStore
from claude_hitl_template.store.postgres import PostgresBackend
from claude_hitl_template.store.protocol import NOW
from tests.contract.asking import INPUT, KEY, ask_for, asking, create, key_of, log, message, said
from tests.postgres import Server, serving

REPLICAS = 3


@pytest_asyncio.fixture
async def ledgers(database: str) -> AsyncIterator[list[CoreStore]]:
    backends = [PostgresBackend(database) for _ in range(REPLICAS)]
    stores = [CoreStore(backend) for backend in backends]
    for store, backend in zip(stores, backends, strict=True):
        await store.ping()
        await until(lambda backend=backend: backend.relay.connected)
    yield stores
    for backend in backends:
        await backend.close()


async def until(true: Callable[[], Any]) -> None:
    async with asyncio.timeout(10):
        while not true():
            await asyncio.sleep(0.01)


# -- rules that rest on exclusion


async def test_eight_decisions_at_once_at_different_ledgers_have_one_winner(ledgers: list[CoreStore]):
    calls = [f"t{n}" for n in range(40)]
    session_id = await asking(ledgers[0], *calls)
    for call in calls:
        results = ["allow" if n % 2 else "deny" for n in range(8)]
        tries = [
            ledgers[n % REPLICAS].send_events(session_id, KEY, [said(call, result)], by=Actor(name=f"h{n}"))
            for n, result in enumerate(results)
        ]
        answers = await asyncio.gather(*tries, return_exceptions=True)
        won = {result for result, a in zip(results, answers, strict=True) if isinstance(a, list)}
        lost = [a for a in answers if not isinstance(a, list)]
        assert len(won) == 1
        assert [type(a) for a in lost] == [AlreadyDecided] * 4
    assert len(await log(ledgers[1], session_id, "user.tool_confirmation")) == len(calls)


async def test_one_of_many_claims_at_different_ledgers_succeeds(ledgers: list[CoreStore]):
    session_id = await asking(ledgers[0], "t1")
    await ledgers[1].send_events(session_id, KEY, [said("t1")], by=Actor(name="ann"))
    tries = [
        ledgers[n % REPLICAS].claim(session_id, 1, "t1", digest(INPUT), claim_id=f"c{n}") for n in range(12)
    ]
    answers = await asyncio.gather(*tries, return_exceptions=True)
    assert sum(isinstance(a, NotWaiting) for a in answers) == 11


async def test_the_log_has_no_gap_whichever_ledger_writes(ledgers: list[CoreStore]):
    session_id = await asking(ledgers[0])
    writes = [ledgers[n % REPLICAS].commit(session_id, 1, [agent_message(f"a{n}", "hi")]) for n in range(30)]
    sends = [
        ledgers[n % REPLICAS].send_events(session_id, KEY, [message(f"m{n}")], by=Actor(name="ann"))
        for n in range(30)
    ]
    await asyncio.gather(*writes, *sends)
    found = await log(ledgers[2], session_id)
    assert [e.seq for e in found] == list(range(1, len(found) + 1))
    assert sum(e.type in ("agent.message", "user.message") for e in found) == 61


async def test_an_idempotency_key_at_several_ledgers_at_once_acts_once(ledgers: list[CoreStore]):
    made = await asyncio.gather(*(create(ledgers[n % REPLICAS], once="k") for n in range(9)))
    assert len({session.id for session in made}) == 1
    sent = await asyncio.gather(
        *(
            ledgers[n % REPLICAS].send_events(
                made[0].id, KEY, [message("more")], by=Actor(name="ann"), idempotency_key="m"
            )
            for n in range(9)
        )
    )
    assert len({event.id for [event] in sent}) == 1


async def test_a_change_of_an_approval_is_announced_at_every_ledger(ledgers: list[CoreStore]):
    here = await ledgers[0].wait_approvals(0, timeout_s=0)
    there = await ledgers[1].wait_approvals(0, timeout_s=0)
    session_id = await asking(ledgers[2], "t1")
    for ledger, start in ((ledgers[0], here), (ledgers[1], there)):
        asked = await ledger.wait_approvals(start.position, timeout_s=10)
        assert [(c.session_id, c.state) for c in asked.changes] == [(session_id, ApprovalState.PENDING)]
    await ledgers[0].send_events(session_id, KEY, [said("t1", "deny")], by=Actor(name="ann"))
    decided = await ledgers[1].wait_approvals(asked.position, timeout_s=10)
    assert [(c.state, c.decided_by) for c in decided.changes] == [(ApprovalState.DENIED, "ann")]


async def test_a_key_recorded_at_several_ledgers_at_once_is_one(ledgers: list[CoreStore]):
    made = await asyncio.gather(*(ledgers[n % REPLICAS].add_key("first", "hash") for n in range(9)))
    assert len({key.id for key in made}) == 1
    assert key_of(await ledgers[0].find_identity("hash")) == made[0]


async def test_leases_taken_at_once_have_different_epochs_and_only_the_last_may_write(
    ledgers: list[CoreStore],
):
    session = await create(ledgers[0])
    taken = await asyncio.gather(
        *(ledgers[n % REPLICAS].acquire(session.id, f"o{n}", lease_s=15) for n in range(6))
    )
    assert sorted(s.epoch for s in taken) == [1, 2, 3, 4, 5, 6]
    tries = [ledgers[0].commit(session.id, s.epoch, [agent_message(f"a{s.epoch}", "hi")]) for s in taken]
    await asyncio.gather(*tries, return_exceptions=True)
    assert [e.id for e in await log(ledgers[1], session.id, "agent.message")] == ["a6"]


async def test_what_is_due_expires_once_whoever_looks(ledgers: list[CoreStore]):
    session = await create(ledgers[0])
    await ledgers[0].acquire(session.id, "owner", lease_s=15)
    await ledgers[0].open_calls(session.id, 1, [], [ask_for("t1")], cwd="/w", expires_at=session.created_at)
    assert sum(await asyncio.gather(*(ledger.expire_due() for ledger in ledgers * 3))) == 1


async def test_deleting_and_deciding_at_once_leaves_nothing_half(ledgers: list[CoreStore]):
    for _ in range(10):
        session_id = await asking(ledgers[0], "t1")
        answers = await asyncio.gather(
            ledgers[1].delete_session(session_id, KEY),
            ledgers[2].send_events(session_id, KEY, [said("t1", "deny")], by=Actor(name="ann")),
            return_exceptions=True,
        )
        if isinstance(answers[1], NotFound):
            assert (await ledgers[0].list_approvals(KEY, limit=100, session_id=session_id)).data == []
        else:  # it runs again, and cannot be deleted
            assert isinstance(answers[0], HitlError)


# -- what one tells the others


@pytest.mark.parametrize(
    "payload",
    ["5", "null", "[]", "{}", '"x"', "not JSON", "[1]", '["mark", "x", []]', '[1, 2, []]', '[1, "x", 5]', '[1, "x", [5]]',
     '[1, "x", [["wake", 5], [], ["preview", "s", "x", 7]]]'],
)  # fmt: skip
async def test_a_notification_that_is_not_ours_does_not_end_the_listening(
    ledgers: list[CoreStore], database: str, payload: str
):
    version = await ledgers[0].wait_supervised(-1, timeout_s=0.01)
    async with await psycopg.AsyncConnection.connect(database, autocommit=True) as connection:
        await connection.execute("select pg_notify('claude_hitl', %s)", (payload,))
    waiting = asyncio.create_task(ledgers[0].wait_supervised(version, timeout_s=30))
    session = await create(ledgers[1])
    async with asyncio.timeout(10):
        version = await waiting
    assert session.id in {s.id for s in await ledgers[0].supervised()}
    assert version > 0


async def test_a_relay_that_a_defect_ended_goes_on_with_the_next_transaction(
    ledgers: list[CoreStore], database: str
):
    backend = PostgresBackend(database)
    store = CoreStore(backend)
    await store.ping()
    await until(lambda: backend.relay.connected)
    delivering, backend.relay.deliver = backend.relay.deliver, partial(_fail, ended := asyncio.Event())
    await create(ledgers[0])
    await asyncio.wait_for(ended.wait(), 10)
    await until(lambda: not backend.relay.connected)
    backend.relay.deliver = delivering
    await store.ping()
    await until(lambda: backend.relay.connected)
    await backend.close()


def _fail(ended: asyncio.Event, *_: Any) -> None:
    ended.set()
    raise RuntimeError("a defect")


async def test_a_decision_at_one_ledger_wakes_the_owner_at_another(ledgers: list[CoreStore]):
    session_id = await asking(ledgers[0], "t1")
    revision = (await ledgers[0].snapshot(session_id, 1)).session.revision
    waiting = asyncio.create_task(ledgers[0].wait_session(session_id, 1, revision, timeout_s=30))
    await ledgers[1].send_events(session_id, KEY, [said("t1")], by=Actor(name="ann"))
    found = await asyncio.wait_for(waiting, 5)
    assert [a.state for a in found.approvals] == [ApprovalState.ALLOWED]


async def test_an_event_committed_at_one_ledger_reaches_a_stream_at_another(ledgers: list[CoreStore]):
    session_id = await asking(ledgers[0])
    last = await ledgers[1].last_seq(session_id, KEY)
    waiting = asyncio.create_task(ledgers[1].wait_events(session_id, KEY, last, timeout_s=30))
    await ledgers[2].commit(session_id, 1, [agent_message("a1", "hi")])
    found, _, _ = await asyncio.wait_for(waiting, 5)
    assert [e.id for e in found] == ["a1"]


async def test_a_stream_of_previews_goes_on_at_another_ledger_without_loss_or_repeat(
    ledgers: list[CoreStore],
):
    session_id = await asking(ledgers[0])
    last = await ledgers[0].last_seq(session_id, KEY)
    _, _, position = await ledgers[0].wait_events(session_id, KEY, last, timeout_s=0, previews=NOW)
    sent, heard = [{"d": n} for n in range(30)], []

    async def speak() -> None:
        for delta in sent:
            await ledgers[2].preview(session_id, 1, [delta])

    speaking = asyncio.create_task(speak())
    for turn in range(60):
        _, deltas, position = await ledgers[turn % 2].wait_events(
            session_id, KEY, last, timeout_s=5, previews=position
        )
        heard += deltas
        if len(heard) >= len(sent):
            break
    await speaking
    assert heard == sent


async def test_new_work_at_one_ledger_wakes_the_supervisor_at_another_and_it_then_rests(
    ledgers: list[CoreStore],
):
    session = await create(ledgers[0], first=None)
    version = await agreed(ledgers, -1)
    waiting = asyncio.create_task(ledgers[1].wait_supervised(version, timeout_s=30))
    await ledgers[0].send_events(session.id, KEY, [message()], by=Actor(name="ann"))
    newer = await asyncio.wait_for(waiting, 5)
    assert newer != version
    assert await agreed(ledgers, newer) != version


async def agreed(ledgers: list[CoreStore], version: int) -> int:
    """Waits until all ledgers return the same version, and returns it, so that a client that asks them in turn waits."""
    same = 0
    async with asyncio.timeout(10):
        while same < len(ledgers):
            newer = await ledgers[same % len(ledgers)].wait_supervised(version, timeout_s=0.2)
            version, same = newer, same + 1 if newer == version else 0
    return version


# -- a database that goes away


@pytest.fixture(scope="module")
def own_server() -> Iterator[Server]:
    """A server with its default settings, so that acknowledged writes survive; a test that stops it must start it again."""
    with serving({}) as server:
        yield server


@pytest_asyncio.fixture
async def fragile(own_server: Server) -> AsyncIterator[CoreStore]:
    with own_server.database() as url:
        backend = PostgresBackend(url, answer_s=3.0)
        yield CoreStore(backend)
        await backend.close()
        own_server.local.start({"port": url.rpartition(":")[2].partition("/")[0]})


async def patiently[T](work: Callable[[], Awaitable[T]]) -> T:
    """Repeats a request with the same ids until the database answers, as the ledger's callers do."""
    async with asyncio.timeout(600):
        while True:
            try:
                return await work()
            except StoreUnreachable:
                await asyncio.sleep(0.05)


@pytest.mark.slow
async def test_no_acknowledged_decision_is_lost_while_connections_are_cut(
    fragile: CoreStore, own_server: Server
):
    sessions = [await asking(fragile, "t1", "t2") for _ in range(50)]
    wanted = [(session_id, call) for session_id in sessions for call in ("t1", "t2")]
    done, tries = asyncio.Event(), 0

    async def cut() -> None:
        async with await psycopg.AsyncConnection.connect(own_server.local.url, autocommit=True) as connection:
            while not done.is_set():
                await connection.execute(
                    "select pg_terminate_backend(pid) from pg_stat_activity "
                    "where pid <> pg_backend_pid() and application_name = 'claude-hitl'"
                )
                await asyncio.sleep(0.1)

    async def decide(session_id: str, call: str) -> None:
        async def once() -> list[Any]:
            nonlocal tries
            tries += 1
            return await fragile.send_events(session_id, KEY, [said(call)], by=Actor(name="ann"))

        await patiently(once)

    cutting = asyncio.create_task(cut())
    for some in range(0, len(wanted), 10):
        await asyncio.gather(*(decide(*one) for one in wanted[some : some + 10]))
    done.set()
    await cutting
    assert tries > len(wanted), "no connection was cut"
    for session_id in sessions:
        page = await patiently(partial(fragile.list_approvals, KEY, limit=10, session_id=session_id))
        assert [a.state for a in page.data] == [ApprovalState.ALLOWED] * 2
        found = await log(fragile, session_id)
        assert [e.seq for e in found] == list(range(1, len(found) + 1))
        assert sum(e.type == "user.tool_confirmation" for e in found) == 2


@pytest.mark.parametrize("how", ["fast", "immediate"])
async def test_all_goes_on_when_the_server_comes_back(fragile: CoreStore, own_server: Server, how: str):
    session_id = await asking(fragile, "t1", "t2")
    await fragile.send_events(session_id, KEY, [said("t1")], by=Actor(name="ann"))
    last = await fragile.last_seq(session_id, KEY)
    streaming = asyncio.create_task(
        patiently(lambda: fragile.wait_events(session_id, KEY, last, timeout_s=50))
    )
    port = own_server.local.url.rpartition(":")[2].partition("/")[0]
    await asyncio.to_thread(own_server.local.stop, how)
    with pytest.raises(StoreUnreachable):
        await fragile.get_session(session_id)
    deciding = asyncio.create_task(
        patiently(lambda: fragile.send_events(session_id, KEY, [said("t2")], by=Actor(name="ann")))
    )
    await asyncio.to_thread(own_server.local.start, {"port": port})
    [event] = await deciding
    found, _, _ = await asyncio.wait_for(streaming, 10)
    assert event in found
    page = await fragile.list_approvals(KEY, limit=10, session_id=session_id)
    assert [a.state for a in page.data] == [ApprovalState.ALLOWED] * 2


@pytest.mark.takes_long("what is tested is how long a stopped server is waited for")
async def test_a_server_that_stands_still_is_away_and_not_waited_for(fragile: CoreStore, own_server: Server):
    session_id = await asking(fragile, "t1")
    await fragile.get_session(session_id)
    master = psutil.Process(own_server.local.pid() or 0)
    stopped = [master, *master.children()]
    for process in stopped:
        process.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(StoreUnreachable):
            await asyncio.wait_for(fragile.get_session(session_id), 30)
    finally:
        for process in stopped:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGCONT)
    assert (await patiently(lambda: fragile.get_session(session_id))).id == session_id
