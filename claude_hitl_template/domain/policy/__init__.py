"""Decides, for one tool call, whether it is allowed, waits for a human, or is denied.

Rules are written in Claude Code's notation: `Bash`, `Bash(git status:*)`, `Bash(npm test)`,
`Read(./secrets/**)`, `Edit(src/**)`, `Write(//abs/path/**)`, `WebFetch(domain:example.com)`, `mcp__server`,
`mcp__server__tool`, `mcp__server__*`. A deny rule wins over an ask rule, that over an allow rule, and that
over the default.

One idea runs through this module: **an allow rule must be sure, a deny or ask rule may guess.** What cannot
be read with certainty (a command with shell syntax, a path with two meanings, a URL with a user in it)
matches no allow pattern, and matches a deny or ask pattern if any reading of it does.

Bash
    An allow pattern matches a command only if that is one simple command: no character of `_SHELL_SYNTAX`,
    quoted or not, no leading `VAR=value`, nothing unprintable; and then either exactly, or (`git status:*`,
    `git status *`) up to a word's end. The program is trusted with every argument: `Bash(git:*)` lets it run
    whatever git can be told to run.
    A deny or ask pattern matches unless it is certain that nothing in the command runs the program that it names
    (`policy.bash`): the command is read with a shell parser, and what is not understood (`$X` as a program or
    before it, a shell that reads its input, a syntax error, more than 16 KiB) matches. Any program that is not
    known to leave its arguments alone counts as one that runs them. Options may stand between the pattern's
    words, and the pattern's own options anywhere. Outside remain what `python -c` puts together as it runs, scripts
    on disk, programs under another name, and aliases from files.
Hosts
    `Network(files.example.org:443)` speaks of connections of the sandbox, `Network(*.example.org)` of all hosts below a
    name. Without a port an allow pattern is for 80 and 443, a deny or ask pattern for every port.
Paths
    Globs with `*`, `?` and `**`, relative to the workspace (`x`, `./x`), absolute (`//x`) or under home
    (`~/x`). An allow pattern must match where the path really leads, and name `.claude`, `.git` or
    `.mcp.json` to allow edits there; a deny or ask pattern matches the path as written, or where it leads,
    and all below it, and a lone name (`.env`) at any depth, in capitals or not. `Edit` covers every editing tool,
    `Read` every reading one. A Bash command that reads a file is a matter for Bash rules.
    The answer holds for the moment it is given: when a symlink may have changed, evaluate again.
"""

import os.path
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from claude_hitl_template.domain import missing_dependency
from claude_hitl_template.domain.canonical_json import canonical_json, digest, shown_host
from claude_hitl_template.domain.policy.bash import Segment as Segment
from claude_hitl_template.domain.policy.bash import may_run
from claude_hitl_template.domain.policy.bash import segments as segments
from claude_hitl_template.domain.policy.matching import wanted
from claude_hitl_template.domain.policy.paths import (
    GLOB_SYNTAX,
    folded,
    is_below,
    matches_within,
    may_climb,
    overlap,
    path_pattern,
    path_readings,
    resolved,
    split_glob,
)
from claude_hitl_template.domain.policy.web import (
    HOST,
    check_entry,
    clear_host,
    covers,
    rule_domain,
    web_matches,
)
from claude_hitl_template.errors import InvalidInput

PolicyName = Literal["always_allow", "always_ask", "always_deny"]

# They ask the human themselves: to allow them unseen would answer in the human's name.
_QUESTIONS = frozenset({"AskUserQuestion", "ExitPlanMode"})

