"""A session's files survive its folder on the real cluster: saved through the ledger, and read over REST."""

import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.integration.harness import KEY, Conversation, Service, script

pytestmark = pytest.mark.slow

SIZE = 7_000_000  # several messages between owner and ledger


@pytest.fixture(scope="module")
def small_area(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A service whose file area is its own small disk."""
    if os.geteuid() != 0:
        pytest.skip("a disk of its own can only be mounted by root")
    disk = tmp_path_factory.mktemp("files")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", disk], check=True)
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.fixture(scope="module")
def parking(tmp_path_factory: pytest.TempPathFactory, small_area: Path) -> Iterator[Service]:
    one = Service(tmp_path_factory.mktemp("workspaces"))
    try:
        one.up(HITL_HOT_WINDOW_S="0", HITL_IDLE_TIMEOUT_S="0", HITL_FILES_URL=small_area.as_uri())
        yield one
    finally:
        one.down()


def wipe(session: Conversation) -> None:
    """Deletes the local files, as on another machine."""
    session.until_parked()
    shutil.rmtree(session.workspace)
    (session.service.root / "data" / "saved" / session.id).unlink()


def fetch(session: Conversation, path: str) -> httpx.Response:
    url = f"{session.service.base}/v1/sessions/{session.id}/workspace/files"
    return httpx.get(url, params={"path": path}, headers={"x-api-key": KEY}, timeout=60)


def listing(session: Conversation) -> dict[str, Any]:
    found = session.service.call("GET", f"/v1/sessions/{session.id}/workspace")
    return {file["path"]: file["size_bytes"] for file in found["data"]}


def test_what_was_written_before_parking_is_there_on_a_machine_that_never_saw_it(parking: Service):
    make = f"mkdir d; echo kept > d/note; head -c {SIZE} /dev/urandom > d/big"
    session = parking.start_session(script(make, "cat d/note; sha256sum d/big"))
    session.decide(session.until_asked())
    second = session.until_asked()
    session.until_parked()
    assert listing(session) == {"d/big": SIZE, "d/note": 5}
    saved = fetch(session, "d/big")
    assert saved.status_code == 200
    wipe(session)
    session.decide(second)
    assert session.until_idle()["type"] == "end_turn"
    said = str(session.events("agent.tool_result")[-1]["content"])
    assert "kept" in said
    assert hashlib.sha256(saved.content).hexdigest() in said


def test_a_full_file_area_costs_no_turn_and_is_made_up_for_once_there_is_room(
    parking: Service, small_area: Path
):
    session = parking.start_session(script("head -c 30000000 /dev/urandom > big"))
    session.decide(session.until_asked())
    assert session.until_idle()["type"] == "end_turn"
    (told,) = [e["error"] for e in session.events("session.error")]
    assert "No space left" in told["message"]
    assert told["concerns"] == "workspace"
    assert listing(session) == {}
    subprocess.run(["mount", "-o", "remount,size=256m", small_area], check=True)
    session.say("Say hello")
    assert session.until_idle()["type"] == "end_turn"
    session.until_parked()
    assert listing(session) == {"big": 30_000_000}
    assert len(session.events("session.error")) == 1
