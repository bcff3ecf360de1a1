"""The Store's backend in memory, for unit tests; the contract tests run on it and on the SQL backend."""

import asyncio
import copy
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from claude_hitl_template.domain.audit import Draft, Entry, Head
from claude_hitl_template.domain.models import (
    ApiKey,
    Approval,
    ApprovalState,
    Event,
    KeptDecision,
    Session,
    SessionStatus,
    StoredPolicy,
    Supervised,
)
from claude_hitl_template.domain.notices import Channel, Delivery, Notice
from claude_hitl_template.domain.people import Principal, Workspace
from claude_hitl_template.domain.policy.tiers import Severity
from claude_hitl_template.domain.sign_in import BrowserSession, Login
from claude_hitl_template.errors import Conflict
from claude_hitl_template.store.backend import NAME_TAKEN, OPEN, Reply, Tx
from claude_hitl_template.store.filters import AuditFilter, Order, TimeRange
from claude_hitl_template.store.protocol import TranscriptKey
from claude_hitl_template.testing.memory_notices import MemoryNotices

type _Key = tuple[str, str, str, str]


def in_range(at: datetime, bounds: TimeRange) -> bool:
    return (
        (bounds.gt is None or at > bounds.gt)
        and (bounds.gte is None or at >= bounds.gte)
        and (bounds.lt is None or at < bounds.lt)
        and (bounds.lte is None or at <= bounds.lte)
    )


@dataclass
class _State:
    keys: dict[str, ApiKey] = field(default_factory=dict[str, ApiKey])
    workspaces: dict[str, Workspace] = field(default_factory=dict[str, Workspace])
    principals: dict[str, Principal] = field(default_factory=dict[str, Principal])
    policies: dict[str, StoredPolicy] = field(default_factory=dict[str, StoredPolicy])
    logins: dict[str, Login] = field(default_factory=dict[str, Login])
    browser_sessions: dict[str, BrowserSession] = field(default_factory=dict[str, BrowserSession])
    channels: dict[str, tuple[Channel, str]] = field(default_factory=dict[str, tuple[Channel, str]])
    notices: dict[str, Notice] = field(default_factory=dict[str, Notice])
    sent: dict[str, Delivery] = field(default_factory=dict[str, Delivery])
    readers: dict[str, datetime] = field(default_factory=dict[str, datetime])
    sessions: dict[str, Session] = field(default_factory=dict[str, Session])
    events: dict[str, tuple[Event, ...]] = field(default_factory=dict[str, tuple[Event, ...]])
    approvals: dict[str, Approval] = field(default_factory=dict[str, Approval])
    kept: dict[str, KeptDecision] = field(default_factory=dict[str, KeptDecision])
    replies: dict[tuple[str, str], tuple[str, Reply]] = field(
        default_factory=dict[tuple[str, str], tuple[str, Reply]]
    )
    transcripts: dict[_Key, tuple[tuple[dict[str, Any], ...], int]] = field(
        default_factory=dict[_Key, tuple[tuple[dict[str, Any], ...], int]]
    )

    audit: dict[str, tuple[Entry, ...]] = field(default_factory=dict[str, tuple[Entry, ...]])
    checkpoints: dict[str, tuple[dict[str, Any], ...]] = field(
        default_factory=dict[str, tuple[dict[str, Any], ...]]
    )

    def fork(self) -> "_State":
        return _State(**{name: dict(value) for name, value in vars(self).items()})


class MemoryBackend:
    relay = None

    def __init__(self) -> None:
        self._state = _State()
        self._writing = asyncio.Lock()

    @asynccontextmanager
    async def begin(self, *, write: bool) -> AsyncGenerator[Tx]:
        if not write:
            yield _MemoryTx(self._state)
            return
        async with self._writing:
            fork = self._state.fork()
            yield _MemoryTx(fork)
            self._state = fork