# They touch nothing but the session's own state. Not among them: what stops something (KillShell, TaskStop),
# reaches other sessions (SendMessage, ListAgents), schedules (CronCreate, ScheduleWakeup) or checks out
# (EnterWorktree).
_HARMLESS = frozenset(
    {"TodoWrite", "TaskCreate", "TaskUpdate", "TaskList", "TaskGet", "TaskOutput", "BashOutput", "ToolSearch"}
    | {"EnterPlanMode", "StructuredOutput"}
)
_SPAWNING = frozenset({"Agent", "Task"})
# A subagent's calls come to the same gate; other fields (`isolation`, `mode`, `cwd`) may lead past it.
_SPAWN_FIELDS = frozenset({"description", "prompt", "subagent_type", "model", "effort", "run_in_background"})

_READING = frozenset({"Read", "Glob", "Grep", "LS", "NotebookRead"})
_EDITING = frozenset({"Edit", "Write", "MultiEdit", "NotebookEdit"})
_SEARCHING = frozenset({"Glob", "Grep", "LS"})
NETWORK = "Network"  # no tool of the CLI's: what a session wants to reach is asked under this name
_OTHERS = frozenset({NETWORK, "Bash", "WebFetch", "WebSearch", "Skill", "KillShell", "TaskStop", "Monitor"})
_KNOWN = _QUESTIONS | _HARMLESS | _SPAWNING | _READING | _EDITING | _OTHERS

_PATH_FIELD = {
    **dict.fromkeys(("Read", "Edit", "Write", "MultiEdit"), "file_path"),
    **dict.fromkeys(("NotebookRead", "NotebookEdit"), "notebook_path"),
    **dict.fromkeys(("Glob", "Grep", "LS"), "path"),
}
_REQUIRED_TEXT: dict[str, tuple[str, ...]] = {
    **{tool: (field,) for tool, field in _PATH_FIELD.items()},
    **dict.fromkeys(("Glob", "Grep"), ("pattern",)),
    "Bash": ("command",),
    "WebFetch": ("url",),
    "WebSearch": ("query",),
    NETWORK: ("host",),
}
_OPTIONAL_TEXT = {"Glob": ("path",), "Grep": ("path", "glob")}

# As in Claude Code: a rule for the first also speaks of the others.
_FAMILIES = {"Read": _READING, "Edit": _EDITING, "Agent": _SPAWNING, "Task": _SPAWNING}
# Monitor runs its command in the same shell; a rule that allows Bash was not written with it in mind.
_GUARDED_FAMILIES = {**_FAMILIES, "Bash": frozenset({"Bash", "Monitor"})}

_SHELL_SYNTAX = frozenset(";&|<>$(){}`\n\r\\#*?[]~!")
_SHELL_SPLIT = re.compile(r"[;&|<>$(){}`\n\r!]+")
# Any other field (`dangerouslyDisableSandbox`, or what a later CLI adds) was not what the pattern promised.
_PLAIN_BASH_FIELDS = frozenset({"command", "description", "timeout", "run_in_background"})
# The model writes these anew each time, and what runs is the same.
_UNSEEN_BASH_FIELDS = frozenset({"description", "timeout"})

# What is written there may later run, or change the rules, with nobody asked: hooks, settings, servers.
_PROTECTED = frozenset({".claude", ".git", ".mcp.json"})

_TOOL = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*")
_MCP_RULE = re.compile(r"mcp__[A-Za-z0-9_.-]+(__\*)?")


class Rule(BaseModel):
    """One line of a permission policy.

    `rule` is text in Claude Code's notation, at most 2000 characters. With a `digest` (SHA-256, hex) it is a
    tool's name, and covers only the calls of that tool that do exactly the same; `remember_rule` makes such
    rules. Raises ValueError (pydantic's ValidationError) that says what is wrong and how to mend it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rule: str = Field(max_length=2000, description="For instance `Bash(git status:*)` or `Edit(src/**)`.")
    policy: PolicyName
    digest: str | None = Field(
        default=None, pattern=r"^[0-9a-f]{64}$", description="Narrows the rule to one exact call."
    )

    @model_validator(mode="after")
    def _is_understood(self) -> Self:
        tool, spec = _parse(self.rule)
        if self.digest is not None and (self.rule != tool or tool.endswith("*")):
            raise ValueError(f"`{self.rule}` has a pattern and a digest; leave one of them out")
        if spec is not None:
            _check_spec(tool, spec, allows=self.policy == "always_allow")
        return self

    def __str__(self) -> str:
        return f"{self.rule} [only the call {self.digest[:12]}]" if self.digest else self.rule


class PermissionPolicy(BaseModel):
    """Rules, and what holds where none of them matches.

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


