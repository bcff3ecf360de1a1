"""The standing rules that a human may choose from for a call, the narrowest first."""

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from claude_hitl_template.domain.policy import (
    NETWORK,
    PermissionPolicy,
    Rule,
    Verdict,
    mcp_parts,
    path_field,
    remember_rule,
)
from claude_hitl_template.domain.policy.floor import BUILT_IN
from claude_hitl_template.errors import InvalidInput

_NO_RULES = PermissionPolicy(default="always_ask")


@dataclass(frozen=True)
class Offer:
    """A rule, and in words what it covers."""

    rule: Rule
    covers: str


def offers(tool_name: str, tool_input: Mapping[str, Any], workspace: Path) -> list[Offer]:
    """The narrowest rule for this call, and a wider one where that makes sense: any arguments, this folder, this tool.

    Each of them covers the call, and counts under the built-in floor (an operator's file may be stricter). So what names
    a tool alone, every file or every host is not offered.

    Args:
        tool_name: The call's tool.
        tool_input: The input that would run.
        workspace: The session's folder. Links are followed where it is on this machine.

    Returns:
        [] for what no rule can answer: questions, plans, malformed calls.
    """
    try:
        narrowest = remember_rule(tool_name, tool_input, workspace)
    except InvalidInput:
        return []
    found = [Offer(narrowest, _narrow_words(narrowest, tool_name))]
    for text, covers in _wider(narrowest, tool_name, tool_input):
        try:
            rule = Rule(rule=text, policy="always_allow")
        except ValidationError:
            continue
        held = BUILT_IN.evaluate(_NO_RULES, tool_name, tool_input, workspace, remembered=[rule])
        if rule != narrowest and held.verdict is Verdict.allow:
            found.append(Offer(rule, covers))
    return found


def _narrow_words(rule: Rule, tool_name: str) -> str:
    if rule.digest is not None:
        return "exactly this input"
    if tool_name == "Bash":
        return "exactly this command"
    if tool_name == NETWORK:
        return "this host and port"
    if path_field(tool_name):
        return "this file"
    return "everything at this host" if tool_name == "WebFetch" else "this tool, with any input"


def _wider(narrowest: Rule, tool_name: str, tool_input: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if tool_name == "Bash":
        if narrowest.digest is None:
            words = _program(str(tool_input.get("command", "")))
            yield f"Bash({words}:*)", f"{words}, with any arguments"
    elif path_field(tool_name):
        path = narrowest.rule.removeprefix(f"{tool_name}(").removesuffix(")")
        if narrowest.digest is None and (folder := path.rpartition("/")[0].rstrip("/")):
            yield f"{tool_name}({folder}/**)", "every file in this folder"
    elif tool_name != NETWORK and not mcp_parts(tool_name)[0]:
        yield tool_name, "this tool, with any input"


def _program(command: str) -> str:
    """A command's program, and its subcommand if it has one: `npm test`, `git status`, `ls`."""
    words = command.split()
    try:
        plain = shlex.split(command) == words
    except ValueError:
        plain = False
    if not plain:  # what is quoted may have spaces
        return words[0]
    return " ".join(words[:2] if len(words) > 1 and not words[1].startswith("-") else words[:1])
