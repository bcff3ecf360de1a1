"""Reaches every fault point: each write, and a conversation in one process; test_fault_points.py runs it in its own process.

Those of the Store are struck one by one in tests/chaos/test_crash_runs.py.
"""

import asyncio
import sys
import time
from datetime import timedelta
from pathlib import Path

import anthropic

from claude_hitl_template.domain.notices import SESSION_KINDS, Channel, Parcel
from claude_hitl_template.domain.people import SERVICE
from claude_hitl_template.files.manifest import Manifest, blob_name
from claude_hitl_template.notify.courier import Courier
from claude_hitl_template.notify.sender import Outcome, Sent
from claude_hitl_template.store.core import CoreStore
from claude_hitl_template.store.owners import LEASE_S
from claude_hitl_template.store.postgres import PostgresBackend
from claude_hitl_template.store.sqlite import SqliteBackend
from claude_hitl_template.testing.clock import FakeClock
from claude_hitl_template.testing.local_service import serve_in_process
from tests.contract.asking import KEY
from tests.contract.test_repeated_writes import live


class Taking:
    """A sender whose target takes everything."""

    async def send(self, parcel: Parcel, link: str) -> Outcome:
        return Sent()

    async def close(self) -> None: ...


async def every_write(backend: SqliteBackend | PostgresBackend, once: str = "") -> None:
    """Calls every write method, over three sessions. `once` makes their ids differ from those of other calls of this
    function."""
    clock = FakeClock()
    store = CoreStore(backend, clock)
    await store.add_key("first", f"hash {once}")
    channel = Channel(
        id=f"chan {once}", kind="webhook", workspace_id=KEY, kinds=SESSION_KINDS, created_at=clock()
    )
    await store.add_channel(channel, {"signing": "s"})
    archived = await live(store, clock, until="archive", once=once)
    deleted = await live(store, clock, until="archive", once=f"{once} 2")
    await store.delete_session(deleted, KEY)
    owned = await live(store, clock, until="give up", once=f"{once} 3")
    epoch = (await store.acquire(owned, "two", lease_s=LEASE_S)).epoch
    clock.now += timedelta(seconds=LEASE_S)
    await store.wait_session(owned, epoch, -1, timeout_s=0)
    await store.drop_lease(owned, epoch)
    epoch = (await store.acquire(owned, "three", lease_s=LEASE_S)).epoch
    await store.tell_waiting(owned, epoch, "no room")
    blobs = Manifest().encode()
    await store.put_blobs(blobs)
    await store.add_files(owned, KEY, blob_name(blobs[-1]))
    await store.release(owned, epoch)
    await store.begin_export(KEY, f"export {once}", form="jsonl", from_seq=1, by=SERVICE)
    key = {"scope": owned, "project_key": "-", "session_id": "s", "subpath": ""}
    await store.delete_transcripts(key)  # type: ignore[arg-type]
    clock.now += timedelta(days=2)
    assert archived in await store.retire(clock.now - timedelta(days=1))
    courier = Courier(store, {"webhook": Taking()}, pages_url="http://127.0.0.1")
    while await courier.send_due():
        await courier.settled()
    await courier.close()
    await asyncio.sleep(0.2)  # for the last notification
    await backend.close()


async def a_conversation(folder: Path) -> None:
    async with serve_in_process(
        folder, keys={"a": "secret"}, hot_window_s=0.0, idle_timeout_s=0.0
    ) as service:
        client = anthropic.AsyncAnthropic(base_url=service.url, api_key="secret")
        session = await client.beta.sessions.create(
            agent="default",
            environment_id="default",
            initial_events=[
                {
                    "type": "user.message",
                    "content": [{"type": "text", "text": "Write hello.txt with a greeting"}],
                }
            ],
        )
        ended, deadline = False, time.monotonic() + 60
        while not ended and time.monotonic() < deadline:
            found = await service.store.get_session(session.id)
            waits = (found.stop_reason or {}).get("type")
            if found.lease is None and waits == "requires_action":
                [call] = (found.stop_reason or {})["event_ids"]
                await client.beta.sessions.events.send(
                    session.id,
                    events=[{"type": "user.tool_confirmation", "tool_use_id": call, "result": "allow"}],
                )
            ended = found.lease is None and waits == "end_turn"
            await asyncio.sleep(0.05)
        await client.close()


async def main() -> None:
    await every_write(PostgresBackend(sys.argv[1]))
    await a_conversation(Path(sys.argv[2]))


if __name__ == "__main__":
    asyncio.run(main())
