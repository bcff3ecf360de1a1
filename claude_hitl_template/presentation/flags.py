"""Marks what an approver must not overlook in a call: by fixed rules over its input, without a model.

A mark is a reason to look closely. That there is none says nothing about a call.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from claude_hitl_template.domain.canonical_json import shown_host
from claude_hitl_template.domain.policy import path_field
from claude_hitl_template.domain.policy.bash import segments
from claude_hitl_template.domain.policy.shell import UNKNOWN, NotUnderstood, Run, read
from claude_hitl_template.presentation.text import hidden_count, is_host

type Level = Literal["danger", "warning", "note"]
MAX_NAMED = 5  # files or hosts that one mark names
MAX_SEGMENTS = 50
HIDDEN = "hidden characters"

_DELETES = ("rm", "rmdir", "unlink", "shred", "truncate", "dd", "mkfs", "wipefs", "git clean", "git reset")
_NETWORK = (
    *("curl", "wget", "ssh", "scp", "sftp", "rsync", "nc", "ncat", "telnet", "ftp"),
    *("git push", "git pull", "git fetch", "git clone", "git ls-remote", "git submodule"),
    *(
        "npm install",
        "npm ci",
        "npm publish",
        "npx",
        "pnpm",
        "yarn",
        "pip install",
        "pip download",
        "pipx",
        "uv",
    ),
    *(
        "apt",
        "apt-get",
        "brew",
        "cargo install",
        "go get",
        "gem",
        "docker pull",
        "docker push",
        "podman pull",
    ),
    *("gh", "glab", "aws", "gcloud", "az", "kubectl"),
)
_READS = frozenset({
    *("cat", "head", "tail", "less", "more", "grep", "egrep", "rg", "ag", "wc", "diff", "cmp", "stat", "file", "ls", "tree"),
    *("jq", "find", "git", "sha256sum", "md5sum", "du", "test", "[", "echo", "printf", "cd"),
})  # fmt: skip
_UNCLEAR = "what it runs cannot be known before"
_ELEVATED = ("sudo", "doas", "su", "pkexec")
_PROGRAMS: tuple[tuple[Level, str, tuple[str, ...]], ...] = (
    ("danger", "deletes or overwrites", _DELETES),
    ("danger", "runs as another user", _ELEVATED),
    ("warning", "reaches the network", _NETWORK),
)
_FIND_DELETES = re.compile(r"\bfind\b.*\s-delete\b", re.DOTALL)
_HOST_IN_TEXT = re.compile(
    r"\b(?:https?|wss?|ftp|ssh|git)://(?:[^\s/@'\"]*@)?([A-Za-z0-9.-]+(?::\d+)?)|\b\w+@([\w.-]+\.\w+):"
)
_NO_FILES = re.compile(r"/dev/(null|stdin|stdout|stderr|tty|fd/\d+)$")
# Files that are run, or change what is run, by something else later; and by what.
_LATER: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"(^|/)(\.git/(hooks/|config$)|\.husky/|\.pre-commit-config\.ya?ml$|\.gitattributes$)"), "git"),
    (re.compile(r"(^|/)(\.claude(/|\.json$)|\.mcp\.json$|CLAUDE(\.local)?\.md$)"), "Claude Code"),
    (
        re.compile(
            r"(^|/)(\.github/(workflows|actions)/|\.gitlab-ci\.ya?ml$|\.circleci/|\.drone\.ya?ml$|Jenkinsfile$|"
            r"azure-pipelines\.ya?ml$|bitbucket-pipelines\.ya?ml$|\.ci/|\.buildkite/)"
        ),
        "CI",
    ),
    (re.compile(r"(^|/)(package\.json|\.npmrc|\.yarnrc(\.yml)?|pnpm-workspace\.yaml)$"), "npm scripts"),
    (
        re.compile(
            r"(^|/)(Makefile|GNUmakefile|[Jj]ustfile|CMakeLists\.txt|setup\.(py|cfg)|pyproject\.toml|conftest\.py|"
            r"noxfile\.py|tox\.ini|Dockerfile|docker-compose\.ya?ml|Gruntfile\.js|build\.gradle(\.kts)?|build\.rs)$"
        ),
        "builds and tests",
    ),
    (re.compile(r"(^|/)(\.vscode/|\.idea/|\.envrc$|\.devcontainer/)"), "editors and shells"),
    (
        re.compile(
            r"(^|/)(\.(bash|zsh)(rc|_profile|env)|\.profile|\.bash_login|crontab|authorized_keys)$|"
            r"/etc/(cron|systemd|profile|rc)|\.config/(systemd|autostart)/"
        ),
        "login and the system",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Flag:
    """`text` says what was found, `detail` where: text from outside."""

    level: Level
    text: str
    detail: str = ""


@dataclass(frozen=True)
class Segment:
    """A simple command of a command line; `start` and `end` are places in it, in characters.

    `asked`: this one made the line ask, because of `rule` ("default": no rule speaks of it).
    """

    text: str
    start: int
    end: int
    flags: tuple[Flag, ...] = ()
    asked: bool = False
    rule: str = ""


@dataclass(frozen=True)
class Marks:
    """`segments`: the simple commands of a command, none if it could not be split."""

    flags: tuple[Flag, ...]
    segments: tuple[Segment, ...] = ()


def marks(
    tool_name: str,
    given: Mapping[str, Any],
    *,
    folder: str | None = ".",
    targets: Sequence[str] | None = None,
) -> Marks:
    """The marks of one call.

    Args:
        tool_name: The tool's full name.
        given: The call's input, of any shape.
        folder: The folder it runs in, as `Approval.folder` has it.
        targets: Where its paths lead, as `Approval.targets` has them.
    """
    found = _Found()
    parts: tuple[Segment, ...] = ()
    command = given.get("command")
    if tool_name in ("Bash", "Monitor") and isinstance(command, str):
        parts = _of_command(command, found)
    if is_host(given):
        found.add("warning", "opens the network", shown_host(given["host"], given["port"]))
    elif tool_name in ("WebFetch", "WebSearch"):
        found.add("warning", "reads from the network", *_hosts(str(given.get("url", ""))))
    _of_paths(tool_name, given, targets, found)
    if folder is not None and folder.startswith("/"):
        found.add("danger", "runs outside of the workspace", folder)
    if given.get("edit_mode") == "delete":
        found.add("danger", "deletes")
    if given.get("run_in_background") is True:
        found.add("warning", "goes on in the background")
    if given.get("dangerouslyDisableSandbox"):
        found.add("danger", "asks to leave the sandbox")
    hidden = sum(map(hidden_count, _texts(given)))
    if hidden:
        found.add("danger", HIDDEN, f"{hidden}, shown as escapes")
    return Marks(found.flags(), parts)


@dataclass
class _Found:
    """Collects marks; those of one kind are one mark with several details."""

    kinds: dict[tuple[Level, str], dict[str, None]] = field(
        default_factory=dict[tuple[Level, str], dict[str, None]]
    )

    def add(self, level: Level, text: str, *details: str) -> None:
        self.kinds.setdefault((level, text), {}).update(dict.fromkeys(details))

    def flags(self) -> tuple[Flag, ...]:
        made = [Flag(level, text, _listed(list(details))) for (level, text), details in self.kinds.items()]
        return tuple(sorted(made, key=lambda flag: flag.level))


def _listed(details: Sequence[str]) -> str:
    more = len(details) - MAX_NAMED
    return ", ".join(details[:MAX_NAMED]) + (f" and {more} more" if more > 0 else "")


# -- commands


def _of_command(command: str, found: _Found) -> tuple[Segment, ...]:
    try:
        runs = read(command).runs
    except NotUnderstood:
        found.add("danger", "cannot be split into its commands: read all of it")
        found.add("warning", "reaches the network", *_hosts(command)) if _hosts(command) else None
        return ()
    unclear = {(s.start, s.end) for s in segments(command, "\x00")}
    notes: dict[tuple[int, int], _Found] = {}
    for place in unclear:
        found.add("danger", _UNCLEAR)
        notes.setdefault(place, _Found()).add("danger", _UNCLEAR)
    for level, text, programs in _PROGRAMS:
        for place in _places(command, programs) - unclear:
            details = _hosts(command[slice(*place)]) if programs is _NETWORK else []
            notes.setdefault(place, _Found()).add(level, text)
            found.add(level, text, *details)
    if _FIND_DELETES.search(command):
        found.add("danger", "deletes or overwrites")
    for run in runs:
        _of_run(run, found)
    parts = segments(command)[:MAX_SEGMENTS]
    empty = _Found()
    return tuple(Segment(p.text, p.start, p.end, notes.get((p.start, p.end), empty).flags()) for p in parts)


def _places(command: str, programs: Iterable[str]) -> set[tuple[int, int]]:
    return {(s.start, s.end) for program in programs for s in segments(command, program)}


def _of_run(run: Run, found: _Found) -> None:
    for word in [*run.words[1:], *run.writes]:
        if UNKNOWN & set(word) or _NO_FILES.match(word):
            continue
        if word.startswith(("/", "~", "../")) or "/../" in word:
            found.add("warning", "names files outside of its folder", word)
    only_reads = bool(run.words) and run.words[0].rpartition("/")[2] in _READS
    for word in run.writes if only_reads else [*run.words[1:], *run.writes]:
        _of_later(word, found)


def _hosts(text: str) -> list[str]:
    return list(dict.fromkeys(match[1] or match[2] for match in _HOST_IN_TEXT.finditer(text)))


# -- files


def _of_paths(tool_name: str, given: Mapping[str, Any], targets: Sequence[str] | None, found: _Found) -> None:
    name = path_field(tool_name)
    written = given.get(name) if name else None
    if not isinstance(written, str):
        return
    for target in targets or ():
        if target.startswith("//"):
            found.add("danger", "outside of the workspace", target[1:])
    if tool_name in ("Write", "Edit", "MultiEdit", "NotebookEdit"):
        for path in targets or (written,):
            _of_later(path.removeprefix("./"), found)


def _of_later(path: str, found: _Found) -> None:
    for pattern, by in _LATER:
        if pattern.search(path):
            found.add("warning", f"run or read later by {by}", path)


def _texts(given: object) -> Iterator[str]:
    waiting: list[object] = [given]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, (list, tuple)):
            waiting += value
