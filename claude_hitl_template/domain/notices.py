"""Notices of what happened to approvals and sessions, the channels that they are sent over, and what came out of it.

A notice has ids and neutral words only: no input of a call, no text of a user or of the model, no secret. What a channel
with the setting `show_input` shows of a call goes with the parcel, and is not stored.
"""

from collections.abc import Mapping
from datetime import datetime, time, timedelta
from typing import Annotated, Any, Literal, get_args
from zoneinfo import ZoneInfo, available_timezones

from pydantic import AfterValidator, Field

from claude_hitl_template.domain.frozen import Frozen
from claude_hitl_template.domain.policy.tiers import SEVERITIES, Severity

ChannelKind = Literal["webhook", "web_push", "slack", "email", "apprise"]
ApprovalNotice = Literal[
    "approval.requested",  # a call waits for a decision
    "approval.voted",  # one of several people allowed it, and more are needed
    "approval.escalated",  # its deadline handed it on to more people
    "approval.delegated",  # it was handed over to a person or a group
    "approval.decided",
    "approval.expired",
    "approval.superseded",  # it stopped waiting without a decision
]
SessionNotice = Literal[
    "session.created",
    "session.status_run_started",
    "session.status_idled",
    "session.requires_action",
    "session.status_rescheduled",
    "session.status_terminated",
    "session.failed",  # retries are exhausted; it rests until the next message
    "session.archived",
    "session.deleted",
]
NoticeKind = Literal[ApprovalNotice, SessionNotice, "test", "digest"]
APPROVAL_KINDS: tuple[ApprovalNotice, ...] = get_args(ApprovalNotice)
SESSION_KINDS: tuple[SessionNotice, ...] = get_args(SessionNotice)
# Sent while the call waits, and no longer: a decision supersedes them.
ASKING: frozenset[NoticeKind] = frozenset({
    "approval.requested", "approval.voted", "approval.escalated", "approval.delegated",
})  # fmt: skip
# What a person or a group gets unless the channel says otherwise.
DEFAULT_KINDS: tuple[NoticeKind, ...] = (
    "approval.requested",
    "approval.voted",
    "approval.escalated",
    "approval.delegated",
    "session.failed",
)


class Notice(Frozen):
    """One thing that happened.

    `title` is one neutral line, such as "Bash waits for approval". `count` is how many notices a digest stands for;
    `result` is of a decision.
    """

    id: str
    kind: NoticeKind
    workspace_id: str
    session_id: str | None = None
    approval_id: str | None = None
    severity: Severity = "medium"
    created_at: datetime
    title: str
    count: int = 1
    result: Literal["allow", "deny"] | None = None


def _clock_time(text: str) -> str:
    time.fromisoformat(text)  # whose ValueError names the text
    return text


def _zone(name: str) -> str:
    if name not in available_timezones():
        raise ValueError("not a time zone; write one as in `Europe/Berlin`")
    return name


class QuietHours(Frozen):
    """Hours of each day in which only critical notices are sent; the others are sent when they end."""

    start: Annotated[str, Field(pattern=r"^\d\d:\d\d$"), AfterValidator(_clock_time)]
    end: Annotated[str, Field(pattern=r"^\d\d:\d\d$"), AfterValidator(_clock_time)]
    time_zone: Annotated[str, AfterValidator(_zone)] = "UTC"

    def end_after(self, now: datetime) -> datetime | None:
        """When the quiet hours that hold at `now` end; None outside of them."""
        local = now.astimezone(ZoneInfo(self.time_zone))
        start, end = time.fromisoformat(self.start), time.fromisoformat(self.end)
        at = local.time().replace(tzinfo=None)
        inside = start <= at < end if start <= end else at >= start or at < end
        if not inside:
            return None
        day = local.date() if at < end else local.date() + timedelta(days=1)
        return datetime.combine(day, end, tzinfo=local.tzinfo).astimezone(now.tzinfo)


class ChannelState(Frozen):
    """How a channel does. `failing_since` is set while sends fail in a row; from FAILING of them on it raises an alarm.

    `gone`: the target said that it takes no more; nothing is sent until the channel is changed.
    """

    last_at: datetime | None = None
    last_error: str | None = None
    failures: int = 0
    failing_since: datetime | None = None
    gone: bool = False

    @property
    def status(self) -> Literal["unused", "active", "failing", "gone"]:
        if self.gone:
            return "gone"
        if self.failures >= FAILING:
            return "failing"
        return "unused" if self.last_at is None else "active"


FAILING = 5  # failed sends in a row
EVERY_WORKSPACE = "*"


