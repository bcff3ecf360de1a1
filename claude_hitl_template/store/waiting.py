"""The Store's rules for the inbox: calls that wait, in all sessions of some workspaces, and the changes of approvals."""

import heapq
import time
from collections import deque
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from datetime import datetime

from claude_hitl_template.domain.models import Approval, ApprovalState, Page, Session
from claude_hitl_template.domain.notices import ShownCall
from claude_hitl_template.domain.policy.tiers import SEVERITIES, Severity
from claude_hitl_template.errors import InvalidInput, NotFound
from claude_hitl_template.presentation.flags import HIDDEN, Flag, marks
from claude_hitl_template.presentation.text import leads_to, one_line, summary, visible
from claude_hitl_template.store.backend import Tx
from claude_hitl_template.store.base import (
    APPROVALS,
    StoreBase,
    decode_cursor,
    decode_time_cursor,
    encode_cursor,
)
from claude_hitl_template.store.protocol import ApprovalChange, Changes, EarlierDecision, WaitingCall

LOOKED_AT = 1000  # approvals that one search looks at; the next page continues
PIECE = 64  # read at once
EARLIER = 5
TITLE_CHARS = 120

_BY_NAME: Mapping[str, Severity] = {severity: severity for severity in SEVERITIES}
_PENDING = (ApprovalState.PENDING,)
_DECIDED = tuple(state for state in ApprovalState if state is not ApprovalState.PENDING)


class WaitingRules(StoreBase):
    async def list_waiting(
        self,
        workspace_ids: Sequence[str] | None,
        *,
        limit: int,
        page: str | None = None,
        session_id: str | None = None,
        tool_name: str | None = None,
        severity: Severity | None = None,
        text: str = "",
    ) -> Page[WaitingCall]:
        begin = _place(page)
        wanted = tuple(reversed(SEVERITIES)) if severity is None else (severity,)
        found: list[WaitingCall] = []
        looked_at, last = 0, None
        async with self._reading() as tx:
            about = _Sessions(tx, self._clock())
            async for approval in _in_order(tx, workspace_ids, begin, wanted, session_id):
                if len(found) == limit or looked_at == LOOKED_AT:
                    assert last is not None  # noqa: S101  (the loop came here before)
                    cursor = encode_cursor("waiting", last.severity, last.created_at.isoformat(), last.id)
                    return Page(data=found, next_page=cursor)
                looked_at, last = looked_at + 1, approval
                if tool_name is None or approval.tool_name == tool_name:
                    call = await about.call(approval)
                    if call.mentions(text):
                        found.append(call)
        return Page(data=found)

    async def get_waiting(
        self, approval_ids: Sequence[str], workspace_ids: Sequence[str] | None
    ) -> list[WaitingCall]:
        async with self._reading() as tx:
            about = _Sessions(tx, self._clock())
            read = [await tx.approval(approval_id) for approval_id in approval_ids]
            return [
                await about.call(approval)
                for approval in read
                if approval is not None
                and approval.state is ApprovalState.PENDING
                and (workspace_ids is None or approval.workspace_id in workspace_ids)
            ]

    async def list_same_calls(self, approval_id: str, workspace_id: str | None) -> list[EarlierDecision]:
        async with self._reading() as tx:
            shown = await tx.approval(approval_id)
            if shown is None or workspace_id not in (None, shown.workspace_id):
                raise NotFound(f"there is no approval {approval_id!r}")
            same: deque[EarlierDecision] = deque(maxlen=EARLIER)
            after: tuple[datetime, str] | None = None
            while True:
                piece = await tx.approvals(
                    shown.workspace_id, after=after, limit=PIECE, states=_DECIDED, session_id=shown.session_id
                )
                same.extend(_earlier(piece, shown))
                if len(piece) < PIECE:
                    return list(reversed(same))
                after = piece[-1].created_at, piece[-1].id

    async def wait_approvals(self, after: int, *, timeout_s: float) -> Changes:
        deadline = time.monotonic() + timeout_s
        with self._signals.listen(APPROVALS) as listener:
            while True:
                found, position, complete = self._approvals.after(after)
                left = max(deadline - time.monotonic(), 0)
                if found or not complete or not await listener.wait(left):
                    changes = tuple(ApprovalChange.model_validate(change) for change in found)
                    return Changes(changes=changes, position=position, complete=complete)


def _earlier(approvals: Sequence[Approval], shown: Approval) -> Iterator[EarlierDecision]:
    for approval in approvals:
        decision = approval.decision
        if decision is not None and approval.digest == shown.digest and approval.id != shown.id:
            yield EarlierDecision(
                id=approval.id,
                result=decision.result,
                deny_message=decision.deny_message,
                decided_by=decision.decided_by,
                decided_at=decision.decided_at,
            )


