"""Synchronises a session's folder with its saved copy: restored before work, saved after it. Independent of Ray."""

import asyncio
import errno
import functools
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

from claude_hitl_template.domain.models import Session
from claude_hitl_template.errors import EngineError, HitlError, InvalidInput, NotFound, StaleOwner, TooLarge
from claude_hitl_template.files import manifest as manifests
from claude_hitl_template.files.manifest import CHUNK_BYTES, Manifest, SavedFile, blob_name, shown
from claude_hitl_template.presentation.text import size
from claude_hitl_template.store.protocol import Owners, SavedBlobs
from claude_hitl_template.workspace import base_state, scan
from claude_hitl_template.workspace.base_state import SavedState
from claude_hitl_template.workspace.scan import Listing
from claude_hitl_template.workspace.writer import TreeWriter, wipe

log = structlog.get_logger()

PROGRESS_BYTES = 128 * 1024 * 1024  # interval of progress reports for larger workspaces
# A clock of the file system ticks every 10 ms at most: a file that changed so shortly before it was looked at may have
# changed again since, with the same times. It is read again.
_TICK_NS = 100_000_000
_NAMED = 3
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)

type Progress = Callable[
    [str, int, int], Awaitable[None]
]  # "saving" or "restoring", bytes done, bytes in all


async def ignore_progress(_doing: str, _done_bytes: int, _of_bytes: int) -> None:
    pass


@dataclass(frozen=True)
class WorkspaceLocation:
    """Where a session's workspace is on this machine.

    `marker` is a file next to the folder. `lasts`: the folder stays when the owner's process is gone. `baked`: names at
    the folder's top that belong to the image, and are neither saved nor touched. `exclude`: globs (see scan.excluded).
    """

    folder: Path
    marker: Path
    lasts: bool = True
    baked: frozenset[str] = frozenset()
    exclude: tuple[str, ...] = ()
    max_bytes: int = 2 * 1024**3


