"""The interface of a database backend: transactions over five collections. core.py has the Store's rules."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

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
from claude_hitl_template.domain.notices import Channel, Delivery, DeliveryState, Notice
from claude_hitl_template.domain.people import Principal, Workspace
from claude_hitl_template.domain.policy.tiers import Severity
from claude_hitl_template.domain.sign_in import BrowserSession, Login
from claude_hitl_template.store.filters import AuditFilter, Order, TimeRange
from claude_hitl_template.store.protocol import TranscriptKey
from claude_hitl_template.store.signals import Note

OPEN = (
    ApprovalState.PENDING,
    ApprovalState.ALLOWED,
    ApprovalState.CLAIMED,
)  # approvals that may still lead to a run


NAME_TAKEN = "another user or service account has this name, or this sign-in; names are unique"


@dataclass(frozen=True)
class Reply:
    """The stored answer to a request with an idempotency key: the request's digest, and the answer as JSON."""

    digest: str
    reply: Any
    created_at: datetime
    expires_at: datetime


class Tx(Protocol):
    """One transaction. Leaving its context normally commits, durably; leaving it by an error undoes everything.

    `drafts` are the entries of the audit log that it will append before it is committed (recording.py), `told` the notices
    that it will add (outbox.py). `changed_approvals` are those that were put, in order.
    """

    drafts: list[Draft]
    told: list[Notice]
    changed_approvals: list[Approval]

    async def add_key(self, key: ApiKey) -> None: ...
    async def find_key(self, secret_hash: str) -> ApiKey | None: ...
    async def key(self, key_id: str) -> ApiKey | None: ...
    async def keys(self) -> list[ApiKey]: ...
    async def put_key(self, key: ApiKey) -> None:
        """Replaces the key with the same id."""
        ...

    async def workspace(self, workspace_id: str) -> Workspace | None: ...
    async def workspaces(self) -> list[Workspace]: ...
    async def put_workspace(self, workspace: Workspace) -> None: ...
    async def principal(self, principal_id: str) -> Principal | None: ...
    async def named_principal(self, *, name: str = "", external_id: str = "") -> Principal | None:
        """By name, or by who it is for the panel or a sign-in provider."""
        ...

    async def principals(self) -> list[Principal]: ...
    async def people(self, principal_ids: Sequence[str]) -> dict[str, Principal]:
        """Those of them that exist, by id. In a writing transaction they do not change until it ends.
        Give the ids in order."""
        ...

    async def policy(self, workspace_id: str) -> StoredPolicy | None:
        """In a writing transaction it does not change until that ends."""
        ...

    async def put_policy(self, stored: StoredPolicy) -> bool:
        """Stores a policy in place of the version before it; False if that is not the stored one."""
        ...

    async def put_principal(self, principal: Principal) -> None:
        """Raises Conflict if another one has its name or its external id."""
        ...

    async def lock(self, name: str) -> None:
        """Keeps writing transactions with the same name apart, until they end."""
        ...

    async def login(self, principal_id: str) -> Login | None: ...
    async def put_login(self, login: Login) -> None: ...
    async def browser_session(self, token_hash: str) -> BrowserSession | None: ...
    async def browser_sessions(self, principal_id: str) -> list[BrowserSession]: ...
    async def put_browser_session(self, session: BrowserSession) -> None: ...
    async def delete_browser_session(self, session_id: str) -> None: ...
    async def forget_browser_sessions(self, now: datetime) -> None:
        """Deletes those whose `expires_at` is past."""
        ...

    async def channel(self, channel_id: str) -> tuple[Channel, str] | None:
        """A channel with its encrypted secrets. In a writing transaction it does not change until that ends."""
        ...

    async def channels(
        self, workspace_ids: Sequence[str] | None, *, principal_id: str | None = None
    ) -> list[Channel]: ...
    async def channels_of(self, channel_ids: Sequence[str]) -> dict[str, tuple[Channel, str]]:
        """Those of them that exist, by id, with their encrypted secrets."""
        ...

    async def put_channel(self, channel: Channel, secret: str) -> None: ...
    async def delete_channel(self, channel_id: str) -> None:
        """With its deliveries."""
        ...

    async def wanted_kinds(self, workspace_id: str) -> set[str]:
        """The kinds of notices that any channel of the workspace, or of a person, gets."""
        ...

    async def add_notices(self, found: Sequence[Notice]) -> None: ...
    async def notices(self, limit: int) -> list[Notice]:
        """The oldest ones that have no deliveries yet."""
        ...

    async def take_notices(self, notice_ids: Sequence[str]) -> list[str]:
        """Deletes them, and returns which of them this transaction deleted."""
        ...

    async def put_delivery(self, delivery: Delivery) -> None: ...
    async def locked_deliveries(self, delivery_ids: Sequence[str]) -> list[Delivery]:
        """Those of them that exist and no other transaction is changing, in order of their ids. None changes until this
        transaction ends."""
        ...

    async def delivery(self, delivery_id: str) -> Delivery | None: ...
    async def due_deliveries(
        self, now: datetime, *, limit: int, of_each: int, busy: Sequence[str]
    ) -> list[str]:
        """Ids of pending deliveries that are due, the first ones `of_each` channel that is not `busy`."""
        ...

    async def next_due(self, busy: Sequence[str]) -> datetime | None:
        """When the first pending delivery of a channel that is not `busy` is due."""
        ...

    async def pending_of_channel(self, channel_id: str, limit: int) -> list[Delivery]: ...
    async def deliveries_of_approval(self, approval_id: str) -> list[Delivery]: ...
    async def deliveries(
        self,
        workspace_id: str | None,
        *,
        after: tuple[datetime, str] | None,
        limit: int,
        channel_id: str | None,
        session_id: str | None,
        states: Sequence[DeliveryState],
    ) -> list[Delivery]:
        """The newest first."""
        ...

    async def forget_deliveries(self, before: datetime) -> int:
        """Deletes those from before that are not pending; returns their number."""
        ...

    async def note_reader(self, principal_id: str, at: datetime) -> None: ...
    async def readers(self, principal_ids: Sequence[str], since: datetime) -> set[str]:
        """Which of these people had the inbox open since."""
        ...

    async def session(self, session_id: str) -> Session | None: ...
    async def put_session(self, session: Session) -> None: ...
    async def delete_session(self, session_id: str) -> None:
        """With its events, approvals, transcripts and replies; of decisions a `KeptDecision` each stays."""
        ...

    async def kept_decisions(
        self, *, after: tuple[datetime, str] | None, limit: int
    ) -> list[KeptDecision]: ...

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
    ) -> list[Session]: ...
    async def supervised(self) -> list[Supervised]: ...
    async def existing_sessions(self, session_ids: Sequence[str]) -> list[str]: ...
    async def manifests(self) -> dict[str, datetime]:
        """The manifests that sessions name, now and as their last turn began, and when such a session last changed."""
        ...

    async def unchanged_sessions(self, since: datetime, limit: int) -> list[str]:
        """Ids of sessions, the oldest first, that are archived, idle at a turn's end, or never ran, and were not changed
        `since`."""
        ...

    async def add_events(self, session_id: str, fresh: Sequence[Event]) -> None: ...
    async def event(self, session_id: str, event_id: str) -> Event | None: ...
    async def known_events(self, session_id: str, ids: Sequence[str]) -> set[str]: ...
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
        """With order "desc", `after` means below it."""
        ...

    async def queued(self, session_id: str) -> list[Event]: ...
    async def set_processed(self, session_id: str, event_id: str, at: datetime) -> None: ...

    async def approval(self, approval_id: str) -> Approval | None: ...
    async def approval_of_call(self, session_id: str, call_id: str) -> Approval | None:
        """By event id or current call id."""
        ...

    async def put_approval(self, approval: Approval) -> None: ...
    async def open_approvals(self, session_id: str) -> list[Approval]:
        """Pending, allowed or claimed ones, oldest first."""
        ...

    async def approvals(
        self,
        workspace_id: str | None,
        *,
        after: tuple[datetime, str] | None,
        limit: int,
        states: Sequence[ApprovalState],
        session_id: str | None,
        severity: Severity | None = None,
    ) -> list[Approval]: ...
    async def due_approvals(self, now: datetime) -> list[Approval]: ...

    async def remembered_reply(self, scope: str, idempotency_key: str) -> Reply | None:
        """Returns the answer to an earlier request with this key."""
        ...

    async def remember_reply(
        self, scope: str, idempotency_key: str, reply: Reply, *, session_id: str
    ) -> None:
        """Stores an answer. It is deleted with its session, at the latest."""
        ...

    async def take_reply(self, scope: str, idempotency_key: str) -> Reply | None:
        """Removes the answer, and returns it to one transaction alone."""
        ...

    async def forget_replies(self, now: datetime, unmarked_before: datetime) -> int:
        """Deletes replies that expired before `now`, and those of an earlier version, which have no end, from before
        `unmarked_before`. Returns their number."""
        ...

    async def append_transcript(
        self, key: TranscriptKey, entries: Sequence[Mapping[str, Any]], now: datetime
    ) -> None: ...
    async def load_transcript(
        self, key: TranscriptKey, *, after: int, limit: int
    ) -> list[tuple[int, dict[str, Any]]]:
        """Entries in order, each with its place, behind the place `after`; 0 for the beginning."""
        ...

    async def list_transcripts(self, scope: str, project_key: str) -> list[tuple[TranscriptKey, int]]: ...
    async def delete_transcripts(self, key: TranscriptKey) -> None: ...

    async def audit_head(self, workspace_id: str) -> Head:
        """The end of a workspace's chain. A writing transaction that asks for it is the only one until it ends."""
        ...

    async def add_audit_entries(
        self, entries: Sequence[Entry], checkpoints: Sequence[dict[str, Any]]
    ) -> None:
        """Appends entries of one workspace, after `audit_head`, with the signed checkpoints among them."""
        ...

    async def audit_entries(
        self, workspace_id: str, *, after: int | None, limit: int, order: Order, matching: AuditFilter
    ) -> list[Entry]:
        """With order "desc", `after` means below it."""
        ...

    async def audit_checkpoints(self, workspace_id: str, *, after: int, up_to: int) -> list[dict[str, Any]]:
        """Those of entries with `after` < seq <= `up_to`, in order."""
        ...


class Notifier(Protocol):
    """The other ledgers on the same database. `deliver(mark, own, notes)` is set by the Store; see notifications.py."""

    deliver: Callable[[int, bool, Sequence[Note]], None]
    connected: bool

    def post(self, note: Note) -> None: ...


class Backend(Protocol):
    @property
    def relay(self) -> Notifier | None:
        """None if no other process uses the database."""
        ...

    def begin(self, *, write: bool) -> AbstractAsyncContextManager[Tx]:
        """Writing transactions on the same session or idempotency key are serialised.

        A writing transaction first reads the session it changes. Reading ones see a consistent state.
        Raises Unavailable; StoreUnreachable when it is not known whether a write was kept.
        """
        ...