class _MemoryTx(MemoryNotices):
    def __init__(self, state: _State) -> None:
        self._s = state
        self.changed_approvals: list[Approval] = []
        self.drafts: list[Draft] = []
        self.told: list[Notice] = []

    async def add_key(self, key: ApiKey) -> None:
        self._s.keys[key.secret_hash] = key

    async def find_key(self, secret_hash: str) -> ApiKey | None:
        return self._s.keys.get(secret_hash)

    async def key(self, key_id: str) -> ApiKey | None:
        return next((key for key in self._s.keys.values() if key.id == key_id), None)

    async def keys(self) -> list[ApiKey]:
        return list(self._s.keys.values())

    async def put_key(self, key: ApiKey) -> None:
        self._s.keys = {h: k for h, k in self._s.keys.items() if k.id != key.id} | {key.secret_hash: key}

    async def workspace(self, workspace_id: str) -> Workspace | None:
        return self._s.workspaces.get(workspace_id)

    async def workspaces(self) -> list[Workspace]:
        return list(self._s.workspaces.values())

    async def put_workspace(self, workspace: Workspace) -> None:
        self._s.workspaces[workspace.id] = workspace

    async def principal(self, principal_id: str) -> Principal | None:
        return self._s.principals.get(principal_id)

    async def named_principal(self, *, name: str = "", external_id: str = "") -> Principal | None:
        everyone = self._s.principals.values()
        if external_id:
            return next((one for one in everyone if one.external_id == external_id), None)
        return next((one for one in everyone if one.name == name), None)

    async def principals(self) -> list[Principal]:
        return list(self._s.principals.values())

    async def people(self, principal_ids: Sequence[str]) -> dict[str, Principal]:
        return {one: self._s.principals[one] for one in principal_ids if one in self._s.principals}

    async def policy(self, workspace_id: str) -> StoredPolicy | None:
        return self._s.policies.get(workspace_id)

    async def put_policy(self, stored: StoredPolicy) -> bool:
        before = self._s.policies.get(stored.workspace_id)
        if (before.version if before else 0) != stored.version - 1:
            return False
        self._s.policies[stored.workspace_id] = stored
        return True

    async def put_principal(self, principal: Principal) -> None:
        for other in self._s.principals.values():
            same = other.name == principal.name or (
                principal.external_id is not None and other.external_id == principal.external_id
            )
            if other.id != principal.id and same:
                raise Conflict(NAME_TAKEN)
        self._s.principals[principal.id] = principal

    async def lock(self, name: str) -> None:
        pass  # writing transactions are kept apart as it is

    async def login(self, principal_id: str) -> Login | None:
        return self._s.logins.get(principal_id)

    async def put_login(self, login: Login) -> None:
        self._s.logins[login.principal_id] = login

    async def browser_session(self, token_hash: str) -> BrowserSession | None:
        return next((one for one in self._s.browser_sessions.values() if one.token_hash == token_hash), None)

    async def browser_sessions(self, principal_id: str) -> list[BrowserSession]:
        return [one for one in self._s.browser_sessions.values() if one.principal_id == principal_id]

    async def put_browser_session(self, session: BrowserSession) -> None:
        self._s.browser_sessions[session.id] = session

    async def delete_browser_session(self, session_id: str) -> None:
        self._s.browser_sessions.pop(session_id, None)

    async def forget_browser_sessions(self, now: datetime) -> None:
        kept = {k: one for k, one in self._s.browser_sessions.items() if one.expires_at > now}
        self._s.browser_sessions = kept

    async def session(self, session_id: str) -> Session | None:
        return self._s.sessions.get(session_id)

    async def put_session(self, session: Session) -> None:
        self._s.sessions[session.id] = session

    async def delete_session(self, session_id: str) -> None:
        await self.delete_notices_of(session_id)
        self._s.sessions.pop(session_id, None)
        self._s.events.pop(session_id, None)
        mine = (KeptDecision.of(a) for a in self._s.approvals.values() if a.session_id == session_id)
        self._s.kept.update({kept.id: kept for kept in mine if kept is not None})
        self._s.approvals = {k: a for k, a in self._s.approvals.items() if a.session_id != session_id}
        self._s.transcripts = {k: t for k, t in self._s.transcripts.items() if k[0] != session_id}
        self._s.replies = {k: r for k, r in self._s.replies.items() if r[0] != session_id}

    async def kept_decisions(self, *, after: tuple[datetime, str] | None, limit: int) -> list[KeptDecision]:
        found = sorted(self._s.kept.values(), key=lambda kept: (kept.decided_at, kept.id))
        return [kept for kept in found if after is None or (kept.decided_at, kept.id) > after][:limit]

    async def sessions(
        self,
        workspace_id: str | None,
        *,
        after: tuple[datetime, str] | None,
        limit: int,
        order: Order,
        statuses: Sequence[SessionStatus],
        agent_id: str | None,
        created: TimeRange,
        include_archived: bool,
    ) -> list[Session]:
        found = [
            s
            for s in self._s.sessions.values()
            if workspace_id in (None, s.workspace_id)
            and (not statuses or s.status in statuses)
            and (agent_id is None or s.agent.id == agent_id)
            and in_range(s.created_at, created)
            and (include_archived or s.archived_at is None)
        ]
        return _slice(found, after, limit, order)

    async def supervised(self) -> list[Supervised]:
        return [
            Supervised(id=s.id, status=s.status, epoch=s.epoch, lease=s.lease, updated_at=s.updated_at)
            for s in self._s.sessions.values()
            if s.lease is not None or s.status in ("running", "rescheduling")
        ]

    async def existing_sessions(self, session_ids: Sequence[str]) -> list[str]:
        return [session_id for session_id in session_ids if session_id in self._s.sessions]

    async def manifests(self) -> dict[str, datetime]:
        found: dict[str, datetime] = {}
        for session in self._s.sessions.values():
            for name in (*session.manifests, *(session.turn_base or ())):
                found[name] = max(session.updated_at, found.get(name, session.updated_at))
        return found

    async def unchanged_sessions(self, since: datetime, limit: int) -> list[str]:
        found = [
            s.id
            for s in self._s.sessions.values()
            if s.updated_at < since
            and (
                s.archived_at
                or (s.status == "idle" and (s.stop_reason or {"type": None})["type"] in (None, "end_turn"))
            )
        ]
        return found[:limit]

    async def add_events(self, session_id: str, fresh: Sequence[Event]) -> None:
        self._s.events[session_id] = (*self._s.events.get(session_id, ()), *fresh)

    async def event(self, session_id: str, event_id: str) -> Event | None:
        return next((e for e in self._s.events.get(session_id, ()) if e.id == event_id), None)

    async def known_events(self, session_id: str, ids: Sequence[str]) -> set[str]:
        wanted = set(ids)
        return {e.id for e in self._s.events.get(session_id, ()) if e.id in wanted}

    async def events(
        self,
        session_id: str,
        *,
        after: int | None,
        limit: int,
        order: Order,
        types: Sequence[str],
        created: TimeRange,
    ) -> list[Event]:
        found = [
            e
            for e in self._s.events.get(session_id, ())
            if (not types or e.type in types) and in_range(e.created_at, created)
        ]
        if order == "desc":
            found.reverse()
        if after is not None:
            found = [e for e in found if (e.seq > after if order == "asc" else e.seq < after)]
        return found[:limit]

    async def queued(self, session_id: str) -> list[Event]:
        return [e for e in self._s.events.get(session_id, ()) if e.processed_at is None]

    async def set_processed(self, session_id: str, event_id: str, at: datetime) -> None:
        self._s.events[session_id] = tuple(
            e.but(processed_at=at) if e.id == event_id else e for e in self._s.events.get(session_id, ())
        )

    async def approval(self, approval_id: str) -> Approval | None:
        return self._s.approvals.get(approval_id)

    async def approval_of_call(self, session_id: str, call_id: str) -> Approval | None:
        mine = [a for a in self._s.approvals.values() if a.session_id == session_id]
        return next((a for a in mine if call_id in (a.event_id, a.call_id)), None)

    async def put_approval(self, approval: Approval) -> None:
        self.changed_approvals.append(approval)
        self._s.approvals[approval.id] = approval

    async def open_approvals(self, session_id: str) -> list[Approval]:
        mine = [a for a in self._s.approvals.values() if a.session_id == session_id and a.state in OPEN]
        return sorted(mine, key=lambda a: (a.created_at, a.id))

    async def approvals(
        self,
        workspace_id: str | None,
        *,
        after: tuple[datetime, str] | None,
        limit: int,
        states: Sequence[ApprovalState],
        session_id: str | None,
        severity: Severity | None = None,
    ) -> list[Approval]:
        found = [
            a
            for a in self._s.approvals.values()
            if workspace_id in (None, a.workspace_id)
            and (not states or a.state in states)
            and (session_id is None or a.session_id == session_id)
            and severity in (None, a.severity)
        ]
        return _slice(found, after, limit, "asc")

    async def due_approvals(self, now: datetime) -> list[Approval]:
        pending = [a for a in self._s.approvals.values() if a.state is ApprovalState.PENDING]
        return [a for a in pending if a.expires_at is not None and a.expires_at <= now]

    async def remembered_reply(self, scope: str, idempotency_key: str) -> Reply | None:
        return self._s.replies.get((scope, idempotency_key), (None, None))[1]

    async def remember_reply(
        self, scope: str, idempotency_key: str, reply: Reply, *, session_id: str
    ) -> None:
        self._s.replies[scope, idempotency_key] = (session_id, reply)

    async def take_reply(self, scope: str, idempotency_key: str) -> Reply | None:
        return self._s.replies.pop((scope, idempotency_key), (None, None))[1]

    async def forget_replies(self, now: datetime, unmarked_before: datetime) -> int:
        kept = {k: r for k, r in self._s.replies.items() if r[1].expires_at >= now}
        forgotten, self._s.replies = len(self._s.replies) - len(kept), kept
        return forgotten

    async def append_transcript(
        self, key: TranscriptKey, entries: Sequence[Mapping[str, Any]], now: datetime
    ) -> None:
        if not entries:
            return
        old, last = self._s.transcripts.get(_flat(key), ((), 0))
        kept, known = list(old), {e["uuid"] for e in old if e.get("uuid")}
        for entry in entries:
            if entry.get("uuid") not in known:
                kept.append(copy.deepcopy(dict(entry)))
                known |= {entry["uuid"]} if entry.get("uuid") else set()
        self._s.transcripts[_flat(key)] = (tuple(kept), max(int(now.timestamp() * 1000), last + 1))

    async def load_transcript(
        self, key: TranscriptKey, *, after: int, limit: int
    ) -> list[tuple[int, dict[str, Any]]]:
        entries = self._s.transcripts.get(_flat(key), ((), 0))[0]
        return [(i, copy.deepcopy(e)) for i, e in enumerate(entries, 1) if after < i <= after + limit]

    async def list_transcripts(self, scope: str, project_key: str) -> list[tuple[TranscriptKey, int]]:
        return [(_key(k), at) for k, (_, at) in self._s.transcripts.items() if k[:2] == (scope, project_key)]

    async def delete_transcripts(self, key: TranscriptKey) -> None:
        flat = _flat(key)
        for found in [
            k for k in self._s.transcripts if k == flat or (not key["subpath"] and k[:3] == flat[:3])
        ]:
            del self._s.transcripts[found]

    async def audit_head(self, workspace_id: str) -> Head:
        entries = self._s.audit.get(workspace_id)
        return Head(entries[-1].seq, entries[-1].hash) if entries else Head()

    async def add_audit_entries(
        self, entries: Sequence[Entry], checkpoints: Sequence[dict[str, Any]]
    ) -> None:
        workspace_id = entries[0].workspace_id
        self._s.audit[workspace_id] = (*self._s.audit.get(workspace_id, ()), *entries)
        self._s.checkpoints[workspace_id] = (*self._s.checkpoints.get(workspace_id, ()), *checkpoints)

    async def audit_entries(
        self, workspace_id: str, *, after: int | None, limit: int, order: Order, matching: AuditFilter
    ) -> list[Entry]:
        found = [
            e
            for e in self._s.audit.get(workspace_id, ())
            if matching.action in (None, e.action)
            and matching.actor in (None, e.actor.id)
            and matching.target in (None, e.target)
            and in_range(e.time, matching.created)
            and (after is None or (e.seq > after if order == "asc" else e.seq < after))
        ]
        return (found if order == "asc" else found[::-1])[:limit]

    async def audit_checkpoints(self, workspace_id: str, *, after: int, up_to: int) -> list[dict[str, Any]]:
        return [c for c in self._s.checkpoints.get(workspace_id, ()) if after < c["seq"] <= up_to]


def _flat(key: TranscriptKey) -> _Key:
    return key["scope"], key["project_key"], key["session_id"], key["subpath"]


def _key(flat: _Key) -> TranscriptKey:
    return {"scope": flat[0], "project_key": flat[1], "session_id": flat[2], "subpath": flat[3]}


def _slice[T: (Session, Approval)](
    found: list[T], after: tuple[datetime, str] | None, limit: int, order: Order
) -> list[T]:
    found = sorted(found, key=lambda x: (x.created_at, x.id), reverse=order == "desc")
    if after is not None:
        found = [
            x
            for x in found
            if ((x.created_at, x.id) > after) == (order == "asc") and (x.created_at, x.id) != after
        ]
    return found[:limit]
