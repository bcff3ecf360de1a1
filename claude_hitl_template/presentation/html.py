"""Renders HTML from templates, for the panel and for the pages that this service serves itself.

In a template `{{ value }}` is text for a reader: nothing in it becomes markup, and characters that hide or act stand out
as escapes. `{{ value|e }}` is the exact value, for an attribute or a text area.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token
from markupsafe import Markup, escape

from claude_hitl_template.presentation.text import pieces
from claude_hitl_template.presentation.tools import pretty_json

LINKS = frozenset({"http", "https", "mailto"})
MAX_CHARS = 200_000  # of one text in a timeline; a browser shows a page with more only slowly
SHORT_LINES, SHORT_CHARS = 12, 2_000
_MARK = Markup('<b class="hitl-mark">{}</b>')  # a character as an escape
_CODE, _BLOCK = Markup("<code>{}</code>"), Markup("<pre>{}</pre>")


def text(given: object) -> Markup:
    """`given` as HTML: nothing in it is markup, and characters that hide or act stand out as escapes."""
    if hasattr(given, "__html__"):
        return Markup(given)  # noqa: S704
    shown = (_mark(piece) if hidden else escape(piece) for piece, hidden in pieces(str(given)))
    return Markup("".join(shown))  # noqa: S704  (all escaped)


@lru_cache(maxsize=1024)
def _mark(character_escape: str) -> Markup:
    return _MARK.format(character_escape)


@dataclass(frozen=True)
class Excerpt:
    """The beginning of a text that is too long to be shown whole, and the size of all of it."""

    head: str
    size: str


def excerpt(given: str) -> Excerpt | None:
    """None for a text that is short enough."""
    if len(given) <= SHORT_CHARS and given.count("\n") < SHORT_LINES:
        return None
    head = "\n".join(given[:SHORT_CHARS].split("\n")[:SHORT_LINES])
    return Excerpt(f"{head}\n…", f"{line_count(given)} lines, {len(given)} characters")


def limited(given: str) -> str:
    """The first MAX_CHARS characters; a last line says how many are left out."""
    left = len(given) - MAX_CHARS
    return given if left <= 0 else f"{given[:MAX_CHARS]}\n… {left} characters more: the REST API has them"


def line_count(given: str) -> int:
    return given.count("\n") + 1


# -- Markdown


class _SafeRenderer(RendererHTML):
    """Writes every text through `text`: an entity such as `&#x202e;` is decoded only after Markdown was parsed."""

    def text(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        return text(tokens[idx].content)

    def code_inline(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        return _CODE.format(text(tokens[idx].content))

    def code_block(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        return _BLOCK.format(text(tokens[idx].content.rstrip("\n")))

    def fence(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        return self.code_block(tokens, idx, options, env)

    def link_open(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        token = tokens[idx]
        href = str(token.attrs.get("href", ""))
        token.attrs = {"href": href, "title": href, "target": "_blank", "rel": "noopener noreferrer"}
        return self.renderToken(tokens, idx, options, env)


def _may_be_linked(url: str) -> bool:
    try:
        return urlsplit(url.strip()).scheme.lower() in LINKS
    except ValueError:
        return False


def _markdown_parser() -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"html": False}, renderer_cls=_SafeRenderer)
    parser.enable(["table", "strikethrough"])
    # The approver's browser would fetch an image, and its address could carry away what the model knows.
    parser.disable(["image", "html_block", "html_inline"])
    parser.validateLink = _may_be_linked  # pyright: ignore[reportAttributeAccessIssue]
    return parser


_PARSER = _markdown_parser()


def markdown(given: str) -> Markup:
    """Markdown without raw HTML and images; links lead to http, https and mailto only and show where they lead."""
    return Markup(_PARSER.render(limited(given)))  # noqa: S704  (written by _SafeRenderer)


# -- templates


def templates(*folders: Path, **names: Any) -> Environment:
    """The templates of `folders`, in which `names` are defined.

    Autoescape is on. A value that is not given is an error.
    """
    made = Environment(
        loader=FileSystemLoader(folders),
        autoescape=True,
        finalize=text,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    filters: Mapping[str, Any] = {"markdown": markdown, "limited": limited, "pretty_json": pretty_json}
    made.filters.update(filters)
    made.globals.update(names)
    return made
