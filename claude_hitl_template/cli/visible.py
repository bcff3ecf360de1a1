"""Text from a model, a tool or a user, made safe to show: what is shown is what runs."""

import re
import unicodedata

from rich.style import Style
from rich.text import Text

_KEPT = frozenset("\n\t ")
_HIDDEN_CATEGORIES = frozenset({"Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp", "Zs"})
# Letters and marks that leave no ink (Default_Ignorable_Code_Point, and the blank Braille pattern).
_BLANK = frozenset(
    {0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x2800, 0x3164, 0xFFA0}
    | {*range(0x180B, 0x1810), *range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0)}
)
ESCAPE_STYLE = Style(reverse=True, bold=True)


def visible(text: str) -> str:
    """`text` with everything that a terminal would not show as itself written as an escape (`\\x1b`, `\\u202e`)."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escape(char) if _is_hidden(char) else char for char in text)


def shown(text: str, style: str | Style = "") -> Text:
    """`visible(text)` for rich: no markup in it is interpreted, and escapes stand out from text that spells one."""
    result = Text(style=style, overflow="fold")
    start = 0
    for position, char in enumerate(text):
        if _is_hidden(char):
            result.append(text[start:position])
            result.append(_escape(char), style=ESCAPE_STYLE)
            start = position + 1
    result.append(text[start:])
    return result


def one_line(text: str, width: int) -> str:
    """The beginning of `text` on one line of at most `width` characters, made visible."""
    line = visible(re.sub(r"\s+", " ", text[: width * 4]).strip())
    return line if len(line) <= width else line[: max(width - 1, 0)] + "…"


def _is_hidden(char: str) -> bool:
    if char in _KEPT or "!" <= char <= "~":
        return False
    return unicodedata.category(char) in _HIDDEN_CATEGORIES or ord(char) in _BLANK


def _escape(char: str) -> str:
    code = ord(char)
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
