"""Texts for people, independent of the medium: hidden characters as escapes, sizes, ages, summaries of calls.

Approvers see exactly what runs: no character of a text from a model, a tool or a user is left out.
"""

import difflib
import json
import os.path
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from claude_hitl_template.domain.canonical_json import shown_host
from claude_hitl_template.errors import InvalidInput

SUMMARY_CHARS = 100
_KEPT = frozenset("\n\t ")
_NOT_PLAIN = re.compile(r"[^\n\t -~]")
_HIDDEN_CATEGORIES = frozenset({"Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp", "Zs"})
# Invisible letters and marks (Default_Ignorable_Code_Point, and the blank Braille pattern).
_BLANK = frozenset(
    {0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x2800, 0x3164, 0xFFA0}
    | {*range(0x180B, 0x1810), *range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0)}
)
# The fields that describe a call best, in this order.
_SUMMARY_FIELDS = (
    "command",
    "file_path",
    "notebook_path",
    "url",
    "query",
    "pattern",
    "description",
    "skill",
    "plan",
)

_HOOK = re.compile(r"^PreToolUse:\S+ hook error: ")
_PATHS = ("file_path", "notebook_path", "path")

# -- text


def visible(text: str) -> str:
    """`text` with every character that would not be seen as itself as an escape (`\\x1b`, `\\u202e`)."""
    return "".join(piece for piece, _ in pieces(text))


def pieces(text: str) -> Iterator[tuple[str, bool]]:
    """`visible(text)` in pieces: unchanged text (False), and escapes of single characters (True)."""
    start = 0
    for match in _NOT_PLAIN.finditer(text):  # a text may have megabytes, and few of these
        position, char = match.start(), match[0]
        if is_hidden(char):
            if position > start:
                yield text[start:position], False
            yield _escape(char), True
            start = position + 1
    if start < len(text):
        yield text[start:], False


def one_line(text: str, width: int) -> str:
    """The beginning of `text` on one line of at most `width` characters, with hidden characters escaped."""
    line = visible(re.sub(r"\s+", " ", text[: width * 4]).strip())
    return line if len(line) <= width else line[: max(width - 1, 0)] + "…"


def hidden_count(text: str) -> int:
    """How many hidden characters a text has."""
    return sum(is_hidden(match[0]) for match in _NOT_PLAIN.finditer(text))


def with_escapes(text: str, escape: Callable[[str], str]) -> str:
    """A text with `escape(character)` in the place of each hidden one."""
    return _NOT_PLAIN.sub(lambda match: escape(match[0]) if is_hidden(match[0]) else match[0], text)


def is_hidden(char: str) -> bool:
    """Whether a character is invisible, or acts on a terminal or browser. Line breaks, tabs and spaces are not hidden."""
    if char in _KEPT or "!" <= char <= "~":
        return False
    return unicodedata.category(char) in _HIDDEN_CATEGORIES or ord(char) in _BLANK


def _escape(char: str) -> str:
    code = ord(char)
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def age(since: str, now: datetime | None = None) -> str:
    """How long ago an ISO 8601 time was: `5s`, `12m`, `3h`, `4d`."""
    seconds = int(((now or datetime.now(UTC)) - datetime.fromisoformat(since)).total_seconds())
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size}{unit}"
    return f"{max(seconds, 0)}s"


def size(count_bytes: int) -> str:
    """A number of bytes with a unit: `512 B`, `3.4 MiB`."""
    value, units = float(count_bytes), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.0f} {units[0]}" if units[0] == "B" else f"{value:.1f} {units[0]}"


def last_line(said: str) -> str:
    """The last line of a program's output that is not empty, up to 500 characters; "" if there is none."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return lines[-1][:500] if lines else ""


# -- events and calls


def progress_text(workspace: Mapping[str, Any]) -> str:
    """The progress of saving or restoring a large workspace, from a `session.updated` event."""
    return f"{workspace['doing']} the workspace: {size(workspace['bytes'])} of {size(workspace['of_bytes'])}"


def texts(content: Sequence[Mapping[str, Any]]) -> str:
    """The text of an event's content blocks; of other blocks the type."""
    return "\n".join(str(b["text"]) if b.get("type") == "text" else f"[{b.get('type')}]" for b in content)


def without_hook(said: str) -> str:
    """The result of a call that was refused, without what the Claude Code CLI puts before it for some of the tools."""
    return _HOOK.sub("", said)


def summary(given: Mapping[str, Any]) -> str:
    """A call's input on one line, with hidden characters escaped."""
    if is_host(given):
        because = given.get("because")
        why = f" because of: {because}" if isinstance(because, str) else ""
        return one_line(f"{shown_host(given['host'], given['port'])}{why}", SUMMARY_CHARS)
    asked = given.get("questions")
    if isinstance(asked, list) and asked and isinstance(asked[0], dict):
        return one_line(str(asked[0].get("question", "")), SUMMARY_CHARS)
    for name in _SUMMARY_FIELDS:
        if isinstance(given.get(name), str):
            return one_line(given[name], SUMMARY_CHARS)
    return one_line(json.dumps(given, ensure_ascii=False), SUMMARY_CHARS) if given else ""


def leads_to(given: Mapping[str, Any], targets: Sequence[str] | None) -> str:
    """Where the path of a call led when it was recorded; "" if it is the path as written."""
    written = next((given[name] for name in _PATHS if isinstance(given.get(name), str)), None)
    if written is None or all(_is_literally(written, target) for target in targets or ()):
        return ""
    return " and ".join(
        target.removeprefix("/") if target.startswith("//") else target for target in targets or ()
    )


def _is_literally(written: str, target: str) -> bool:
    """Whether a path names this target (see `Approval.targets`) without following a link."""
    path = os.path.normpath(written)
    if target.startswith("/"):
        return path == target[1:]
    inside = os.path.normpath(target)
    return path == inside or (path.startswith("/") and path.endswith(f"/{inside}")) or inside == "."


def is_host(given: Mapping[str, Any]) -> bool:
    """Whether a call's input is a request for network access to a host."""
    return isinstance(given.get("host"), str) and isinstance(given.get("port"), int)


def are_strings(given: Mapping[str, Any], *names: str) -> bool:
    return all(isinstance(given.get(name), str) for name in names)


def rule_text(rule: Mapping[str, Any]) -> str:
    """A remembered rule. One with a digest covers exactly one input."""
    return f"{rule['rule']}{' with exactly this input' if rule.get('digest') else ''}"


def asked_questions(given: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The well-formed questions in the input of AskUserQuestion."""
    found = given.get("questions")
    return [question for question in found if isinstance(question, dict)] if isinstance(found, list) else []


def question_options(question: Mapping[str, Any]) -> list[Any]:
    found = question.get("options")
    return found if isinstance(found, list) else []


def option_label(option: Any) -> str:
    return str(option.get("label", "")) if isinstance(option, dict) else str(option)


def option_description(option: Any) -> str:
    return str(option.get("description", "")) if isinstance(option, dict) else ""


def diff_lines(old: str, new: str) -> Iterator[tuple[str, str]]:
    """Both texts whole, as a diff: marks ("+", "-" or " ") and lines. Lines are split at newlines only."""
    for line in difflib.ndiff(old.split("\n"), new.split("\n"), charjunk=None):
        if not line.startswith("? "):
            yield line[0], line[2:]


def plain(value: Any) -> str:
    """A value of a call's input: a text as it is, everything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def parse_input(text: str) -> dict[str, Any]:
    """A call's input from JSON text. Raises InvalidInput."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"the input is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidInput("the input must be a JSON object")
    return value
