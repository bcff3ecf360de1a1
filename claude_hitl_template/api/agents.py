"""Agents on the wire: what a caller may override of the built-in agent, and how a session's agent is shown."""

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_args
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationInfo,
    field_validator,
)

from claude_hitl_template.api.strict_json import Body
from claude_hitl_template.api.validation import parse
from claude_hitl_template.config.addresses import host_of, is_private
from claude_hitl_template.domain import missing_dependency
from claude_hitl_template.domain.models import Agent, Environment
from claude_hitl_template.domain.policy import (
    PermissionPolicy,
    PolicyName,
    Rule,
    Verdict,
    evaluate,
    mcp_parts,
)
from claude_hitl_template.domain.policy.floor import Floor
from claude_hitl_template.errors import InvalidInput, NotFound

MAX_MCP_SERVERS = 20
ToolName = Literal["bash", "read", "write", "edit", "glob", "grep", "web_fetch", "web_search"]
_CLI_NAMES: Mapping[str, str] = {
    **{name: name.capitalize() for name in get_args(ToolName)},
    "web_fetch": "WebFetch",
    "web_search": "WebSearch",
}
# A call of each tool, inside the workspace, that no pattern of a rule is written for.
_ANY = "claude-hitl-any"
_NOWHERE = Path("/nonexistent/claude-hitl")
_CALLS: Mapping[str, Mapping[str, str]] = {
    "bash": {"command": _ANY},
    "read": {"file_path": _ANY},
    "write": {"file_path": _ANY, "content": ""},
    "edit": {"file_path": _ANY, "old_string": "", "new_string": ""},
    "glob": {"pattern": "*", "path": _ANY},
    "grep": {"pattern": "x", "path": _ANY},
    "web_fetch": {"url": f"https://{_ANY}.invalid/", "prompt": "x"},
    "web_search": {"query": "x"},
}
# The CLI builds tool names from it, mcp__<server>__<tool>, and replaces other characters by "_".
ServerName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9-]+(_[A-Za-z0-9-]+)*$", max_length=64)]
McpToolName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]+$", max_length=128)]


class PolicyBody(Body):
    type: PolicyName


class DefaultConfigBody(Body):
    """How a tool is configured. A field that is left out or null is as in the default_config."""

    enabled: bool | None = None
    permission_policy: PolicyBody | None = None


class ToolConfigBody(DefaultConfigBody):
    name: ToolName
    type: ToolName = Field(default_factory=lambda known: known.get("name", "bash"))

    @field_validator("type")
    @classmethod
    def _is_the_name(cls, given: str, known: ValidationInfo) -> str:
        if given != known.data.get("name", given):
            raise ValueError(f"must be the name, {known.data['name']!r}, or left out")
        return given


class McpToolConfigBody(DefaultConfigBody):
    name: McpToolName


class ToolsetBody(Body):
    type: Literal["agent_toolset_20260401"]
    configs: list[ToolConfigBody] = Field(default_factory=list[ToolConfigBody], max_length=8)
    default_config: DefaultConfigBody | None = None


class McpToolsetBody(Body):
    """The tools of an MCP server. A server without a toolset offers all its tools, and they ask."""

    type: Literal["mcp_toolset"]
    mcp_server_name: ServerName
    configs: list[McpToolConfigBody] = Field(default_factory=list[McpToolConfigBody], max_length=100)
    default_config: DefaultConfigBody | None = None


_NO_TOOLS = ToolsetBody(type="agent_toolset_20260401", default_config=DefaultConfigBody(enabled=False))


def _is_mcp_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or not url.isprintable() or " " in url:
        raise ValueError("must be a URL that begins with http:// or https://")
    if parts.username is not None or parts.password is not None:
        raise ValueError("must not contain a user or password: everyone who can read the session sees it")
    if host_of(url) is None:
        raise ValueError("must name its host in the usual way, as https://wiki.example.org/mcp does")
    return url


def _is_not_ours(name: str) -> str:
    if name.lower() == missing_dependency.SERVER:
        raise ValueError(f"{missing_dependency.SERVER!r} is reserved for the service; choose another name")
    return name


class McpServerBody(Body):
    type: Literal["url"]
    name: Annotated[ServerName, AfterValidator(_is_not_ours)]
    url: Annotated[str, StringConstraints(max_length=2000), AfterValidator(_is_mcp_url)]


class RuleBody(Body):
    rule: Annotated[str, StringConstraints(max_length=1000)]
    policy: PolicyName


class ModelBody(Body):
    """A model by its id. The Claude Code CLI chooses how to run it (effort, speed)."""

    id: Annotated[str, StringConstraints(min_length=1, max_length=200)]


