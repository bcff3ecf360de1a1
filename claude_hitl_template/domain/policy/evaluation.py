"""Evaluates a policy for one tool call. The package's docstring describes what a rule matches."""

import os.path
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from claude_hitl_template.domain import missing_dependency
from claude_hitl_template.domain.canonical_json import canonical_json, digest, shown_host
from claude_hitl_template.domain.policy.bash import may_run
from claude_hitl_template.domain.policy.lines import parts
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
from claude_hitl_template.domain.policy.rules import (
    PermissionPolicy,
    PolicyName,
    Rule,
    bash_pattern,
    is_simple_command,
    parse_rule,
)
from claude_hitl_template.domain.policy.tools import (
    EDITING,
    FAMILIES,
    GUARDED_FAMILIES,
    HARMLESS,
    NETWORK,
    OPTIONAL_TEXT,
    PATH_FIELD,
    PROTECTED,
    QUESTIONS,
    READING,
    REQUIRED_TEXT,
    SEARCHING,
    SPAWN_FIELDS,
    SPAWNING,
)
from claude_hitl_template.domain.policy.web import clear_host, covers, web_matches
from claude_hitl_template.errors import InvalidInput

# Any other field (`dangerouslyDisableSandbox`, or what a later CLI adds) was not what the pattern promised.
_PLAIN_BASH_FIELDS = frozenset({"command", "description", "timeout", "run_in_background"})
# The model writes these differently each time; they do not change what runs.
_UNSEEN_BASH_FIELDS = frozenset({"description", "timeout"})


JOINED = " && "  # no Bash allow rule contains it


class Verdict(StrEnum):
    allow = "allow"
    ask = "ask"
    deny = "deny"


@dataclass(frozen=True)
class Evaluation:
    """A verdict, and its `source`: the text of the rule that decided, or "default".

    For a command line whose commands are allowed one by one, `source` is the text of those rules, joined by JOINED.
    `rule` is the one that asked or denied.
    """

    verdict: Verdict
    source: str
    rule: Rule | None = field(default=None, compare=False)


def evaluate(
    policy: PermissionPolicy,
    tool_name: str,
    tool_input: Mapping[str, Any],
    workspace: Path,
    cwd: Path | None = None,
) -> Evaluation:
    """Evaluates the policy for one call. Never raises for a model's input, and never allows a malformed one.

    `workspace` is the folder that relative patterns start from; `cwd` the one the call runs in, where its relative
    paths start: None for the workspace. Reads the file system only to follow symlinks.
    """
    call = _Call.read(tool_name, tool_input, workspace, cwd)
    if denied := _first(policy, "always_deny", call):
        return Evaluation(Verdict.deny, str(denied), denied)
    if tool_name == missing_dependency.FULL_NAME:  # it only tells a human something
        return Evaluation(Verdict.allow, "built in")
    if asked := _first(policy, "always_ask", call):
        return Evaluation(Verdict.ask, str(asked), asked)
    if allowed := _first(policy, "always_allow", call):
        return Evaluation(Verdict.ask if call.name in QUESTIONS else Verdict.allow, str(allowed))
    if each := _each_part(policy, call):
        return Evaluation(Verdict.allow, JOINED.join(dict.fromkeys(map(str, each))))
    server, _ = mcp_parts(tool_name)
    default = policy.servers.get(server) or policy.default
    return Evaluation(_by_default(default, call), "default")


def matching(
    rules: Sequence[Rule],
    tool_name: str,
    tool_input: Mapping[str, Any],
    workspace: Path,
    cwd: Path | None = None,
) -> list[bool]:
    """Whether each of the rules matches the call, for itself; see `evaluate`."""
    call = _Call.read(tool_name, tool_input, workspace, cwd)
    return [
        _matches(rule, call)
        or (rule.policy == "always_allow" and bool(_each_part(PermissionPolicy(rules=(rule,)), call)))
        for rule in rules
    ]


