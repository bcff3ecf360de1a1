"""A failing disk: lost writes are not acknowledged, the service reports the problem, and continues afterwards."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from claude_hitl_template.store.core import CoreStore
from claude_hitl_template.store.sqlite import SqliteBackend, sqlite_url
from claude_hitl_template.testing.local_service import LocalService, serve_in_process
from tests.contract.conftest import KEYS
from tests.failing_disk import Fault, failing_disk

PATIENCE_S = 60
DATABASE = "hitl.sqlite3"


class Caller:
    """A client of the service that returns its errors unchanged."""

    def __init__(self, service: LocalService) -> None:
        self.service = service
        self._http = httpx.AsyncClient(headers={"x-api-key": KEYS["alice"]}, timeout=PATIENCE_S)

    async def post(self, path: str, body: Any) -> httpx.Response:
        return await self._http.post(f"{self.service.url}{path}", json=body)

    async def parked(self) -> tuple[str, str]:
        """Returns a session in which a call waits, and the call."""
        said = {
            "type": "user.message",
            "content": [{"type": "text", "text": "Write hello.txt with a greeting"}],
        }
        body = {"agent": "default", "environment_id": "default", "initial_events": [said]}
        session: str = (await self.post("/v1/sessions", body)).json()["id"]
        (call,) = (await self.until(session, "requires_action"))["event_ids"]
        return session, call

    async def until(self, session_id: str, reason: str) -> dict[str, Any]:
        async with asyncio.timeout(PATIENCE_S):
            while True:
                found = await self.service.store.get_session(session_id)
                if found.parked and (found.stop_reason or {}).get("type") == reason:
                    return dict(found.stop_reason or {})
                await self.service.store.wait_events(session_id, None, found.next_seq - 1, timeout_s=0.2)

    async def close(self) -> None:
        await self._http.aclose()


@asynccontextmanager
async def calling(folder: Path) -> AsyncIterator[Caller]:
    async with serve_in_process(folder, keys=KEYS, hot_window_s=0.0, idle_timeout_s=0.0) as service:
        caller = Caller(service)
        try:
            yield caller
        finally:
            await caller.close()


async def kept_by_a_crash(folder: Path, session_id: str, into: Path) -> list[str]:
    """Returns the texts of the session's messages that would survive a crash of the service and the machine now."""
    into.mkdir()
    for name in (DATABASE, f"{DATABASE}-wal"):
        shutil.copy(folder / name, into / name)
    backend = SqliteBackend(sqlite_url(into / DATABASE))
    events = (await CoreStore(backend).list_events(session_id, None, limit=1000, types=["user.message"])).data
    await backend.close()
    return [e.payload["content"][0]["text"] for e in events]


@pytest.mark.parametrize("fault", ["write", "fsync"])
async def test_what_a_failing_disk_does_not_keep_is_refused_and_all_goes_on_once_it_is_well_again(
    tmp_path: Path, fault: Fault
):
    folder = tmp_path / "data"
    folder.mkdir()
    with failing_disk(f"{DATABASE}-wal") as disk:
        async with calling(folder) as caller:
            session, call = await caller.parked()
            path = f"/v1/sessions/{session}/events"
            acknowledged = ["Write hello.txt with a greeting"]
            for number in range(3):
                text = f"message {number}"
                message = {"type": "user.message", "content": [{"type": "text", "text": text}]}
                assert (await caller.post(path, {"events": [message]})).status_code == 200
                acknowledged.append(text)
                disk.faults = {fault}
                allow = {"type": "user.tool_confirmation", "tool_use_id": call, "result": "allow"}
                for refused in (message, allow, allow):
                    answer = await caller.post(path, {"events": [refused]})
                    assert answer.status_code == 503, answer.text
                    said = answer.json()["error"]["message"]
                    assert "disk I/O error" in said
                    assert "check the disk" in said
                (waiting,) = (await caller.service.store.list_approvals(None, limit=9)).data
                assert waiting.decision is None
                kept = await kept_by_a_crash(folder, session, tmp_path / f"crash-{number}")
                assert kept[: len(acknowledged)] == acknowledged
                disk.faults = set()
            assert disk.met >= 9
            log_before = (await caller.service.store.list_events(session, None, limit=1000)).data
            assert (await caller.post(path, {"events": [allow]})).status_code == 200
            await caller.until(session, "end_turn")
            log = (await caller.service.store.list_events(session, None, limit=1000)).data
            assert [e.id for e in log][: len(log_before)] == [e.id for e in log_before]
            assert [e.seq for e in log] == list(range(1, len(log) + 1))
            assert [e.type for e in log].count("user.tool_confirmation") == 1
            assert (caller.service.workspace(session) / "hello.txt").exists()
