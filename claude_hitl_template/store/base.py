"""Shared base of the Store's rules: transactions, time, notifications and cursors."""

import asyncio
import base64
import binascii
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

from claude_hitl_template import fault_points
from claude_hitl_template.domain.audit.signing import Signer
from claude_hitl_template.domain.models import Approval, Event, Session
from claude_hitl_template.errors import InvalidInput, StoreUnreachable
from claude_hitl_template.files.blob_store import FileArea
from claude_hitl_template.store.backend import Backend, Tx
from claude_hitl_template.store.outbox import post
from claude_hitl_template.store.recording import append
from claude_hitl_template.store.sealing import Sealer
from claude_hitl_template.store.session_aggregate import SessionAggregate
from claude_hitl_template.store.signals import Note, Previews, RecentChanges, RecentEvents, Signals

SUPERVISED = "supervised"
APPROVALS = "approvals"
NOTICES = "notices"
_LOGS, _WAKES = "log:", "wake:"


def log_topic(session_id: str) -> str:
    return f"{_LOGS}{session_id}"


def preview_topic(session_id: str) -> str:
    return f"preview:{session_id}"


def wake_topic(session_id: str) -> str:
    return f"{_WAKES}{session_id}"


@dataclass(frozen=True)
class AskLimits:
    """How many calls of a session may wait for a human: within a minute, and between two messages of a user."""

    per_minute: int
    per_session: int


class StoreBase:
    def __init__(
        self,
        backend: Backend,
        files: FileArea,
        clock: Callable[[], datetime],
        signer: Signer,
        *,
        limits: AskLimits | None,
        sealer: Sealer,
    ) -> None:
        self._backend, self._files, self._clock, self._signer = backend, files, clock, signer
        self._limits, self._sealer = limits, sealer
        self._signals = Signals()
        self._previews = Previews()
        self._recent = RecentEvents()
        self._approvals = RecentChanges()
        self._contents: dict[str, frozenset[str]] = {}  # what manifests name, the one used last at the end
        # The epoch of a lease and the session's revision, as far as they were looked up.
        self._drivers: dict[str, tuple[int, int]] = {}
        self._mark = 0  # of the last message to all ledgers in which `supervised()` changed; 0: not known
        if backend.relay is not None:
            backend.relay.deliver = self._deliver

    @asynccontextmanager
    async def _changing(
        self, session_id: str, point: str, *, epoch: int | None = None, workspace_id: str | None = None
    ) -> AsyncGenerator[SessionAggregate]:
        """A session loaded for change, saved at the end, and its waiters woken once that is durable.

        `point` names the write in fault_points.py.
        """
        before = after = None
        appended: Sequence[Event] = ()
        try:
            async with self._writing(point) as tx:
                now = self._clock()
                if epoch is None:
                    unit = await SessionAggregate.load(tx, session_id, now, workspace_id=workspace_id)
                else:
                    unit = await SessionAggregate.load_owned(tx, session_id, epoch, now)
                before = unit.session
                yield unit
                appended = unit.appended
                after = await unit.save()
        except (StoreUnreachable, asyncio.CancelledError):
            # The write may have been kept; a repeated one would change and announce nothing.
            if before and after:
                self._forget(after.id)
                self._announce(before, after)
            raise
        self._announce(before, after, appended)

    @asynccontextmanager
    async def _writing(self, point: str) -> AsyncGenerator[Tx]:
        changed: list[Approval] = []
        told = False
        try:
            async with self._backend.begin(write=True) as tx:
                changed = tx.changed_approvals
                yield tx
                told = await post(tx)
                await append(tx, self._signer)
                await fault_points.reach(f"{point}.before_commit")
        except (StoreUnreachable, asyncio.CancelledError):
            if changed:  # whether they were kept is not known
                self._approvals.forget()
                self._signals.notify(APPROVALS)
            if told:
                self._notify(NOTICES)
            raise
        await fault_points.reach(f"{point}.after_commit")
        self._announce_approvals(changed)
        if told:
            self._notify(NOTICES)

    async def _check_driver(self, session_id: str, epoch: int) -> None:
        """Raises StaleOwner unless `epoch` is the session's present lease; another ledger's change may be missed for as
        long as its message takes."""
        await self._known_revision(session_id, epoch)

    async def _known_revision(self, session_id: str, epoch: int) -> int:
        """The session's revision, which is at least that of its last change at this ledger. Raises as `_check_driver`."""
        known = self._drivers.get(session_id)
        if known is None or known[0] != epoch:
            self._drivers[session_id] = epoch, -1  # so that what is announced meanwhile is not lost
            try:
                async with self._reading() as tx:
                    unit = await SessionAggregate.load_owned(tx, session_id, epoch, self._clock())
            except BaseException:
                self._drivers.pop(session_id, None)
                raise
            self._note_driver(unit.session)
            known = epoch, unit.session.revision
        return known[1]

    def _note_driver(self, session: Session) -> None:
        """Changes may be announced in another order than they were made: the latest counts."""
        known, lease = self._drivers.get(session.id), session.lease
        if lease is None:
            self._drivers.pop(session.id, None)
        elif known is not None:
            self._drivers[session.id] = max(known, (lease.epoch, session.revision))

    def _forget(self, session_id: str) -> None:
        """What this ledger knows of a session may not be what is stored."""
        self._drivers.pop(session_id, None)
        self._recent.forget(session_id)

    def _announce(self, before: Session | None, after: Session, appended: Sequence[Event] = ()) -> None:
        """`appended`: the events between the two."""
        self._note_driver(after)
        self._recent.add(after.id, appended)
        if after.lease is None:
            self._previews.forget(after.id)
            if before is None or before.lease is not None:
                self._post(["forget", after.id])
        if before is None or after.next_seq != before.next_seq:
            self._notify(log_topic(after.id))
        if before is None or after.revision != before.revision or after.epoch != before.epoch:
            self._notify(wake_topic(after.id))
        owned = after.lease is not None  # then its owner minds the status
        if before is None or after.lease != before.lease or (after.status != before.status and not owned):
            self._notify(SUPERVISED)

    def _announce_approvals(self, changed: Sequence[Approval]) -> None:
        for approval in {approval.id: approval for approval in changed}.values():
            decision = approval.decision
            change = {
                "id": approval.id,
                "workspace_id": approval.workspace_id,
                "session_id": approval.session_id,
                "state": approval.state.value,
                "decided_by": decision.decided_by if decision else None,
                "votes": len(approval.votes),
                "reviewer": approval.reviewer.name if approval.reviewer else None,
            }
            self._post(["approval", self._approvals.add(change), change])
        if changed:
            self._signals.notify(APPROVALS)

    # -- notifications to and from the other ledgers

    def _notify(self, topic: str) -> None:
        relay = self._backend.relay
        if topic != SUPERVISED or relay is None or not relay.connected:
            self._signals.notify(
                topic
            )  # else the supervisor is woken by the message, which has the new version
        self._post(["wake", topic])

    @property
    def _hears_of_all(self) -> bool:
        """Whether this ledger hears of what other ledgers change."""
        return self._backend.relay is None or self._backend.relay.connected

    def _post(self, note: Note) -> None:
        if self._backend.relay is not None:
            self._backend.relay.post(note)

    def _deliver(self, mark: int, own: bool, notes: Sequence[Note]) -> None:
        if not mark:
            self._mark = 0
            self._drivers.clear()
            self._recent.forget_all()
            self._approvals.forget()
            self._signals.wake_all()
        for note in notes:
            match note:
                case ["wake", str(topic)]:
                    if not own:
                        self._forget(topic.removeprefix(_WAKES).removeprefix(_LOGS))
                    self._mark = mark if topic == SUPERVISED else self._mark
                    if not own or topic == SUPERVISED:
                        self._signals.wake(topic)
                case ["preview", str(session_id), int(position), dict(delta)] if not own:
                    self._previews.add(session_id, delta, position)
                    self._signals.wake(preview_topic(session_id))
                case ["forget", str(session_id)] if not own:
                    self._previews.forget(session_id)
                    self._forget(session_id)
                case ["approval", int(position), dict(change)] if not own:
                    self._approvals.add(change, position)
                    self._signals.wake(APPROVALS)
                case _:
                    pass

    def _supervised_version(self, seen: int) -> int:
        """The version for `wait_supervised`, the same at all ledgers. While a ledger does not know it, it returns the
        caller's own, so that the caller waits."""
        return self._signals.version if self._backend.relay is None else self._mark or seen

    @asynccontextmanager
    async def _reading(self) -> AsyncGenerator[Tx]:
        async with self._backend.begin(write=False) as tx:
            yield tx


