"""Sessions, agents and approvals as the wire protocol shows them, and the bodies that create and change them."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StringConstraints

from claude_hitl_template.api.reading import Body, parse
from claude_hitl_template.errors import NotFound
from claude_hitl_template.events import UserMessage, usage_wire
from claude_hitl_template.models import Agent, Approval, Environment, Session, utcnow
from claude_hitl_template.policy import PermissionPolicy, Rule

Title = Annotated[str, StringConstraints(max_length=500)]
MetaKey = Annotated[str, StringConstraints(min_length=1, max_length=64)]
MetaValue = Annotated[str, StringConstraints(max_length=512)]
ToolName = Literal["bash", "read", "write", "edit", "glob", "grep", "web_fetch", "web_search"]
_CLI_NAMES = {"web_fetch": "WebFetch", "web_search": "WebSearch"}


class PolicyBody(Body):
    type: Literal["always_allow", "always_ask", "always_deny"]


class ToolConfigBody(Body):
    """`enabled` and `permission_policy` left out, or null: as the default_config has them."""

    name: ToolName
    type: str | None = None
    enabled: bool | None = None
    permission_policy: PolicyBody | None = None


class DefaultConfigBody(Body):
    enabled: bool | None = None
    permission_policy: PolicyBody | None = None


class ToolsetBody(Body):
    type: Literal["agent_toolset_20260401"]
    configs: list[ToolConfigBody] = Field(default_factory=list[ToolConfigBody], max_length=8)
    default_config: DefaultConfigBody | None = None


_NO_TOOLS = ToolsetBody(type="agent_toolset_20260401", default_config=DefaultConfigBody(enabled=False))


class RuleBody(Body):
    rule: Annotated[str, StringConstraints(max_length=1000)]
    policy: Literal["always_allow", "always_ask", "always_deny"]


class ModelBody(Body):
    """A model by its id; how it is to be run (effort, speed) is the Claude Code CLI's own choice."""

    id: Annotated[str, StringConstraints(min_length=1, max_length=200)]


def _by_id(kind: str) -> BeforeValidator:
    """The short form of the protocol: an id, for an object that has nothing else."""
    extra = {"type": kind} if kind else {}
    return BeforeValidator(lambda given: {"id": given, **extra} if isinstance(given, str) else given)


class AgentBody(Body):
    """`agent` or `agent_with_overrides`. Ours: `permission_rules` (rules as Claude Code writes them), `permission_mode`."""

    type: Literal["agent", "agent_with_overrides"]
    id: str
    version: Literal[1] = 1
    model: Annotated[ModelBody, _by_id("")] | None = None
    system: Annotated[str, StringConstraints(max_length=100_000)] | None = None
    tools: Annotated[list[ToolsetBody], Field(max_length=1)] | None = None
    skills: Annotated[list[Any], Field(max_length=0)] = Field(default_factory=list[Any])
    mcp_servers: Annotated[list[Any], Field(max_length=0)] = Field(default_factory=list[Any])
    permission_rules: Annotated[list[RuleBody], Field(max_length=500)] = Field(default_factory=list[RuleBody])
    permission_mode: Literal["default", "plan"] = "default"


class CreateSession(Body):
    agent: Annotated[AgentBody, _by_id("agent")]
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


def build_agent(body: AgentBody, default: Agent) -> Agent:
    """The agent a session will run: the built-in one, with what the caller overrides. Raises NotFound, InvalidInput."""
    if body.id != default.id:
        raise NotFound(f"there is no agent {body.id!r}; the built-in one is {default.id!r}")
    changed: dict[str, Any] = {}
    if "permission_mode" in body.model_fields_set:
        changed["permission_mode"] = body.permission_mode
    if body.model is not None:
        changed["model"] = body.model.id
    if "system" in body.model_fields_set:
        changed["system"] = body.system
    toolset = _NO_TOOLS if body.tools == [] else body.tools[0] if body.tools else None
    if toolset is not None:
        changed["toolset"] = toolset.model_dump(mode="json", exclude_none=True)
    if toolset is not None or body.permission_rules:
        changed["policy"] = _policy(toolset, body.permission_rules)
    return default.but(**changed)


def _policy(toolset: ToolsetBody | None, extra: list[RuleBody]) -> PermissionPolicy:
    rules: list[Rule] = []
    for index, body in enumerate(extra):
        rules.append(parse(Rule, body.model_dump(), f"agent.permission_rules.{index}"))
    for config in toolset.configs if toolset else ():
        if config.permission_policy is not None:
            name = _CLI_NAMES.get(config.name, config.name.capitalize())
            rules.append(Rule(rule=name, policy=config.permission_policy.type))
    fallback = toolset.default_config.permission_policy if toolset and toolset.default_config else None
    return PermissionPolicy(rules=tuple(rules), default=fallback.type if fallback else None)


def session_wire(session: Session) -> dict[str, Any]:
    """A BetaManagedAgentsSession; ours beside it: `parked`, `stop_reason`."""
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
        "title": session.title,
        "usage": usage_wire(session.usage, active),
        "vault_ids": [],
        "deployment_id": None,
    }


def agent_wire(agent: Agent) -> dict[str, Any]:
    return {
        "type": "agent",
        "id": agent.id,
        "version": agent.version,
        "name": agent.name,
        "description": agent.description,
        "execution_identity": {"type": "service_account"},
        "mcp_servers": [],
        "model": {"id": agent.model},
        "multiagent": None,
        "skills": [],
        "system": agent.system,
        "tools": [_toolset_wire(agent)],
        "permission_rules": [r.model_dump(mode="json", exclude_none=True) for r in agent.policy.rules],
        "permission_mode": agent.permission_mode,
    }


def _toolset_wire(agent: Agent) -> dict[str, Any]:
    """The protocol knows always_allow and always_ask; a denied tool is shown as switched off."""
    toolset = agent.toolset or {}
    default = toolset.get("default_config") or {}
    fallback, switched_on = _policy_wire(default.get("permission_policy")), bool(default.get("enabled", True))
    configs: list[dict[str, Any]] = []
    for config in toolset.get("configs") or []:
        given = config.get("permission_policy")
        denied = bool(given) and given["type"] == "always_deny"
        policy = _policy_wire(given or default.get("permission_policy"))
        enabled = bool(config.get("enabled", switched_on)) and not denied
        configs.append(
            {"type": config["name"], "name": config["name"], "enabled": enabled, "permission_policy": policy}
        )
    return {
        "type": "agent_toolset_20260401",
        "configs": configs,
        "default_config": {"enabled": switched_on, "permission_policy": fallback},
    }


def _policy_wire(given: dict[str, Any] | None) -> dict[str, str]:
    kind = (given or {}).get("type")
    return {"type": "always_allow" if kind == "always_allow" else "always_ask"}


def environment_wire(environment: Environment) -> dict[str, Any]:
    """`config.type` is self_hosted: it runs on the operator's own machines."""
    epoch = "2026-01-01T00:00:00+00:00"  # built in: it has no history
    return {
        "type": "environment",
        "id": environment.id,
        "name": environment.name,
        "description": environment.description,
        "config": {"type": "self_hosted"},
        "metadata": {},
        "archived_at": None,
        "created_at": epoch,
        "updated_at": epoch,
        "image": environment.image,
    }


def approval_wire(approval: Approval) -> dict[str, Any]:
    """What an approver needs: what would run, where, for whom, and what became of it."""
    shown = approval.model_dump(
        mode="json", exclude={"key_id", "claim_id", "reminded", "call_id", "claimed_epoch", "batch"}
    )
    return {"type": "approval", **shown, "batch": list(approval.batch)}
