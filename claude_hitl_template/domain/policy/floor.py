"""The operator's floor under every agent's policy. For each call the stricter of the two verdicts applies.

Without a file, what writes, runs or leaves the machine asks, unless a rule of the agent or a human names what may:
`Bash(git status:*)`, `Edit(src/**)`, `WebFetch(domain:example.com)`, one tool of an MCP server. `Bash` alone, `Edit(**)` or
a default name nothing. With a file, its rules and its default hold as they are written. Of a human's remembered rules only
one for exactly this call counts as the answer to what the file asks, and none does with `remember: false`. Nothing gets past
a denial.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from claude_hitl_template.domain.policy import (
    JOINED,
    Evaluation,
    PermissionPolicy,
    Rule,
    Verdict,
    evaluate,
    matching,
    mcp_parts,
)
from claude_hitl_template.domain.policy.documents import read_file
from claude_hitl_template.domain.policy.lines import parts
from claude_hitl_template.domain.policy.programs import INTERPRETER, SHELL, WRAPPERS

STRICTNESS = {Verdict.allow: 0, Verdict.ask: 1, Verdict.deny: 2}

# They neither write nor run, nor leave the machine: what an agent's policy says of them is enough.
_FREE = frozenset({"Read", "Glob", "Grep", "LS", "NotebookRead", "Skill", "KillShell", "TaskStop"})
_WILD = frozenset("./~*?")
_FIX = "correct it, or leave HITL_POLICY out; docs/security.md has an example"


class Floor(PermissionPolicy):
    """As a policy, in the operator's file. `remember`: whether a remembered rule may answer what the floor asks."""

    remember: bool = True

    def described(self) -> str:
        """A short description for status and doctor."""
        if self == BUILT_IN:
            return "built in: what writes, runs or leaves the machine asks"
        parts = [f"{len(self.rules)} rules" if len(self.rules) != 1 else "1 rule"]
        parts.append(f"default {self.default}" if self.default else "the built-in default")
        if self.servers:
            parts.append(f"MCP servers: {', '.join(self.servers)}")
        return ", ".join(parts if self.remember else [*parts, "nothing remembered counts"])

    def evaluate(
        self,
        policy: PermissionPolicy,
        tool_name: str,
        tool_input: Mapping[str, Any],
        workspace: Path,
        *,
        cwd: Path | None = None,
        remembered: Sequence[Rule] = (),
    ) -> Evaluation:
        """The stricter of the floor and the agent's policy, with what humans had remembered. See `policy.evaluate`."""

        def of(*rules: Rule, **more: Any) -> Evaluation:
            return evaluate(PermissionPolicy(rules=rules, **more), tool_name, tool_input, workspace, cwd)

        agents = of(*policy.rules, *remembered, default=policy.default, servers=policy.servers)
        held = of(*self.rules, default=self.default, servers=self.servers)
        if STRICTNESS[held.verdict] <= STRICTNESS[agents.verdict]:
            return agents
        source = f"the operator's floor: {held.source}"
        if held.verdict is Verdict.deny:
            return Evaluation(Verdict.deny, source, held.rule)
        narrow = [rule for rule in remembered if self.remember and is_narrow(rule)]
        if held.source != "default" or self.servers.get(mcp_parts(tool_name)[0]) or self.default:
            narrow = [rule for rule in narrow if _is_exact(rule)]
        elif tool_name in _FREE or _allows(of(*filter(is_narrow, policy.rules), default="always_ask")):
            return agents
        answered = of(*narrow, default="always_ask")
        if _allows(answered):
            return answered
        if tool_name == "Bash":
            found = [
                self.evaluate(
                    policy,
                    tool_name,
                    {**tool_input, "command": part},
                    workspace,
                    cwd=cwd,
                    remembered=remembered,
                )
                for part in _commands(tool_input, held.rule, workspace)
            ]
            if found and all(map(_allows, found)):
                return Evaluation(Verdict.allow, JOINED.join(dict.fromkeys(one.source for one in found)))
        return Evaluation(Verdict.ask, source, held.rule)


BUILT_IN = Floor()


def strictest(one: Evaluation, other: Evaluation) -> Evaluation:
    """The stricter of two; the first if they are equally strict."""
    return other if STRICTNESS[other.verdict] > STRICTNESS[one.verdict] else one


def _commands(tool_input: Mapping[str, Any], asked: Rule | None, workspace: Path) -> list[str]:
    """The commands of a line; [] if the rule that asks for the line asks for none of them alone."""
    line = tool_input.get("command")
    found = [part.command for part in parts(line)] if isinstance(line, str) else []
    if asked is None or any(matching([asked], "Bash", {"command": one}, workspace)[0] for one in found):
        return found
    return []


def _allows(found: Evaluation) -> bool:
    return found.verdict is Verdict.allow


def is_narrow(rule: Rule) -> bool:
    """Whether an allow rule is narrower than a whole tool."""
    if rule.policy != "always_allow":
        return False
    tool, _, spec = rule.rule.removesuffix(")").partition("(")
    if rule.digest is not None:
        return True
    if tool.startswith("mcp__"):
        return "__" in tool.removeprefix("mcp__") and not tool.endswith("__*")
    if tool == "Bash":
        return bool(spec) and spec != "*" and not _runs_anything(spec)
    return bool(set(spec) - _WILD)


def _runs_anything(spec: str) -> bool:
    """`bash:*`, `python -c:*`, `env:*`: a prefix that names only what runs its arguments."""
    if not spec.endswith((":*", " *")):
        return False
    program, *words = spec[:-2].split() or [""]
    name = program.rpartition("/")[2]
    runs = SHELL.fullmatch(name) or INTERPRETER.fullmatch(name) or name in WRAPPERS or name == "eval"
    return bool(runs) and all(word.startswith("-") for word in words)


def _is_exact(rule: Rule) -> bool:
    return is_narrow(rule) and (rule.digest is not None or not set("*?") & set(rule.rule))


def read_floor(path: Path | None) -> Floor:
    """The floor in a file of YAML or JSON; the built-in one for None. Raises ConfigError with the place and what to do."""
    if path is None:
        return BUILT_IN
    return read_file(path, Floor, "HITL_POLICY", _FIX)