def targets(
    tool_name: str, tool_input: Mapping[str, Any], workspace: Path, cwd: Path | None = None
) -> tuple[str, ...]:
    """Where the paths of this call lead now, links followed: `./x` inside the workspace, else `//x`. Sorted.

    Empty for a tool that takes no path, and for paths that lead nowhere. A hard link can't be told from its file.
    """
    call = _Call.read(tool_name, tool_input, workspace, cwd)
    if tool_name not in PATH_FIELD:
        return ()
    return tuple(sorted(call.portable(path) for path in call.paths.real))


def path_field(tool_name: str) -> str | None:
    """The field of a tool's input that holds its path; None for a tool that takes none."""
    return PATH_FIELD.get(tool_name)


def written_targets(
    tool_name: str, tool_input: Mapping[str, Any], workspace: Path, cwd: Path | None = None
) -> tuple[str, ...]:
    """What `targets` says of these paths if nothing below the folder is a link."""
    call = _Call.read(tool_name, tool_input, workspace, cwd)
    return tuple(sorted(call.portable(path) for path in call.paths.written))


def from_folder(tool_name: str, tool_input: Mapping[str, Any], cwd: Path) -> dict[str, Any]:
    """The same input with a relative path made absolute, so that it names the same file whatever the CLI's folder is."""
    field = PATH_FIELD.get(tool_name, "")
    path = tool_input.get(field)
    if not isinstance(path, str) or not path or not _is_plain(path) or path.startswith(("/", "~")):
        return dict(tool_input)
    return {**tool_input, field: os.path.normpath(cwd / path)}


def portable_rules(rules: Sequence[Rule]) -> tuple[Rule, ...]:
    """The remembered `rules` that hold in every folder: a command, or an exact input, may have another meaning in
    another folder than the one it was allowed in."""
    bound = (r for r in rules if r.rule.startswith("Bash(") or (r.digest and r.rule not in PATH_FIELD))
    kept = set(rules) - set(bound)
    return tuple(r for r in rules if r in kept)


def is_harmless(tool_name: str) -> bool:
    """Whether a tool changes only the session's own state, with any input: no human is asked about it."""
    return tool_name in HARMLESS


def mcp_parts(name: str) -> tuple[str, str]:
    """("server", "tool") of "mcp__server__tool"; ("", name) for a built-in tool."""
    if not name.startswith("mcp__"):
        return "", name
    server, _, tool = name.removeprefix("mcp__").partition("__")
    return server, tool


def remember_rule(tool_name: str, tool_input: Mapping[str, Any], workspace: Path) -> Rule:
    """The narrowest useful allow rule: the one that "allow and remember" records for this call.

    Bash: this exact command. A tool that reads or writes one file: this file, any content (relative to the
    workspace if inside it, because the workspace moves between nodes). WebFetch: the host. MCP: the tool.
    Otherwise: this exact input. Where the notation cannot say that, the rule has a digest.
    Raises InvalidInput(field="remember") for malformed calls and for questions, which no rule can answer.
    """
    call = _Call.read(tool_name, tool_input, workspace)
    if not call.sound or call.name in QUESTIONS:
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
    if call.name in QUESTIONS:
        raise InvalidInput(f"{call.name} is a question to a human and is asked every time", "remember")
    if not _matches(rule, call):
        raise InvalidInput(
            f"`{rule}` does not match this call; correct it, or allow the call once", "remember"
        )


def compile_settings(
    policy: PermissionPolicy, tools: Sequence[str], mcp_servers: Sequence[str]
) -> dict[str, Any]:
    """`{"permissions": {"ask": [...], "deny": [...]}}` for the CLI's `--settings`.

    Every tool is under `ask`, so that the CLI runs none on its own authority, not even while it replays a
    deferred call before the hooks are registered: the gate decides. There is never an allow list.
    """
    # The CLI spells server names in tool names like this.
    servers = [f"mcp__{re.sub('[^a-zA-Z0-9_-]', '_', server)}" for server in mcp_servers]
    ask = dict.fromkeys([*tools, *servers])
    denied = (r.rule for r in policy.rules if r.policy == "always_deny" and r.digest is None)
    deny = dict.fromkeys(
        rule for rule in denied if parse_rule(rule)[0] != NETWORK
    )  # the CLI knows no such tool
    return {"permissions": {"ask": list(ask), "deny": list(deny)}}