class Workspace:
    """One session's workspace, under one lease."""

    def __init__(self, place: WorkspaceLocation, store: Owners, session: Session) -> None:
        self._place, self._store = place, store
        self._id, self._epoch = session.id, session.epoch
        self._get_blobs = functools.partial(store.get_blobs, session_id=self._id, epoch=self._epoch)
        self._base = SavedState(session.workspace, manifests.EMPTY, {})
        self.ready = asyncio.Event()
        self._taken: tuple[str, ...] = ()
        self._reported: tuple[str, ...] = ()
        self._saving = asyncio.Lock()
        self.unsaved = False

    @property
    def folder(self) -> Path:
        return self._place.folder

    @property
    def must_stay(self) -> bool:
        """Whether work would be lost if the owner ended now."""
        return self.unsaved and not self._place.lasts

    # -- before work

    async def restore(self, session: Session, progress: Progress = ignore_progress) -> list[str]:
        """Restores the last saved state, with the files added since. Returns messages for a human.

        A folder that is still there and based on that is kept as it is: it may hold more than could be saved. Raises
        EngineError with the fix; Unavailable.
        """
        if self.ready.is_set():
            return await self._take(session)
        try:
            self._base = await self._kept(session.workspace) or await self._restored(session, progress)
        except OSError as error:
            raise _broken(f"its folder {self.folder} cannot be written ({error.strerror})") from error
        except (NotFound, InvalidInput) as error:
            raise _broken(str(error)) from error
        self.ready.set()
        return await self._take(session)

    async def _kept(self, name: str | None) -> SavedState | None:
        if not self._place.lasts or not self.folder.is_dir():
            return None
        known = await asyncio.to_thread(base_state.read, self._place.marker)
        if known is not None and known.name == name:
            return known
        return SavedState(None, manifests.EMPTY, {}) if name is None else None

    async def _restored(self, session: Session, progress: Progress) -> SavedState:
        place, name = self._place, session.workspace
        await asyncio.to_thread(place.folder.mkdir, parents=True, exist_ok=True)
        if name is None:
            return SavedState(None, manifests.EMPTY, {})
        whole = (await manifests.load(name, self._get_blobs)).without(place.baked)
        await asyncio.to_thread(base_state.mark_unfinished, place.marker)
        await asyncio.to_thread(wipe, place.folder, place.baked)
        with TreeWriter(place.folder) as tree:
            await self._write(tree, whole, progress)
            for link in whole.links:  # last, so that nothing could be written through one
                await asyncio.to_thread(tree.link, link)
            for folder in whole.folders:
                await asyncio.to_thread(tree.folder, folder)
            known = SavedState(name, whole, tree.stamps)
        await asyncio.to_thread(base_state.write, place.marker, known)
        return known

    async def _write(self, tree: TreeWriter, manifest: Manifest, progress: Progress) -> None:
        counting = _Counting("restoring", manifest.size_bytes, progress)
        contents: Mapping[str, bytes] = {}
        for pieces in _batches(manifest.files):
            names = dict.fromkeys(file.chunks[number] for file, number in pieces if file.chunks)
            if not names.keys() <= contents.keys():
                contents = dict(zip(names, await self._get_blobs(list(names)), strict=True))
            await asyncio.to_thread(tree.write, pieces, contents)
            await counting.add(sum(len(contents[f.chunks[n]]) for f, n in pieces if f.chunks))

    async def _take(self, session: Session) -> list[str]:
        """Writes the session's added files into the folder. One that cannot be written is reported and skipped."""
        messages: list[str] = []
        for name in session.uploads:
            if name in self._taken:
                continue
            try:
                added = (await manifests.load(name, self._get_blobs)).without(self._place.baked)
            except (NotFound, InvalidInput) as error:
                messages.append(f"files that were uploaded are lost: {error}")
                added = manifests.EMPTY
            for file in added.files:
                messages += await self._take_one(file)
            self._taken = (*self._taken, name)
        return messages

    async def _take_one(self, file: SavedFile) -> list[str]:
        try:
            with TreeWriter(self.folder) as tree:
                await self._write(tree, Manifest.of([file]), ignore_progress)
        except OSError as error:
            why = (error.strerror or "unknown error").lower()
            if error.errno in _NO_ROOM:
                raise _broken(f"{self.folder} takes no more files ({why})") from error
            return [f"{shown(file.path)} was uploaded and cannot be put there ({why}): give it another name"]
        except (NotFound, InvalidInput) as error:
            return [f"{shown(file.path)} was uploaded and is lost: {error}"]
        return []

    # -- after work

    async def save(self, progress: Progress = ignore_progress) -> list[str]:
        """Saves the changes. Returns messages for a human, each once: what could not be saved, why, and the fix.

        Without a change nothing is asked of the store. Raises StaleOwner, nothing else: the turn goes on.
        """
        if not self.ready.is_set():
            return []
        async with self._saving:
            try:
                left_out = await self._save(progress)
            except StaleOwner:
                raise
            except HitlError as error:
                messages = self._failed(str(error))
            except OSError as error:
                messages = self._failed(
                    f"its folder cannot be read ({(error.strerror or 'unknown error').lower()})"
                )
            else:
                self.unsaved, messages = False, _not_kept(left_out)
        news = [line for line in messages if line not in self._reported]
        self._reported = tuple(messages)
        return news

    def _failed(self, why: str) -> list[str]:
        self.unsaved = True
        log.warning("workspace not saved", session=self._id, why=why)
        stays = "The session keeps its process until it is" if self.must_stay else "Its folder stays as it is"
        return [
            f"the workspace was not saved: {why}. {stays}; what was saved before is kept, and the next save tries again"
        ]

    async def _save(self, progress: Progress) -> list[tuple[str, str]]:
        place, base = self._place, self._base
        listing = await asyncio.to_thread(
            scan.list_folder, place.folder, exclude=place.exclude, baked=place.baked
        )
        _check_size(listing, place.max_bytes)
        old = {f.path: f for f in base.manifest.files}
        same = {
            f.path: old[f.path] for f in listing.files if base.stamps.get(f.path) == f.stamp and f.path in old
        }
        changed = [f for f in listing.files if f.path not in same]
        fresh = await self._send(changed, progress)
        found = Manifest.of(
            [*same.values(), *(file for file, _ in fresh.files)], listing.links, listing.empty_folders()
        )
        name = (
            base.name
            if found == base.manifest
            else await _put_manifest(self._store, found, self._id, self._epoch)
        )
        if name != base.name or self._taken:
            await self._store.save_workspace(self._id, self._epoch, name, taken=self._taken)
            self._taken = ()
        certain = listing.began_ns - _TICK_NS
        stamps = {path: base.stamps[path] for path in same}
        stamps |= {file.path: stamp for file, stamp in fresh.files if stamp.ctime_ns < certain}
        self._base = SavedState(name, found, stamps)
        if place.lasts and (name != base.name or stamps != base.stamps):
            await asyncio.to_thread(base_state.write, place.marker, self._base)
        return [*listing.left_out, *fresh.left_out]

    async def _send(self, changed: Sequence[scan.Found], progress: Progress) -> scan.Batch:
        """Puts the blobs of these files that the store has not got. Returns the files, without the blobs."""
        total = scan.Batch()
        if not changed:
            return total
        counting = _Counting("saving", sum(f.stamp.size for f in changed), progress)
        known = self._base.manifest.chunks()
        reading = scan.read(self.folder, changed, known)
        while (batch := await asyncio.to_thread(next, reading, None)) is not None:
            await _put(self._store, batch.blobs, self._id, self._epoch)
            known |= batch.blobs.keys()
            total.files += batch.files
            total.left_out += batch.left_out
            await counting.add(batch.read_bytes)
        return total


