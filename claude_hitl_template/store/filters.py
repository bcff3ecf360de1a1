"""What a listing is limited to."""

from datetime import datetime
from typing import Literal

from claude_hitl_template.domain.models import Frozen

type Order = Literal["asc", "desc"]


class TimeRange(Frozen):
    """Bounds on a creation time; the names are the wire protocol's."""

    gt: datetime | None = None
    gte: datetime | None = None
    lt: datetime | None = None
    lte: datetime | None = None


class AuditFilter(Frozen):
    """Which entries of an audit log are listed: `action` exactly, `actor` by a principal's id, `target` by its id."""

    action: str | None = None
    actor: str | None = None
    target: str | None = None
    created: TimeRange = TimeRange()


EVERY_ENTRY = AuditFilter()
