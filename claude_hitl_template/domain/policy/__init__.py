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
    whatever git can be told to run. A line of such commands (`policy.lines`) is allowed if each of them is.
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

from claude_hitl_template.domain.policy.bash import Segment, segments
from claude_hitl_template.domain.policy.evaluation import (
    JOINED,
    Evaluation,
    Verdict,
    compile_settings,
    evaluate,
    from_folder,
    is_harmless,
    matching,
    mcp_parts,
    path_field,
    portable_rules,
    remember_rule,
    targets,
    validate_remember,
    written_targets,
)
from claude_hitl_template.domain.policy.rules import PermissionPolicy, PolicyName, Rule
from claude_hitl_template.domain.policy.tools import NETWORK

__all__ = [
    "JOINED",
    "NETWORK",
    "Evaluation",
    "PermissionPolicy",
    "PolicyName",
    "Rule",
    "Segment",
    "Verdict",
    "compile_settings",
    "evaluate",
    "from_folder",
    "is_harmless",
    "matching",
    "mcp_parts",
    "path_field",
    "portable_rules",
    "remember_rule",
    "segments",
    "targets",
    "validate_remember",
    "written_targets",
]