def encode_cursor(kind: str, *parts: str) -> str:
    return base64.urlsafe_b64encode("\x1f".join((kind, *parts)).encode()).decode().rstrip("=")


def decode_cursor(kind: str, page: str | None, count: int) -> list[str] | None:
    """The parts of a cursor that `encode_cursor` made; None for no cursor. Raises InvalidInput(field="page")."""
    if page is None:
        return None
    try:
        found, *parts = base64.urlsafe_b64decode(page + "=" * (-len(page) % 4)).decode().split("\x1f")
    except (binascii.Error, UnicodeError, ValueError) as error:
        raise InvalidInput("this is not a cursor; use next_page of an earlier answer", "page") from error
    if found != kind or len(parts) != count:
        raise InvalidInput("this cursor belongs to another listing", "page")
    return parts


def decode_time_cursor(kind: str, page: str | None) -> tuple[datetime, str] | None:
    parts = decode_cursor(kind, page, 2)
    if parts is None:
        return None
    try:
        at = datetime.fromisoformat(parts[0])
        if at.tzinfo is None:
            raise InvalidInput("this is not a cursor; use next_page of an earlier answer", "page")
        return at.astimezone(UTC), parts[1]
    except (ValueError, OverflowError) as error:
        raise InvalidInput("this is not a cursor; use next_page of an earlier answer", "page") from error


def decode_seq_cursor(kind: str, page: str | None) -> int | None:
    parts = decode_cursor(kind, page, 1)
    if parts is None:
        return None
    if not parts[0].isdecimal() or len(parts[0]) > 18:
        raise InvalidInput("this is not a cursor; use next_page of an earlier answer", "page")
    return int(parts[0])
