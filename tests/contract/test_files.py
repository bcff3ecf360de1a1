"""The promises of the file area, on a local disk and on another file system of fsspec."""

import asyncio
import os
import uuid
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import fsspec
import pytest

from claude_hitl_template.errors import ConfigError, InvalidInput, NotFound, Unavailable
from claude_hitl_template.files.blob_store import FileArea
from claude_hitl_template.files.manifest import blob_name
from claude_hitl_template.testing.clock import FakeClock

HOUR = timedelta(hours=1)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture(params=["file", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "file":
        yield (tmp_path / "files").as_uri()
        return
    root = f"/{uuid.uuid4().hex}"
    yield f"memory:/{root}"
    memory = fsspec.filesystem("memory")
    if memory.exists(root):
        memory.rm(root, recursive=True)


@pytest.fixture
def area(url: str, clock: FakeClock) -> FileArea:
    return FileArea(url, clock)


async def test_what_was_put_is_read_in_order_by_its_name(area: FileArea) -> None:
    blobs = [b"one", b"", b"two" * 100_000, b"one"]
    await area.put(blobs)
    assert await area.get([blob_name(b) for b in blobs]) == blobs


async def test_another_process_finds_it_too(area: FileArea, url: str) -> None:
    await area.put([b"kept"])
    assert await FileArea(url).get([blob_name(b"kept")]) == [b"kept"]


async def test_only_what_is_not_there_is_missing(area: FileArea) -> None:
    await area.put([b"here"])
    assert await area.missing([blob_name(b"here"), blob_name(b"away")]) == [blob_name(b"away")]
    assert await area.missing([]) == []


async def test_a_blob_that_is_not_there_is_not_found(area: FileArea) -> None:
    with pytest.raises(NotFound, match="HITL_FILES_URL"):
        await area.get([blob_name(b"never put")])


@pytest.mark.parametrize("name", ["", "../../etc/passwd", "a" * 63, "A" * 64, f"{'a' * 64}\n", "/etc/passwd"])
async def test_a_name_that_is_no_digest_never_becomes_a_path(area: FileArea, name: str) -> None:
    for call in (area.missing, area.get, area.drop):
        with pytest.raises(InvalidInput):
            await call([name])


async def test_a_damaged_blob_is_not_taken_for_the_content(area: FileArea, url: str) -> None:
    await area.put([b"right"])
    files, root = fsspec.core.url_to_fs(url)
    (path,) = files.find(root)
    files.pipe_file(path, b"wrong")
    with pytest.raises(NotFound, match="damaged"):
        await area.get([blob_name(b"right")])


async def test_what_is_old_can_be_dropped_and_what_is_young_cannot(area: FileArea, clock: FakeClock) -> None:
    await area.put([b"old"])
    assert await area.old() == []
    assert await area.drop([blob_name(b"old")]) == 0
    clock.now += 25 * HOUR
    assert await area.old() == [blob_name(b"old")]
    assert await area.drop(await area.old()) == 1
    assert await area.missing([blob_name(b"old")]) == [blob_name(b"old")]


async def test_what_might_be_swept_soon_is_asked_for_again_and_then_stays(
    area: FileArea, clock: FakeClock, url: str
) -> None:
    await area.put([b"shared"])
    clock.now += 13 * HOUR
    assert await area.missing([blob_name(b"shared")]) == [blob_name(b"shared")]
    clock.now -= 13 * HOUR  # the file system's clock cannot be moved: put again means put now
    await area.put([b"shared"])
    assert await area.missing([blob_name(b"shared")]) == []


async def test_many_put_the_same_at_once(area: FileArea) -> None:
    blobs = [bytes([i]) * 1000 for i in range(50)]
    await asyncio.gather(*(area.put(blobs) for _ in range(5)))
    assert await area.get([blob_name(b) for b in blobs]) == blobs
    assert await area.old() == []


async def test_a_sweep_beside_a_put_never_loses_what_was_put(area: FileArea, clock: FakeClock) -> None:
    """The blob is old each time, and is stored while the sweep drops it. Afterwards it exists, or the client was
    asked to send it again."""
    name = blob_name(b"contended")
    for _ in range(50):
        await area.put([b"contended"])
        now, clock.now = clock.now, clock.now + 25 * HOUR
        dropping = asyncio.create_task(area.drop([name]))
        clock.now = now
        await area.put([b"contended"])
        if not await dropping:
            assert await area.get([name]) == [b"contended"]


async def test_no_file_system_of_that_kind_says_which_setting(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="HITL_FILES_URL"):
        FileArea("nonsense://x/y")


async def test_what_cannot_be_written_is_unavailable_and_leaves_nothing_half_done(tmp_path: Path) -> None:
    (tmp_path / "files").write_text("a file is in the folder's place")
    area = FileArea((tmp_path / "files").as_uri())
    with pytest.raises(Unavailable, match="nothing was changed"):
        await area.put([b"x"])
    assert (tmp_path / "files").read_text() == "a file is in the folder's place"


async def test_what_a_ledger_that_died_left_behind_is_removed_once_it_is_old(
    tmp_path: Path, clock: FakeClock
) -> None:
    area = FileArea((tmp_path / "files").as_uri(), clock)
    await area.put([b"x"])
    left = tmp_path / "files" / blob_name(b"x")[:2] / f".{blob_name(b'x')}.abcd"
    left.write_bytes(b"hal")
    assert await area.old() == []
    assert left.exists()
    os.utime(left, (1, 1))
    assert await area.old() == []
    assert not left.exists()
