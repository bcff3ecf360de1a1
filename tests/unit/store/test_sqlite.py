"""Writes that arrive together share one commit; each still succeeds, fails and is cancelled by itself."""

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from claude_hitl_template.domain.models import ApiKey, utcnow
from claude_hitl_template.errors import Unavailable
from claude_hitl_template.store.connect import migrate
from claude_hitl_template.store.sqlite import SqliteBackend, sqlite_url

KEYS = 200


@pytest_asyncio.fixture
async def backend(tmp_path: Path) -> AsyncIterator[SqliteBackend]:
    migrate(sqlite_url(tmp_path / "store.db"))
    one = SqliteBackend(sqlite_url(tmp_path / "store.db"))
    yield one
    await one.close()


def key(name: str) -> ApiKey:
    return ApiKey(id=f"key_{name}", name=name, secret_hash=f"hash of {name}", created_at=utcnow())


async def add(
    backend: SqliteBackend, name: str, *, error: Exception | None = None, wait_s: float = 0
) -> None:
    async with backend.begin(write=True) as tx:
        await tx.add_key(key(name))
        await asyncio.sleep(wait_s)
        if error is not None:
            raise error


async def names(backend: SqliteBackend) -> set[str]:
    async with backend.begin(write=False) as tx:
        return {found.name for found in await tx.keys()}


def committed(path: Path) -> int:
    """What another process finds."""
    connection = sqlite3.connect(path)
    try:
        return connection.execute("select count(*) from api_keys").fetchone()[0]
    finally:
        connection.close()


async def test_what_was_returned_is_on_the_disk(backend: SqliteBackend, tmp_path: Path) -> None:
    returned = 0

    async def one(number: int) -> None:
        nonlocal returned
        await add(backend, str(number))
        returned += 1
        assert committed(tmp_path / "store.db") >= returned

    await asyncio.gather(*map(one, range(KEYS)))
    assert committed(tmp_path / "store.db") == KEYS


async def test_writes_that_arrive_together_share_commits(backend: SqliteBackend) -> None:
    commits = 0
    real = backend._commit

    async def counted(*given: object) -> None:
        nonlocal commits
        commits += 1
        await real(*given)  # type: ignore[arg-type]

    backend._commit = counted  # type: ignore[method-assign]
    await asyncio.gather(*(add(backend, str(number)) for number in range(KEYS)))
    assert commits < KEYS / 10


async def test_one_that_fails_undoes_its_own_writes_and_no_others(backend: SqliteBackend) -> None:
    fails = ValueError("refused")
    ended = await asyncio.gather(
        *(add(backend, str(n), error=fails if n % 3 == 0 else None) for n in range(KEYS)),
        return_exceptions=True,
    )
    assert [n for n, end in enumerate(ended) if end is fails] == list(range(0, KEYS, 3))
    assert await names(backend) == {str(n) for n in range(KEYS) if n % 3}


async def test_one_that_is_cancelled_is_kept_whole_or_not_at_all_and_is_settled_then(
    backend: SqliteBackend,
) -> None:
    writes = [asyncio.create_task(add(backend, str(n), wait_s=n % 5 / 1000)) for n in range(KEYS)]
    for turn, write in enumerate(writes):
        if turn % 4 == 0:
            write.cancel()
        await asyncio.sleep(0)
    ended = await asyncio.gather(*writes, return_exceptions=True)
    kept = await names(backend)
    assert {str(n) for n, end in enumerate(ended) if end is None} <= kept
    await asyncio.sleep(0.05)
    assert await names(backend) == kept, "something was written after its caller had gone on"


async def test_another_process_that_writes_is_waited_for_and_holds_up_no_reader(
    backend: SqliteBackend, tmp_path: Path
) -> None:
    assert await names(backend) == set()
    other = sqlite3.connect(tmp_path / "store.db", isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    writing = asyncio.create_task(add(backend, "late"))
    assert await names(backend) == set()
    assert not writing.done()
    other.execute("ROLLBACK")
    other.close()
    await writing
    assert await names(backend) == {"late"}


async def test_a_file_that_is_no_database_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "store.db").write_bytes(b"garbage" * 1000)
    broken = SqliteBackend(sqlite_url(tmp_path / "store.db"))
    with pytest.raises(Unavailable, match="the store cannot be used now"):
        await add(broken, "x")
    with pytest.raises(Unavailable):
        await names(broken)
    await broken.close()


KILLED = """
import asyncio, sys
from claude_hitl_template.domain.models import ApiKey, utcnow
from claude_hitl_template.store.sqlite import SqliteBackend

async def main():
    backend = SqliteBackend(sys.argv[1])

    async def add(number):
        async with backend.begin(write=True) as tx:
            await tx.add_key(ApiKey(id=f"key_{number}", name=str(number), secret_hash=str(number), created_at=utcnow()))
        print(number, flush=True)

    while True:
        start = main.number
        main.number += 8
        await asyncio.gather(*map(add, range(start, start + 8)))

main.number = 0
asyncio.run(main())
"""


@pytest.mark.parametrize("lines", [1, 50, 333])
def test_a_process_that_is_killed_loses_nothing_that_it_acknowledged(tmp_path: Path, lines: int) -> None:
    path = tmp_path / "store.db"
    migrate(sqlite_url(path))
    writer = subprocess.Popen([sys.executable, "-c", KILLED, sqlite_url(path)], stdout=subprocess.PIPE)
    assert writer.stdout is not None
    acknowledged = {int(writer.stdout.readline()) for _ in range(lines)}
    os.kill(writer.pid, signal.SIGKILL)
    acknowledged |= {int(line) for line in writer.stdout.read().splitlines() if line.strip().isdigit()}
    writer.wait()
    writer.stdout.close()
    connection = sqlite3.connect(path)
    kept = {int(row[0]) for row in connection.execute("select secret_hash from api_keys")}
    connection.close()
    assert acknowledged <= kept
