"""Files keep to their folder, whatever they are called and wherever they lead."""

import json
import os
import time
import uuid
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given

from claude_hitl_template.errors import InvalidInput
from claude_hitl_template.panel.upload import collect, read, safe_name
from tests.unit.panel.nasty import texts


@pytest.mark.parametrize(
    ("given_name", "kept"),
    [
        ("report.pdf", "report.pdf"),
        ("../../etc/passwd", "passwd"),
        ("C:\\temp\\a.txt", "a.txt"),
        ("a\u202egnp.exe\x00\n", "agnp.exe"),
        (".env", "env"),
        ("..", "file"),
        ("", "file"),
        ("日本.txt", "日本.txt"),
    ],
)
def test_a_name_loses_its_path_and_what_hides(given_name: str, kept: str) -> None:
    assert safe_name(given_name) == kept


@given(texts)
def test_any_name_is_one_file_of_the_folder(name: str) -> None:
    safe = safe_name(name * 3)
    assert safe not in ("", ".", "..")
    assert "/" not in safe
    assert len(safe.encode("utf-8", "surrogatepass")) <= 200


def state(*names: str) -> dict[str, Any]:
    items = {str(uuid.uuid4()): {"filename": str(n), "totalChunks": 1} for n in range(len(names))}
    return {
        "batch": str(uuid.uuid4()),
        "items": items,
        "names": {str(n): name for n, name in enumerate(names)},
    }


def test_files_of_the_same_name_are_told_apart() -> None:
    found = read(json.dumps(state("x/a.txt", "y/a.txt", "a.txt")))
    assert found is not None
    assert [name for _, name in found.names] == ["a.txt", "a (2).txt", "a (3).txt"]


def test_no_files_are_no_error() -> None:
    assert read("") is None


@pytest.mark.parametrize(
    "change",
    [
        {"batch": "../x"},
        {"items": {"../x": {"filename": "0", "totalChunks": 1}}},
        {"items": []},
        {"names": None},
    ],
)
def test_what_would_be_a_path_in_the_panel_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput) as caught:
        read(json.dumps({**state("a"), **change}))
    assert caught.value.field == "files"


@pytest.mark.parametrize("text", ["{", "[]", "7", '"x"'])
def test_what_is_no_list_of_files_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput):
        read(text)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    workspace, target = tmp_path / "workspace", tmp_path / "target"
    workspace.mkdir()
    target.mkdir()
    return workspace, target


def test_only_what_the_turn_changed_is_offered(folders: tuple[Path, Path]) -> None:
    workspace, target = folders
    (workspace / "old").write_text("old")
    os.utime(workspace / "old", (1, 1))
    (workspace / "sub").mkdir()
    (workspace / "sub" / "<b>new").write_text("new")
    found = collect(workspace, time.time() - 60, target, 1000)
    ((name, stored, count),) = found.files
    assert (name, count) == ("sub/<b>new", 3)
    assert (target / stored).read_text() == "new"
    assert not set("<>") & set(stored)


def test_links_out_of_the_workspace_are_not_followed(folders: tuple[Path, Path], tmp_path: Path) -> None:
    workspace, target = folders
    (tmp_path / "secret").write_text("secret")
    (workspace / "file").symlink_to(tmp_path / "secret")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b").write_text("secret")
    (workspace / "folder").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(workspace / "pipe")
    assert collect(workspace, 0, target, 1000).files == []
    assert list(target.iterdir()) == []


def test_what_is_over_the_limit_is_named_with_its_reason(folders: tuple[Path, Path]) -> None:
    workspace, target = folders
    (workspace / "a").write_bytes(b"x" * 600)
    (workspace / "b").write_bytes(b"x" * 600)
    (workspace / "c").write_bytes(b"x" * 100)
    found = collect(workspace, 0, target, 1000)
    assert [name for name, _, _ in found.files] == ["a", "c"]
    assert [name for name, _ in found.left_out] == ["b"]


def test_a_workspace_that_was_never_made_offers_nothing(tmp_path: Path) -> None:
    assert collect(tmp_path / "none", 0, tmp_path, 1000).files == []
