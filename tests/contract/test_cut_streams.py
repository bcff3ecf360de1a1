"""Event streams that either end cuts anywhere while events are committed: a client that resumes after the last complete
event receives each event once, in order.

`--scale N` says how many cuts there are, shared by followers of raw bytes and of the official SDK.
"""

import asyncio
import json
import random
import socket
import struct
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anthropic
import httpx
import httpx2  # the SDK's HTTP client, whose errors say how a stream broke
import pytest

from claude_hitl_template.config.secret_files import hash_api_key
from claude_hitl_template.domain.models import Agent, Environment
from claude_hitl_template.testing.local_service import LocalService, serve_in_process

SECRET = "secret-of-the-followers"
SESSIONS = 2
FOLLOWERS = ("raw", "raw", "sdk", "sdk")  # of each session
MOST_BYTES = 2_500  # of an answer until it is cut: some cuts are in its headers, some some events later
TEXTS = ("short", "ä€😀" * 40, "a line separator \u2028 in it", "x" * 1500)
AT_ONCE = struct.pack("ii", 1, 0)
WAIT_S = 60


class Cutter:
    """A proxy between client and service that closes each connection after a number of bytes of the answer."""

    def __init__(self, service_url: str, chance: random.Random) -> None:
        self._to, self._chance = httpx.URL(service_url), chance
        self.url = ""

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        self.url = str(self._to.copy_with(port=port))
        async with server:
            yield

    async def _serve(self, client: asyncio.StreamReader, answer: asyncio.StreamWriter) -> None:
        service, request = await asyncio.open_connection(self._to.host, self._to.port)
        asking = asyncio.create_task(_pass_on(client, request))
        with suppress(OSError):
            left = self._chance.randrange(MOST_BYTES)
            while left and (some := await service.read(left)):
                answer.write(some)
                await answer.drain()
                left -= len(some)
        asking.cancel()
        reset = self._chance.random() < 0.5  # instead of an end
        for end in (answer, request):
            with suppress(OSError):  # that end is gone already
                if reset:
                    end.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, AT_ONCE)
            end.close()


