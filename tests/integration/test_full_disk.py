"""A full disk: lost writes are not acknowledged, and acknowledged ones are not lost."""

import errno
import io
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.integration.harness import KEY, Service

pytestmark = pytest.mark.slow

WRITE = "Write hello.txt with a greeting"
DISK = "48m"


@pytest.fixture(scope="module")
def cramped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service whose data folder is its own small disk."""
    if os.geteuid() != 0:
        pytest.skip("a disk of its own can only be mounted by root")
    one = Service(tmp_path_factory.mktemp("cramped"))
    disk = one.root / "data"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "none", disk], check=True)
    try:
        one.up(HITL_HOT_WINDOW_S="0")
        yield one
    finally:
        one.down()
        subprocess.run(["umount", disk], check=True)


def _write_without_end(file: io.RawIOBase) -> None:
    while file.write(b"x" * 4096):
        pass


def fill(folder: Path) -> Path:
    """Fills the disk, and returns the file to delete to free it."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        _write_without_end(file)
    return filler


def post(service: Service, path: str, body: object) -> httpx.Response:
    return httpx.post(service.base + path, json=body, headers={"x-api-key": KEY}, timeout=60)


def test_what_a_full_disk_cannot_keep_is_not_acknowledged_and_all_goes_on_once_there_is_room(
    cramped: Service,
):
    session, talking = cramped.start_session(WRITE), cramped.start_session(WRITE)
    asked, other = session.until_asked(), talking.until_asked()
    session.until_parked()
    before = session.events()
    filler = fill(cramped.root / "data")
    said = {"type": "user.tool_confirmation", "tool_use_id": asked, "result": "allow"}
    path = f"/v1/sessions/{session.id}/events"
    acknowledged, refused = 0, None
    while refused is None:  # the database still has some room of its own
        text = {"type": "text", "text": f"{acknowledged} {'x' * 3000}"}
        answer = post(cramped, path, {"events": [{"type": "user.message", "content": [text]}]})
        if answer.status_code == 200:
            acknowledged += 1
        else:
            refused = answer
    assert refused.status_code == 503, refused.text
    error = refused.json()["error"]
    assert "disk" in error["message"]
    assert "nothing was changed" in error["message"]
    assert post(cramped, path, {"events": [said]}).status_code in (200, 503)
    checks = {check["name"]: check["level"] for check in json.loads(cramped.hitl("doctor", "--json").stdout)}
    assert checks["disk"] == "wrong"
    filler.unlink()
    session.decide(asked)
    assert session.until_idle()["type"] in ("end_turn", "requires_action")
    assert (session.workspace / "hello.txt").exists()
    log = session.events()
    assert log[: len(before)] == before
    assert len([e for e in log if e["type"] == "user.message"]) == 1 + acknowledged
    assert len([e for e in log if e["type"] == "user.tool_confirmation"]) == 1
    talking.decide(other, "deny")
    assert talking.until_idle()["type"] == "end_turn"