def by_id(kind: str, model: type[BaseModel]) -> BeforeValidator:
    """Accepts the protocol's short form: an id instead of an object of this model that has only an id."""
    extra = {"type": kind} if kind else {}
    return BeforeValidator(
        lambda given: {"id": given, **extra} if isinstance(given, str) else given,
        json_schema_input_type=str | model,
    )


AnyToolset = Annotated[ToolsetBody | McpToolsetBody, Field(discriminator="type")]


_REFERENCE = ("type", "id", "version")


class AgentBody(Body):
    """A reference to an agent, as type `agent`, or as `agent_with_overrides` with fields that replace the agent's own.

    `permission_rules` (in Claude Code's own syntax) and `permission_mode` extend the protocol. A field that is null is not
    left out.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "if": {"properties": {"type": {"const": "agent"}}},
            "then": {"propertyNames": {"enum": list(_REFERENCE)}},
        }
    )

    type: Literal["agent", "agent_with_overrides"]
    id: str
    version: Annotated[int, Field(ge=1, le=1)] = 1
    model: Annotated[ModelBody, by_id("", ModelBody)] = ModelBody(id="default")
    system: Annotated[str, StringConstraints(max_length=100_000)] | None = None
    tools: Annotated[list[AnyToolset], Field(max_length=1 + MAX_MCP_SERVERS)] = Field(
        default_factory=list[AnyToolset]
    )
    skills: Annotated[list[Any], Field(max_length=0)] = Field(default_factory=list[Any])
    mcp_servers: Annotated[list[McpServerBody], Field(max_length=MAX_MCP_SERVERS)] = Field(
        default_factory=list[McpServerBody]
    )
    permission_rules: Annotated[list[RuleBody], Field(max_length=500)] = Field(default_factory=list[RuleBody])
    permission_mode: Literal["default", "plan"] = "default"


def build_agent(body: AgentBody, default: Agent, floor: Floor) -> Agent:
    """Builds a session's agent: the built-in `default` with the caller's overrides.

    Raises:
        NotFound: There is no agent of this id.
        InvalidInput: The overrides contradict each other, or let something run unasked that the operator's floor forbids.
    """
    if body.id != default.id:
        raise NotFound(f"agent: no agent {body.id!r}; the built-in agent is {default.id!r}")
    changed: dict[str, Any] = {}
    if "permission_mode" in body.model_fields_set:
        changed["permission_mode"] = body.permission_mode
    if "model" in body.model_fields_set:
        changed["model"] = body.model.id
    if "system" in body.model_fields_set:
        changed["system"] = body.system
    toolset, of_servers = _toolsets(body)
    if toolset is not None:
        changed["toolset"] = toolset.model_dump(mode="json", exclude_none=True)
    changed["mcp_servers"] = {
        server.name: {
            "url": server.url,
            "toolset": of_servers[server.name].model_dump(mode="json", exclude_none=True),
        }
        for server in body.mcp_servers
    }
    if "tools" in body.model_fields_set or body.permission_rules or of_servers:
        changed["policy"] = _policy(toolset, of_servers, body.permission_rules)
        _refuse_unasked(body, changed["policy"], floor)
    overrides = sorted(body.model_fields_set.difference(_REFERENCE))
    if body.type == "agent" and overrides:
        raise InvalidInput("needs the type agent_with_overrides", f"agent.{overrides[0]}")
    return default.but(**changed)


def check_servers(body: AgentBody, environment: Environment) -> None:
    """Checks that no MCP server is certainly at a private address, unless the environment lists its host.

    A name that turns out to lead to such an address is refused at each connection (`claude/egress.py`).

    Raises:
        InvalidInput: Names the server's URL, and the setting that permits it.
    """
    for index, server in enumerate(body.mcp_servers):
        host = host_of(server.url)
        if host is not None and is_private(host[0]) and not environment.networking.declares(*host):
            raise InvalidInput(environment.refuses_server(*host), f"agent.mcp_servers.{index}.url")


def _toolsets(body: AgentBody) -> tuple[ToolsetBody | None, dict[str, McpToolsetBody]]:
    """The toolset of the built-in tools, and those of MCP servers by name.

    `tools` without a toolset of built-in tools disables them. Raises InvalidInput.
    """
    servers = [server.name for server in body.mcp_servers]
    _refuse_repeated(servers, "agent.mcp_servers")
    own = _NO_TOOLS if "tools" in body.model_fields_set else None
    of_servers: dict[str, McpToolsetBody] = {}
    for index, toolset in enumerate(body.tools):
        _refuse_repeated([config.name for config in toolset.configs], f"agent.tools.{index}.configs")
        if isinstance(toolset, ToolsetBody):
            if own not in (None, _NO_TOOLS):
                raise InvalidInput("is a second toolset of this type", f"agent.tools.{index}.type")
            own = toolset
            continue
        name, field = toolset.mcp_server_name, f"agent.tools.{index}.mcp_server_name"
        if name not in servers:
            raise InvalidInput("not the name of a server in agent.mcp_servers", field)
        if name in of_servers:
            raise InvalidInput("is a second toolset of this server", field)
        of_servers[name] = toolset
    for name in servers:
        of_servers.setdefault(name, McpToolsetBody(type="mcp_toolset", mcp_server_name=name))
    return own, of_servers


def _refuse_repeated(names: Sequence[str], at: str) -> None:
    for index, name in enumerate(names):
        if name in names[:index]:
            raise InvalidInput("is not unique", f"{at}.{index}.name")


def _policy(
    toolset: ToolsetBody | None, of_servers: Mapping[str, McpToolsetBody], extra: list[RuleBody]
) -> PermissionPolicy:
    rules: list[Rule] = []
    for index, body in enumerate(extra):
        rules.append(parse(Rule, body.model_dump(), f"agent.permission_rules.{index}"))
    for config in toolset.configs if toolset else ():
        if config.permission_policy is not None:
            rules.append(Rule(rule=_CLI_NAMES[config.name], policy=config.permission_policy.type))
    for server, of_server in of_servers.items():
        rules += _mcp_rules(server, of_server)
    fallback = toolset.default_config.permission_policy if toolset and toolset.default_config else None
    return PermissionPolicy(
        rules=tuple(rules),
        default=fallback.type if fallback else None,
        servers={server: _mcp_policy(of_server, None) for server, of_server in of_servers.items()},
    )


def _refuse_unasked(body: AgentBody, policy: PermissionPolicy, floor: Floor) -> None:
    """Raises InvalidInput for a tool that the policy allows and the floor does not. Other calls ask, or are denied."""
    calls = {_CLI_NAMES[name]: call for name, call in _CALLS.items()}
    for name, field in _permitted(body):
        given = calls.get(name, {})
        if evaluate(policy, name, given, _NOWHERE).verdict is not Verdict.allow:
            continue
        held = floor.evaluate(policy, name, given, _NOWHERE)
        if held.verdict is not Verdict.allow:
            raise InvalidInput(
                f"{name.replace(_ANY, '*')} may not run unasked here ({held.source}). Use always_ask, or name what "
                "may run in agent.permission_rules, such as `Bash(git status:*)`; the operator of this service can permit "
                "more in the file that HITL_POLICY names",
                field,
            )


def _permitted(body: AgentBody) -> Iterator[tuple[str, str]]:
    """The tools that the body may permit, by the CLI's name, each with the field that does so."""
    for place, rule in enumerate(body.permission_rules):
        tool = rule.rule.partition("(")[0].removesuffix("__*")
        is_server = tool.startswith("mcp__") and "__" not in tool.removeprefix("mcp__")
        yield f"{tool}__{_ANY}" if is_server else tool, f"agent.permission_rules.{place}.policy"
    for place, toolset in enumerate(body.tools):
        field = f"agent.tools.{place}"
        for config, number in _offered(toolset):
            is_own = number is not None and toolset.configs[number].permission_policy is not None
            at = f"{field}.configs.{number}" if is_own else f"{field}.default_config"
            yield config, f"{at}.permission_policy"