class Verdict(StrEnum):
    allow = "allow"
    ask = "ask"
    deny = "deny"


@dataclass(frozen=True)
class Evaluation:
    """A verdict, and its `source`: the text of the rule that decided, or "default"."""

    verdict: Verdict
    source: str


def evaluate(
    policy: PermissionPolicy,
    tool_name: str,
    tool_input: Mapping[str, Any],
    workspace: Path,
    cwd: Path | None = None,
) -> Evaluation:
    """Says what holds for this call. Never raises for what a model may send, never allows what is malformed.

    `workspace` is the folder that relative patterns start from; `cwd` the one the call runs in, where its relative
    paths start: None for the workspace. Reads the file system only to follow symlinks.
    """
    call = _Call.read(tool_name, tool_input, workspace, cwd)
    if denied := _first(policy, "always_deny", call):
        return Evaluation(Verdict.deny, str(denied))
    if tool_name == missing_dependency.FULL_NAME:  # it only tells a human something
        return Evaluation(Verdict.allow, "built in")
    if asked := _first(policy, "always_ask", call):
        return Evaluation(Verdict.ask, str(asked))
    if allowed := _first(policy, "always_allow", call):
        return Evaluation(Verdict.ask if call.name in _QUESTIONS else Verdict.allow, str(allowed))
    server, _ = mcp_parts(tool_name)
    default = policy.servers.get(server) or policy.default
    return Evaluation(_by_default(default, call), "default")


def targets(
    tool_name: str, tool_input: Mapping[str, Any], workspace: Path, cwd: Path | None = None
) -> tuple[str, ...]:
    """Where the paths of this call lead now, links followed: `./x` inside the workspace, else `//x`. Sorted.

    Empty for a tool that takes no path, and for paths that lead nowhere. A hard link can't be told from its file.
    """
    call = _Call.read(tool_name, tool_input, workspace, cwd)
    if tool_name not in _PATH_FIELD:
        return ()
    return tuple(sorted(call.portable(spot) for spot in call.spots.real))


def path_field(tool_name: str) -> str | None:
    """The field of a tool's input that holds its path; None for a tool that takes none."""
    return _PATH_FIELD.get(tool_name)


def written_targets(
    tool_name: str, tool_input: Mapping[str, Any], workspace: Path, cwd: Path | None = None
) -> tuple[str, ...]:
    """What `targets` says of these paths if nothing below the folder is a link."""
    call = _Call.read(tool_name, tool_input, workspace, cwd)
    return tuple(sorted(call.portable(spot) for spot in call.spots.written))


def from_folder(tool_name: str, tool_input: Mapping[str, Any], cwd: Path) -> dict[str, Any]:
    """The same input with a relative path made absolute, so that it names the same file whatever the CLI's folder is."""
    field = _PATH_FIELD.get(tool_name, "")
    path = tool_input.get(field)
    if not isinstance(path, str) or not path or not _is_plain(path) or path.startswith(("/", "~")):
        return dict(tool_input)
    return {**tool_input, field: os.path.normpath(cwd / path)}


def portable_rules(rules: Sequence[Rule]) -> tuple[Rule, ...]:
    """Those of remembered `rules` that hold in every folder: a command, or an exact input, may mean something else
    in another one than it was allowed in."""
    bound = (r for r in rules if r.rule.startswith("Bash(") or (r.digest and r.rule not in _PATH_FIELD))
    kept = set(rules) - set(bound)
    return tuple(r for r in rules if r in kept)


