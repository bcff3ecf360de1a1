"""Entries of the audit log, committed in the transaction of what they record.

`record` only notes what an entry will say. `append` gives all entries of a transaction their places at its end, when every
other lock is held: the locks of chains are the last ones taken, in one order, so that no two transactions wait for each
other.
"""

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from pydantic import BaseModel

from claude_hitl_template.domain.audit import SERVICE_CHAIN, Draft, Entry, Head, seal
from claude_hitl_template.domain.audit.checkpoints import EVERY, checkpoint
from claude_hitl_template.domain.audit.signing import Signer
from claude_hitl_template.domain.canonical_json import digest
from claude_hitl_template.domain.models import ApiKey, Approval, StoredPolicy
from claude_hitl_template.domain.people import EVERYWHERE, Actor, Principal, Workspace
from claude_hitl_template.store.backend import Tx

TOOL_NAME_CHARS = 200  # the model chooses it


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
    A call that such a rule allows later has the same digest as its `rule`. `asked_by` are the workspace's rules that asked,
    `votes` the people who allowed it so far, where it takes several.
    """
    details: dict[str, Any] = {
        "session_id": approval.session_id,
        "event_id": approval.event_id,
        "kind": approval.kind,
        "tool_name": approval.tool_name[:TOOL_NAME_CHARS],
        "digest": approval.digest,
        "asked_at": approval.created_at.isoformat(),
        **more,
    }
    if approval.requirements:
        shown = {"rule", "severity", "quorum", "approvers", "exclude_requester"}
        details["asked_by"] = [one.model_dump(mode="json", include=shown) for one in approval.requirements]
        details["votes"] = [
            {
                "id": vote.principal_id,
                "name": vote.name,
                "at": vote.at.isoformat(),
                "run_digest": vote.run_digest,
            }
            for vote in approval.votes
        ]
    decision = approval.decision
    if decision is not None:
        details |= {
            "result": decision.result,
            "run_digest": approval.run_digest,
            "edited": decision.updated_input is not None,
            "remembered": None if decision.remember is None else digest(str(decision.remember)),
        }
    record(tx, approval.workspace_id, action, actor, approval.id, details=details, now=now)


async def record_key(tx: Tx, action: str, key: ApiKey, actor: Actor, now: datetime, **more: Any) -> None:
    """Records what happened to an API key, in each workspace of its principal."""
    principal = None if key.principal_id is None else await tx.principal(key.principal_id)
    details: dict[str, Any] = {
        "name": key.name,
        "prefix": key.prefix,
        "principal_id": key.principal_id,
        "scopes": key.scopes,
        "expires_at": key.expires_at.isoformat() if key.expires_at else None,
        **more,
    }
    for workspace_id in _chains(principal):
        record(tx, workspace_id, action, actor, key.id, details=details, now=now)


def record_workspace(tx: Tx, before: Workspace | None, after: Workspace, actor: Actor, now: datetime) -> None:
    """Records a workspace that was created or changed, with what it was and is now."""
    action = "workspace.created" if before is None else "workspace.changed"
    details = _differences(before, after, ("name", "default", "separation_of_duties"))
    record(tx, after.id, action, actor, after.id, details=details, now=now)


def record_policy(tx: Tx, before: StoredPolicy, after: StoredPolicy, actor: Actor, now: datetime) -> None:
    """Records a change of a workspace's rules, with those that were added and removed."""
    old = [rule.model_dump(mode="json") for rule in before.policy.rules]
    new = [rule.model_dump(mode="json") for rule in after.policy.rules]
    details = {
        "version": after.version,
        "added": [rule for rule in new if rule not in old],
        "removed": [rule for rule in old if rule not in new],
        "default": after.policy.default,
    }
    record(tx, after.workspace_id, "policy.changed", actor, after.workspace_id, details=details, now=now)


def record_principal(tx: Tx, before: Principal | None, after: Principal, actor: Actor, now: datetime) -> None:
    """Records a principal that was created or changed, and its roles in the log of each workspace where they changed.

    Of an e-mail address and of the id at a sign-in provider only that they changed.
    """
    details = _differences(before, after, ("kind", "name", "groups"))
    details |= {name: "changed" for name in ("email", "external_id") if _differs(before, after, name)}
    if before is None:
        action = "principal.created"
    elif (before.disabled_at is None) != (after.disabled_at is None):
        action = "principal.enabled" if after.disabled_at is None else "principal.disabled"
    else:
        action = "principal.changed"
    if details or action != "principal.changed":
        for workspace_id in _chains(after):
            record(tx, workspace_id, action, actor, after.id, details=details, now=now)
    former = before.roles if before is not None else {}
    for workspace_id in sorted({*former, *after.roles}):
        roles = {"before": former.get(workspace_id, ()), "after": after.roles.get(workspace_id, ())}
        if roles["before"] != roles["after"]:
            chain = SERVICE_CHAIN if workspace_id == EVERYWHERE else workspace_id
            details = {"name": after.name, **roles}
            record(tx, chain, "role.changed", actor, after.id, details=details, now=now)


def record_sign_in(
    tx: Tx, action: str, principal: Principal, actor: Actor, *, target: str, now: datetime, **details: Any
) -> None:
    """Records a sign-in, a failed one, or the end of browsers' sessions, in each workspace of the user."""
    for workspace_id in _chains(principal):
        record(tx, workspace_id, action, actor, target, details=details, now=now)


def _chains(principal: Principal | None) -> tuple[str, ...]:
    """Where what concerns a principal is recorded: in its workspaces, without any in the log of the service."""
    return (principal.workspace_ids if principal is not None else ()) or (SERVICE_CHAIN,)


def _differs(before: BaseModel | None, after: BaseModel, name: str) -> bool:
    return getattr(before, name, None) != getattr(after, name)


def _differences(before: BaseModel | None, after: BaseModel, names: Iterable[str]) -> dict[str, Any]:
    return {
        name: {"before": getattr(before, name, None), "after": getattr(after, name)}
        for name in names
        if _differs(before, after, name)
    }


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
