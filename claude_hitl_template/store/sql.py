"""The Store's transactions on SQLAlchemy, for SQLite (sqlite.py) and Postgres (postgres.py)."""

import operator
from collections.abc import Mapping, Sequence
from datetime import datetime
from itertools import batched
from typing import Any

import sqlalchemy as sa

from claude_hitl_template.domain.audit import GENESIS, Draft, Entry, Head
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
from claude_hitl_template.domain.notices import Notice
from claude_hitl_template.domain.people import Principal, Workspace
from claude_hitl_template.domain.policy.tiers import SEVERITIES, Severity
from claude_hitl_template.domain.sign_in import BrowserSession, Login
from claude_hitl_template.errors import Conflict
from claude_hitl_template.store import statements
from claude_hitl_template.store.backend import NAME_TAKEN, Reply
from claude_hitl_template.store.filters import AuditFilter, Order, TimeRange
from claude_hitl_template.store.notices_sql import NoticesSql
from claude_hitl_template.store.protocol import TranscriptKey
from claude_hitl_template.store.rows import Executor, document, of_workspace, paged, stored
from claude_hitl_template.store.tables import (
    api_keys,
    approvals,
    audit_checkpoints,
    audit_entries,
    audit_heads,
    browser_sessions,
    events,
    kept_decisions,
    logins,
    policies,
    principals,
    replies,
    sessions,
    transcripts,
    workspaces,
)

MOST_IDS = 50  # in one statement


def execute(connection: sa.Connection, *, statement: str) -> None:
    connection.exec_driver_sql(statement)


