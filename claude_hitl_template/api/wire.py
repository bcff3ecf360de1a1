"""Sessions, environments and approvals as the wire protocol shows them."""

from typing import Any

from claude_hitl_template.api.agents import agent_wire
from claude_hitl_template.domain.events import usage_wire
from claude_hitl_template.domain.models import Approval, Environment, ImageFacts, Networking, Session, utcnow

_PACKAGE_MANAGERS = ("apt", "cargo", "gem", "go", "npm", "pip")
_INTERNAL = frozenset({
    "claim_id", "reminded", "call_id", "model_call_id", "claimed_epoch", "batch", "folder", "timeout_at", "segments",
})  # fmt: skip


def session_wire(session: Session) -> dict[str, Any]:
    """A session as a BetaManagedAgentsSession, extended by the fields from `stop_reason` to `created_by`."""
    running = (utcnow() - session.running_since).total_seconds() if session.running_since else 0.0
    active = session.active_seconds + max(running, 0.0)
    ended = session.archived_at or utcnow()
    return {
        "type": "session",
        "id": session.id,
        "agent": agent_wire(session.agent),
        "archived_at": session.archived_at and session.archived_at.isoformat(),
        "budget": None,
        "created_at": session.created_at.isoformat(),
        "updated_at": session.updated_at.isoformat(),
        "environment_id": session.environment.id,
        "metadata": session.metadata,
        "outcome_evaluations": [],
        "resources": [],
        "stats": {
            "active_seconds": round(active, 3),
            "duration_seconds": round((ended - session.created_at).total_seconds(), 3),
        },
        "status": session.status,
        "stop_reason": session.stop_reason,
        "parked": session.parked,
        "waiting_for_room": session.waits_for_room,
        "title": session.title,
        "first_words": session.first_words,
        "workspace_id": session.workspace_id,
        "created_by": session.created_by,
        "usage": usage_wire(session.usage, active),
        "vault_ids": [],
        "deployment_id": None,
    }


def _networking_wire(networking: Networking) -> dict[str, Any]:
    """The hosts that sessions reach without asking. `private_hosts` extends the protocol. Package registries are ordinary
    hosts."""
    if networking.type == "unrestricted":
        return {"type": "unrestricted", "private_hosts": networking.private_hosts}
    return {**networking.model_dump(mode="json"), "allow_package_managers": False}


def environment_wire(
    environment: Environment, facts: ImageFacts | None, *, sandboxed: bool
) -> dict[str, Any]:
    """An environment as a BetaEnvironment.

    `config.type` is cloud because the service runs the tools; in a self_hosted one the client would run a worker.
    Nothing is installed for an environment. If it is not `sandboxed`, it has its host's network.

    `image` (its reference), `image_digest` (as its registry knows it), `image_facts` (version, commit, ray, python) and
    `dependencies` (the manifest of what is installed) extend the protocol; each is null while it is unknown.
    """
    epoch = "2026-01-01T00:00:00+00:00"  # built in, so it has no creation time
    return {
        "type": "environment",
        "id": environment.id,
        "name": environment.name,
        "description": environment.description,
        "config": {
            "type": "cloud",
            "networking": _networking_wire(environment.networking) if sandboxed else {"type": "unrestricted"},
            "packages": {"type": "packages", **{kind: [] for kind in _PACKAGE_MANAGERS}},
        },
        "metadata": {},
        "archived_at": None,
        "created_at": epoch,
        "updated_at": epoch,
        "image": environment.image,
        "image_digest": facts and facts.digest,
        "image_facts": facts
        and facts.model_dump(mode="json", include={"version", "commit", "ray", "python"}),
        "dependencies": facts and facts.manifest,
    }


def approval_wire(approval: Approval) -> dict[str, Any]:
    """An approval as an approver needs it: the call, its folder, its requester, and its outcome."""
    shown = approval.model_dump(mode="json", exclude=set(_INTERNAL), by_alias=False)
    command = str(approval.input.get("command", ""))
    return {
        "type": "approval",
        **shown,
        "batch": list(approval.batch),
        "severity": approval.severity,
        "reason": approval.reason,
        "quorum": approval.quorum,
        "segments": [{"text": one.text(command), **one.model_dump(mode="json")} for one in approval.segments],
    }