def _offered(toolset: AnyToolset) -> Iterator[tuple[str, int | None]]:
    """Each enabled tool of a set with the index of its config, then one that stands for tools without a config."""
    rest = toolset.default_config is None or toolset.default_config.enabled is not False
    places: dict[str, int] = {config.name: place for place, config in enumerate(toolset.configs)}
    named = _CALLS if isinstance(toolset, ToolsetBody) else [*places, _ANY]
    for name in sorted(named, key=lambda name: name not in places):
        place = places.get(name)
        enabled = None if place is None else toolset.configs[place].enabled
        if rest if enabled is None else enabled:
            is_own = isinstance(toolset, ToolsetBody)
            yield _CLI_NAMES[name] if is_own else f"mcp__{toolset.mcp_server_name}__{name}", place


def _mcp_rules(server: str, toolset: McpToolsetBody) -> Iterator[Rule]:
    for config in toolset.configs:
        yield Rule(rule=f"mcp__{server}__{config.name}", policy=_mcp_policy(toolset, config))


def _mcp_policy(toolset: McpToolsetBody, config: McpToolConfigBody | None) -> PolicyName:
    """The policy of an MCP server's tool, or of its tools without a config. A disabled tool is denied."""
    fallback = toolset.default_config or DefaultConfigBody()
    enabled = fallback.enabled if config is None or config.enabled is None else config.enabled
    if enabled is False:
        return "always_deny"
    policy = (config and config.permission_policy) or fallback.permission_policy
    return policy.type if policy else "always_ask"