# -- one call, read once


@dataclass(frozen=True)
class _Call:
    """A tool call, parsed. `sound` is False if its input does not fit the tool."""

    name: str
    given: Mapping[str, Any]
    workspace: Path
    cwd: Path
    sound: bool

    @classmethod
    def read(cls, name: str, given: object, workspace: Path, cwd: Path | None = None) -> Self:
        fields: dict[str, Any] = dict(given) if isinstance(given, Mapping) else {}
        sound = all(isinstance(fields.get(key), str) and fields[key] for key in REQUIRED_TEXT.get(name, ()))
        sound &= all(isinstance(fields.get(key, ""), str) for key in OPTIONAL_TEXT.get(name, ()))
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

    def with_command(self, command: str) -> Self:
        return replace(self, given={**self.given, "command": command})

    @cached_property
    def digest(self) -> str:
        """Digest of a sound call's effect: the exact command, the exact file, else the exact input."""
        if self.name == "Bash":
            return digest({key: value for key, value in self.given.items() if key not in _UNSEEN_BASH_FIELDS})
        file = self.one_file
        return digest(self.given) if file is None else digest({"path": self.portable(file)})

    @cached_property
    def paths(self) -> "_CallPaths":
        return _call_paths(self)

    @property
    def one_file(self) -> Path | None:
        """The file this call reads or writes, if it is a tool for one file and there is no doubt which."""
        if self.name not in PATH_FIELD or self.name in SEARCHING or not self.paths.certain:
            return None
        return next(iter(self.paths.real)) if len(self.paths.real) == 1 else None

    def portable(self, file: Path) -> str:
        """`./x` inside the workspace, else `//x`."""
        return f"./{file.relative_to(self.workspace)}" if file.is_relative_to(self.workspace) else f"/{file}"

    def stays_inside(self) -> bool:
        return self.paths.certain and all(path.is_relative_to(self.workspace) for path in self.paths.real)


def _first(policy: PermissionPolicy, name: PolicyName, call: _Call) -> Rule | None:
    return next((rule for rule in policy.rules if rule.policy == name and _matches(rule, call)), None)


def _each_part(policy: PermissionPolicy, call: "_Call") -> list[Rule]:
    """The rules that allow the commands of a line, one for each; [] unless every command is allowed."""
    if call.name != "Bash" or not call.sound:
        return []
    found: list[Rule] = []
    for part in parts(call.text("command")):
        rule = _first(policy, "always_allow", call.with_command(part.command))
        if rule is None:
            return []
        found.append(rule)
    return found


def _by_default(default: PolicyName | None, call: _Call) -> Verdict:
    if default == "always_deny":
        return Verdict.deny
    if default == "always_ask" or not call.sound or call.name in QUESTIONS:
        return Verdict.ask
    if call.name == NETWORK:
        return Verdict.ask
    if default == "always_allow" or call.name in HARMLESS:
        return Verdict.allow
    if call.name in SPAWNING:
        return Verdict.allow if call.given.keys() <= SPAWN_FIELDS else Verdict.ask
    return Verdict.allow if call.name in READING and call.stays_inside() else Verdict.ask


def _allow_rule(text: str, digest: str | None = None) -> Rule | None:
    try:
        return Rule(rule=text, policy="always_allow", digest=digest)
    except ValueError:  # the notation cannot say it
        return None


def _narrow_text(call: _Call) -> str | None:
    """A rule for what this call does and nothing else, or None where the notation would say more."""
    if call.name == "Bash":
        return f"Bash({call.text('command')})" if is_simple_command(call.text("command")) else None
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
    tool, spec = parse_rule(rule.rule)
    if not _names_tool(tool, call.name, allows=allows) or (allows and _is_protected(spec, call)):
        return False
    return spec is None or _spec_matches(tool, spec, rule.policy, call)


