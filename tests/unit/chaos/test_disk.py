"""The run's own disk can be filled to its last byte, and its files are kept afterwards."""

import errno
import threading
import time
from pathlib import Path

import pytest

from claude_hitl_template.domain.models import new_id
from tests.chaos import disk as disks
from tests.chaos.disk import Disk


def no_room(folder: Path) -> bool:
    path = folder / new_id("tried")
    try:
        path.write_bytes(b"x" * 5000)
    except OSError as error:
        return error.errno == errno.ENOSPC
    return False


def test_a_disk_is_full_for_a_while_and_then_has_room_again(tmp_path: Path):
    disk = Disk(tmp_path / "data", "8m")
    if not disk.mount():
        pytest.skip("a disk of its own can only be mounted by root")
    (tmp_path / "data" / "kept.txt").write_text("kept")
    enough = threading.Event()
    filling = threading.Thread(target=disk.fill, args=(600.0, enough))
    filling.start()
    while filling.is_alive() and not no_room(tmp_path / "data"):
        time.sleep(0.01)
    assert filling.is_alive(), "it was never full"
    enough.set()
    filling.join()
    assert not no_room(tmp_path / "data")
    assert not (tmp_path / "data" / disks.FILLER).exists()
    disk.unmount()
    assert (tmp_path / "data" / "kept.txt").read_text() == "kept"