def agent_wire(agent: Agent) -> dict[str, Any]:
    """An agent as a BetaManagedAgentsSessionAgent, extended by `permission_rules` and `permission_mode`.

    The toolsets show the effective policy also where fields were left out: the default, and each tool that differs.
    """
    of_servers = [_mcp_toolset_wire(name, agent) for name in agent.mcp_servers]
    return {
        "type": "agent",
        "id": agent.id,
        "version": agent.version,
        "name": agent.name,
        "description": agent.description,
        "execution_identity": {"type": "service_account"},
        "mcp_servers": [
            {"type": "url", "name": name, "url": server["url"]} for name, server in agent.mcp_servers.items()
        ],
        "model": {"id": agent.model},
        "multiagent": None,
        "skills": [],
        "system": agent.system,
        "tools": [_toolset_wire(agent), *of_servers],
        "permission_rules": [r.model_dump(mode="json", exclude_none=True) for r in agent.policy.rules],
        "permission_mode": agent.permission_mode,
    }


def _toolset_wire(agent: Agent) -> dict[str, Any]:
    policy, names = agent.policy, tuple(_CALLS)
    held = _verdicts(policy.rules, policy.default, None, tuple(_CLI_NAMES[name] for name in names))
    rest = {"always_allow": Verdict.allow, "always_deny": Verdict.deny}.get(policy.default or "", Verdict.ask)
    configs, default = _configs_wire(agent.toolset or {}, dict(zip(names, held, strict=True)), rest)
    typed = [{"type": config["name"], **config} for config in configs]
    return {"type": "agent_toolset_20260401", "configs": typed, "default_config": default}


def _mcp_toolset_wire(name: str, agent: Agent) -> dict[str, Any]:
    policy, toolset = agent.policy, agent.mcp_servers[name].get("toolset") or {}
    tools = [config["name"] for config in toolset.get("configs") or ()]
    called = tuple(f"mcp__{name}__{tool}" for tool in (*tools, _ANY))
    *held, rest = _verdicts(policy.rules, policy.default, policy.servers.get(name), called)
    configs, default = _configs_wire(toolset, dict(zip(tools, held, strict=True)), rest)
    return {"type": "mcp_toolset", "mcp_server_name": name, "configs": configs, "default_config": default}


def _configs_wire(
    toolset: Mapping[str, Any], held: Mapping[str, Verdict], rest: Verdict
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(configs, default_config) with each tool that was configured or differs from the default."""
    on = bool((toolset.get("default_config") or {}).get("enabled", True))
    switched = {c["name"]: bool(c.get("enabled", on)) for c in toolset.get("configs") or ()}
    default = _config_wire(on, rest)
    configs: list[dict[str, Any]] = []
    for name, verdict in held.items():
        config = _config_wire(switched.get(name, on), verdict)
        differs = config != default and (config["enabled"] or default["enabled"])
        if differs or name in switched:
            configs.append({"name": name, **config})
    return configs, default


def _config_wire(on: bool, verdict: Verdict) -> dict[str, Any]:
    """The protocol has only always_allow and always_ask; a denied tool is shown as disabled."""
    policy = "always_allow" if verdict is Verdict.allow else "always_ask"
    return {"enabled": on and verdict is not Verdict.deny, "permission_policy": {"type": policy}}


@lru_cache(maxsize=1024)
def _verdicts(
    rules: tuple[Rule, ...], default: PolicyName | None, of_server: PolicyName | None, tools: tuple[str, ...]
) -> tuple[Verdict, ...]:
    """The gate's own verdict on an ordinary call of each tool. Cached, because a listing shows the same agent many times."""
    servers: dict[str, PolicyName] = {mcp_parts(tool)[0]: of_server for tool in tools if of_server}
    policy = PermissionPolicy(rules=rules, default=default, servers=servers)
    calls = {_CLI_NAMES[name]: call for name, call in _CALLS.items()}
    return tuple(evaluate(policy, tool, calls.get(tool, {}), _NOWHERE).verdict for tool in tools)
