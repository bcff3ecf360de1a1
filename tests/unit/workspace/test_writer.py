"""Writing what was saved goes nowhere but into the folder."""

import os
from pathlib import Path
from typing import Any

import pytest

from claude_hitl_template.errors import InvalidInput
from claude_hitl_template.files.manifest import SavedFile, SavedLink, blob_name
from claude_hitl_template.workspace.writer import TreeWriter, wipe


def put(folder: Path, path: str, content: bytes, **changes: Any) -> None:
    name = blob_name(content)
    facts = {"path": path, "mode": 0o640, "size": len(content), "mtime_ns": 1_000_000_123, "chunks": (name,)}
    file = SavedFile(**{**facts, **changes})
    with TreeWriter(folder) as tree:
        tree.write([(file, 0)], {name: content})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "w").mkdir()
    return tmp_path / "w"


def test_a_file_comes_back_with_its_mode_and_its_time(folder: Path) -> None:
    put(folder, "a/b/c", b"x")
    found = (folder / "a/b/c").stat()
    assert (found.st_mode & 0o7777, found.st_mtime_ns) == (0o640, 1_000_000_123)
    assert (folder / "a/b/c").read_bytes() == b"x"


def test_nothing_is_written_through_a_link(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/file").write_text("mine")
    (folder / "link").symlink_to(tmp_path / "outside")
    with pytest.raises(OSError, match=r"link|directory"):
        put(folder, "link/file", b"theirs")
    with pytest.raises(OSError, match=r"link|directory"), TreeWriter(folder) as tree:
        tree.link(SavedLink("link/x", "y"))
    (folder / "file").symlink_to(tmp_path / "outside/file")
    put(folder, "file", b"theirs")
    assert (tmp_path / "outside/file").read_text() == "mine"
    assert os.listdir(tmp_path / "outside") == ["file"]
    assert not (folder / "file").is_symlink()


def test_a_link_is_made_as_it_was_wherever_it_leads(folder: Path) -> None:
    with TreeWriter(folder) as tree:
        tree.link(SavedLink("a/b", "/etc/passwd"))
        tree.link(SavedLink("up", "../.."))
    assert os.readlink(folder / "a/b") == "/etc/passwd"
    assert os.readlink(folder / "up") == "../.."


def test_a_content_of_another_size_is_refused_and_leaves_no_file(folder: Path) -> None:
    with pytest.raises(InvalidInput, match="size"):
        put(folder, "a", b"xyz", size=2)
    assert os.listdir(folder) == []


def test_a_setuid_bit_in_a_manifest_is_not_set(folder: Path) -> None:
    put(folder, "a", b"x", mode=0o4755)
    assert (folder / "a").stat().st_mode & 0o7777 == 0o755


def test_wiping_removes_all_but_what_was_baked_and_follows_nothing(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/file").write_text("stays")
    (folder / "link").symlink_to(tmp_path / "outside")
    (folder / "deep/er").mkdir(parents=True)
    (folder / "deep/er/link").symlink_to(tmp_path / "outside")
    (folder / "deep/er/file").write_text("x")
    (folder / ".claude").mkdir()
    (folder / ".claude/settings.json").write_text("{}")
    wipe(folder, {".claude"})
    assert os.listdir(folder) == [".claude"]
    assert (folder / ".claude/settings.json").exists()
    assert (tmp_path / "outside/file").read_text() == "stays"
