"""The standing rules that a human may choose from for a call, the narrowest first."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from claude_hitl_template.domain.policy import (
    NETWORK,
    PermissionPolicy,
    Rule,
    Verdict,
    matching,
    mcp_parts,
    path_field,
    remember_rule,
    validate_remember,
)
from claude_hitl_template.domain.policy.command_segments import JudgedSegment, asking
from claude_hitl_template.domain.policy.floor import BUILT_IN
from claude_hitl_template.errors import InvalidInput

_NO_RULES = PermissionPolicy(default="always_ask")


@dataclass(frozen=True)
class Offer:
    """A rule, and in words what it covers."""

    rule: Rule
    covers: str


def offers(
    tool_name: str,
    tool_input: Mapping[str, Any],
    workspace: Path,
    segments: Sequence[JudgedSegment] = (),
) -> list[Offer]:
    """The narrowest rule for this call, and a wider one where that makes sense: any arguments, this folder, this tool.

    Each of them covers the call, and counts under the built-in floor (an operator's file may be stricter). So what names
    a tool alone, every file or every host is not offered. Of a command line each command that asks is offered for itself,
    and then the line as it is; where several ask, one of these rules answers for its own command only.

    Args:
        tool_name: The call's tool.
        tool_input: The input that would run.
        workspace: The session's folder. Links are followed where it is on this machine.
        segments: How the commands of a line were judged (`Approval.segments`).

    Returns:
        [] for what no rule can answer: questions, plans, malformed calls.
    """
    try:
        narrowest = remember_rule(tool_name, tool_input, workspace)
    except InvalidInput:
        return []
    if commands := asking(segments, str(tool_input.get("command", ""))):
        each = [
            Offer(one.rule, f"{one.covers}, alone or in a line")
            for command in commands
            for one in offers(tool_name, {**tool_input, "command": command}, workspace)
            if one.rule.digest is None
        ]
        return [*each, Offer(narrowest, "exactly this line")]
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


def granted(
    tool_name: str, tool_input: Mapping[str, Any], workspace: Path, segments: Sequence[JudgedSegment] = ()
) -> Rule:
    """The rule that "allow and remember" records for a call: the first of `offers` where one command of a line asks, else
    the narrowest for the whole call. Raises InvalidInput(field="remember")."""
    narrowest = remember_rule(tool_name, tool_input, workspace)
    if len(asking(segments, str(tool_input.get("command", "")))) == 1:
        return offers(tool_name, tool_input, workspace, segments)[0].rule
    return narrowest


def check_granted(
    rule: Rule,
    tool_name: str,
    tool_input: Mapping[str, Any],
    workspace: Path,
    segments: Sequence[JudgedSegment] = (),
) -> None:
    """Refuses a human's own rule unless it covers the call, or one command of its line that asks.
    Raises InvalidInput(field="remember")."""
    for command in asking(segments, str(tool_input.get("command", ""))):
        one = {**tool_input, "command": command}
        if rule.policy == "always_allow" and matching([rule], tool_name, one, workspace)[0]:
            return
    validate_remember(rule, tool_name, tool_input, workspace)


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
