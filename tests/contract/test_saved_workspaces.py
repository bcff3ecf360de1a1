"""The Store's promises about saved workspaces, on both backends."""

import json
import os
from datetime import timedelta
from typing import Any

import pytest

from claude_hitl_template.domain.events import UserMessage, text_blocks
from claude_hitl_template.domain.models import Agent, Environment, Session
from claude_hitl_template.domain.people import SERVICE
from claude_hitl_template.errors import Conflict, InvalidInput, NotFound, StaleOwner, TooLarge
from claude_hitl_template.files.blob_store import FileArea
from claude_hitl_template.files.manifest import CHUNK_BYTES, Manifest, SavedFile, SavedLink, blob_name
from claude_hitl_template.store.core import CoreStore
from claude_hitl_template.store.sqlite import SqliteBackend
from claude_hitl_template.testing.clock import FakeClock
from claude_hitl_template.testing.memory_backend import MemoryBackend

KEY, OTHER = "key_1", "key_2"


@pytest.fixture
def files_clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def store(backend: MemoryBackend | SqliteBackend, tmp_path: Any, files_clock: FakeClock) -> CoreStore:
    return CoreStore(backend, files=FileArea((tmp_path / "files").as_uri(), files_clock))


async def owned(store: CoreStore) -> Session:
    made = await store.create_session(
        KEY, agent=Agent(), environment=Environment(), title=None, metadata={}, initial=[]
    )
    return await store.acquire(made.id, "owner", lease_s=15)


def a_file(path: str, content: bytes = b"x", **more: Any) -> SavedFile:
    facts = {
        "path": path,
        "mode": 0o644,
        "size": len(content),
        "mtime_ns": 5,
        "chunks": (blob_name(content),),
    }
    return SavedFile(**{**facts, **more})


async def put(store: CoreStore, manifest: Manifest, *contents: bytes) -> str:
    blobs = [*contents, *manifest.encode()]
    await store.put_blobs(blobs)
    return blob_name(blobs[-1])


async def saved(store: CoreStore, session: Session, **files: str) -> str:
    made = Manifest.of(a_file(path, content.encode()) for path, content in files.items())
    name = await put(store, made, *(content.encode() for content in files.values()))
    await store.save_workspace(session.id, session.epoch, name)
    return name


async def paths(store: CoreStore, session: Session) -> list[str]:
    return [f.path for f in (await store.list_workspace(session.id, KEY, limit=100)).data]


async def test_what_was_saved_is_listed_and_read(store: CoreStore) -> None:
    session = await owned(store)
    assert await paths(store, session) == []
    name = await saved(store, session, b="two", a="one")
    assert (await store.get_session(session.id)).workspace == name
    assert await paths(store, session) == ["a", "b"]
    found = await store.workspace_file(session.id, KEY, "b")
    assert await store.get_blobs(found.chunks) == [b"two"]
    await store.save_workspace(session.id, session.epoch, name)  # the answer was lost, and it is said again


async def test_a_stale_owner_cannot_save(store: CoreStore) -> None:
    old = await owned(store)
    kept = await saved(store, old, a="kept")
    await store.acquire(old.id, "another", lease_s=15)
    with pytest.raises(StaleOwner):
        await saved(store, old, a="stale")
    assert (await store.get_session(old.id)).workspace == kept


async def test_what_is_no_manifest_is_not_named(store: CoreStore) -> None:
    session = await owned(store)
    await store.put_blobs(
        [b"no manifest", json.dumps({"version": 1, "files": [["../x", 1, 1, 1, []]]}).encode()]
    )
    for name, error in (
        ("0" * 64, NotFound),
        (blob_name(b"no manifest"), InvalidInput),
        ("../x", InvalidInput),
    ):
        with pytest.raises(error):
            await store.save_workspace(session.id, session.epoch, name)
    assert (await store.get_session(session.id)).workspace is None


async def test_blobs_are_small_enough_for_a_call(store: CoreStore) -> None:
    with pytest.raises(TooLarge):
        await store.put_blobs([b"x" * (CHUNK_BYTES + 1)])


