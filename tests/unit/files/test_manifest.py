"""A manifest is valid or refused; no path in it may lead out of the workspace."""

import json
import os
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from claude_hitl_template.errors import InvalidInput
from claude_hitl_template.files import manifest as manifests
from claude_hitl_template.files.manifest import Manifest, SavedFile, SavedLink, blob_name, check_path, load

BLOB = blob_name(b"x")


def a_file(path: str, **changes: Any) -> SavedFile:
    return SavedFile(**{"path": path, "mode": 0o644, "size": 1, "mtime_ns": 5, "chunks": (BLOB,), **changes})


class Blobs(dict[str, bytes]):
    def keep(self, *blobs: bytes) -> str:
        self.update({blob_name(b): b for b in blobs})
        return blob_name(blobs[-1])

    async def get(self, names: Any) -> list[bytes]:
        return [self[name] for name in names]


async def test_a_manifest_is_read_as_it_was_written() -> None:
    made = Manifest.of(
        [a_file("b/c"), a_file("a", chunks=(), size=0), a_file("caf\udce9")],
        [SavedLink("link", "/etc/passwd"), SavedLink("b/up", "../../..")],
        ["b/empty", "z"],
    )
    blobs = Blobs()
    assert await load(blobs.keep(*made.encode()), blobs.get) == made
    assert await load(None, blobs.get) == Manifest()


async def test_one_of_many_files_is_split_into_parts_that_fit_a_call() -> None:
    made = Manifest.of([a_file(f"folder/file number {i}") for i in range(40_000)])
    blobs, encoded = Blobs(), made.encode()
    assert len(encoded) > 2
    assert max(map(len, encoded)) <= manifests.CHUNK_BYTES
    found, own = await manifests.load_with_parts(blobs.keep(*encoded), blobs.get)
    assert found == made
    assert set(own) == {blob_name(b) for b in encoded}


def test_equal_workspaces_have_equal_manifests() -> None:
    assert (
        Manifest.of([a_file("b"), a_file("a")]).encode() == Manifest.of([a_file("a"), a_file("b")]).encode()
    )


HOSTILE = [
    "",
    "/",
    "/etc/passwd",
    "..",
    "../x",
    "a/../b",
    "a/./b",
    "./a",
    "a//b",
    "a/",
    "a\0b",
    "\ud800",
    "x" * 256,
    "a/" * 2050 + "a",
]


@pytest.mark.parametrize("path", HOSTILE)
@pytest.mark.parametrize("kind", ["files", "links", "folders"])
async def test_a_path_that_leads_elsewhere_is_refused(path: str, kind: str) -> None:
    rows = {"files": [path, 0o644, 1, 0, [BLOB]], "links": [path, "x"], "folders": path}
    raw = {"version": 1, "files": [], "links": [], "folders": [], kind: [rows[kind]]}
    await refused(raw)


async def refused(raw: Any) -> None:
    blobs = Blobs()
    with pytest.raises(InvalidInput) as caught:
        await load(blobs.keep(raw if isinstance(raw, bytes) else json.dumps(raw).encode()), blobs.get)
    assert str(caught.value).encode()  # no lone surrogate: it goes into logs and answers


ONE = ["a", 0o644, 1, 0, [BLOB]]


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"\xff", b"[]", b"null", b"[" * 100_000, {"version": 2}, {"version": 1}, {"version": 1, "parts": 5},
        {"version": 1, "parts": ["../x"]},
        {"version": 1, "files": 5, "links": [], "folders": []},
        {"version": 1, "files": [ONE, ONE], "links": [], "folders": []},
        {"version": 1, "files": [ONE], "links": [["a", "x"]], "folders": []},
        {"version": 1, "files": [ONE], "links": [], "folders": ["a/b"]},
        {"version": 1, "files": [["l/x", 0o644, 1, 0, [BLOB]]], "links": [["l", "/etc"]], "folders": []},
        {"version": 1, "files": [], "links": [["l", ""]], "folders": []},
        {"version": 1, "files": [], "links": [["l", "a\0b"]], "folders": []},
        {"version": 1, "files": [["a", 0o4755, 1, 0, [BLOB]]], "links": [], "folders": []},
        {"version": 1, "files": [["a", True, 1, 0, [BLOB]]], "links": [], "folders": []},
        {"version": 1, "files": [["a", 0o644, -1, 0, [BLOB]]], "links": [], "folders": []},
        {"version": 1, "files": [["a", 0o644, 1, 10**40, [BLOB]]], "links": [], "folders": []},
        {"version": 1, "files": [["a", 0o644, 1, 0, ["../../x"]]], "links": [], "folders": []},
        {"version": 1, "files": [["a", 0o644, 1, 0, BLOB]], "links": [], "folders": []},
        {"version": 1, "files": [["a", 0o644, 1]], "links": [], "folders": []},
    ],
)  # fmt: skip
async def test_what_is_no_manifest_is_refused_with_a_reason(raw: Any) -> None:
    await refused(raw)


@given(st.text(max_size=300))
def test_a_path_that_is_taken_stays_below_its_folder(path: str) -> None:
    try:
        check_path(path)
    except InvalidInput:
        return
    assert os.path.normpath(f"/w/{path}") == f"/w/{path}"


def test_files_that_are_added_take_the_places_of_what_was_there() -> None:
    old = Manifest.of([a_file("a"), a_file("b")], [SavedLink("c", "x")], ["d"])
    new = [a_file(name, mtime_ns=9) for name in "bcd"]
    assert old.with_added(new) == Manifest.of([a_file("a"), *new])


def test_what_the_image_baked_is_left_out() -> None:
    made = Manifest.of(
        [a_file(".claude/x"), a_file("a/.claude")], [SavedLink("CLAUDE.md", "x")], [".claude/y"]
    )
    assert made.without(frozenset({".claude", "CLAUDE.md"})) == Manifest.of([a_file("a/.claude")])
