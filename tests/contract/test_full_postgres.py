"""Postgres on a full disk: lost writes are not acknowledged, and everything continues once there is space."""

import asyncio
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from claude_hitl_template.cli.host.ports import free_ports
from claude_hitl_template.cli.host.postgres import LocalPostgres
from claude_hitl_template.domain.models import ApprovalState
from claude_hitl_template.domain.people import Actor
from claude_hitl_template.errors import StoreUnreachable, Unavailable
from claude_hitl_template.store.connect import migrate
from claude_hitl_template.store.core import CoreStore
from claude_hitl_template.store.postgres import PostgresBackend
from tests.contract.test_several_ledgers import KEY, asking, message, said
from tests.postgres import require

DISKS = {"data": "112m", "log": "48m"}
ROOM_BYTES = 2 * 1024**2
# A small log that is given back soon, so that there is as little room as there seems to be. Everything is kept for real.
SMALL = {"max_wal_size": "32MB", "min_wal_size": "32MB", "shared_buffers": "4MB", "autovacuum": "off"}


class Cramped(LocalPostgres):
    """A server that keeps its port. Either all its data or only its log (WAL) is on the small disk `disk`."""

    def __init__(self, folder: Path, what: str) -> None:
        super().__init__(folder / "postgres", folder / "password")
        self._log = folder / "postgres" / "cluster" / "pg_wal"
        self.disk = folder if what == "data" else folder / "log"
        self._options = {**SMALL, "port": str(free_ports(1)[0])}
        self.disk.mkdir(exist_ok=True)
        options = f"size={DISKS[what]},mode=755"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", self.disk], check=True)

    def up(self) -> None:
        self.start(self._options)

    def move_log(self) -> None:
        self.stop()
        subprocess.run(["cp", "-a", self._log, self.disk / "pg_wal"], check=True)
        shutil.rmtree(self._log)
        self._log.symlink_to(self.disk / "pg_wal")
        self.up()

    def close(self) -> None:
        self.stop("immediate")
        subprocess.run(["umount", self.disk], check=True)


@pytest.fixture(params=DISKS)
def cramped(request: pytest.FixtureRequest) -> Iterator[Cramped]:
    if os.geteuid() != 0:
        pytest.skip("a disk of its own can only be mounted by root")
    require()
    folder = Path(tempfile.mkdtemp(prefix="hitl-full-"))
    folder.chmod(0o755)
    server = Cramped(folder, request.param)
    try:
        server.up()
        if request.param == "log":
            server.move_log()
        migrate(server.url)
        yield server
    finally:
        server.close()
        shutil.rmtree(folder)


def fill(folder: Path) -> Path:
    """Fills the disk almost completely, and returns the file to delete to free it."""
    filler = folder / "filler"
    left = shutil.disk_usage(folder).free - ROOM_BYTES
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, left)
    return filler


async def until_refused(store: CoreStore, session_id: str) -> tuple[list[str], Unavailable]:
    """Sends messages until one is refused; returns the ids of the acknowledged ones, and the error."""
    acknowledged: list[str] = []
    while True:
        text = f"{len(acknowledged)} {os.urandom(100_000).hex()}"
        try:
            sent = await store.send_events(session_id, KEY, [message(text)], by=Actor(name="ann"))
        except Unavailable as error:
            return acknowledged, error
        acknowledged += [event.id for event in sent]


async def until_back(server: Cramped, store: CoreStore) -> None:
    """Starts the server again if it stopped, as an operator would who freed space."""
    async with asyncio.timeout(60):
        while True:
            if server.pid() is None:
                await asyncio.to_thread(server.up)
            with suppress(StoreUnreachable):
                return await store.ping()
            await asyncio.sleep(0.1)


async def test_what_a_full_disk_of_postgres_cannot_keep_is_not_acknowledged_and_all_goes_on_once_there_is_room(
    cramped: Cramped,
):
    backend = PostgresBackend(cramped.url)
    store = CoreStore(backend)
    session_id = await asking(store, "t1", "t2")
    await store.send_events(session_id, KEY, [said("t1")], by=Actor(name="ann"))
    filler = fill(cramped.disk)
    acknowledged, why = await until_refused(store, session_id)
    assert isinstance(why, StoreUnreachable) or "disk" in str(why)
    with suppress(Unavailable):  # so small a thing may find room
        await store.send_events(session_id, KEY, [said("t2", "deny")], by=Actor(name="ann"))
    filler.unlink()
    await until_back(cramped, store)
    await store.send_events(session_id, KEY, [said("t2", "deny")], by=Actor(name="ann"))
    log = (await store.list_events(session_id, KEY, limit=100_000)).data
    assert [e.seq for e in log] == list(range(1, len(log) + 1))
    kept = [e.id for e in log if e.type == "user.message"]
    assert [i for i in kept if i in set(acknowledged)] == acknowledged
    assert len(kept) - 1 - len(acknowledged) in (0, 1)  # the one whose outcome was not known
    states = {a.event_id: a.state for a in (await store.list_approvals(KEY, limit=9)).data}
    assert states == {"t1": ApprovalState.ALLOWED, "t2": ApprovalState.DENIED}
    assert [e.type for e in log].count("user.tool_confirmation") == 2
    await backend.close()
