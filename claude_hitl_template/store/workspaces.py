"""The Store's rules for saved workspaces: blobs in the file area, and the name of a manifest in the session."""

from collections.abc import Iterable, Sequence
from datetime import datetime

import structlog

from claude_hitl_template.domain.canonical_json import digest
from claude_hitl_template.domain.models import Page, Session
from claude_hitl_template.domain.people import SERVICE, Actor
from claude_hitl_template.errors import HitlError, InvalidInput, NotFound, TooLarge
from claude_hitl_template.files import manifest as manifests
from claude_hitl_template.files.blob_store import KEPT
from claude_hitl_template.files.manifest import Manifest, SavedFile
from claude_hitl_template.store.base import StoreBase, decode_seq_cursor, encode_cursor
from claude_hitl_template.store.clients import earlier_reply, refuse_archived, remember_reply, reply_scope
from claude_hitl_template.store.session_aggregate import SessionAggregate

log = structlog.get_logger()
MAX_BLOBS = 10_000  # in one call
MAX_NAMES = 200_000  # of blobs, known of the manifests used last: some 25 MB


class WorkspaceRules(StoreBase):
    async def missing_blobs(
        self, names: Sequence[str], *, session_id: str | None = None, epoch: int | None = None
    ) -> list[str]:
        await self._seen_from(session_id, epoch)
        return await self._files.missing(_few(names))

    async def put_blobs(
        self, blobs: Sequence[bytes], *, session_id: str | None = None, epoch: int | None = None
    ) -> None:
        await self._seen_from(session_id, epoch)
        if any(len(blob) > manifests.CHUNK_BYTES for blob in blobs):
            raise TooLarge(f"a blob has at most {manifests.CHUNK_BYTES} bytes", "blobs")
        await self._files.put(_few(blobs))

    async def get_blobs(
        self, names: Sequence[str], *, session_id: str | None = None, epoch: int | None = None
    ) -> list[bytes]:
        session = await self._seen_from(session_id, epoch)
        if session is not None:
            await self._check_named(session, _few(names))
        return await self._files.get(_few(names))

    async def _seen_from(self, session_id: str | None, epoch: int | None) -> Session | None:
        """The session of the caller; None for the service itself. Raises NotFound, StaleOwner."""
        if session_id is None:
            return None
        async with self._reading() as tx:
            if epoch is not None:
                return (await SessionAggregate.load_owned(tx, session_id, epoch, self._clock())).session
            return (await SessionAggregate.load(tx, session_id, self._clock())).session

    async def _check_named(self, session: Session, names: Sequence[str]) -> None:
        roots = session.manifests
        others = set(names).difference(roots)
        broken: HitlError = NotFound("the session's saved workspace has no such part")
        for root in roots:
            if others:
                try:
                    others -= await self._named_by(root)
                except (NotFound, InvalidInput) as error:
                    broken = error
        if others:
            raise broken

    async def _named_by(self, root: str) -> frozenset[str]:
        """The blobs that a manifest names, cached: a manifest never changes."""
        found = self._contents.pop(root, None)
        if found is None:
            manifest, own = await manifests.load_with_parts(root, self._files.get)
            found = frozenset(manifest.chunks().union(own))
        self._contents[root] = found
        while len(self._contents) > 1 and sum(map(len, self._contents.values())) > MAX_NAMES:
            self._contents.pop(next(iter(self._contents)))
        return found

    async def save_workspace(
        self, session_id: str, epoch: int, manifest: str | None, *, taken: Sequence[str] = ()
    ) -> None:
        await manifests.load(manifest, self._files.get)
        async with self._changing(session_id, "save_workspace", epoch=epoch) as unit:
            left = tuple(name for name in unit.session.uploads if name not in taken)
            if (manifest, left) != (unit.session.workspace, unit.session.uploads):
                unit.set(workspace=manifest, uploads=left)

    async def add_files(
        self,
        session_id: str,
        workspace_id: str | None,
        manifest: str,
        *,
        by: Actor = SERVICE,
        idempotency_key: str | None = None,
    ) -> None:
        added = await manifests.load(manifest, self._files.get)
        if added.links or added.folders:
            raise InvalidInput("only files can be added", "manifest")
        request = digest(["add files", session_id, manifest])
        async with self._changing(session_id, "add_files", workspace_id=workspace_id) as unit:
            scope = reply_scope(workspace_id, by)
            if await earlier_reply(unit.tx, scope, idempotency_key, request) is not None:
                return
            refuse_archived(unit)
            unit.set(uploads=(*unit.session.uploads, manifest))
            unit.wake()
            await remember_reply(unit, scope, idempotency_key, request, manifest)

    async def list_workspace(
        self,
        session_id: str,
        workspace_id: str | None,
        *,
        limit: int,
        page: str | None = None,
        changed_since_ns: int | None = None,
    ) -> Page[SavedFile]:
        begin = decode_seq_cursor("workspace", page) or 0
        found = await self._saved(session_id, workspace_id)
        files = [f for f in found.files if changed_since_ns is None or f.mtime_ns >= changed_since_ns]
        end = begin + limit
        cursor = encode_cursor("workspace", str(end)) if len(files) > end else None
        return Page(data=files[begin:end], next_page=cursor)

    async def workspace_file(self, session_id: str, workspace_id: str | None, path: str) -> SavedFile:
        for file in (await self._saved(session_id, workspace_id)).files:
            if manifests.shown(file.path) == path:
                return file
        raise NotFound("the session's saved workspace has no such file")

    async def sweep_blobs(self) -> int:
        old = set(await self._files.old())
        async with self._reading() as tx:
            named = await tx.manifests()
        if not old:
            return 0
        for name, changed_at in named.items():
            old -= await self._needed(name, changed_at, old)
        return await self._files.drop(sorted(old))

    async def _needed(self, name: str, changed_at: datetime, old: Iterable[str]) -> set[str]:
        """The blobs that a manifest and its content are. What one that is lost named is not known: then all that were
        there when its session last changed, so that they are found again if it is."""
        try:
            found, own = await manifests.load_with_parts(name, self._files.get)
        except (NotFound, InvalidInput) as error:
            log.warning("the manifest of a saved workspace cannot be read", why=str(error))
            return await self._files.put_before(sorted(old), changed_at + KEPT)
        return found.chunks().union(own)

    async def _saved(self, session_id: str, workspace_id: str | None) -> Manifest:
        """With what was added and is not in the session's folder yet."""
        async with self._reading() as tx:
            session = (
                await SessionAggregate.load(tx, session_id, self._clock(), workspace_id=workspace_id)
            ).session
        return await manifests.load_together(session.manifests, self._files.get)


def _few[T](items: Sequence[T]) -> Sequence[T]:
    if len(items) > MAX_BLOBS:
        raise TooLarge(f"at most {MAX_BLOBS} blobs at once", "blobs")
    return items