def is_harmless(tool_name: str) -> bool:
    """Whether a tool touches nothing but the session's own state, whatever its input: no human is asked about it."""
    return tool_name in _HARMLESS


def mcp_parts(name: str) -> tuple[str, str]:
    """("server", "tool") of "mcp__server__tool"; ("", name) for a built-in tool."""
    if not name.startswith("mcp__"):
        return "", name
    server, _, tool = name.removeprefix("mcp__").partition("__")
    return server, tool


def remember_rule(tool_name: str, tool_input: Mapping[str, Any], workspace: Path) -> Rule:
    """The narrowest standing allow rule that is of use: what "allow and remember" records for this call.

    Bash: this exact command. A tool that reads or writes one file: this file, any content (relative to the
    workspace if inside it, because the workspace moves between nodes). WebFetch: the host. MCP: the tool.
    Otherwise: this exact input. Where the notation cannot say that, the rule has a digest.
    Raises InvalidInput(field="remember") for malformed calls and for questions, which no rule can answer.
    """
    call = _Call.read(tool_name, tool_input, workspace)
    if not call.sound or call.name in _QUESTIONS:
        raise InvalidInput(f"such a call of {tool_name!r} cannot be remembered; decide it once", "remember")
    text = _narrow_text(call)
    rule = _allow_rule(text) if text else None
    if rule is None or not _matches(rule, call):
        rule = _allow_rule(call.name, call.digest)
    if rule is None:
        raise InvalidInput(f"no rule can name the tool {tool_name!r}; decide it once", "remember")
    return rule


def validate_remember(rule: Rule, tool_name: str, tool_input: Mapping[str, Any], workspace: Path) -> None:
    """Refuses a human's own standing rule unless it allows, and covers, the call at hand.

    Raises InvalidInput(field="remember").
    """
    call = _Call.read(tool_name, tool_input, workspace)
    if rule.policy != "always_allow":
        raise InvalidInput(
            f"its policy is `{rule.policy}`; only `always_allow` can be remembered", "remember"
        )
    if call.name in _QUESTIONS:
        raise InvalidInput(f"{call.name} is a question to a human and is asked every time", "remember")
    if not _matches(rule, call):
        raise InvalidInput(f"`{rule}` does not match this call; mend it, or allow the call once", "remember")


def compile_settings(
    policy: PermissionPolicy, tools: Sequence[str], mcp_servers: Sequence[str]
) -> dict[str, Any]:
    """`{"permissions": {"ask": [...], "deny": [...]}}` for the CLI's `--settings`.

    Every tool stands under `ask`, so that the CLI runs none on its own authority, not even while it replays a
    deferred call before the hooks are registered: the gate decides. There is never an allow list.
    """
    # The CLI spells server names in tool names like this.
    servers = [f"mcp__{re.sub('[^a-zA-Z0-9_-]', '_', server)}" for server in mcp_servers]
    ask = dict.fromkeys([*tools, *servers])
    denied = (r.rule for r in policy.rules if r.policy == "always_deny" and r.digest is None)
    deny = dict.fromkeys(rule for rule in denied if _parse(rule)[0] != NETWORK)  # the CLI knows no such tool
    return {"permissions": {"ask": list(ask), "deny": list(deny)}}


# -- the notation


@lru_cache(maxsize=4096)
def _parse(text: str) -> tuple[str, str | None]:
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
    for name in _KNOWN:
        if tool != name and tool.lower() == name.lower():
            raise ValueError(f"tool names are case-sensitive: write `{name}`, not `{tool}`")


