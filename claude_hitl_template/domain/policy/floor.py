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

from pydantic import ValidationError

from claude_hitl_template.domain.policy import (
    Evaluation,
    PermissionPolicy,
    Rule,
    Verdict,
    evaluate,
    mcp_parts,
)
from claude_hitl_template.domain.policy.programs import INTERPRETER, SHELL, WRAPPERS
from claude_hitl_template.errors import ConfigError

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
            return Evaluation(Verdict.deny, source)
        narrow = [rule for rule in remembered if self.remember and is_narrow(rule)]
        if held.source != "default" or self.servers.get(mcp_parts(tool_name)[0]) or self.default:
            narrow = [rule for rule in narrow if _is_exact(rule)]
        elif tool_name in _FREE or _allows(of(*filter(is_narrow, policy.rules), default="always_ask")):
            return agents
        answered = of(*narrow, default="always_ask")
        return answered if _allows(answered) else Evaluation(Verdict.ask, source)


BUILT_IN = Floor()


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
    import yaml  # noqa: PLC0415  (every owner imports this module, and reads no file)

    try:
        text = path.read_text(encoding="utf-8")
        found, node = yaml.safe_load(text), yaml.compose(text, Loader=yaml.SafeLoader)
    except (OSError, UnicodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no UTF-8"
        raise ConfigError(f"HITL_POLICY: {path} cannot be read: {why}", _FIX) from error
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"HITL_POLICY: {path}{line}: {problem or 'neither YAML nor JSON'}", _FIX) from error
    try:
        return Floor.model_validate({} if found is None else found)
    except ValidationError as error:
        # A misspelled name is reported as missing, too: name the misspelled one.
        first = min(
            error.errors(include_url=False, include_input=False), key=lambda e: e["type"] != "extra_forbidden"
        )
        problem = first["msg"].removeprefix("Value error, ")
        field = ".".join(map(str, first["loc"]))
        where = f", line {_line_of(node, first['loc'])}" if node is not None else ""
        raise ConfigError(
            f"HITL_POLICY: {path}{where}: {field + ': ' if field else ''}{problem}", _FIX
        ) from error


def _line_of(node: Any, place: Sequence[int | str]) -> int:
    """The line of the innermost part of `place` that is there."""
    line = node.start_mark.line + 1
    for part in place:
        if node.id == "sequence" and isinstance(part, int):
            node = node.value[part]
            line = node.start_mark.line + 1
            continue
        pairs = node.value if node.id == "mapping" else []
        found = [(key, value) for key, value in pairs if key.value == part]
        if not found:
            break
        key, node = found[0]
        line = key.start_mark.line + 1
    return line
