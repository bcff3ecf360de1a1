"""What a session's agent shows of its tools is what the gate does with them, whatever was left out."""

import json
from typing import Any

import pytest
from anthropic.types.beta import BetaCloudConfig, BetaEnvironment, BetaLimitedNetwork
from pydantic import ValidationError

from claude_hitl_template.api.agents import AgentBody, agent_wire, build_agent
from claude_hitl_template.api.validation import parse
from claude_hitl_template.api.wire import environment_wire
from claude_hitl_template.domain.models import Agent, Environment, Networking
from claude_hitl_template.domain.policy.floor import Floor

TOOLSET = {"type": "agent_toolset_20260401"}
WIKI = {"type": "url", "name": "wiki", "url": "https://wiki.example/mcp"}
TOOLS = ("bash", "read", "write", "edit", "glob", "grep", "web_fetch", "web_search")
READING = {"read", "glob", "grep"}


def shown(number: int = 0, **overrides: Any) -> dict[str, str]:
    """For each tool, and for "" (the others): allow, ask, or off."""
    body = parse(AgentBody, {"type": "agent_with_overrides", "id": "default", **overrides}, "agent")
    toolset = agent_wire(build_agent(body, Agent(), Floor(default="always_allow")))["tools"][number]
    default = _state(toolset["default_config"])
    configured = {config["name"]: _state(config) for config in toolset["configs"]}
    known = TOOLS if toolset["type"] == TOOLSET["type"] else tuple(configured)
    return {"": default, **{tool: configured.get(tool, default) for tool in known}}


def _state(config: dict[str, Any]) -> str:
    return config["permission_policy"]["type"].removeprefix("always_") if config["enabled"] else "off"


@pytest.mark.parametrize(
    "overrides", [{}, {"tools": [TOOLSET]}, {"tools": [{**TOOLSET, "default_config": None}]}]
)
def test_an_omitted_policy_shows_that_reading_is_allowed_and_the_rest_asks(overrides: dict[str, Any]):
    held = shown(**overrides)
    assert {tool for tool, state in held.items() if state == "allow"} == READING
    assert {state for tool, state in held.items() if tool not in READING} == {"ask"}


@pytest.mark.parametrize(
    ("policy", "state"), [("always_allow", "allow"), ("always_ask", "ask"), ("always_deny", "off")]
)
def test_a_default_holds_for_every_tool(policy: str, state: str):
    toolset = {**TOOLSET, "default_config": {"permission_policy": {"type": policy}}}
    assert set(shown(tools=[toolset]).values()) == {state}


def test_a_tool_that_is_configured_is_shown_as_it_holds():
    configs = [
        {"name": "bash", "permission_policy": {"type": "always_allow"}},
        {"name": "read", "permission_policy": {"type": "always_ask"}},
        {"name": "web_fetch", "enabled": False},
        {"name": "web_search", "permission_policy": {"type": "always_deny"}},
    ]
    held = shown(tools=[{**TOOLSET, "configs": configs}])
    assert (held["bash"], held["read"], held["web_fetch"], held["web_search"]) == (
        "allow",
        "ask",
        "off",
        "off",
    )


def test_a_rule_for_a_whole_tool_is_seen_and_one_with_a_pattern_is_not():
    rules = [
        {"rule": "Bash", "policy": "always_allow"},
        {"rule": "Edit", "policy": "always_deny"},
        {"rule": "Read(./secrets/**)", "policy": "always_deny"},
    ]
    held = shown(permission_rules=rules)
    assert (held["bash"], held["edit"], held["write"]) == ("allow", "off", "off")
    assert {held[tool] for tool in READING} == {"allow"}


def test_no_tools_are_shown_as_none():
    assert set(shown(tools=[]).values()) == {"off"}


def test_tools_of_a_server_ask_unless_something_else_holds():
    assert shown(1, mcp_servers=[WIKI]) == {"": "ask"}
    toolset = {
        "type": "mcp_toolset",
        "mcp_server_name": "wiki",
        "default_config": {"permission_policy": {"type": "always_allow"}},
        "configs": [{"name": "add"}, {"name": "clear", "enabled": False}],
    }
    assert shown(1, mcp_servers=[WIKI], tools=[toolset]) == {"": "allow", "add": "allow", "clear": "off"}
    ask = [{"rule": "mcp__wiki", "policy": "always_ask"}]
    held = shown(1, mcp_servers=[WIKI], tools=[toolset], permission_rules=ask)
    assert held == {"": "ask", "add": "ask", "clear": "off"}


@pytest.mark.parametrize(("sandboxed", "network"), [(True, "limited"), (False, "unrestricted")])
def test_an_environment_says_what_its_sessions_reach(sandboxed: bool, network: str):
    shown = environment_wire(Environment(), None, sandboxed=sandboxed)
    strict = BetaEnvironment.model_validate_json(json.dumps(shown), strict=True)
    assert isinstance(strict.config, BetaCloudConfig)
    assert strict.config.networking.type == network


def test_networking_is_shown_as_the_protocol_has_it():
    listed = Networking(allowed_hosts=("*.example.org", "api.example.com:8443"), allow_mcp_servers=False)
    shown = environment_wire(Environment(networking=listed), None, sandboxed=True)
    strict = BetaEnvironment.model_validate_json(json.dumps(shown), strict=True)
    assert isinstance(strict.config, BetaCloudConfig)
    assert isinstance(strict.config.networking, BetaLimitedNetwork)
    assert strict.config.networking.allowed_hosts == ["*.example.org", "api.example.com:8443"]
    assert strict.config.networking.allow_mcp_servers is False
    wide = environment_wire(Environment(networking=Networking(type="unrestricted")), None, sandboxed=True)
    assert BetaEnvironment.model_validate_json(json.dumps(wide), strict=True)


@pytest.mark.parametrize("entry", ["*", "*.", "", "exa mple.org", "example.org:0", "example.org:70000", "0x7f.1", "https://x.org"])  # fmt: skip  # noqa: E501
def test_an_entry_that_names_no_host_is_refused_with_what_to_write(entry: str):
    with pytest.raises(ValidationError, match=r"\*\.example\.org"):
        Networking(allowed_hosts=(entry,))
