"""Command lines of several simple commands, of which allow rules may speak one by one.

A line is taken apart only if every shell reads it as simple commands joined by `&&`, `||`, `;`, `|` or line ends, none of
which changes the shell for those after it (`cd`, `export`, `source`, ...). Then running the line does no more than running
its parts one by one, and allow rules may speak of each part. Behind a `|` stand only programs that take their input as data.
"""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from claude_hitl_template.domain.policy.bash import Segment, segments
from claude_hitl_template.domain.policy.rules import is_simple_command

_JOIN = re.compile(r"[ \t\n]*(?:(&&|\|\||;|\|)[ \t\n]*|\n[ \t\n]*)")
_END = re.compile(r"[ \t\n]*;?[ \t\n]*")
# Redirections that write no file: errors to where the output goes, either of them to nowhere.
_DISCARDS = re.compile(r"(?:[ \t]+(?:2>&1|[12]?>[ \t]?/dev/null))+$")

# Words that begin something else than a simple command, or run one in another way.
_RESERVED = frozenset({
    "if", "then", "else", "elif", "fi", "while", "until", "do", "done", "for", "select", "case", "in", "esac",
    "function", "time", "coproc", "repeat", "foreach", "end", "command", "builtin", "exec", "nocorrect",
    "noglob", "-", "eval",
})  # fmt: skip
# Builtins of bash, dash and zsh that may change the shell in which the rest of the line runs, or end it.
_CHANGES_SHELL = frozenset({
    ".", "alias", "autoload", "bg", "bind", "bindkey", "break", "caller", "cd", "chdir", "compgen",
    "complete", "compopt", "continue", "declare", "dirs", "disown", "emulate", "enable", "exit", "export",
    "fc", "fg", "float", "functions", "getopts", "hash", "history", "integer", "jobs", "let", "limit",
    "local", "logout", "mapfile", "popd", "private", "pushd", "pushln", "r", "read", "readarray", "readonly",
    "rehash", "return", "sched", "set", "setopt", "shift", "shopt", "source", "suspend", "trap", "ttyctl",
    "typeset", "ulimit", "umask", "unalias", "unfunction", "unhash", "unlimit", "unset", "unsetopt", "vared",
    "wait", "zcompile", "zle", "zmodload", "zparseopts", "zstyle",
})  # fmt: skip
# They neither run what they read nor write it to a file.
_FILTERS = frozenset({
    "cat", "head", "tail", "wc", "sort", "uniq", "cut", "tr", "grep", "egrep", "fgrep", "rg", "nl", "tac",
    "rev", "column", "fold", "fmt", "jq",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class Part:
    """One simple command of a line. `command` is its text without redirections that only discard output."""

    command: str
    start: int
    end: int


def parts(line: str) -> tuple[Part, ...]:
    """The simple commands of a line, in their order. () unless it is certain that there are several, and nothing else."""
    if not set(line) & set("&|;\n"):
        return ()
    found = segments(line)
    if len(found) < 2 or not _are_joined(line, found):
        return ()
    taken = tuple(Part(_DISCARDS.sub("", one.text), one.start, one.end) for one in found)
    joins = (None, *(_join(line, one, other) for one, other in pairwise(found)))
    return taken if all(map(_is_sure, taken, joins)) else ()


def _are_joined(line: str, found: Sequence[Segment]) -> bool:
    if line[: found[0].start].strip(" \t\n") or not _END.fullmatch(line[found[-1].end :]):
        return False
    return all(
        one.end <= other.start and _JOIN.fullmatch(line[one.end : other.start])
        for one, other in pairwise(found)
    )


def _join(line: str, one: Segment, other: Segment) -> str | None:
    return match[1] if (match := _JOIN.fullmatch(line[one.end : other.start])) else None


def _is_sure(part: Part, join: str | None) -> bool:
    if not is_simple_command(part.command):
        return False
    try:
        program, *rest = shlex.split(part.command)
    except ValueError:  # an open quote, or nothing
        return False
    if program in _RESERVED | _CHANGES_SHELL:
        return False
    if program in ("print", "printf") and any(word.startswith("-") for word in rest):  # `printf -v PATH`
        return False
    return join != "|" or program in _FILTERS
