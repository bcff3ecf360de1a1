"""Escapes the parts of a message that the CLI would interpret instead of passing on.

Measured on the CLI 2.1.330: `@path` becomes the file's content (a setting turns that off: MENTIONS_OFF), `@server:uri`
becomes what the MCP server answers, and a last block of text that begins with `/` is a command. All of it
bypasses the gate. So a path stays text, which the model may read with a call; a server is not asked; and the only commands
are those of the image, and those of the CLI's own that change only the conversation. `/heapdump`, for instance,
writes a file into the home folder.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

MENTIONS_OFF = {"CLAUDE_CODE_DISABLE_FILE_MENTIONS": "1"}
COMMANDS = frozenset({
    "clear", "compact", "context", "cost", "usage", "model", "effort", "recap", "rename",
    "init", "review", "code-review", "security-review", "simplify", "verify",
})  # fmt: skip
_WORD_JOINER = "\u2060"  # invisible
_COMMAND = re.compile(r"/(\S*)")


def usable_commands(announced: Iterable[Mapping[str, Any]]) -> frozenset[str]:
    """The names a message may begin with, from the `commands` of the CLI's answer to `initialize`: it marks its own."""
    found = list(announced)
    if not any(command.get("builtin") for command in found):  # an older CLI does not say which are its own
        return COMMANDS
    layers = [command for command in found if not command.get("builtin")]
    names = {str(name) for c in layers for name in (c.get("name"), *(c.get("aliases") or ()))}
    own = {str(c.get("name")) for c in found if c.get("builtin")}
    return COMMANDS | {
        name for name in names - own if not name.startswith("mcp__")
    }  # that asks a server for a text


def as_said(
    content: Sequence[Mapping[str, Any]], commands: Collection[str], servers: Collection[str]
) -> list[dict[str, Any]]:
    """Message content in which the CLI finds nothing to interpret but one of `commands`."""
    return [
        {**block, "text": _plain(str(block["text"]), commands, servers)}
        if block.get("type") == "text"
        else dict(block)
        for block in content
    ]


def _plain(text: str, commands: Collection[str], servers: Collection[str]) -> str:
    command = _COMMAND.match(text)
    if command is not None and command[1] not in commands:
        text = f" {text}"
    names = "|".join(map(re.escape, servers))
    return re.sub(rf'@(?="?(?:{names}):)', f"@{_WORD_JOINER}", text) if names else text