async def _pass_on(client: asyncio.StreamReader, service: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while some := await client.read(65536):
            service.write(some)
            await service.drain()
        service.close()  # the client left


@dataclass
class Follower:
    """A client that follows the log. `heard` are (seq, id) of each complete event; `torn` counts cuts in the middle
    of an event."""

    session_id: str
    chance: random.Random
    heard: list[tuple[int, str]] = field(default_factory=list)
    cuts: Counter[str] = field(default_factory=Counter)
    torn: int = 0

    @property
    def cursor(self) -> str:
        return str(self.heard[-1][0] if self.heard else 0)

    def leaves(self) -> bool:
        """Whether the client makes the next cut."""
        found = self.chance.random() < 0.3
        self.cuts["the client left" if found else "the connection ended"] += 1
        return found

    @property
    def path(self) -> str:
        return f"/v1/sessions/{self.session_id}/events/stream"


async def follow_raw(follower: Follower, service: LocalService, cutter: Cutter, cuts: int) -> None:
    async with httpx.AsyncClient(headers={"x-api-key": SECRET}, timeout=WAIT_S) as http:
        for _ in range(cuts):
            leaves = follower.leaves()
            most = follower.chance.randrange(MOST_BYTES) if leaves else None
            with suppress(httpx.TransportError):
                await _read(follower, http, service.url if leaves else cutter.url, most)


async def _read(
    follower: Follower, http: httpx.AsyncClient, url: str, most: int | None, until: int = 0
) -> None:
    """Reads until the stream ends, `most` bytes were read, or event `until` arrived."""
    buffer, read = b"", 0
    headers = {"last-event-id": follower.cursor}
    async with http.stream("GET", url + follower.path, headers=headers) as answer:
        assert answer.status_code == 200
        try:
            async for some in answer.aiter_raw():
                kept = some if most is None else some[: most - read]
                read += len(kept)
                *whole, buffer = (buffer + kept).split(b"\n\n")
                for frame in whole:
                    _hear(follower, frame)
                if (most is not None and read >= most) or 0 < until <= int(follower.cursor):
                    return
        finally:
            follower.torn += bool(buffer)


def _hear(follower: Follower, frame: bytes) -> None:
    fields = dict(line.split(": ", 1) for line in frame.decode().split("\n") if not line.startswith(":"))
    if "id" in fields:
        follower.heard.append((int(fields["id"]), json.loads(fields["data"])["id"]))


async def follow_with_the_sdk(follower: Follower, service: LocalService, cutter: Cutter, cuts: int) -> None:
    """Follows with the SDK, which does not show the ids of messages. Its users count events, because a log has no gaps."""
    async with (
        anthropic.AsyncAnthropic(base_url=service.url, api_key=SECRET, max_retries=0) as straight,
        anthropic.AsyncAnthropic(base_url=cutter.url, api_key=SECRET, max_retries=0) as through,
    ):
        for _ in range(cuts):
            leaves = follower.leaves()
            most = follower.chance.randrange(5) if leaves else None
            with suppress(anthropic.APIConnectionError, httpx2.TransportError):
                await _read_with_the_sdk(follower, straight if leaves else through, most)


async def _read_with_the_sdk(follower: Follower, sdk: Any, most: int | None) -> None:
    stream = await sdk.beta.sessions.events.stream(
        follower.session_id, extra_headers={"Last-Event-ID": follower.cursor}
    )
    async with stream:
        if most == 0:
            return
        async for event in stream:
            follower.heard.append((int(follower.cursor) + 1, event.id))
            most = most and most - 1
            if most == 0:
                return


async def commit(service: LocalService, session_id: str, key_id: str) -> None:
    """Commits events one by one until it is cancelled."""
    number = 0
    while True:
        number += 1
        title = f"{number} {TEXTS[number % len(TEXTS)]}"
        await service.store.update_session(session_id, key_id, changes={"title": title})


@pytest.mark.takes_long("a service and its streams are cut again and again")
@pytest.mark.parametrize("database", ["sqlite", "postgres"])
async def test_a_stream_that_is_cut_anywhere_goes_on_without_gap_or_repeat(
    database: str,
    tmp_path: Path,
    scale: int,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
):
    if database == "sqlite":
        followers = await _struggle(tmp_path, scale, None)
    else:
        with request.getfixturevalue("postgres_server").database() as url:
            followers = await _struggle(tmp_path, scale, url)
    cuts = sum((f.cuts for f in followers), Counter[str]())
    with capsys.disabled():
        print(f"\n{database}: {dict(cuts)}, {sum(f.torn for f in followers)} of the raw ones within an event, "
              f"{sum(len(f.heard) for f in followers)} events heard")  # fmt: skip
    assert cuts.total() == scale
    assert sum(f.torn for f in followers)


async def _struggle(folder: Path, scale: int, database_url: str | None) -> list[Follower]:
    async with serve_in_process(
        folder, keys={"alice": SECRET}, driving=False, database_url=database_url
    ) as service:
        key_id = await _key(service)
        sessions = [await _session(service, key_id) for _ in range(SESSIONS)]
        kinds = FOLLOWERS * SESSIONS
        followers = [
            Follower(sessions[n // len(FOLLOWERS)], random.Random(f"follower {n}")) for n in range(len(kinds))
        ]
        shares = [scale // len(kinds) + (n < scale % len(kinds)) for n in range(len(kinds))]
        writers = [asyncio.create_task(commit(service, s, key_id)) for s in sessions]
        cutter = Cutter(service.url, random.Random("cuts"))
        async with cutter.listening(), asyncio.TaskGroup() as group:
            for kind, follower, cuts in zip(kinds, followers, shares, strict=True):
                follow = follow_raw if kind == "raw" else follow_with_the_sdk
                group.create_task(follow(follower, service, cutter, cuts))
        for writer in writers:
            writer.cancel()
        await asyncio.gather(*writers, return_exceptions=True)
        for follower in followers:
            await _check(follower, service, key_id)
    return followers


async def _key(service: LocalService) -> str:
    return (await service.store.add_key("alice", hash_api_key(SECRET))).id


async def _session(service: LocalService, key_id: str) -> str:
    made = await service.store.create_session(
        key_id, agent=Agent(), environment=Environment(), title=None, metadata={}, initial=[]
    )
    return made.id


async def _check(follower: Follower, service: LocalService, key_id: str) -> None:
    """Reads the rest without a cut, and asserts that all events together are the log."""
    newest = await service.store.last_seq(follower.session_id, key_id)
    async with httpx.AsyncClient(headers={"x-api-key": SECRET}, timeout=WAIT_S) as http:
        if int(follower.cursor) < newest:
            await _read(follower, http, service.url, None, until=newest)
    log: list[tuple[int, str]] = []
    page: str | None = None
    while True:
        found = await service.store.list_events(follower.session_id, key_id, limit=1000, page=page)
        log += [(event.seq, event.id) for event in found.data]
        page = found.next_page
        if page is None:
            break
    assert follower.heard == log
    assert [seq for seq, _ in log] == list(range(1, newest + 1))
