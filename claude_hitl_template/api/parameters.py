"""Types of path, query and header parameters. Each is strict: `1_0`, `True` or `1700000000` are not what they seem."""

import re
from datetime import UTC, datetime
from typing import Annotated, Literal

from fastapi import Depends, Header, Path, Query
from pydantic import AfterValidator, BeforeValidator, Field, StringConstraints, WithJsonSchema
from pydantic.json_schema import SkipJsonSchema

from claude_hitl_template.domain.events import EVENT_TYPES, FOREIGN_TYPES
from claude_hitl_template.domain.models import ApprovalState, SessionStatus
from claude_hitl_template.store.filters import TimeRange

MAX_KEY_CHARS = 255
_MAX_DIGITS = 9  # more than any limit needs, and always quick to parse
_RFC_3339 = re.compile(r"\d{4}-\d\d-\d\d[Tt]\d\d:\d\d:\d\d(\.\d{1,9})?([Zz]|[+-]\d\d:\d\d)", re.ASCII)
_TYPES = EVENT_TYPES | FOREIGN_TYPES


def _digits(given: str) -> int:
    if not (given.isascii() and given.isdecimal() and len(given) <= _MAX_DIGITS):
        raise ValueError("a whole number is needed")
    return int(given)


def _flag(given: str) -> bool:
    if given not in ("true", "false"):
        raise ValueError("true or false")
    return given == "true"


def _rfc_3339(given: object) -> str:
    """Pydantic alone would take numbers for seconds since 1970, too."""
    if not (isinstance(given, str) and _RFC_3339.fullmatch(given)):
        raise ValueError("a time with its zone, as in 2026-01-31T12:00:00Z")
    return given.upper()


def _in_utc(at: datetime) -> datetime:
    try:
        return at.astimezone(UTC)
    except OverflowError as error:
        raise ValueError("is before the year 1 or after the year 9999") from error


def _event_type(given: str) -> str:
    if given not in _TYPES:
        raise ValueError(f"{given!r} is not an event type")
    return given


Omitted = SkipJsonSchema[None]  # what an optional parameter is when it is not sent; it cannot be sent as null
NonEmpty = Annotated[str, StringConstraints(min_length=1)]
Flag = Annotated[bool, BeforeValidator(_flag)]
Timestamp = Annotated[datetime, AfterValidator(_in_utc), BeforeValidator(_rfc_3339)]
EventType = Annotated[
    str, AfterValidator(_event_type), WithJsonSchema({"type": "string", "enum": sorted(_TYPES)})
]
PreviewType = Literal["agent.message", "agent.thinking"]

SessionId = Annotated[str, Path(description="The id of a session of the workspace.")]
ApprovalId = Annotated[str, Path(description="The id of an approval of the workspace.")]

Limit = Annotated[
    Annotated[int, Field(ge=1, le=1000), BeforeValidator(_digits)], Query(description="Size of the page.")
]
PageToken = Annotated[
    NonEmpty | Omitted,
    Query(description="`next_page` of the previous response to the same request: same filters, same order."),
]
Seq = Annotated[
    Annotated[int, Field(ge=1), BeforeValidator(_digits)],
    Query(description="The number of the first entry that is exported."),
]
Order = Annotated[Literal["asc", "desc"], Query(description="By creation: oldest or newest first.")]
Version = Annotated[
    Annotated[int, Field(ge=1), BeforeValidator(_digits)] | Omitted,
    Query(description="A version of the agent; the newest if omitted."),
]
Statuses = Annotated[
    list[SessionStatus] | Omitted,
    Query(alias="statuses[]", description="Only sessions with one of these statuses."),
]
States = Annotated[
    list[ApprovalState] | Omitted,
    Query(alias="states[]", description="Only approvals in one of these states."),
]
EventTypes = Annotated[
    list[EventType] | Omitted, Query(alias="types[]", description="Only events of one of these types.")
]
Previews = Annotated[
    list[PreviewType] | Omitted,
    Query(alias="event_deltas[]", description="Types of events to preview while the model writes them."),
]
IdempotencyKey = Annotated[
    Annotated[str, StringConstraints(min_length=1, max_length=MAX_KEY_CHARS)] | Omitted,
    Header(
        alias="Idempotency-Key",
        description="The same request with the same key again has no further effect, and the same response.",
    ),
]
LastEventId = Annotated[
    Annotated[int, Field(ge=0), BeforeValidator(_digits)] | Omitted,
    Header(
        alias="Last-Event-ID",
        description="The `id` of the last event that arrived; the stream continues after it. 0 starts at the beginning.",
    ),
]


async def _created(
    gt: Annotated[Timestamp | Omitted, Query(alias="created_at[gt]", description="Created after.")] = None,
    gte: Annotated[
        Timestamp | Omitted, Query(alias="created_at[gte]", description="Created at or after.")
    ] = None,
    lt: Annotated[Timestamp | Omitted, Query(alias="created_at[lt]", description="Created before.")] = None,
    lte: Annotated[
        Timestamp | Omitted, Query(alias="created_at[lte]", description="Created at or before.")
    ] = None,
) -> TimeRange:
    given = {"gt": gt, "gte": gte, "lt": lt, "lte": lte}
    return TimeRange(**{bound: at for bound, at in given.items() if at is not None})


CreatedAt = Annotated[TimeRange, Depends(_created)]