def _names_tool(tool: str, name: str, *, allows: bool) -> bool:
    if not tool.startswith("mcp__"):
        return name in (FAMILIES if allows else GUARDED_FAMILIES).get(tool, {tool})
    server = tool.removesuffix("__*")
    if name == server or not name.startswith(f"{server}__"):
        return name == tool
    if not allows:
        return True
    # `mcp__a__b` is tool b of a, and `mcp__a__b__c` tool c of a server `a__b` that no rule allows; so is, for
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


def _bash_allows(spec: str, call: _Call) -> bool:
    command = call.text("command")
    if not call.given.keys() <= _PLAIN_BASH_FIELDS or not is_simple_command(command):
        return False
    program = spec.split(" ", 1)[0]
    if call.cwd != call.workspace and "/" in program and not program.startswith(("/", "~")):
        return False  # `./run.sh` is another file there
    pattern, is_prefix = bash_pattern(spec, allows=True)
    return command == pattern or (is_prefix and command.startswith(f"{pattern} "))


def _bash_guards(spec: str, call: _Call) -> bool:
    return may_run(call.text("command"), bash_pattern(spec, allows=False)[0])


# -- paths


@dataclass(frozen=True)
class _CallPaths:
    """Where a call's paths lead. `certain`: every path could be read in one way only."""

    written: frozenset[Path]
    real: frozenset[Path]
    certain: bool


def _call_paths(call: _Call) -> _CallPaths:
    base = call.text(PATH_FIELD.get(call.name, "")) or "."
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
    return _CallPaths(frozenset(written), frozenset(real), certain)


def _globs(call: _Call) -> list[str]:
    if call.name == "Glob":
        return [call.text("pattern")]
    return [glob.removeprefix("!") for glob in call.text("glob").split()] if call.name == "Grep" else []


def _is_plain(path: str) -> bool:
    """Whether Node, Python and the kernel read it alike: the CLI trims paths and normalizes their Unicode."""
    return path.isprintable() and "\\" not in path and path == unicodedata.normalize("NFC", path.strip())


def _path_allows(spec: str, call: _Call) -> bool:
    base, parts = path_pattern(spec, call.workspace)
    if call.name in SEARCHING and parts[-1] != "**":
        return False  # a search reaches all below
    if call.name not in SEARCHING and parts[-1] == "**":
        parts = [*parts, "*"]  # gitignore's `src/**` is what is inside src, not src
    return call.paths.certain and all(is_below(path, base, parts) for path in call.paths.real)


def _is_protected(spec: str | None, call: _Call) -> bool:
    """Whether the call edits a place that an allow rule must name."""
    named = set((spec or "").split("/"))
    places = (set(call.portable(path).lower().split("/")) for path in call.paths.real)
    return call.name in EDITING and any(place & PROTECTED - named for place in places)


def _path_guards(spec: str, call: _Call, *, searches_below: bool) -> bool:
    """`searches_below`: a search that may reach into the guarded place counts too.

    Deny rules do without it, because the CLI excludes denied paths from its searches (measured on
    2.1.330); nothing but this keeps them out of what must be asked for.
    """
    base, parts = path_pattern(spec, call.workspace)
    if len(parts) == 1 and not spec.startswith(("./", "//", "~")):
        parts = ["**", *parts]
    fixed, rest = split_glob(parts)
    anchor = base.joinpath(*fixed)
    paths = {folded(path) for path in call.paths.written | call.paths.real}
    below = [part.casefold() for part in (*rest, "**")]
    for start in {folded(anchor), folded(resolved(anchor) or anchor)}:
        if any(is_below(path, start, below) for path in paths):
            return True
        if searches_below and call.name == "Grep" and any(overlap(start, path) for path in paths):
            return True
        if (
            searches_below
            and call.name == "Glob"
            and set(rest) <= {"**"}
            and _glob_reaches(call, paths, start)
        ):
            return True
    return False


def _glob_reaches(call: _Call, paths: Iterable[Path], start: Path) -> bool:
    """Whether the pattern of a search for names may match something in the folder `start`."""
    _, rest = split_glob(call.text("pattern").split("/"))
    return any(
        start.is_relative_to(path) and matches_within(rest, start.relative_to(path).parts) for path in paths
    )
