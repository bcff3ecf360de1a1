"""Rules in Claude Code's notation: their types, their syntax and the checks when one is created."""

import re
from functools import lru_cache
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from claude_hitl_template.domain.policy.matching import wanted
from claude_hitl_template.domain.policy.paths import GLOB_SYNTAX
from claude_hitl_template.domain.policy.tools import KNOWN, NETWORK, PATH_FIELD
from claude_hitl_template.domain.policy.web import HOST, check_entry, rule_domain

PolicyName = Literal["always_allow", "always_ask", "always_deny"]

_SHELL_SYNTAX = frozenset(";&|<>$(){}`\n\r\\#*?[]~!")
_SHELL_SPLIT = re.compile(r"[;&|<>$(){}`\n\r!]+")
_TOOL = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*")
_MCP_RULE = re.compile(r"mcp__[A-Za-z0-9_.-]+(__\*)?")


class Rule(BaseModel):
    """One line of a permission policy.

    `rule` is text in Claude Code's notation, at most 2000 characters. With a `digest` (SHA-256, hex) it is a
    tool's name, and covers only the calls of that tool that do exactly the same; `remember_rule` makes such
    rules. Raises ValueError (pydantic's ValidationError) with the problem and the fix.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rule: str = Field(max_length=2000, description="For instance `Bash(git status:*)` or `Edit(src/**)`.")
    policy: PolicyName
    digest: str | None = Field(
        default=None, pattern=r"^[0-9a-f]{64}$", description="Narrows the rule to one exact call."
    )

    @model_validator(mode="after")
    def _is_understood(self) -> Self:
        tool, spec = parse_rule(self.rule)
        if self.digest is not None and (self.rule != tool or tool.endswith("*")):
            raise ValueError(f"`{self.rule}` has a pattern and a digest; leave one of them out")
        if spec is not None:
            _check_spec(tool, spec, allows=self.policy == "always_allow")
        return self

    def __str__(self) -> str:
        return f"{self.rule} [only the call {self.digest[:12]}]" if self.digest else self.rule


class PermissionPolicy(BaseModel):
    """Rules, and the defaults for calls that match none.

    `default` None: what writes, runs or leaves the machine asks; reading inside the workspace and the
    session's own bookkeeping do not. "always_ask": nothing runs unasked. "always_deny": nothing runs without
    a rule. "always_allow" is permitted, as an explicit choice; questions to the human, and hosts that no rule names,
    are asked even then.
    `servers` has a default of their own for the tools of single MCP servers, by the server's name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rules: tuple[Rule, ...] = ()
    default: PolicyName | None = None
    servers: dict[str, PolicyName] = Field(default_factory=dict[str, PolicyName])


# -- the notation


@lru_cache(maxsize=4096)
def parse_rule(text: str) -> tuple[str, str | None]:
    """`Tool` -> (Tool, None); `Tool(spec)` -> (Tool, spec)."""
    if not text.strip():
        raise ValueError("the rule is empty; name a tool, for instance `Bash(git status:*)`")
    if not text.isprintable():
        raise ValueError(f"{text!r} contains control or invisible characters; remove them")
    match = re.fullmatch(r"([^()]*)(?:\(([^()]*)\))?", text)
    if not match:
        raise ValueError(f"`{text}`: write `Tool` or `Tool(pattern)`, and `?` for a parenthesis in a path")
    tool, spec = str(match[1]), match[2]
    if tool.startswith("mcp__") and (spec is not None or not _MCP_RULE.fullmatch(tool)):
        raise ValueError(f"`{text}`: write `mcp__server`, `mcp__server__tool` or `mcp__server__*`")
    if not tool.startswith("mcp__") and not _TOOL.fullmatch(tool):
        raise ValueError(f"`{text}` is no rule: write `Tool`, `Tool(pattern)` or `mcp__server__tool`")
    _check_spelling(tool)
    return tool, None if tool == "Bash" and spec == "*" else spec


def _check_spelling(tool: str) -> None:
    """A deny rule for `bash` would silently deny nothing."""
    for name in KNOWN:
        if tool != name and tool.lower() == name.lower():
            raise ValueError(f"tool names are case-sensitive: write `{name}`, not `{tool}`")


def _check_spec(tool: str, spec: str, *, allows: bool) -> None:
    if not spec.strip():
        raise ValueError(f"`{tool}({spec})` has an empty pattern; write `{tool}` for every call of it")
    if spec != spec.strip():
        raise ValueError(f"remove the spaces at the ends of the pattern in `{tool}({spec})`")
    if tool == "Bash":
        _check_bash_spec(spec, allows=allows)
    elif tool in PATH_FIELD:
        _check_path_spec(tool, spec)
    elif tool == "WebFetch":
        if not spec.startswith("domain:") or not HOST.fullmatch(rule_domain(spec)):
            raise ValueError(f"`WebFetch({spec})`: write `WebFetch(domain:example.com)`, subdomains included")
    elif tool == NETWORK:
        check_entry(spec)
    else:
        raise ValueError(f"`{tool}` takes no pattern; write `{tool}`")


def _check_bash_spec(spec: str, *, allows: bool) -> None:
    pattern, _ = bash_pattern(spec, allows=allows)
    if "*" in pattern:
        raise ValueError(f"`Bash({spec})`: a `*` may stand only at the end, as in `Bash(git push:*)`")
    if allows and not is_simple_command(pattern):
        raise ValueError(f"`Bash({spec})` has shell syntax; an allow rule covers one simple command")
    if _SHELL_SPLIT.search(pattern) or not wanted(pattern):
        raise ValueError(f"`Bash({spec})` names no simple command; write one rule for each part")


def _check_path_spec(tool: str, spec: str) -> None:
    if spec == "*":
        raise ValueError(f"`{tool}(*)`: write `{tool}` for every path, `{tool}(./**)` for the workspace")
    if spec.startswith("/") and not spec.startswith("//"):
        raise ValueError(f"`{tool}({spec})`: write `//` for an absolute path, `./` for the workspace")
    if spec.startswith("~") and spec != "~" and not spec.startswith("~/"):
        raise ValueError(f"`{tool}({spec})`: only your own home has a short form, `~/`")
    if ".." in spec.split("/"):
        raise ValueError(f"`{tool}({spec})`: in place of `..` write the absolute path, beginning with `//`")
    if GLOB_SYNTAX & set(spec) - set("*?"):
        raise ValueError(f"`{tool}({spec})`: of the wildcards only `*`, `?` and `**` are understood")


def bash_pattern(spec: str, *, allows: bool) -> tuple[str, bool]:
    """The pattern's text, and whether it is a prefix. Guards always are: `rm -rf /*` just loses its star."""
    for ending in (":*", " *") if allows else (":*", " *", "*"):
        if spec.endswith(ending):
            return spec.removesuffix(ending), True
    return spec, False


def is_simple_command(command: str) -> bool:
    """One program and its arguments, with nothing in it that a shell could take for more, quoted or not."""
    if not command.isprintable() or _SHELL_SYNTAX & set(command):
        return False
    return "=" not in command.split(" ", 1)[0]