class SqlTx(NoticesSql):
    """A transaction of SQLAlchemy."""

    def __init__(self, connection: Executor, *, locking: bool = False) -> None:
        super().__init__(connection, locking=locking)
        self.changed_approvals: list[Approval] = []
        self.drafts: list[Draft] = []
        self.told: list[Notice] = []
        self._unwritten: list[dict[str, Any]] = []  # events

    async def flush(self) -> None:
        """Writes what was only noted so far: all new events of a transaction are one statement, which also what reads
        events writes first."""
        rows, self._unwritten = self._unwritten, []
        if rows:
            await self._c.execute(statements.ADD_EVENTS, rows)

    # -- keys

    async def add_key(self, key: ApiKey) -> None:
        row = {"id": key.id, "secret_hash": key.secret_hash, "doc": document(key)}
        await self._c.execute(self._insert(api_keys).values(row).on_conflict_do_nothing())

    async def find_key(self, secret_hash: str) -> ApiKey | None:
        row = await self._one(statements.KEY_OF_SECRET, key=secret_hash)
        return stored(ApiKey, row) if row else None

    async def key(self, key_id: str) -> ApiKey | None:
        query = sa.select(api_keys.c.doc).where(api_keys.c.id == key_id)
        row = await self._one(query.with_for_update() if self._locking else query)
        return stored(ApiKey, row) if row else None

    async def keys(self) -> list[ApiKey]:
        return [stored(ApiKey, row) for row in await self._all(sa.select(api_keys.c.doc))]

    async def put_key(self, key: ApiKey) -> None:
        changed = {"secret_hash": key.secret_hash, "doc": document(key)}
        await self._c.execute(sa.update(api_keys).where(api_keys.c.id == key.id).values(changed))

    # -- people

    async def workspace(self, workspace_id: str) -> Workspace | None:
        row = await self._one(self._locked(statements.WORKSPACE), key=workspace_id)
        return stored(Workspace, row) if row else None

    async def workspaces(self) -> list[Workspace]:
        return [stored(Workspace, row) for row in await self._all(sa.select(workspaces.c.doc))]

    async def put_workspace(self, workspace: Workspace) -> None:
        await self._upsert(workspaces, {"id": workspace.id, "doc": document(workspace)})

    async def principal(self, principal_id: str) -> Principal | None:
        row = await self._one(statements.PRINCIPAL, key=principal_id)
        return stored(Principal, row) if row else None

    async def named_principal(self, *, name: str = "", external_id: str = "") -> Principal | None:
        t = principals.c
        where = t.external_id == external_id if external_id else t.name == name
        row = await self._one(sa.select(t.doc).where(where))
        return stored(Principal, row) if row else None

    async def principals(self) -> list[Principal]:
        return [stored(Principal, row) for row in await self._all(sa.select(principals.c.doc))]

    async def people(self, principal_ids: Sequence[str]) -> dict[str, Principal]:
        if not principal_ids:
            return {}
        if len(principal_ids) == 1:
            rows = await self._all(self._locked(statements.PRINCIPAL, read=True), key=principal_ids[0])
        else:
            t = principals.c  # in one order, so that no two transactions wait for each other
            query = sa.select(t.doc).where(t.id.in_(principal_ids)).order_by(t.id)
            rows = await self._all(self._locked(query, read=True))
        found = [stored(Principal, row) for row in rows]
        return {one.id: one for one in found}

    async def policy(self, workspace_id: str) -> StoredPolicy | None:
        row = await self._one(self._locked(statements.POLICY, read=True), key=workspace_id)
        return stored(StoredPolicy, row) if row else None

    async def put_policy(self, stored: StoredPolicy) -> bool:
        t = policies.c
        row = {"version": stored.version, "doc": document(stored)}
        if stored.version > 1:
            where = (t.workspace_id == stored.workspace_id, t.version == stored.version - 1)
            statement = sa.update(policies).where(*where).values(row)
        else:
            adding = self._insert(policies).values(workspace_id=stored.workspace_id, **row)
            statement = adding.on_conflict_do_nothing()
        return (await self._c.execute(statement.returning(t.version))).first() is not None

    async def put_principal(self, principal: Principal) -> None:
        t = principals.c
        query = sa.select(t.id).where(
            t.id != principal.id,
            (t.name == principal.name)
            | (t.external_id.is_not(None) & (t.external_id == principal.external_id)),
        )
        if await self._one(query):
            raise Conflict(NAME_TAKEN)
        row = {"id": principal.id, "name": principal.name, "external_id": principal.external_id}
        await self._upsert(principals, {**row, "doc": document(principal)})

    async def lock(self, name: str) -> None:
        if self._locking:
            key = sa.func.hashtextextended(name.replace("\0", "\ufffd"), 0)
            await self._c.execute(sa.select(sa.func.pg_advisory_xact_lock(key)))

    # -- signing in

    async def login(self, principal_id: str) -> Login | None:
        query = sa.select(logins.c.doc).where(logins.c.principal_id == principal_id)
        row = await self._one(query.with_for_update() if self._locking else query)
        return stored(Login, row) if row else None

    async def put_login(self, login: Login) -> None:
        row = {"principal_id": login.principal_id, "doc": document(login)}
        statement = self._insert(logins).values(row)
        await self._c.execute(
            statement.on_conflict_do_update(
                index_elements=[logins.c.principal_id], set_={"doc": statement.excluded["doc"]}
            )
        )

    async def browser_session(self, token_hash: str) -> BrowserSession | None:
        query = sa.select(browser_sessions.c.doc).where(browser_sessions.c.token_hash == token_hash)
        row = await self._one(query.with_for_update() if self._locking else query)
        return stored(BrowserSession, row) if row else None

    async def browser_sessions(self, principal_id: str) -> list[BrowserSession]:
        query = sa.select(browser_sessions.c.doc).where(browser_sessions.c.principal_id == principal_id)
        return [stored(BrowserSession, row) for row in await self._all(query)]

    async def put_browser_session(self, session: BrowserSession) -> None:
        names = ("id", "token_hash", "principal_id", "expires_at")
        row = {name: getattr(session, name) for name in names}
        await self._upsert(browser_sessions, {**row, "doc": document(session)})

    async def delete_browser_session(self, session_id: str) -> None:
        await self._c.execute(sa.delete(browser_sessions).where(browser_sessions.c.id == session_id))

    async def forget_browser_sessions(self, now: datetime) -> None:
        await self._c.execute(sa.delete(browser_sessions).where(browser_sessions.c.expires_at <= now))

    # -- sessions

    async def session(self, session_id: str) -> Session | None:
        # Everything of a session changes behind this lock, by whichever ledger.
        row = await self._one(self._locked(statements.SESSION), key=session_id)
        return stored(Session, row) if row else None

    async def put_session(self, session: Session) -> None:
        supervised = session.lease is not None or session.status in ("running", "rescheduling")
        row = {
            "id": session.id,
            "workspace_id": session.workspace_id,
            "agent_id": session.agent.id,
            "status": session.status,
            "archived": session.archived_at is not None,
            "supervised": supervised,
            "created_at": session.created_at,
            "doc": document(session),
        }
        await self._upsert(sessions, row)

    async def delete_session(self, session_id: str) -> None:
        await self.flush()
        await self._c.execute(sa.delete(events).where(events.c.session_id == session_id))
        await self._keep_decisions(session_id)
        await self.delete_notices_of(session_id)
        await self._c.execute(sa.delete(approvals).where(approvals.c.session_id == session_id))
        await self._c.execute(sa.delete(transcripts).where(transcripts.c.scope == session_id))
        await self._c.execute(sa.delete(replies).where(replies.c.session_id == session_id))
        await self._c.execute(sa.delete(sessions).where(sessions.c.id == session_id))

    async def _keep_decisions(self, session_id: str) -> None:
        query = sa.select(approvals.c.doc).where(approvals.c.session_id == session_id)
        for row in await self._all(query):
            kept = KeptDecision.of(stored(Approval, row))
            if kept is not None:
                values = {
                    "id": kept.id,
                    "session_id": session_id,
                    "decided_at": kept.decided_at,
                    "doc": document(kept),
                }
                await self._c.execute(self._insert(kept_decisions).values(values).on_conflict_do_nothing())

    async def kept_decisions(self, *, after: tuple[datetime, str] | None, limit: int) -> list[KeptDecision]:
        t = kept_decisions.c
        query = paged(sa.select(t.doc), t.decided_at, t.id, after=after, limit=limit, order="asc")
        return [stored(KeptDecision, row) for row in await self._all(query)]

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
        t = sessions.c
        query = sa.select(t.doc).where(
            *of_workspace(t.workspace_id, workspace_id), *_bounds(t.created_at, created)
        )
        if statuses:
            query = query.where(t.status.in_(statuses))
        if agent_id is not None:
            query = query.where(t.agent_id == agent_id)
        if not include_archived:
            query = query.where(t.archived.is_(False))
        rows = await self._all(
            paged(query, t.created_at, t.id, after=after, limit=limit, order=order), slow=True
        )
        return [stored(Session, row) for row in rows]

    async def supervised(self) -> list[Supervised]:
        t, doc = sessions.c, sessions.c.doc
        query = sa.select(
            t.id,
            t.status,
            doc["epoch"].as_integer().label("epoch"),
            doc["lease"].as_json().label("lease"),
            doc["updated_at"].as_string().label("updated_at"),
        ).where(
            sa.text("sessions.supervised")
        )  # as the partial index has it: SQLite uses it for nothing else
        return [Supervised.model_validate(dict(row._mapping)) for row in await self._all(query)]

    async def existing_sessions(self, session_ids: Sequence[str]) -> list[str]:
        query = sa.select(sessions.c.id).where(sessions.c.id.in_(session_ids))
        return [row.id for row in await self._all(query)] if session_ids else []

    async def unchanged_sessions(self, since: datetime, limit: int) -> list[str]:
        t, doc = sessions.c, sessions.c.doc
        why = doc["stop_reason"]["type"].as_string()  # none: it never ran
        at_rest = (t.status == "idle") & (why.is_(None) | (why == "end_turn"))
        query = sa.select(t.id).where(
            t.created_at < since,
            t.archived | at_rest,
            doc["updated_at"].as_string() < since.strftime("%Y-%m-%dT%H:%M:%S"),  # as its JSON begins
        )
        return [row.id for row in await self._all(query.order_by(t.created_at).limit(limit), slow=True)]

    async def manifests(self) -> dict[str, datetime]:
        doc = sessions.c.doc
        lists = doc["uploads"].as_json(), doc["turn_base"].as_json()
        columns = doc["workspace"].as_string(), *lists, doc["updated_at"].as_string()
        found: dict[str, datetime] = {}
        for workspace, uploads, base, changed in await self._all(sa.select(*columns), slow=True):
            at = datetime.fromisoformat(changed)
            for name in filter(None, (workspace, *(uploads or ()), *(base or ()))):
                found[name] = max(at, found.get(name, at))
        return found

    # -- events

    async def add_events(self, session_id: str, fresh: Sequence[Event]) -> None:
        self._unwritten += [{"session_id": session_id, **vars(event)} for event in fresh]

    async def event(self, session_id: str, event_id: str) -> Event | None:
        await self.flush()
        row = await self._one(statements.ONE_EVENT, key=session_id, event_id=event_id)
        return _event(row) if row else None

    async def known_events(self, session_id: str, ids: Sequence[str]) -> set[str]:
        await self.flush()
        found: set[str] = set()
        for some in batched(ids, MOST_IDS):
            given: dict[str, Any] = {f"id{number}": one for number, one in enumerate(some)}
            query = statements.known_events(len(some))
            found |= {row.id for row in await self._all(query, key=session_id, **given)}
        return found

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
        await self.flush()
        t = events.c
        if not types and after is not None and order == "asc" and created == TimeRange():
            rows = await self._all(statements.NEXT_EVENTS, key=session_id, after=after, most=limit)
            return [_event(row) for row in rows]
        query = sa.select(*statements.EVENT).where(
            t.session_id == session_id, *_bounds(t.created_at, created)
        )
        if types:
            query = query.where(t.type.in_(types))
        if after is not None:
            query = query.where(t.seq > after if order == "asc" else t.seq < after)
        query = query.order_by(t.seq.asc() if order == "asc" else t.seq.desc()).limit(limit)
        return [_event(row) for row in await self._all(query)]

    async def queued(self, session_id: str) -> list[Event]:
        await self.flush()
        return [_event(row) for row in await self._all(statements.QUEUED, key=session_id)]

    async def set_processed(self, session_id: str, event_id: str, at: datetime) -> None:
        await self.flush()
        await self._c.execute(statements.SET_PROCESSED, {"key": session_id, "event_id": event_id, "at": at})

    # -- approvals

    async def approval(self, approval_id: str) -> Approval | None:
        row = await self._one(statements.APPROVAL, key=approval_id)
        return stored(Approval, row) if row else None

    async def approval_of_call(self, session_id: str, call_id: str) -> Approval | None:
        given = {"key": session_id, "call_id": call_id}
        row = await self._one(statements.APPROVAL_OF_EVENT, **given) or await self._one(
            statements.APPROVAL_OF_CALL, **given
        )
        return stored(Approval, row) if row else None

    async def put_approval(self, approval: Approval) -> None:
        self.changed_approvals.append(approval)
        row = {
            name: getattr(approval, name)
            for name in (
                "id",
                "session_id",
                "workspace_id",
                "event_id",
                "call_id",
                "created_at",
                "expires_at",
            )
        }
        row |= {"state": approval.state.value, "severity": SEVERITIES.index(approval.severity)}
        await self._upsert(approvals, {**row, "doc": document(approval)})

    async def open_approvals(self, session_id: str) -> list[Approval]:
        return [stored(Approval, row) for row in await self._all(statements.OPEN_APPROVALS, key=session_id)]

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
        t = approvals.c
        key, state = t.workspace_id, t.state
        query = sa.select(t.doc)
        if session_id is not None:
            query = query.where(t.session_id == session_id)
            # SQLite would look for its few rows among all that wait, for those are in order: no index has expressions.
            key, state = key + "", state + ""
        query = query.where(*of_workspace(key, workspace_id))
        if states:
            query = query.where(state.in_([s.value for s in states]))
        if severity is not None:
            query = query.where(t.severity == SEVERITIES.index(severity))
        rows = await self._all(
            paged(query, t.created_at, t.id, after=after, limit=limit, order="asc"), slow=True
        )
        return [stored(Approval, row) for row in rows]

    async def due_approvals(self, now: datetime) -> list[Approval]:
        t = approvals.c
        query = sa.select(t.doc).where(t.state == ApprovalState.PENDING.value, t.expires_at <= now)
        return [stored(Approval, row) for row in await self._all(query)]

    # -- idempotency

    async def remembered_reply(self, scope: str, idempotency_key: str) -> Reply | None:
        # Of two requests with the same key, the second waits for the first one's reply.
        await self.lock(f"{scope} {idempotency_key}")
        row = await self._one(statements.REPLY, key=scope, idempotency_key=idempotency_key)
        return Reply(**row._asdict()) if row else None

    async def remember_reply(
        self, scope: str, idempotency_key: str, reply: Reply, *, session_id: str
    ) -> None:
        row = {"scope": scope, "idempotency_key": idempotency_key, "session_id": session_id, **vars(reply)}
        await self._c.execute(statements.ADD_REPLY, row)

    async def take_reply(self, scope: str, idempotency_key: str) -> Reply | None:
        row = await self._one(statements.REPLY, key=scope, idempotency_key=idempotency_key)
        if row is None:
            return None
        reply = Reply(**row._asdict())
        # Another transaction may have taken it meanwhile, and another one may be in its place.
        same = {"key": scope, "idempotency_key": idempotency_key, "created_at": reply.created_at}
        return reply if (await self._c.execute(statements.DROP_REPLY, same)).rowcount else None

    async def forget_replies(self, now: datetime, unmarked_before: datetime) -> int:
        t, forgotten = replies.c, 0
        for old in (t.expires_at < now, t.expires_at.is_(None) & (t.created_at < unmarked_before)):
            forgotten += (await self._c.execute(sa.delete(replies).where(old))).rowcount
        return forgotten

    # -- transcripts

    async def append_transcript(
        self, key: TranscriptKey, entries: Sequence[Mapping[str, Any]], now: datetime
    ) -> None:
        if not entries:
            return
        written_ms = int(now.timestamp() * 1000)
        rows = [
            {**key, "uuid": entry.get("uuid"), "written_ms": written_ms, "entry": dict(entry)}
            for entry in entries
        ]
        await self._c.execute(statements.ADD_TRANSCRIPT[self._insert], rows)

    async def load_transcript(
        self, key: TranscriptKey, *, after: int, limit: int
    ) -> list[tuple[int, dict[str, Any]]]:
        given: dict[str, Any] = {**key, "after": after, "most": limit}
        rows = await self._all(statements.TRANSCRIPT_PIECE, **given)
        return [(row.id, row.entry) for row in rows]

    async def list_transcripts(self, scope: str, project_key: str) -> list[tuple[TranscriptKey, int]]:
        t = transcripts.c
        query = sa.select(t.session_id, t.subpath, sa.func.max(t.written_ms).label("at"))
        query = query.where(t.scope == scope, t.project_key == project_key).group_by(t.session_id, t.subpath)
        found: list[tuple[TranscriptKey, int]] = []
        for row in await self._all(query):
            key = TranscriptKey(
                scope=scope, project_key=project_key, session_id=row.session_id, subpath=row.subpath
            )
            found.append((key, row.at))
        return found

    async def delete_transcripts(self, key: TranscriptKey) -> None:
        where = _transcript(key)
        await self._c.execute(sa.delete(transcripts).where(*(where if key["subpath"] else where[:-1])))

    # -- the audit log

    async def audit_head(self, workspace_id: str) -> Head:
        query = self._locked(statements.AUDIT_HEAD)
        row = await self._one(query, key=workspace_id)
        if row is None and not self._locking:
            return Head()
        if row is None:  # two that begin a chain at once: the second waits here for the first
            first = {"workspace_id": workspace_id, "seq": 0, "hash": GENESIS}
            await self._c.execute(self._insert(audit_heads).values(first).on_conflict_do_nothing())
            row = await self._one(query, key=workspace_id)
        return Head(row.seq, row.hash)

    async def add_audit_entries(
        self, entries: Sequence[Entry], checkpoints: Sequence[dict[str, Any]]
    ) -> None:
        rows = [
            {
                "workspace_id": entry.workspace_id,
                "seq": entry.seq,
                "created_at": entry.time,
                "action": entry.action,
                "actor_id": entry.actor.id,
                "target": entry.target,
                "doc": entry.wire(),
            }
            for entry in entries
        ]
        await self._c.execute(statements.ADD_ENTRIES, rows)
        last = entries[-1]
        head = {"workspace_id": last.workspace_id, "seq": last.seq, "hash": last.hash}
        await self._upsert(audit_heads, head, key="workspace_id")
        if checkpoints:
            signed = [{"workspace_id": c["workspace_id"], "seq": c["seq"], "doc": c} for c in checkpoints]
            await self._c.execute(sa.insert(audit_checkpoints), signed)

    async def audit_entries(
        self, workspace_id: str, *, after: int | None, limit: int, order: Order, matching: AuditFilter
    ) -> list[Entry]:
        t = audit_entries.c
        query = sa.select(t.doc).where(
            t.workspace_id == workspace_id, *_bounds(t.created_at, matching.created)
        )
        wanted = ((t.action, matching.action), (t.actor_id, matching.actor), (t.target, matching.target))
        query = query.where(*(column == value for column, value in wanted if value is not None))
        if after is not None:
            query = query.where(t.seq > after if order == "asc" else t.seq < after)
        query = query.order_by(t.seq.asc() if order == "asc" else t.seq.desc()).limit(limit)
        return [Entry.model_validate(row.doc) for row in await self._all(query, slow=True)]

    async def audit_checkpoints(self, workspace_id: str, *, after: int, up_to: int) -> list[dict[str, Any]]:
        t = audit_checkpoints.c
        query = sa.select(t.doc).where(t.workspace_id == workspace_id, t.seq > after, t.seq <= up_to)
        return [row.doc for row in await self._all(query.order_by(t.seq))]


def _transcript(key: TranscriptKey) -> list[sa.ColumnElement[bool]]:
    t = transcripts.c
    return [
        t.scope == key["scope"],
        t.project_key == key["project_key"],
        t.session_id == key["session_id"],
        t.subpath == key["subpath"],
    ]


def _event(row: Any) -> Event:
    return Event(**row._asdict())


def _bounds(column: sa.Column[datetime], created: TimeRange) -> list[sa.ColumnElement[bool]]:
    compare = {"gt": operator.gt, "gte": operator.ge, "lt": operator.lt, "lte": operator.le}
    bounds = ((name, getattr(created, name)) for name in compare)
    return [compare[name](column, bound) for name, bound in bounds if bound is not None]
