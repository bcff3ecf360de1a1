"""Escapes text from a model, a tool or a user for a terminal."""

from rich.style import Style
from rich.text import Text

from claude_hitl_template.presentation.text import pieces

ESCAPE_STYLE = Style(reverse=True, bold=True)


def shown(text: str, style: str | Style = "") -> Text:
    """`visible(text)` for rich: markup in it is not interpreted, and escapes look different from text that spells one."""
    result = Text(style=style, overflow="fold")
    for piece, escaped in pieces(text):
        result.append(piece, style=ESCAPE_STYLE if escaped else None)
    return result
