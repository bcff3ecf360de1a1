"""An agent's files are restored; a file that cannot be saved is reported and affects no other."""

import asyncio
import os
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from claude_hitl_template.domain.models import Agent, Environment, Session
from claude_hitl_template.errors import EngineError, StaleOwner, Unavailable
from claude_hitl_template.files.manifest import CHUNK_BYTES, Manifest, SavedFile, blob_name
from claude_hitl_template.store.core import CoreStore
from claude_hitl_template.store.protocol import Store
from claude_hitl_template.testing.memory_backend import MemoryBackend
from claude_hitl_template.workspace.sync import PROGRESS_BYTES, Workspace, WorkspaceLocation

KEY = "key_1"


class Counted:
    """A store that counts its calls, and can be made to fail."""

    def __init__(self, store: CoreStore) -> None:
        self.store, self.calls, self.failing = store, list[str](), dict[str, Exception]()

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.store, name)

        async def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(name)
            if name in self.failing:
                raise self.failing[name]
            return await method(*args, **kwargs)

        return call


@dataclass
class Bench:
    store: Counted
    session: Session
    place: WorkspaceLocation

    async def owner(self) -> Workspace:
        """Returns a new owner, which has not scanned its folder yet."""
        self.session = await self.store.store.acquire(self.session.id, "owner", lease_s=15)
        return Workspace(self.place, cast(Store, self.store), self.session)

    async def ready(self) -> Workspace:
        workspace = await self.owner()
        await workspace.restore(self.session)
        self.store.calls.clear()
        return workspace

    async def saved(self) -> str | None:
        return (await self.store.store.get_session(self.session.id)).workspace

    def wipe(self) -> None:
        """Deletes the local files, as on another machine."""
        shutil.rmtree(self.place.folder, ignore_errors=True)
        self.place.marker.unlink(missing_ok=True)


async def bench_at(root: Path, **place: Any) -> Bench:
    store = CoreStore(MemoryBackend())
    session = await store.create_session(
        KEY, agent=Agent(), environment=Environment(), title=None, metadata={}, initial=[]
    )
    return Bench(Counted(store), session, WorkspaceLocation(root / "w", root / "saved" / "w", **place))


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return asyncio.run(bench_at(tmp_path))


type TreeWriter = dict[str, Any]


def tree_of(folder: Path) -> TreeWriter:
    """Returns everything about a folder that must be restored."""
    found: TreeWriter = {}
    for path in sorted(folder.rglob("*")):
        name, facts = str(path.relative_to(folder)), path.lstat()
        if path.is_symlink():
            found[name] = ("link", os.readlink(path))
        elif path.is_dir():
            found[name] = "folder"
        else:
            found[name] = (stat.S_IMODE(facts.st_mode), facts.st_mtime_ns, path.read_bytes())
    return found


# -- there and back

NAMES = st.text(st.characters(exclude_characters="/\0", codec="utf-8"), min_size=1, max_size=12).filter(
    lambda n: n not in (".", "..") and len(n.encode()) <= 100 and not n.startswith(".hitl-unfinished-")
)
BYTES_NAMES = st.binary(min_size=1, max_size=6).map(lambda b: b.replace(b"/", b"_").replace(b"\0", b"_"))
ANY_NAME = st.one_of(NAMES, BYTES_NAMES.filter(lambda b: b not in (b".", b"..")).map(os.fsdecode))
FILE = st.tuples(st.binary(max_size=50), st.sampled_from([0o644, 0o600, 0o755, 0o400]), st.integers(0, 2**31))
LINK = st.sampled_from(["/etc/passwd", "..", "nowhere", "/"])
TREES = st.recursive(
    st.one_of(FILE, LINK, st.just({})),
    lambda below: st.dictionaries(ANY_NAME, below, max_size=4),
    max_leaves=12,
)


def make(folder: Path, content: Any) -> None:
    if isinstance(content, str):
        folder.symlink_to(content)
    elif isinstance(content, dict):
        folder.mkdir()
        for name, below in content.items():
            make(folder / name, below)
    else:
        data, mode, seconds = content
        folder.write_bytes(data)
        folder.chmod(mode)
        os.utime(folder, ns=(seconds * 10**9 + 7, seconds * 10**9 + 7))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.dictionaries(ANY_NAME, TREES, max_size=4))