async def put_files(store: SavedBlobs, folder: Path) -> str:
    """Puts the files of a folder where `Clients.add_files` finds them; returns their manifest's name. Raises Unavailable."""
    listing = await asyncio.to_thread(scan.list_folder, folder)
    files: list[SavedFile] = []
    reading = scan.read(folder, listing.files, ())
    while (batch := await asyncio.to_thread(next, reading, None)) is not None:
        await _put(store, batch.blobs)
        files += [file for file, _ in batch.files]
    return await _put_manifest(store, Manifest.of(files))


async def _put(
    store: SavedBlobs, blobs: Mapping[str, bytes], session_id: str | None = None, epoch: int | None = None
) -> None:
    if not blobs:
        return
    missing = await store.missing_blobs(list(blobs), session_id=session_id, epoch=epoch)
    if missing:
        await store.put_blobs([blobs[name] for name in missing], session_id=session_id, epoch=epoch)


async def _put_manifest(
    store: SavedBlobs, manifest: Manifest, session_id: str | None = None, epoch: int | None = None
) -> str:
    """Puts what the manifest consists of and the store has not got, its root last. Returns its name."""
    *parts, root = await asyncio.to_thread(manifest.encode)
    for some in _fitting(parts):
        await _put(store, {blob_name(part): part for part in some}, session_id, epoch)
    await store.put_blobs([root], session_id=session_id, epoch=epoch)
    return blob_name(root)


def _fitting(blobs: Sequence[bytes]) -> Iterator[list[bytes]]:
    """As many at a time as fit a call."""
    batch: list[bytes] = []
    held = 0
    for blob in blobs:
        if batch and held + len(blob) > CHUNK_BYTES:
            yield batch
            batch, held = [], 0
        batch.append(blob)
        held += len(blob)
    if batch:
        yield batch


class _Counting:
    """Says how far it is, when there is enough to do that a human would wonder."""

    def __init__(self, doing: str, of_bytes: int, progress: Progress) -> None:
        self._doing, self._of, self._progress = doing, of_bytes, progress
        self._done = self._said = 0

    async def add(self, count_bytes: int) -> None:
        self._done += count_bytes
        if self._of >= PROGRESS_BYTES and self._done - self._said >= PROGRESS_BYTES:
            self._said = self._done
            await self._progress(self._doing, min(self._done, self._of), self._of)


def _batches(files: Sequence[SavedFile]) -> Iterator[list[tuple[SavedFile, int]]]:
    """The files' chunks in order, as many at a time as fit a call."""
    batch: list[tuple[SavedFile, int]] = []
    held = 0
    for file in files:
        most = min(file.size, CHUNK_BYTES)
        for number in range(max(len(file.chunks), 1)):
            if batch and (held + most > CHUNK_BYTES or len(batch) >= scan.BATCH_BLOBS):
                yield batch
                batch, held = [], 0
            batch.append((file, number))
            held += most
    if batch:
        yield batch


def _check_size(listing: Listing, max_bytes: int) -> None:
    if listing.size_bytes > max_bytes:
        names = ", ".join(f"{path} ({size(count)})" for path, count in scan.largest(listing, _NAMED))
        raise TooLarge(
            f"it has {size(listing.size_bytes)}, and the limit is {size(max_bytes)}; the largest: {names}. Have some "
            "removed, leave some out (HITL_WORKSPACE_EXCLUDE), or raise the limit (HITL_MAX_WORKSPACE_BYTES)"
        )


def _not_kept(left_out: Sequence[tuple[str, str]]) -> list[str]:
    if not left_out:
        return []
    named = "; ".join(f"{shown(path)}: {why}" for path, why in sorted(left_out)[:_NAMED])
    more = f"; and {len(left_out) - _NAMED} more" if len(left_out) > _NAMED else ""
    return [f"not everything is saved with the workspace ({named}{more}); the rest is"]


def _broken(why: str) -> EngineError:
    return EngineError(
        f"the session's workspace cannot be used: {why}. Correct that, then send your message again",
        retryable=False,
    )
