"""The SDK's SessionStore over our Store: the CLI's transcripts are rows, written as they grow, fenced by the lease."""

from collections.abc import Sequence
from typing import cast

from claude_agent_sdk import SessionKey, fold_session_summary
from claude_agent_sdk.types import (
    SessionListSubkeysKey,
    SessionStore,
    SessionStoreEntry,
    SessionStoreListEntry,
    SessionSummaryEntry,
)

from claude_hitl_template.errors import StaleOwner
from claude_hitl_template.store.protocol import Owners, TranscriptKey


class TranscriptStore(SessionStore):
    """Transcripts of one scope (a session id). Writes of a stale owner raise StaleOwner.

    The SDK names projects after the working folder's path. With `any_folder` that name is not kept, so that a
    transcript is found again when the workspace is stored elsewhere (another node, a moved data folder).
    """

    def __init__(
        self, store: Owners | None, scope: str, *, epoch: int | None = None, any_folder: bool = False
    ) -> None:
        self._given, self._scope, self._epoch, self._any_folder = store, scope, epoch, any_folder

    def bind(self, store: Owners) -> None:
        """Sets the store, which one that is made before its session is assigned does not have."""
        self._given = store

    @property
    def _store(self) -> Owners:
        if self._given is None:
            raise StaleOwner(f"session {self._scope} has not been assigned to this owner")
        return self._given

    async def append(self, key: SessionKey, entries: list[SessionStoreEntry]) -> None:
        await self._store.append_transcript(self._key(key), [dict(e) for e in entries], epoch=self._epoch)

    async def load(self, key: SessionKey) -> list[SessionStoreEntry] | None:
        found = await self._store.load_transcript(self._key(key), epoch=self._epoch)
        return cast("list[SessionStoreEntry] | None", found)

    async def list_sessions(self, project_key: str) -> list[SessionStoreListEntry]:
        return [{"session_id": k["session_id"], "mtime": at} for k, at in await self._mains(project_key)]

    async def list_session_summaries(self, project_key: str) -> list[SessionSummaryEntry]:
        summaries: list[SessionSummaryEntry] = []
        for key, at in await self._mains(project_key):
            named: SessionKey = {"project_key": project_key, "session_id": key["session_id"]}
            entries = await self.load(named) or []
            summaries.append({**fold_session_summary(None, named, entries), "mtime": at})
        return summaries

    async def delete(self, key: SessionKey) -> None:
        await self._store.delete_transcripts(self._key(key), epoch=self._epoch)

    async def list_subkeys(self, key: SessionListSubkeysKey) -> list[str]:
        found = await self._list(key["project_key"])
        return [k["subpath"] for k, _ in found if k["session_id"] == key["session_id"] and k["subpath"]]

    async def _mains(self, project_key: str) -> Sequence[tuple[TranscriptKey, int]]:
        return [(k, at) for k, at in await self._list(project_key) if not k["subpath"]]

    async def _list(self, project_key: str) -> Sequence[tuple[TranscriptKey, int]]:
        return await self._store.list_transcripts(self._scope, self._project(project_key), epoch=self._epoch)

    def _project(self, project_key: str) -> str:
        return "-" if self._any_folder else project_key

    def _key(self, key: SessionKey) -> TranscriptKey:
        return {
            "scope": self._scope,
            "project_key": self._project(key["project_key"]),
            "session_id": key["session_id"],
            "subpath": key.get("subpath", "") or "",
        }