def test_any_workspace_comes_back_as_it_was(content: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.mktemp("any")

    async def run() -> None:
        b = await bench_at(root)
        workspace = await b.ready()
        for name, below in content.items():
            make(b.place.folder / name, below)
        assert await workspace.save() == []
        before = tree_of(b.place.folder)
        b.wipe()
        await b.ready()
        assert tree_of(b.place.folder) == before

    asyncio.run(run())


async def test_a_large_file_comes_back_from_its_chunks(bench: Bench) -> None:
    workspace = await bench.ready()
    content = os.urandom(2 * CHUNK_BYTES + 17)
    (bench.place.folder / "large").write_bytes(content)
    await workspace.save()
    bench.wipe()
    await bench.ready()
    assert (bench.place.folder / "large").read_bytes() == content


async def test_what_was_removed_stays_removed(bench: Bench) -> None:
    workspace = await bench.ready()
    (bench.place.folder / "a").write_text("a")
    (bench.place.folder / "b").write_text("b")
    await workspace.save()
    (bench.place.folder / "a").unlink()
    await workspace.save()
    bench.wipe()
    await bench.ready()
    assert os.listdir(bench.place.folder) == ["b"]


# -- what it costs


async def test_an_unchanged_workspace_asks_nothing_of_the_store(bench: Bench) -> None:
    workspace = await bench.ready()
    assert await workspace.save() == []
    assert bench.store.calls == []
    (bench.place.folder / "a").write_text("a")
    await workspace.save()
    bench.store.calls.clear()
    for _ in range(3):
        await workspace.save()
    assert bench.store.calls == []


async def test_a_folder_that_is_still_there_is_not_asked_for_again(bench: Bench) -> None:
    workspace = await bench.ready()
    (bench.place.folder / "a").write_text("a")
    await workspace.save()
    again = await bench.owner()
    bench.store.calls.clear()
    await again.restore(bench.session)
    await again.save()
    assert bench.store.calls == []


async def test_only_what_is_new_travels(bench: Bench) -> None:
    workspace = await bench.ready()
    (bench.place.folder / "large").write_bytes(os.urandom(CHUNK_BYTES * 2))
    await workspace.save()
    put: list[int] = []
    whole = bench.store.store.put_blobs

    async def put_blobs(blobs: Any, **of: Any) -> None:
        put.extend(map(len, blobs))
        await whole(blobs, **of)

    bench.store.put_blobs = put_blobs
    (bench.place.folder / "small").write_text("small")
    os.utime(bench.place.folder / "large", (1, 1))  # read again, and the same
    await workspace.save()
    assert sum(put) < 2000


async def test_a_change_within_a_clocks_tick_is_seen(bench: Bench) -> None:
    """Size and times are equal, so only reading the file again shows the change."""
    workspace = await bench.ready()
    path = bench.place.folder / "a"
    for content in ("one", "two", "six", "ten"):
        path.write_text(content)
        os.utime(path, ns=(5, 5))
        await workspace.save()
        found = await bench.store.store.workspace_file(bench.session.id, KEY, "a")
        assert await bench.store.store.get_blobs(found.chunks) == [content.encode()]


# -- a folder that is, or is not, what was saved


async def test_a_folder_that_is_based_on_what_was_saved_keeps_what_could_not_be_saved(bench: Bench) -> None:
    workspace = await bench.ready()
    (bench.place.folder / "a").write_text("saved")
    await workspace.save()
    (bench.place.folder / "b").write_text("written after the last save; then the owner was killed")
    await bench.ready()
    assert sorted(os.listdir(bench.place.folder)) == ["a", "b"]


async def test_a_folder_of_another_time_is_made_anew(bench: Bench, tmp_path: Path) -> None:
    workspace = await bench.ready()
    (bench.place.folder / "a").write_text("old")
    await workspace.save()
    here = bench.place
    bench.place = WorkspaceLocation(tmp_path / "elsewhere", tmp_path / "saved" / "elsewhere")
    elsewhere = await bench.ready()
    (bench.place.folder / "a").write_text("new")
    await elsewhere.save()
    bench.place = here
    (here.folder / "stray").write_text("x")
    await bench.ready()
    assert tree_of(here.folder) == tree_of(tmp_path / "elsewhere")


async def test_a_folder_that_was_there_before_anything_was_saved_is_kept(bench: Bench) -> None:
    bench.place.folder.mkdir()
    (bench.place.folder / "a").write_text("of an earlier version of this service")
    workspace = await bench.ready()
    await workspace.save()
    bench.wipe()
    await bench.ready()
    assert (bench.place.folder / "a").exists()


async def test_a_folder_that_was_half_restored_is_begun_anew(bench: Bench) -> None:
    workspace = await bench.ready()
    (bench.place.folder / "a").write_text("a")
    (bench.place.folder / "b").write_text("b" * CHUNK_BYTES)
    await workspace.save()
    bench.wipe()
    whole, asked = bench.store.store.get_blobs, list[Any]()

    async def get_blobs(names: Any, **of: Any) -> Any:
        asked.append(names)
        if len(asked) == 3:  # the manifest and the first file were read
            raise Unavailable("away")
        return await whole(names, **of)

    bench.store.get_blobs = get_blobs
    restoring = await bench.owner()
    with pytest.raises(Unavailable):
        await restoring.restore(bench.session)
    assert os.listdir(bench.place.folder) == ["a"]
    assert await restoring.save() == []
    (bench.place.folder / "a").write_text("half of it")
    (bench.place.folder / "c").write_text("stray")
    await bench.ready()
    assert sorted(os.listdir(bench.place.folder)) == ["a", "b"]
    assert (bench.place.folder / "a").read_text() == "a"


async def test_a_container_has_nothing_but_what_was_saved(tmp_path: Path) -> None:
    bench = await bench_at(tmp_path, lasts=False, baked=frozenset({".claude"}))
    (bench.place.folder / ".claude").mkdir(parents=True)
    (bench.place.folder / ".claude/settings.json").write_text("baked")
    workspace = await bench.ready()
    (bench.place.folder / "a").write_text("a")
    await workspace.save()
    (bench.place.folder / "stray").write_text("of a container that was used before")
    await bench.ready()
    assert sorted(os.listdir(bench.place.folder)) == [".claude", "a"]
    listed = (await bench.store.store.list_workspace(bench.session.id, KEY, limit=10)).data
    assert [f.path for f in listed] == ["a"]


async def test_a_manifest_cannot_replace_what_the_image_baked(tmp_path: Path) -> None:
    bench = await bench_at(tmp_path, lasts=False, baked=frozenset({".claude", "CLAUDE.md"}))
    bench.place.folder.mkdir()
    (bench.place.folder / "CLAUDE.md").write_text("baked")
    content = b"theirs"
    hostile = Manifest.of(
        SavedFile(path, 0o644, len(content), 5, (blob_name(content),))
        for path in (".claude/settings.json", "CLAUDE.md", "a")
    )
    session = await bench.store.store.acquire(bench.session.id, "owner", lease_s=15)
    await bench.store.store.put_blobs([content, *hostile.encode()])
    await bench.store.store.save_workspace(session.id, session.epoch, blob_name(hostile.encode()[-1]))
    await bench.store.store.add_files(session.id, KEY, blob_name(hostile.encode()[-1]))
    await bench.ready()
    assert sorted(os.listdir(bench.place.folder)) == ["CLAUDE.md", "a"]
    assert (bench.place.folder / "CLAUDE.md").read_text() == "baked"


# -- uploads


async def upload(bench: Bench, **files: str) -> None:
    made = Manifest.of(
        SavedFile(path, 0o644, len(text), 5, (blob_name(text.encode()),)) for path, text in files.items()
    )
    await bench.store.store.put_blobs([*(text.encode() for text in files.values()), *made.encode()])
    await bench.store.store.add_files(bench.session.id, KEY, blob_name(made.encode()[-1]))


async def test_files_that_are_added_are_there_before_work_and_saved_after_it(bench: Bench) -> None:
    await upload(bench, a="one")
    workspace = await bench.ready()
    assert (bench.place.folder / "a").read_text() == "one"
    await upload(bench, b="two")
    await workspace.restore(await bench.store.store.get_session(bench.session.id))
    (bench.place.folder / "a").write_text("changed by the agent")
    await workspace.restore(await bench.store.store.get_session(bench.session.id))
    await workspace.save()
    assert (await bench.store.store.get_session(bench.session.id)).uploads == ()
    bench.wipe()
    await bench.ready()
    assert {n: (bench.place.folder / n).read_text() for n in "ab"} == {
        "a": "changed by the agent",
        "b": "two",
    }


async def test_an_upload_where_a_folder_is_is_told_and_given_up_and_the_others_are_there(
    bench: Bench,
) -> None:
    workspace = await bench.ready()
    (bench.place.folder / "a").mkdir()
    await upload(bench, a="file", b="other")
    (told,) = await workspace.restore(await bench.store.store.get_session(bench.session.id))
    assert told.startswith("a was uploaded")
    assert (bench.place.folder / "b").read_text() == "other"
    await workspace.save()
    assert (await bench.store.store.get_session(bench.session.id)).uploads == ()
    assert sorted(os.listdir(bench.place.folder)) == ["a", "b"]


async def test_an_upload_whose_content_is_lost_is_told_and_does_not_stand_in_the_way(bench: Bench) -> None:
    made = Manifest.of([SavedFile("a", 0o644, 1, 5, (blob_name(b"never put"),))])
    await bench.store.store.put_blobs(made.encode())
    await bench.store.store.add_files(bench.session.id, KEY, blob_name(made.encode()[-1]))
    workspace = await bench.owner()
    (told,) = await workspace.restore(bench.session)
    assert "is lost" in told
    assert await workspace.save() == []
    assert (await bench.store.store.get_session(bench.session.id)).uploads == ()


# -- what goes wrong


async def test_over_the_limit_nothing_is_lost_and_the_largest_are_named(tmp_path: Path) -> None:
    bench = await bench_at(tmp_path, max_bytes=2 * 1024**3)
    workspace = await bench.ready()
    (bench.place.folder / "small").write_text("small")
    await workspace.save()
    kept = await bench.saved()
    with (bench.place.folder / "big.bin").open("wb") as file:
        file.truncate(3 * 1024**3)  # sparse: it takes no room
    (bench.place.folder / "other").write_text("other")
    (told,) = await workspace.save()
    assert "big.bin (3.0 GiB)" in told
    assert "HITL_MAX_WORKSPACE_BYTES" in told
    assert await workspace.save() == []  # said once
    assert await bench.saved() == kept
    await bench.ready()
    assert (bench.place.folder / "big.bin").stat().st_size == 3 * 1024**3
    (bench.place.folder / "big.bin").unlink()
    again = await bench.ready()
    assert await again.save() == []
    assert await bench.saved() != kept


@pytest.mark.parametrize("failing", ["put_blobs", "missing_blobs", "save_workspace"])
async def test_a_store_that_fails_is_told_once_and_the_next_save_has_all(bench: Bench, failing: str) -> None:
    workspace = await bench.ready()
    (bench.place.folder / "a").write_text("a")
    bench.store.failing[failing] = Unavailable(
        "the file area cannot be used now (no space left); check the disk"
    )
    (told,) = await workspace.save()
    assert "no space left" in told
    assert "tries again" in told
    assert await workspace.save() == []
    bench.store.failing.clear()
    assert await workspace.save() == []
    bench.wipe()
    await bench.ready()
    assert (bench.place.folder / "a").exists()


async def test_an_owner_that_dies_while_it_saves_many_files_leaves_the_saved_workspace_as_it_was(
    bench: Bench,
) -> None:
    workspace = await bench.ready()
    for number in range(600):
        (bench.place.folder / f"file number {number}").write_text(str(number))
    await workspace.save()
    kept = await bench.saved()
    (bench.place.folder / "file number 7").write_text("changed")
    bench.store.failing["save_workspace"] = Unavailable("the owner dies before the session names what it put")
    await workspace.save()
    assert await bench.saved() == kept
    bench.store.failing.clear()
    bench.wipe()
    again = await bench.ready()
    assert (bench.place.folder / "file number 7").read_text() == "7"
    (bench.place.folder / "file number 7").write_text("changed")
    await again.save()
    bench.wipe()
    await bench.ready()
    found = {path.name: path.read_text() for path in bench.place.folder.iterdir()}
    assert found == {f"file number {n}": "changed" if n == 7 else str(n) for n in range(600)}


@pytest.mark.parametrize(("lasts", "stays"), [(True, False), (False, True)])
async def test_only_an_owner_whose_folder_goes_with_it_must_stay(
    tmp_path: Path, lasts: bool, stays: bool
) -> None:
    bench = await bench_at(tmp_path, lasts=lasts)
    workspace = await bench.ready()
    (bench.place.folder / "a").write_text("a")
    bench.store.failing["put_blobs"] = Unavailable("away")
    (told,) = await workspace.save()
    assert workspace.must_stay is stays
    assert ("keeps its process" in told) is stays
    bench.store.failing.clear()
    await workspace.save()
    assert not workspace.must_stay


async def test_a_folder_that_is_gone_is_told_and_not_saved_as_empty(bench: Bench) -> None:
    workspace = await bench.ready()
    (bench.place.folder / "a").write_text("a")
    await workspace.save()
    kept = await bench.saved()
    shutil.rmtree(bench.place.folder)
    (told,) = await workspace.save()
    assert "cannot be read" in told
    assert await bench.saved() == kept
    await bench.ready()
    assert (bench.place.folder / "a").exists()


async def test_what_cannot_be_kept_is_named_once(bench: Bench) -> None:
    workspace = await bench.ready()
    os.mkfifo(bench.place.folder / "pipe")
    (bench.place.folder / "a").write_text("a")
    (told,) = await workspace.save()
    assert "pipe: a pipe" in told
    assert await workspace.save() == []
    assert await bench.saved() is not None


async def test_a_stale_owner_stops_at_once(bench: Bench) -> None:
    workspace = await bench.ready()
    await bench.store.store.acquire(bench.session.id, "another", lease_s=15)
    (bench.place.folder / "a").write_text("a")
    with pytest.raises(StaleOwner):
        await workspace.save()


async def test_a_part_that_is_missing_ends_the_turn_with_what_to_mend(bench: Bench) -> None:
    workspace = await bench.ready()
    (bench.place.folder / "a").write_text("a")
    await workspace.save()
    bench.wipe()
    bench.store.store = replace_files(bench.store.store)
    with pytest.raises(EngineError, match="HITL_FILES_URL") as caught:
        await (await bench.owner()).restore(bench.session)
    assert not caught.value.retryable


def replace_files(store: CoreStore) -> CoreStore:
    """Returns the same database with an empty file area."""
    return CoreStore(cast(Any, store)._backend)


async def test_a_folder_that_cannot_be_made_ends_the_turn_with_what_to_mend(bench: Bench) -> None:
    bench.place.folder.write_text("a file is in its place")
    with pytest.raises(EngineError, match="cannot be written"):
        await (await bench.owner()).restore(bench.session)


async def test_progress_is_told_of_large_ones_only(bench: Bench) -> None:
    told: list[tuple[str, int, int]] = []

    async def progress(*said: Any) -> None:
        told.append(said)

    workspace = await bench.ready()
    (bench.place.folder / "small").write_text("small")
    await workspace.save(progress)
    assert told == []
    with (bench.place.folder / "large").open("wb") as file:
        file.truncate(2 * PROGRESS_BYTES)
    await workspace.save(progress)
    assert told
    assert all(doing == "saving" and 0 < done <= of and of >= 2 * PROGRESS_BYTES for doing, done, of in told)
    bench.wipe()
    told.clear()
    await (await bench.owner()).restore(bench.session, progress)
    assert {doing for doing, _, _ in told} == {"restoring"}
