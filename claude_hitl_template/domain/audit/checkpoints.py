"""Signed statements about a chain: the service vouches for its content up to an entry."""

from datetime import UTC, datetime
from typing import Any

from claude_hitl_template.domain.audit.entries import Entry, Head
from claude_hitl_template.domain.audit.signing import Signer

EVERY = 100  # entries from one checkpoint to the next
CHECKPOINT, EXPORT_END = "audit_checkpoint", "audit_export_end"


def checkpoint(signer: Signer, workspace_id: str, head: Head, at: datetime) -> dict[str, Any]:
    """States that the workspace's entry `head.seq` had this hash at that time."""
    return signer.sign({
        "type": CHECKPOINT, "workspace_id": workspace_id, "seq": head.seq, "hash": head.hash, "time": _shown(at),
    })  # fmt: skip


def export_end(signer: Signer, first: Entry, last: Entry, at: datetime) -> dict[str, Any]:
    """The last line of an export: from which entry to which it goes, so that a cut at either end is found."""
    return signer.sign({
        "type": EXPORT_END, "workspace_id": last.workspace_id, "from_seq": first.seq, "previous": first.previous,
        "seq": last.seq, "hash": last.hash, "time": _shown(at), "public_key": signer.jwk,
    })  # fmt: skip


def _shown(at: datetime) -> str:
    return at.astimezone(UTC).isoformat().replace("+00:00", "Z")