class _Sessions:
    """What the inbox says of the sessions of approvals, each read once."""

    def __init__(self, tx: Tx, now: datetime) -> None:
        self._tx, self._now = tx, now
        self._sessions: dict[str, Session | None] = {}
        self._names: dict[str, str] = {}

    async def call(self, approval: Approval) -> WaitingCall:
        if approval.session_id not in self._sessions:
            self._sessions[approval.session_id] = await self._tx.session(approval.session_id)
        session, reviewer = self._sessions[approval.session_id], approval.reviewer
        return WaitingCall(
            id=approval.id,
            workspace_id=approval.workspace_id,
            session_id=approval.session_id,
            title=_title(session),
            requester=await self._requester(session),
            tool_name=approval.tool_name,
            kind=approval.kind,
            effect=summary(approval.input),
            is_whole=is_whole(approval),
            digest=approval.digest,
            severity=approval.severity,
            quorum=approval.quorum,
            votes=len(approval.votes),
            reviewer=reviewer.name if reviewer and reviewer.until > self._now else None,
            assignee=approval.assignee.name if approval.assignee else None,
            by_subagent=approval.agent_id is not None,
            created_at=approval.created_at,
            expires_at=approval.expires_at,
        )

    async def _requester(self, session: Session | None) -> str:
        """The name of who created the session; "" if that is not known."""
        made_by = session.created_by if session else None
        if made_by is None:
            return ""
        if made_by not in self._names:
            principal = await self._tx.principal(made_by)
            self._names[made_by] = principal.name if principal else ""
        return self._names[made_by]


def is_whole(approval: Approval) -> bool:
    """Whether the one line that a list shows of a call says all that it does."""
    if approval.kind not in ("tool", "network"):
        return False
    shown = summary(approval.input)
    if approval.kind == "network":
        return not shown.endswith("…")
    rest = [value for name, value in approval.input.items() if name != "description"]
    return len(rest) == 1 and isinstance(rest[0], str) and visible(rest[0]) == shown


def shown_call(approval: Approval) -> ShownCall:
    """What a channel may show of a call. An input that its line does not show whole is not searched for marks: it may be
    large."""
    whole = is_whole(approval)
    given, folder, targets = approval.input, approval.folder, approval.targets
    flags = marks(approval.tool_name, given, folder=folder, targets=targets).flags if whole else ()
    return ShownCall(
        effect=summary(given),
        is_whole=whole and _runs_as_written(approval, flags),
        digest=approval.digest,
        severity=approval.severity,
        flags=tuple(f"{flag.text}: {flag.detail}" if flag.detail else flag.text for flag in flags),
        quorum=approval.quorum,
        votes=len(approval.votes),
    )


def _runs_as_written(approval: Approval, flags: Sequence[Flag]) -> bool:
    """Whether nothing but the line is needed to know a call: it runs in the workspace's own folder, its path leads to no
    other file, nothing in it is hidden, and no one who agreed to it changed it."""
    return (
        approval.folder in (None, ".")
        and not leads_to(approval.input, approval.targets)
        and not any(flag.text == HIDDEN for flag in flags)
        and not any(vote.updated_input for vote in approval.votes)
    )


def _title(session: Session | None) -> str:
    if session is None:
        return ""
    return one_line(session.title or session.first_words or session.id, TITLE_CHARS)


type _Place = tuple[Severity, tuple[datetime, str]]  # a severity, and where a call of it is


def _place(page: str | None) -> _Place | None:
    """Where a page begins. Raises InvalidInput for a cursor of another listing."""
    parts = decode_cursor("waiting", page, 3)
    if parts is None:
        return None
    severity = _BY_NAME.get(parts[0])
    if severity is None:
        raise InvalidInput("this is not a cursor; use next_page of an earlier answer", "page")
    after = decode_time_cursor("waiting", encode_cursor("waiting", *parts[1:]))
    return (severity, after) if after is not None else None


async def _in_order(
    tx: Tx,
    workspace_ids: Sequence[str] | None,
    begin: _Place | None,
    severities: Sequence[Severity],
    session_id: str | None,
) -> AsyncGenerator[Approval]:
    """Pending approvals of these workspaces behind a place, the most severe first, then the oldest."""
    for severity in severities:
        if begin is not None and SEVERITIES.index(severity) > SEVERITIES.index(begin[0]):
            continue
        after = begin[1] if begin is not None and begin[0] == severity else None
        async for approval in _by_age(tx, workspace_ids, after, severity, session_id):
            yield approval


async def _by_age(
    tx: Tx,
    workspace_ids: Sequence[str] | None,
    after: tuple[datetime, str] | None,
    severity: Severity,
    session_id: str | None,
) -> AsyncGenerator[Approval]:
    """Those of one severity, the oldest first. Reads little more than is taken."""
    sources = [
        _of_workspace(tx, workspace_id, after, severity, session_id)
        for workspace_id in (workspace_ids if workspace_ids is not None else [None])
    ]
    heads: list[tuple[datetime, str, int, Approval]] = []

    async def advance(number: int) -> None:
        async for approval in sources[number]:
            heapq.heappush(heads, (approval.created_at, approval.id, number, approval))
            return

    for number in range(len(sources)):
        await advance(number)
    while heads:
        _, _, number, approval = heapq.heappop(heads)
        yield approval
        await advance(number)


async def _of_workspace(
    tx: Tx,
    workspace_id: str | None,
    after: tuple[datetime, str] | None,
    severity: Severity,
    session_id: str | None,
) -> AsyncGenerator[Approval]:
    while True:
        piece = await tx.approvals(
            workspace_id,
            after=after,
            limit=PIECE,
            states=_PENDING,
            session_id=session_id,
            severity=severity,
        )
        for approval in piece:
            yield approval
        if len(piece) < PIECE:
            return
        after = piece[-1].created_at, piece[-1].id