def _check_spec(tool: str, spec: str, *, allows: bool) -> None:
    if not spec.strip():
        raise ValueError(f"`{tool}({spec})` has an empty pattern; write `{tool}` for every call of it")
    if spec != spec.strip():
        raise ValueError(f"remove the spaces at the ends of the pattern in `{tool}({spec})`")
    if tool == "Bash":
        _check_bash_spec(spec, allows=allows)
    elif tool in _PATH_FIELD:
        _check_path_spec(tool, spec)
    elif tool == "WebFetch":
        if not spec.startswith("domain:") or not HOST.fullmatch(rule_domain(spec)):
            raise ValueError(f"`WebFetch({spec})`: write `WebFetch(domain:example.com)`, subdomains included")
    elif tool == NETWORK:
        check_entry(spec)
    else:
        raise ValueError(f"`{tool}` takes no pattern; write `{tool}`")


def _check_bash_spec(spec: str, *, allows: bool) -> None:
    pattern, _ = _bash_pattern(spec, allows=allows)
    if "*" in pattern:
        raise ValueError(f"`Bash({spec})`: a `*` may stand only at the end, as in `Bash(git push:*)`")
    if allows and not _is_simple_command(pattern):
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


# -- one call, read once


@dataclass(frozen=True)
class _Call:
    """A tool call as far as it is understood; `sound` is False if its input is not what the tool takes."""

    name: str
    given: Mapping[str, Any]
    workspace: Path
    cwd: Path
    sound: bool

    @classmethod
    def read(cls, name: str, given: object, workspace: Path, cwd: Path | None = None) -> Self:
        fields: dict[str, Any] = dict(given) if isinstance(given, Mapping) else {}
        sound = all(isinstance(fields.get(key), str) and fields[key] for key in _REQUIRED_TEXT.get(name, ()))
        sound &= all(isinstance(fields.get(key, ""), str) for key in _OPTIONAL_TEXT.get(name, ()))
        sound &= name != NETWORK or isinstance(fields.get("port"), int)
        try:
            canonical_json(fields)
        except InvalidInput:
            sound = False
        workspace = workspace.resolve()
        base = workspace if cwd is None else resolved(cwd) or cwd
        return cls(name, fields, workspace, base, sound and isinstance(given, Mapping))

    def text(self, key: str) -> str:
        """The field's text, "" if it is missing or something else."""
        value = self.given.get(key)
        return value if isinstance(value, str) else ""

    @cached_property
    def digest(self) -> str:
        """Of what a sound call does: the exact command, the exact file, else the exact input."""
        if self.name == "Bash":
            return digest({key: value for key, value in self.given.items() if key not in _UNSEEN_BASH_FIELDS})
        file = self.one_file
        return digest(self.given) if file is None else digest({"path": self.portable(file)})

    @cached_property
    def spots(self) -> "_Spots":
        return _spots(self)

    @property
    def one_file(self) -> Path | None:
        """The file this call reads or writes, if it is a tool for one file and there is no doubt which."""
        if self.name not in _PATH_FIELD or self.name in _SEARCHING or not self.spots.certain:
            return None
        return next(iter(self.spots.real)) if len(self.spots.real) == 1 else None

    def portable(self, file: Path) -> str:
        """`./x` inside the workspace, else `//x`."""
        return f"./{file.relative_to(self.workspace)}" if file.is_relative_to(self.workspace) else f"/{file}"

    def stays_inside(self) -> bool:
        return self.spots.certain and all(spot.is_relative_to(self.workspace) for spot in self.spots.real)


def _first(policy: PermissionPolicy, name: PolicyName, call: _Call) -> Rule | None:
    return next((rule for rule in policy.rules if rule.policy == name and _matches(rule, call)), None)


def _by_default(default: PolicyName | None, call: _Call) -> Verdict:
    if default == "always_deny":
        return Verdict.deny
    if default == "always_ask" or not call.sound or call.name in _QUESTIONS:
        return Verdict.ask
    if call.name == NETWORK:
        return Verdict.ask
    if default == "always_allow" or call.name in _HARMLESS:
        return Verdict.allow
    if call.name in _SPAWNING:
        return Verdict.allow if call.given.keys() <= _SPAWN_FIELDS else Verdict.ask
    return Verdict.allow if call.name in _READING and call.stays_inside() else Verdict.ask


