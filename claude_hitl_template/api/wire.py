"""Sessions, environments and approvals as the wire protocol shows them, and the bodies that create and change them."""

from typing import Annotated, Any

from pydantic import Field, StringConstraints

from claude_hitl_template.api.agents import AgentBody, agent_wire, by_id
from claude_hitl_template.api.strict_json import Body
from claude_hitl_template.domain.events import UserMessage, usage_wire
from claude_hitl_template.domain.models import Approval, Environment, ImageFacts, Networking, Session, utcnow

Title = Annotated[str, StringConstraints(max_length=500)]
MetaKey = Annotated[str, StringConstraints(min_length=1, max_length=64)]
MetaValue = Annotated[str, StringConstraints(max_length=512)]


_PACKAGE_MANAGERS = ("apt", "cargo", "gem", "go", "npm", "pip")


class CreateSession(Body):
    agent: Annotated[AgentBody, by_id("agent")]
    environment_id: str
    title: Title | None = None
    metadata: Annotated[dict[MetaKey, MetaValue], Field(max_length=16)] = Field(
        default_factory=dict[str, str]
    )
    initial_events: Annotated[list[UserMessage], Field(max_length=50)] = Field(
        default_factory=list[UserMessage]
    )
    resources: Annotated[list[Any], Field(max_length=0)] = Field(default_factory=list[Any])
    vault_ids: Annotated[list[Any], Field(max_length=0)] = Field(default_factory=list[Any])


class UpdateSession(Body):
    title: Title | None = None
    metadata: dict[MetaKey, MetaValue | None] | None = None


def session_wire(session: Session) -> dict[str, Any]:
    """A BetaManagedAgentsSession with fields of this service: `parked`, `stop_reason`, `waiting_for_room`, `first_words`."""
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
        "usage": usage_wire(session.usage, active),
        "vault_ids": [],
        "deployment_id": None,
    }


def _networking_wire(networking: Networking) -> dict[str, Any]:
    """What is reached unasked. `private_hosts` is ours. Package registries are hosts like others here."""
    if networking.type == "unrestricted":
        return {"type": "unrestricted", "private_hosts": networking.private_hosts}
    return {**networking.model_dump(mode="json"), "allow_package_managers": False}


def environment_wire(
    environment: Environment, facts: ImageFacts | None, *, sandboxed: bool
) -> dict[str, Any]:
    """A BetaEnvironment; `config.type` is cloud: the service runs the tools. In a self_hosted one the client would have to,
    with a worker of its own. Nothing is installed for an environment; not `sandboxed`, it has its host's network.

    Ours beside it: `image` (its reference), `image_digest` (as its registry knows it), `image_facts` (version, commit,
    ray, python) and `dependencies` (the manifest of what is installed); null as far as nothing is known.
    """
    epoch = "2026-01-01T00:00:00+00:00"  # built in: it has no history
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
    """What an approver needs: what would run, where, for whom, and what became of it."""
    shown = approval.model_dump(
        mode="json",
        exclude={
            *(
                "key_id",
                "claim_id",
                "reminded",
                "call_id",
                "model_call_id",
                "claimed_epoch",
                "batch",
                "folder",
            )
        },
    )
    return {"type": "approval", **shown, "batch": list(approval.batch)}
