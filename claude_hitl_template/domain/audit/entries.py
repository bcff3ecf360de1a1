"""Entries of the audit log. Each has the hash of the one before, so that none can change, go or come unseen."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import Field

from claude_hitl_template.domain.audit.canonical import canonical, plain
from claude_hitl_template.domain.models import Frozen
from claude_hitl_template.domain.people import Actor

GENESIS = "0" * 64  # `previous` of a chain's first entry
SERVICE_CHAIN = "service"  # the `workspace_id` of entries that concern no single workspace


class EntryActor(Frozen):
    """Who did it. `id` is a principal's, None for the service itself, a rule, or before principals were kept; `key_id` the
    API key that the request came with, if it was one."""

    id: str | None
    name: str
    key_id: str | None


class Entry(Frozen):
    """One entry of a workspace's chain. `seq` counts from 1 without gaps.

    `target` is the id of what `action` changed. `details` has neither secrets nor the inputs of calls: their digests are
    enough. `hash` is the SHA-256 of the RFC 8785 JSON of all other fields, so that a further field would change the hashes
    of earlier entries: what an action needs goes into `details`.
    """

    type: Literal["audit_entry"] = "audit_entry"
    workspace_id: str
    seq: int = Field(ge=1)
    time: datetime
    actor: EntryActor
    action: str = Field(pattern=r"^[a-z_]+(\.[a-z_]+)*$")
    target: str
    details: dict[str, Any]
    previous: str
    hash: str

    def wire(self) -> dict[str, Any]:
        """The entry as it is hashed, stored and exported."""
        return self.model_dump(mode="json")


@dataclass(frozen=True)
class Draft:
    """What an entry will say, before its place in the chain is known."""

    workspace_id: str
    action: str
    actor: Actor
    target: str
    details: Mapping[str, Any]
    time: datetime


@dataclass(frozen=True)
class Head:
    """The last entry of a chain; the initial values are those of an empty one."""

    seq: int = 0
    hash: str = GENESIS


def seal(draft: Draft, head: Head) -> Entry:
    """The entry that follows `head`. Raises TypeError for details that are not JSON, or have fractions."""
    actor = draft.actor
    unhashed = Entry(
        workspace_id=draft.workspace_id,
        seq=head.seq + 1,
        time=draft.time.astimezone(UTC),
        actor=EntryActor(id=actor.principal_id, name=plain(actor.name), key_id=actor.key_id),
        action=draft.action,
        target=plain(draft.target),
        details=plain(draft.details),
        previous=head.hash,
        hash="",
    )
    return unhashed.but(hash=hash_of(unhashed.wire()))


def hash_of(entry: Mapping[str, Any]) -> str:
    """SHA-256 (64 hex digits) of the RFC 8785 JSON of an entry's wire form without `hash`."""
    rest = {name: value for name, value in entry.items() if name != "hash"}
    return hashlib.sha256(canonical(rest)).hexdigest()