def _allow_rule(text: str, digest: str | None = None) -> Rule | None:
    try:
        return Rule(rule=text, policy="always_allow", digest=digest)
    except ValueError:  # the notation cannot say it
        return None


def _narrow_text(call: _Call) -> str | None:
    """A rule for what this call does and nothing else, or None where the notation would say more."""
    if call.name == "Bash":
        return f"Bash({call.text('command')})" if _is_simple_command(call.text("command")) else None
    if call.name == "WebFetch":
        return f"WebFetch(domain:{host})" if (host := clear_host(call.text("url"))) else None
    if call.name == NETWORK:
        return f"{NETWORK}({shown_host(call.text('host'), call.given['port'])})"
    if re.fullmatch(r"mcp__.+__[^*]+", call.name):
        return call.name
    file = call.portable(call.one_file) if call.one_file else None
    return None if file is None or GLOB_SYNTAX & set(file) else f"{call.name}({file})"


def _matches(rule: Rule, call: _Call) -> bool:
    allows = rule.policy == "always_allow"
    if not call.sound and (allows or rule.digest is not None):
        return False
    if rule.digest is not None:
        return rule.rule == call.name and rule.digest == call.digest
    tool, spec = _parse(rule.rule)
    if not _names_tool(tool, call.name, allows=allows) or (allows and _is_protected(spec, call)):
        return False
    return spec is None or _spec_matches(tool, spec, rule.policy, call)


def _names_tool(tool: str, name: str, *, allows: bool) -> bool:
    if not tool.startswith("mcp__"):
        return name in (_FAMILIES if allows else _GUARDED_FAMILIES).get(tool, {tool})
    server = tool.removesuffix("__*")
    if name == server or not name.startswith(f"{server}__"):
        return name == tool
    if not allows:
        return True
    # `mcp__a__b` is tool b of a, and `mcp__a__b__c` tool c of a server `a__b` that nobody allowed; so is, for
    # the rule `mcp__a`, whatever has a second `__`.
    is_server = tool != server or "__" not in tool.removeprefix("mcp__")
    return is_server and "__" not in "_" + name.removeprefix(f"{server}__")


def _spec_matches(tool: str, spec: str, policy: PolicyName, call: _Call) -> bool:
    allows = policy == "always_allow"
    if tool == "Bash":
        return _bash_allows(spec, call) if allows else _bash_guards(spec, call)
    if tool == "WebFetch":
        return web_matches(spec, call.text("url"), allows=allows)
    if tool == NETWORK:
        port = call.given.get("port")
        return isinstance(port, int) and covers(spec, call.text("host"), port, any_port=not allows)
    if allows:
        return _path_allows(spec, call)
    return _path_guards(spec, call, searches_below=policy == "always_ask")


# -- Bash


def _bash_pattern(spec: str, *, allows: bool) -> tuple[str, bool]:
    """The pattern's text, and whether it is a prefix. Guards always are: `rm -rf /*` just loses its star."""
    for ending in (":*", " *") if allows else (":*", " *", "*"):
        if spec.endswith(ending):
            return spec.removesuffix(ending), True
    return spec, False


def _is_simple_command(command: str) -> bool:
    """One program and its arguments, with nothing in it that a shell could take for more, quoted or not."""
    if not command.isprintable() or _SHELL_SYNTAX & set(command):
        return False
    return "=" not in command.split(" ", 1)[0]


def _bash_allows(spec: str, call: _Call) -> bool:
    command = call.text("command")
    if not call.given.keys() <= _PLAIN_BASH_FIELDS or not _is_simple_command(command):
        return False
    program = spec.split(" ", 1)[0]
    if call.cwd != call.workspace and "/" in program and not program.startswith(("/", "~")):
        return False  # `./run.sh` is another file there
    pattern, is_prefix = _bash_pattern(spec, allows=True)
    return command == pattern or (is_prefix and command.startswith(f"{pattern} "))