async def test_another_keys_workspace_is_not_there(store: CoreStore) -> None:
    session = await owned(store)
    await saved(store, session, a="secret")
    name = await put(store, Manifest.of([a_file("x")]), b"x")
    for call in (
        store.list_workspace(session.id, OTHER, limit=1),
        store.workspace_file(session.id, OTHER, "a"),
        store.add_files(session.id, OTHER, name),
        store.workspace_file(session.id, KEY, "../a"),
        store.list_workspace("sesn_none", KEY, limit=1),
    ):
        with pytest.raises(NotFound):
            await call


async def test_a_long_listing_comes_in_pages(store: CoreStore) -> None:
    session = await owned(store)
    await saved(store, session, **{f"f{i}": str(i) for i in range(5)})
    found: list[str] = []
    page = None
    while True:
        part = await store.list_workspace(session.id, KEY, limit=2, page=page)
        found += [f.path for f in part.data]
        page = part.next_page
        if page is None:
            break
    assert found == [f"f{i}" for i in range(5)]
    with pytest.raises(InvalidInput):
        await store.list_workspace(session.id, KEY, limit=2, page="nonsense")


async def test_only_what_changed_since_a_time_is_listed(store: CoreStore) -> None:
    session = await owned(store)
    made = Manifest.of([a_file("old", mtime_ns=10), a_file("new", mtime_ns=20)])
    await store.save_workspace(session.id, session.epoch, await put(store, made, b"x"))
    found = await store.list_workspace(session.id, KEY, limit=9, changed_since_ns=20)
    assert [f.path for f in found.data] == ["new"]


# -- uploads


async def test_added_files_are_in_the_workspace_at_once_and_until_the_owner_took_them(
    store: CoreStore,
) -> None:
    session = await owned(store)
    await saved(store, session, a="old", b="b")
    added = await put(store, Manifest.of([a_file("a", b"new"), a_file("c", b"c")]), b"new", b"c")
    await store.add_files(session.id, KEY, added)
    assert await paths(store, session) == ["a", "b", "c"]
    assert (await store.workspace_file(session.id, KEY, "a")).chunks == (blob_name(b"new"),)
    await saved(store, session, a="old", b="b2")  # an owner that has not heard of it yet
    assert await paths(store, session) == ["a", "b", "c"]
    whole = await put(store, Manifest.of([a_file("a", b"newer")]), b"newer")
    await store.save_workspace(session.id, session.epoch, whole, taken=[added])
    assert await paths(store, session) == ["a"]
    assert (await store.get_session(session.id)).uploads == ()


async def test_a_request_to_add_that_is_repeated_adds_once(store: CoreStore) -> None:
    session = await owned(store)
    added = await put(store, Manifest.of([a_file("a")]), b"x")
    await store.add_files(session.id, KEY, added, idempotency_key="k")
    await store.save_workspace(session.id, session.epoch, None, taken=[added])
    await store.add_files(session.id, KEY, added, idempotency_key="k")
    assert (await store.get_session(session.id)).uploads == ()
    other = await put(store, Manifest.of([a_file("b")]))
    with pytest.raises(Conflict):
        await store.add_files(session.id, KEY, other, idempotency_key="k")


async def test_an_owner_hears_of_what_was_added(store: CoreStore) -> None:
    session = await owned(store)
    await store.add_files(session.id, KEY, await put(store, Manifest.of([a_file("a")]), b"x"))
    found = await store.wait_session(session.id, session.epoch, session.revision, timeout_s=0)
    assert len(found.session.uploads) == 1


async def test_only_files_can_be_added_and_not_to_an_archived_session(store: CoreStore) -> None:
    session = await owned(store)
    link = await put(store, Manifest.of([], [SavedLink("a", "/etc")]))
    with pytest.raises(InvalidInput):
        await store.add_files(session.id, KEY, link)
    await store.archive_session(session.id, KEY)
    with pytest.raises(Conflict):
        await store.add_files(session.id, KEY, await put(store, Manifest.of([a_file("a")]), b"x"))


# -- sweeping


