"""A manifest is valid or refused; no path in it may lead out of the workspace."""

import json
import os
from typing import Any

import pytest
from hypothesis import given, settings
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


async def test_one_of_many_files_is_split_into_shards_that_fit_a_call() -> None:
    made = Manifest.of(
        [a_file(f"folder/file number {i}") for i in range(40_000)],
        [SavedLink("link", "x")],
        ["empty", "caf\udce9"],
    )
    blobs, encoded = Blobs(), made.encode()
    assert max(map(len, encoded)) <= manifests.CHUNK_BYTES
    found, own = await manifests.load_with_parts(blobs.keep(*encoded), blobs.get)
    assert found == made
    assert set(own) == {blob_name(b) for b in encoded}


async def test_a_manifest_that_an_earlier_version_cut_into_parts_is_read() -> None:
    made, blobs = Manifest.of([a_file("a"), a_file("b")]), Blobs()
    pieces = [made.text()[:50], made.text()[50:]]
    root = {"version": 1, "parts": [blob_name(piece) for piece in pieces]}
    name = blobs.keep(*pieces, json.dumps(root).encode())
    assert await manifests.load_with_parts(name, blobs.get) == (made, [name, *root["parts"]])  # type: ignore[misc]


@pytest.mark.parametrize("path", ["src/file number 1234", "a new one"])
async def test_a_changed_file_among_thousands_adds_little(path: str) -> None:
    before = Manifest.of(
        [a_file(f"src/file number {i}", chunks=(blob_name(b"%d" % i),)) for i in range(5000)]
    )
    blobs = Blobs()
    blobs.keep(*before.encode())
    after = before.with_added([a_file(path, mtime_ns=6)])
    added = [blob for blob in after.encode() if blob_name(blob) not in blobs]
    assert sum(map(len, added)) <= 20_000
    assert await load(blobs.keep(*added), blobs.get) == after


async def test_shards_that_contradict_each_other_are_refused() -> None:
    blobs = Blobs()
    shards = [Manifest.of([a_file(path)]).text() for path in ("a", "a/b")]
    root = json.dumps({"version": 2, "shards": [blob_name(shard) for shard in shards]}).encode()
    with pytest.raises(InvalidInput, match="below"):
        await load(blobs.keep(*shards, root), blobs.get)


@settings(max_examples=30)
@given(
    paths=st.sets(st.text("ab\udce9\u00fc", min_size=1, max_size=30), min_size=300, max_size=400),
    linked=st.integers(0, 300),
)
async def test_any_large_manifest_is_read_as_it_was_written(paths: set[str], linked: int) -> None:
    ordered = sorted(paths)
    links = [SavedLink(path, "elsewhere") for path in ordered[:linked]]
    made = Manifest.of([a_file(path) for path in ordered[linked:]], links)
    blobs, encoded = Blobs(), made.encode()
    assert len(encoded) > 2 or len(encoded[0]) <= 2 * manifests.SHARD_BYTES
    assert await load(blobs.keep(*encoded), blobs.get) == made


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
        {"version": 1, "parts": ["../x"]}, {"version": 2, "shards": ["../x"]}, {"version": 2, "shards": {}},
        {"version": 3, "shards": []}, {"version": True, "files": 5}, {"version": "1"},
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