class Channel(Frozen):
    """Where notices are sent.

    Attributes:
        workspace_id: Whose notices it gets. EVERY_WORKSPACE for the channel of a person, who gets notices of each workspace
            in which the person may decide.
        principal_id: The person; None for a channel of the workspace, which gets all of its notices.
        settings: What its kind of sender needs, without secrets; it is shown to users.
        kinds: The notices that it gets.
        min_severity: The mildest approvals that it gets notices of.
        digest_s: Seconds for which notices are collected into one; None: each is sent for itself.
        enabled: Nothing is sent, and notices are not kept for it, while it is not.
    """

    id: str
    kind: ChannelKind
    workspace_id: str
    principal_id: str | None = None
    name: Annotated[str, Field(max_length=200)] = ""
    settings: dict[str, Any] = Field(default_factory=dict[str, Any])
    kinds: tuple[NoticeKind, ...] = DEFAULT_KINDS
    min_severity: Severity = "low"
    quiet_hours: QuietHours | None = None
    digest_s: Annotated[int, Field(ge=60, le=24 * 3600)] | None = None
    enabled: bool = True
    created_at: datetime
    state: ChannelState = ChannelState()

    @property
    def label(self) -> str:
        return self.kind if self.principal_id is not None else f"{self.kind} {self.name}".strip()

    def wants(self, notice: Notice) -> bool:
        """Whether its own settings let the notice through; who may decide is another question."""
        if not self.enabled or self.state.gone or notice.kind not in self.kinds:
            return False
        mild = SEVERITIES.index(notice.severity) < SEVERITIES.index(self.min_severity)
        return not (mild and notice.approval_id is not None)


DeliveryState = Literal[
    "pending",  # to be sent, perhaps again
    "sent",
    "refused",  # the target, or our own check of it, refused it for good
    "gone",  # the target no longer exists
    "failed",  # it could not be sent for as long as it was tried
    "no_recipient",  # the workspace has channels, and none of them belongs to a person who may decide
    "superseded",  # the call was decided, or stopped waiting, before it was sent
]


class Delivery(Frozen):
    """One notice on one channel.

    Attributes:
        over: What the channel is called, for people; without the name that a person gave to an own channel.
        attempts: How often a courier began to send it.
        next_at: When it is due; while it is being sent, when another courier may try.
        sending: Whether a courier has it, until `next_at`.
        first_at: When a courier first had it.
        by_hand: A user asked for it, so it is sent at once, and even if the call was decided.
        last_error: Why the last attempt failed, without any content.
        external_ref: What the sender returned for the message that it sent, such as the time stamp of a Slack message.
    """

    id: str
    notice: Notice
    channel_id: str | None
    over: str = ""
    state: DeliveryState = "pending"
    attempts: int = 0
    created_at: datetime
    next_at: datetime
    sending: bool = False
    first_at: datetime | None = None
    by_hand: bool = False
    last_error: str | None = None
    external_ref: dict[str, Any] | None = None
    closed_at: datetime | None = None


class Settled(Frozen):
    """What came out of a send, for the Store. `retry_s`: it is tried again in so many seconds."""

    state: Literal["sent", "retry", "refused", "gone"]
    why: Annotated[str, Field(max_length=500)] = ""
    retry_s: float = 0.0
    external_ref: dict[str, Any] | None = None


class ShownCall(Frozen):
    """A call as the inbox's list has it, for channels that show it.

    Attributes:
        effect: The call on one line, with hidden characters as escapes.
        is_whole: Whether that line says all that the call does, where it runs included.
        digest: The approval's.
        flags: The marks of `presentation.flags`, as text; none for a call whose line is not whole.
        votes: How many people allowed it; at least `quorum` must.
    """

    effect: str
    is_whole: bool
    digest: str
    severity: Severity
    flags: tuple[str, ...] = ()
    quorum: int = 1
    votes: int = 0


class Parcel(Frozen):
    """What a sender needs for one send.

    Attributes:
        delivery_ids: Of the deliveries that it settles; several for a digest.
        attempt: Counts from 1; with it the outcome is recorded.
        secret: The channel's secrets by name.
        external_ref: The reference that the channel's last send about the same approval returned; None if there was none.
        call: The call that the notice asks about, for a channel of Slack whose setting `show_input` is true.
    """

    delivery_ids: tuple[str, ...]
    attempt: int
    notice: Notice
    channel: Channel
    secret: Mapping[str, str] = Field(default_factory=dict[str, str], repr=False)
    external_ref: dict[str, Any] | None = None
    call: ShownCall | None = Field(default=None, repr=False)