async def test_what_no_session_names_is_swept_after_a_day_and_nothing_else(
    store: CoreStore, files_clock: FakeClock
) -> None:
    session, doomed = await owned(store), await owned(store)
    first = await saved(store, session, a="replaced", b="stays")
    await saved(store, session, b="stays")
    gone = await saved(store, doomed, c="of a deleted session", b="stays")
    added = await put(store, Manifest.of([a_file("d", b"upload")]), b"upload")
    await store.add_files(session.id, KEY, added)
    await store.drop_lease(doomed.id, doomed.epoch)
    await store.delete_session(doomed.id, KEY)
    assert await store.sweep_blobs() == 0
    files_clock.now += timedelta(hours=25)
    assert await store.sweep_blobs() == 4
    swept = [first, blob_name(b"replaced"), gone, blob_name(b"of a deleted session")]
    for name in swept:
        with pytest.raises(NotFound):
            await store.get_blobs([name])
    for path in await paths(store, session):
        await store.get_blobs((await store.workspace_file(session.id, KEY, path)).chunks)
    assert await paths(store, session) == ["b", "d"]


async def test_what_the_files_were_as_the_last_turn_began_is_kept_until_the_next_one_begins(
    store: CoreStore, files_clock: FakeClock
) -> None:
    session = await owned(store)
    base = await saved(store, session, a="before the turn")
    for kept in (True, False):
        message = UserMessage.model_validate({"type": "user.message", "content": text_blocks("go")})
        [sent] = await store.send_events(session.id, KEY, [message], by=SERVICE)
        await store.begin_turn(session.id, session.epoch, sent.id)
        await saved(store, session, a="changed by the turn")
        assert ((await store.get_session(session.id)).turn_base == (base,)) is kept
        files_clock.now += timedelta(hours=25)
        assert await store.sweep_blobs() == (0 if kept else 2)


async def test_the_shards_of_a_large_manifest_are_kept_and_those_of_an_earlier_one_swept(
    store: CoreStore, files_clock: FakeClock
) -> None:
    session = await owned(store)
    before = Manifest.of(a_file(f"{'folder' * 20}/{i}") for i in range(2000))
    after = before.with_added([a_file("one", mtime_ns=6)])
    for each in (before, after):
        await store.save_workspace(session.id, session.epoch, await put(store, each, b"x"))
    old, new = ({blob_name(blob) for blob in each.encode()} for each in (before, after))
    assert len(old & new) > 10
    files_clock.now += timedelta(hours=25)
    assert await store.sweep_blobs() == len(old - new) == 2
    assert (await store.list_workspace(session.id, KEY, limit=1)).next_page
    assert len(await store.get_blobs(sorted(new), session_id=session.id, epoch=session.epoch)) == len(new)


@pytest.mark.parametrize("lost", ["damaged", "missing"])
async def test_what_a_lost_manifest_may_have_named_stays_and_what_came_later_is_swept(
    store: CoreStore, files_clock: FakeClock, tmp_path: Any, lost: str
) -> None:
    session = await owned(store)
    name = await saved(store, session, a="precious")
    place = tmp_path / "files" / name[:2] / name
    place.write_bytes(b"damaged") if lost == "damaged" else place.unlink()
    files_clock.now += timedelta(hours=25)
    assert await store.sweep_blobs() == 0
    assert await store.get_blobs([blob_name(b"precious")]) == [b"precious"]
    later = await put(store, Manifest.of([a_file("d", b"without a session")]), b"without a session")
    written = (files_clock.now + timedelta(days=2)).timestamp()
    for blob in (later, blob_name(b"without a session")):
        os.utime(tmp_path / "files" / blob[:2] / blob, (written, written))
    files_clock.now += timedelta(days=4)
    assert await store.sweep_blobs() == 2
    assert await store.get_blobs([blob_name(b"precious")]) == [b"precious"]


async def test_what_somebody_else_put_into_the_file_area_does_not_stop_the_sweep(
    store: CoreStore, files_clock: FakeClock, tmp_path: Any
) -> None:
    await put(store, Manifest.of([a_file("a", b"without a session")]), b"without a session")
    stray = tmp_path / "files" / "README.txt"
    stray.write_text("not ours")
    os.utime(stray, (0, 0))
    files_clock.now += timedelta(hours=25)
    assert await store.sweep_blobs() == 2
    assert stray.read_text() == "not ours"
