"""Files stay in their folder, whatever their names and links."""

import json
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given

from claude_hitl_template.errors import InvalidInput, NotFound
from claude_hitl_template.files.manifest import SavedFile, blob_name
from claude_hitl_template.panel.uploads import MAX_FILES, collect, parse, safe_name
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
    found = parse(json.dumps(state("x/a.txt", "y/a.txt", "a.txt")))
    assert found is not None
    assert [name for _, name in found.names] == ["a.txt", "a (2).txt", "a (3).txt"]


def test_no_files_are_no_error() -> None:
    assert parse("") is None


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
        parse(json.dumps({**state("a"), **change}))
    assert caught.value.field == "files"


@pytest.mark.parametrize("text", ["{", "[]", "7", '"x"'])
def test_what_is_no_list_of_files_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput):
        parse(text)


class Saved:
    """Files of a saved workspace, with their content."""

    def __init__(self) -> None:
        self.files: list[SavedFile] = []
        self._blobs: dict[str, bytes] = {}

    def add(self, path: str, content: bytes) -> None:
        self._blobs[blob_name(content)] = content
        self.files.append(SavedFile(path, 0o644, len(content), 0, (blob_name(content),)))

    def lose(self, content: bytes) -> None:
        del self._blobs[blob_name(content)]

    async def get(self, names: Sequence[str]) -> list[bytes]:
        if names[0] not in self._blobs:
            raise NotFound("gone")
        return [self._blobs[name] for name in names]


async def test_saved_files_are_offered_under_names_that_are_inert(tmp_path: Path) -> None:
    saved = Saved()
    saved.add("sub/<b>new", b"new")
    saved.add(".git/index", b"of git")
    saved.add("a/node_modules/x.js", b"of npm")
    found = await collect(saved.files, saved.get, tmp_path, 1000)
    ((name, stored, count),) = found.files
    assert (name, count) == ("sub/<b>new", 3)
    assert (tmp_path / stored).read_bytes() == b"new"
    assert not set("<>/") & set(stored)


async def test_what_is_over_the_limit_or_lost_is_named_with_its_reason(tmp_path: Path) -> None:
    saved = Saved()
    for name, content in (("a", b"x" * 600), ("b", b"y" * 600), ("c", b"z" * 100), ("d", b"lost")):
        saved.add(name, content)
    saved.lose(b"lost")
    found = await collect(saved.files, saved.get, tmp_path, 1000)
    assert [name for name, _, _ in found.files] == ["a", "c"]
    assert [name for name, _ in found.left_out] == ["b", "d"]


async def test_a_hundred_files_are_offered_and_more_are_said(tmp_path: Path) -> None:
    saved = Saved()
    for number in range(MAX_FILES + 5):
        saved.add(f"{number:03}", b"%d" % number)
    found = await collect(saved.files, saved.get, tmp_path, 10_000)
    assert len(found.files) == MAX_FILES
    assert len(found.left_out) == 1
