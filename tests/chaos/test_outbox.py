"""A process dies at each fault point of the outbox: each approval has its notices, and none comes before its commit."""

import asyncio
import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime, timedelta
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest

from claude_hitl_template.domain.models import Approval, ApprovalState
from claude_hitl_template.domain.notices import APPROVAL_KINDS, Channel, Parcel
from claude_hitl_template.domain.people import Actor
from claude_hitl_template.notify.courier import Courier
from claude_hitl_template.notify.sender import Outcome, Sent
from claude_hitl_template.store.connect import migrate
from claude_hitl_template.store.core import CoreStore
from claude_hitl_template.store.sealing import Sealer
from claude_hitl_template.store.sqlite import sqlite_url
from claude_hitl_template.testing.clock import FakeClock
from tests import faults
from tests.chaos.crash_runs import Home, backend_of
from tests.contract.asking import KEY, ask_for, create, said
from tests.postgres import Server, serving

KILLED = -9
SLEEP_S = 90  # between two lives, by their clock: longer than a courier has for one send
NUMBERS = (1, 2)  # the first call is decided after its courier had a chance, the second one before
POINTS = [
    *(
        f"{write}.{when}_commit"
        for write in ("open_calls", "send_events", "distribute", "take", "settle")
        for when in ("before", "after")
    ),
    "send.before",
    "send.after",
]
FAST = ("send.before", "send.after", "open_calls.before_commit", "settle.before_commit")


class Journal:
    """A sender whose target is a file, which outlives the process."""

    def __init__(self, path: Path) -> None:
        self._path = path

    async def send(self, parcel: Parcel, link: str) -> Outcome:
        line = json.dumps([parcel.notice.kind, parcel.notice.approval_id, parcel.model_dump_json()])
        handle = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.write(handle, f"{line}\n".encode())
        os.close(handle)
        return Sent()

    async def close(self) -> None: ...


def live(home: Home, number: int) -> None:
    """Asks, sends and decides, unless a planned fault kills the process; another life goes on where this one ended."""
    faults.install(home.root / "faults")
    asyncio.run(asyncio.wait_for(_live(home, number), 60))


async def _live(home: Home, number: int) -> None:
    clock = FakeClock(datetime(2030, 1, 1, 12, tzinfo=UTC) + timedelta(seconds=SLEEP_S * number))
    backend = backend_of(home)
    store = CoreStore(backend, clock, sealer=Sealer("00" * 32))
    channel = Channel(id="chan", kind="webhook", workspace_id=KEY, kinds=APPROVAL_KINDS, created_at=clock())
    await store.add_channel(channel, {"signing": "s"})
    courier = Courier(store, {"webhook": Journal(home.root / "told.jsonl")}, pages_url="http://127.0.0.1")
    for asked in NUMBERS:
        approval = await _asked(store, asked)
        if asked == 1:
            await _send(courier)
        if approval.state is ApprovalState.PENDING:
            await store.send_events(
                approval.session_id,
                KEY,
                [said(approval.event_id)],
                by=Actor(name="ann"),
                idempotency_key=f"decide {asked}",
            )
    await _send(courier)
    await courier.close()
    await backend.close()


async def _asked(store: CoreStore, number: int) -> Approval:
    session = await create(store, once=f"create {number}")
    known = await store.list_approvals(KEY, limit=1, session_id=session.id)
    if not known.data:
        epoch = (await store.acquire(session.id, "owner", lease_s=15)).epoch
        calls = [ask_for(f"call {number}")]
        known.data = await store.open_calls(session.id, epoch, [], calls, cwd="/w", expires_at=None)
    return known.data[0]


async def _send(courier: Courier) -> None:
    while await courier.send_due():
        await courier.settled()


@pytest.fixture(scope="module")
def postgres() -> Iterator[Server]:
    with serving() as server:
        yield server


@pytest.fixture
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    databases: AbstractContextManager[str]
    if request.param == "sqlite":
        databases = nullcontext(sqlite_url(tmp_path / "store.db"))
    else:
        databases = request.getfixturevalue("postgres").database(migrated=False)
    with databases as made:
        migrate(made)
        yield made


@pytest.mark.parametrize(
    ("url", "point"),
    [
        pytest.param(
            backing,
            point,
            id=f"{point}-{backing}",
            marks=[] if backing == "sqlite" and point in FAST else [pytest.mark.slow],
        )
        for backing in ("sqlite", "postgres")
        for point in POINTS
    ],
    indirect=["url"],
)
async def test_every_approval_is_told_and_nothing_that_was_not_committed(
    processes: ForkServerContext, tmp_path: Path, url: str, point: str
):
    home, plan = Home(url, tmp_path), tmp_path / "faults" / "plan.json"
    plan.parent.mkdir()
    exits: list[int | None] = []
    for number, planned in enumerate([{point: {"1": "kill"}}, {}]):
        plan.write_text(json.dumps(planned))
        process = processes.Process(target=live, args=(home, number))
        process.start()
        await asyncio.to_thread(process.join)
        exits.append(process.exitcode)
    assert exits == [KILLED, 0]
    told = [json.loads(line) for line in (tmp_path / "told.jsonl").read_text().splitlines()]
    count = Counter((kind, approval_id) for kind, approval_id, _ in told)
    backend = backend_of(home)
    page = await CoreStore(backend).list_approvals(KEY, limit=10, states=list(ApprovalState))
    await backend.close()
    first, second = page.data
    assert count["approval.requested", first.id] >= 1
    assert count["approval.decided", first.id] >= 1
    assert count["approval.decided", second.id] >= 1
    assert {approval_id for _, approval_id in count} == {first.id, second.id}
    assert max(count.values()) <= 2
    assert not [line for *_, line in told if '"command"' in line or '"ls"' in line]