def _bash_guards(spec: str, call: _Call) -> bool:
    return may_run(call.text("command"), _bash_pattern(spec, allows=False)[0])


# -- paths


@dataclass(frozen=True)
class _Spots:
    """Where a call's paths lead. `certain`: every path could be read in one way only."""

    written: frozenset[Path]
    real: frozenset[Path]
    certain: bool


def _spots(call: _Call) -> _Spots:
    base = call.text(_PATH_FIELD.get(call.name, "")) or "."
    globs = _globs(call)
    certain = all(_is_plain(text) for text in (base, *globs))
    written: set[Path] = set()
    real: set[Path] = set()
    for glob in globs if call.name == "Glob" else ("", *globs):
        fixed, rest = split_glob(glob.split("/"))
        certain &= not may_climb(glob, rest)
        for path in path_readings(os.path.join(base, *fixed) if glob else base, call.cwd):
            written.add(Path(os.path.normpath(path)))
            if end := resolved(Path(path)):
                real.add(end)
            else:
                certain = False
    return _Spots(frozenset(written), frozenset(real), certain)


def _globs(call: _Call) -> list[str]:
    if call.name == "Glob":
        return [call.text("pattern")]
    return [glob.removeprefix("!") for glob in call.text("glob").split()] if call.name == "Grep" else []


def _is_plain(path: str) -> bool:
    """Whether Node, Python and the kernel read it alike: the CLI trims paths and normalizes their Unicode."""
    return path.isprintable() and "\\" not in path and path == unicodedata.normalize("NFC", path.strip())


def _path_allows(spec: str, call: _Call) -> bool:
    base, parts = path_pattern(spec, call.workspace)
    if call.name in _SEARCHING and parts[-1] != "**":
        return False  # a search reaches all below
    if call.name not in _SEARCHING and parts[-1] == "**":
        parts = [*parts, "*"]  # gitignore's `src/**` is what is inside src, not src
    return call.spots.certain and all(is_below(spot, base, parts) for spot in call.spots.real)


def _is_protected(spec: str | None, call: _Call) -> bool:
    """Whether the call edits a place that an allow rule must name."""
    named = set((spec or "").split("/"))
    places = (set(call.portable(spot).lower().split("/")) for spot in call.spots.real)
    return call.name in _EDITING and any(place & _PROTECTED - named for place in places)


def _path_guards(spec: str, call: _Call, *, searches_below: bool) -> bool:
    """`searches_below`: a search that may reach into the guarded place counts too.

    Deny rules do without it, because the CLI keeps its searches out of what it is told to deny (measured on
    2.1.330); nothing but this keeps them out of what must be asked for.
    """
    base, parts = path_pattern(spec, call.workspace)
    if len(parts) == 1 and not spec.startswith(("./", "//", "~")):
        parts = ["**", *parts]
    fixed, rest = split_glob(parts)
    anchor = base.joinpath(*fixed)
    spots = {folded(spot) for spot in call.spots.written | call.spots.real}
    below = [part.casefold() for part in (*rest, "**")]
    for start in {folded(anchor), folded(resolved(anchor) or anchor)}:
        if any(is_below(spot, start, below) for spot in spots):
            return True
        if searches_below and call.name == "Grep" and any(overlap(start, spot) for spot in spots):
            return True
        if (
            searches_below
            and call.name == "Glob"
            and set(rest) <= {"**"}
            and _glob_reaches(call, spots, start)
        ):
            return True
    return False


def _glob_reaches(call: _Call, spots: Iterable[Path], start: Path) -> bool:
    """Whether the pattern of a search for names may match something in the folder `start`."""
    _, rest = split_glob(call.text("pattern").split("/"))
    return any(
        start.is_relative_to(spot) and matches_within(rest, start.relative_to(spot).parts) for spot in spots
    )
