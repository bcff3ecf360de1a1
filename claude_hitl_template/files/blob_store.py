"""The file area: blobs named by the SHA-256 of their content, on any file system that fsspec supports.

On a local disk a blob is whole or not there, and once it was put it survives a power cut. Everywhere it is verified
when it is read.
"""

import asyncio
import contextlib
import os
import secrets
import threading
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import fsspec.core
from fsspec.implementations.local import LocalFileSystem

from claude_hitl_template.domain.models import utcnow
from claude_hitl_template.errors import ConfigError, NotFound, Unavailable
from claude_hitl_template.files.manifest import blob_name, check_blob_name, is_blob_name

KEPT = timedelta(days=1)  # a blob that was put is there for so long, whether anything names it or not
_FRESH = KEPT / 2  # one that is older is asked for again, so that it is not swept before it is named
_THREADS = 16  # a disk takes several flushes together for little more than one


class FileArea:
    """Blobs below `url`. `clock` returns the time; the file system's clock must agree within hours.

    Raises ConfigError when the URL is of no file system that can be used here, Unavailable when it cannot be read or
    written now.
    """

    def __init__(self, url: str, clock: Callable[[], datetime] = utcnow) -> None:
        try:
            self._fs, self._root = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError, OSError) as error:
            raise ConfigError(
                f"HITL_FILES_URL cannot be used: {error}",
                "give a URL that fsspec reads (file:///folder, s3://bucket/folder), and install what it needs for it",
            ) from error
        self._local = isinstance(self._fs, LocalFileSystem)
        self._clock = clock
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="files")
        self._names = _Names()

    async def missing(self, names: Sequence[str]) -> list[str]:
        """The names to put: missing ones, and old ones that could be swept before a manifest names them."""
        oldest = self._clock() - _FRESH
        async with _usable():
            times = await self._each(self._written, names)
        return [name for name, at in zip(names, times, strict=True) if at is None or at < oldest]

    async def put(self, blobs: Sequence[bytes]) -> None:
        """Stores each blob under its name, replacing an existing one. Durable when this returns."""
        async with _usable():
            if self._local:
                folders = await self._each(self._write_locally, blobs)
                await self._each(_flush_folder, {*folders})
            else:
                await self._each(self._write, blobs)

    async def get(self, names: Sequence[str]) -> list[bytes]:
        """Their contents, in order. Raises NotFound for one that is not there, or damaged."""
        async with _usable():
            found = await self._each(self._read, names)
        for name, content in zip(names, found, strict=True):
            if content is None or blob_name(content) != name:
                how = "is not in" if content is None else "is damaged in"
                raise NotFound(
                    f"a part of a saved workspace ({name}) {how} the file area; restore the file area (HITL_FILES_URL) "
                    "from a backup"
                )
        return [content for content in found if content is not None]

    async def old(self) -> list[str]:
        """The names of blobs that were put more than a day ago."""
        async with _usable():
            return await self._in_thread(self._old, self._clock() - KEPT)

    async def put_before(self, names: Sequence[str], at: datetime) -> set[str]:
        """Returns the blobs that exist and were last stored at or before `at`."""
        async with _usable():
            times = await self._each(self._written, names)
        return {
            name for name, put_at in zip(names, times, strict=True) if put_at is not None and put_at <= at
        }

    async def drop(self, names: Iterable[str]) -> int:
        """Removes those that were not put again meanwhile; returns how many."""
        before, dropped = self._clock() - KEPT, 0
        for name in names:
            async with _usable():
                dropped += await self._in_thread(self._remove, name, before)
        return dropped

    # -- blocking

    async def _in_thread[*A, T](self, work: Callable[[*A], T], *args: *A) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *args)

    async def _each[A, T](self, work: Callable[[A], T], items: Iterable[A]) -> list[T]:
        return await asyncio.gather(*(self._in_thread(work, item) for item in items))

    def _path(self, name: str) -> str:
        return f"{self._root}/{check_blob_name(name)[:2]}/{name}"

    def _written(self, name: str) -> datetime | None:
        try:
            at: datetime = self._fs.modified(self._path(name))
        except FileNotFoundError:
            return None
        return at if at.tzinfo else at.replace(tzinfo=UTC)

    def _write(self, blob: bytes) -> None:
        name = blob_name(blob)
        with self._names.writing(name):
            self._fs.pipe_file(self._path(name), blob)

    def _write_locally(self, blob: bytes) -> Path:
        """Returns the folder, whose entry is not flushed yet."""
        path = Path(self._path(blob_name(blob)))
        if not path.parent.is_dir():
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            _flush_folder(path.parent.parent)
        unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            with unfinished.open("xb") as file:
                file.write(blob)
                file.flush()
                os.fsync(file.fileno())
            with self._names.writing(path.name):
                unfinished.replace(path)
        except OSError:
            unfinished.unlink(missing_ok=True)
            raise
        return path.parent

    def _read(self, name: str) -> bytes | None:
        try:
            return self._fs.cat_file(self._path(name))
        except FileNotFoundError:
            return None

    def _old(self, before: datetime) -> list[str]:
        names: list[str] = []
        for path in self._fs.find(self._root):
            name = str(path).rpartition("/")[2]
            if name.startswith("."):  # of a ledger that died while it wrote
                self._remove_unfinished(str(path), before)
                continue
            if not is_blob_name(name):  # not a blob of ours: leave it
                continue
            with contextlib.suppress(FileNotFoundError):
                if (self._written(name) or before) < before:
                    names.append(name)
        return names

    def _remove_unfinished(self, path: str, before: datetime) -> None:
        with contextlib.suppress(FileNotFoundError):
            if self._fs.modified(path) < before:
                self._fs.rm_file(path)

    def _remove(self, name: str, before: datetime) -> bool:
        with self._names.removing(name) as free:
            at = self._written(name) if free else None
            if at is None or at >= before:
                return False
            self._fs.rm_file(self._path(name))
            return True


class _Names:
    """Names that this process is writing or removing, so that no blob is removed while it is being put."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._written: Counter[str] = Counter()
        self._removed: str | None = None

    @contextmanager
    def writing(self, name: str) -> Generator[None]:
        with self._changed:
            self._changed.wait_for(lambda: self._removed != name)
            self._written[name] += 1
        try:
            yield
        finally:
            with self._changed:
                self._written[name] -= 1
                self._written += Counter()  # forgets those at zero

    @contextmanager
    def removing(self, name: str) -> Generator[bool]:
        """False when the name is being written: then it must stay."""
        with self._changed:
            free = not self._written[name]
            self._removed = name if free else None
        try:
            yield free
        finally:
            with self._changed:
                self._removed = None
                self._changed.notify_all()


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@asynccontextmanager
async def _usable() -> AsyncGenerator[None]:
    try:
        yield
    except OSError as error:
        raise Unavailable(
            f"the file area cannot be used now ({error.strerror or error}); nothing was changed. Try again; if it "
            "persists, check its disk's free space and permissions (HITL_FILES_URL)"
        ) from error
