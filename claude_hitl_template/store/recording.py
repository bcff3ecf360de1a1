"""Entries of the audit log, committed in the transaction of what they record.

`record` only notes what an entry will say. `append` gives all entries of a transaction their places at its end, when every
other lock is held: the locks of chains are the last ones taken, in one order, so that no two transactions wait for each
other.
"""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from claude_hitl_template.domain.audit import Draft, Entry, Head, seal
from claude_hitl_template.domain.audit.checkpoints import EVERY, checkpoint
from claude_hitl_template.domain.audit.signing import Signer
from claude_hitl_template.domain.canonical_json import digest
from claude_hitl_template.domain.models import Approval
from claude_hitl_template.domain.people import Actor
from claude_hitl_template.store.backend import Tx


def record(
    tx: Tx,
    workspace_id: str,
    action: str,
    actor: Actor,
    target: str,
    *,
    details: Mapping[str, Any],
    now: datetime,
) -> None:
    """Adds an entry to the workspace's chain when the transaction is committed.

    Args:
        tx: A writing transaction of `StoreBase._writing`.
        workspace_id: The chain; SERVICE_CHAIN for what concerns no single workspace.
        action: A noun, a point and what was done to it, such as `key.revoked`.
        actor: Who did it.
        target: The id of what was changed.
        details: JSON without fractions, and without secrets, texts of users or inputs of calls.
        now: The time of the Store's clock.
    """
    tx.drafts.append(Draft(workspace_id, action, actor, target, details, now))


def record_approval(
    tx: Tx, action: str, approval: Approval, actor: Actor, now: datetime, **more: Any
) -> None:
    """Records what happened to an approval: its session and call, by digest, and the decision if there is one.

    `remembered` is the digest of the rule that the decision adds to the session; the rule itself shows a part of the input.
    A call that such a rule allows later has the same digest as its `rule`.
    """
    details: dict[str, Any] = {
        "session_id": approval.session_id,
        "event_id": approval.event_id,
        "kind": approval.kind,
        "tool_name": approval.tool_name,
        "digest": approval.digest,
        "asked_at": approval.created_at.isoformat(),
        **more,
    }
    decision = approval.decision
    if decision is not None:
        details |= {
            "result": decision.result,
            "run_digest": approval.run_digest,
            "edited": decision.updated_input is not None,
            "remembered": None if decision.remember is None else digest(str(decision.remember)),
        }
    record(tx, approval.key_id, action, actor, approval.id, details=details, now=now)


async def append(tx: Tx, signer: Signer) -> None:
    """Appends what the transaction recorded, with a signed checkpoint after each EVERY entries of a chain."""
    drafts = sorted(tx.drafts, key=lambda draft: draft.workspace_id)  # stable: in each chain as recorded
    tx.drafts.clear()
    while drafts:
        workspace_id = drafts[0].workspace_id
        head = await tx.audit_head(workspace_id)
        entries, checkpoints = list[Entry](), list[dict[str, Any]]()
        while drafts and drafts[0].workspace_id == workspace_id:
            entry = seal(drafts.pop(0), head)
            head = Head(entry.seq, entry.hash)
            entries.append(entry)
            if entry.seq % EVERY == 0:
                checkpoints.append(checkpoint(signer, workspace_id, head, entry.time))
        await tx.add_audit_entries(entries, checkpoints)
