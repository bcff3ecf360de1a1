"""Safe HTML from text of others. Whatever the panel shows passes through here: Kodosumi escapes nothing."""

import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any
from urllib.parse import urlsplit

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token

from claude_hitl_template.presentation.text import diff_lines, pieces

LINKS = frozenset({"http", "https", "mailto"})
MAX_CHARS = 200_000  # of one text in the timeline; a page with more stops being one
SHORT_LINES, SHORT_CHARS = 12, 2_000

# In Kodosumi's own colours; a long line wraps, and never widens the page.
STYLE = """<style>
.hitl{max-width:100%;overflow-wrap:anywhere;line-height:1.5;margin:.75rem 0;text-align:left}
.hitl p,.hitl ul,.hitl ol,.hitl h1,.hitl h2,.hitl h3{margin:.4rem 0}
.hitl h1,.hitl h2,.hitl h3{font-size:1.1rem;line-height:1.4;font-weight:bold}
.hitl ul,.hitl ol{padding-left:1.4rem}
.hitl pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:.3rem 0;padding:.5rem .75rem;border-radius:.3rem;
background:var(--surface-container-highest);color:var(--on-surface);font:.8125rem/1.45 monospace;tab-size:4}
.hitl code{white-space:pre-wrap;overflow-wrap:anywhere;font-family:monospace}
.hitl pre code{background:none;padding:0;all:unset}
.hitl table{display:block;overflow-x:auto;max-width:100%}
.hitl summary{cursor:pointer;color:var(--primary);padding:.2rem 0}
.hitl dl{display:grid;grid-template-columns:minmax(5rem,max-content) minmax(0,1fr);gap:.15rem .9rem;margin:.3rem 0}
.hitl dt{opacity:.75}.hitl dd{margin:0}
.hitl-card{border:1px solid var(--outline-variant);border-left:4px solid var(--outline);border-radius:.3rem;
padding:.5rem .9rem;background:var(--surface-container-low);color:var(--on-surface)}
.hitl-wait{border-left-color:var(--primary)}.hitl-bad{border-left-color:var(--error)}
.hitl-you{border-left-color:var(--secondary)}
.hitl-ways{font-size:.875rem;margin-bottom:1rem}.hitl-ways a{color:var(--primary)}
.hitl-dim{opacity:.75;font-size:.875rem}.hitl-bold{font-weight:bold}
.hitl-error{color:var(--error);font-weight:bold}
.hitl-mark{background:var(--error);color:var(--on-error);border-radius:.15rem;padding:0 .15rem;font-weight:bold}
.hitl-add,.hitl-del,.hitl-same{display:block}
.hitl-add{background:rgba(60,160,60,.28)}.hitl-del{background:rgba(220,60,60,.28)}
.hitl .button,.hitl button{white-space:normal;height:auto;min-height:2.5rem;margin:.25rem .5rem .25rem 0;
text-decoration:none!important;color:var(--on-primary)!important}
.hitl button.hitl-deny{background:var(--error);color:var(--on-error)!important}
.hitl button.hitl-plain,.hitl .hitl-plain{background:var(--surface-container-highest);color:var(--on-surface)!important}
.hitl button.hitl-row{display:block;width:100%;box-sizing:border-box;text-align:left;
margin:.4rem 0;padding:.6rem .9rem;border-radius:.3rem;
background:var(--surface-container);color:var(--on-surface)!important;line-height:1.45;font-weight:normal}
.hitl textarea,.hitl input[type=text],.hitl select{width:100%;box-sizing:border-box;padding:.5rem .6rem;
border:1px solid var(--outline);border-radius:.3rem;background:var(--surface-container-lowest);color:var(--on-surface);
font-size:1rem}
.hitl textarea{font:.875rem/1.45 monospace;min-height:2.6rem;resize:vertical}
.hitl label{display:block;margin:.9rem 0 .2rem;font-size:.9375rem;line-height:1.5}
.hitl label.hitl-choice{display:flex;margin:0;gap:.6rem;align-items:flex-start;padding:.35rem 0;cursor:pointer}
.hitl label.hitl-choice input{flex:none;width:1.2rem;height:1.2rem;margin-top:.15rem;opacity:1;accent-color:var(--primary)}
.hitl-bar{position:sticky;bottom:0;padding:.5rem 0;background:var(--surface);z-index:2}
.hitl-card .hitl-bar{background:var(--surface-container-low)}
.hitl [hidden]{display:none!important}
.hitl input[type=file]{opacity:1;position:static;width:100%;height:auto;padding:.4rem 0;display:block;color:inherit}
@media(max-width:600px){
#status-grid>div:not(:first-child),#header-container>nav:first-child{display:none!important}
#header-container>nav.responsive{display:block!important;margin:0!important;padding:0!important;max-width:100%}
#header-container #header{max-width:100vw;box-sizing:border-box;padding:.25rem!important;margin:0!important}
#header-container #article-head{width:auto!important;max-width:100%;margin:0!important;padding:.5rem!important;
box-sizing:border-box;overflow-x:hidden}
#header-container h3{font-size:1.05rem!important;line-height:1.3;white-space:normal}
#header-container h3 .summary{display:-webkit-box;-webkit-line-clamp:2;-webkit-box-orient:vertical;overflow:hidden}
#header-container .tabs{height:2.5rem!important;min-height:0;overflow-x:auto;max-width:60%}
#header-container .tabs span{display:none}
body>main.responsive.responsive.responsive{margin:0!important;padding:.5rem!important;inset:0!important;transform:none!important;
max-width:100%}
#article-output{margin:0!important;padding:.75rem!important}
.hitl-card{padding:.5rem .6rem}
}
</style>"""


def text(given: str) -> str:
    """`given` as HTML: nothing in it is markup, and characters that hide or act stand out as escapes."""
    return "".join(
        f'<b class="hitl-mark">{escape(piece)}</b>' if hidden else escape(piece)
        for piece, hidden in pieces(given)
    )


def inert(given: str, width: int) -> str:
    """A short name that is text in any place, escaped or not: where Kodosumi's own scripts build HTML from it."""
    kept = re.sub(r"[^\w .,:;!?()/+=@#%-]", "·", " ".join(given.split()), flags=re.ASCII)
    return kept if len(kept) <= width else kept[: width - 1] + "…"


def link(path: str, label: str, kind: str = "link") -> str:
    """`path` is one of the panel's own."""
    return f'<a class="{kind}" href="{escape(path)}">{text(label)}</a>'


def block(*parts: str, kind: str = "") -> str:
    """One piece of a page, of HTML parts."""
    return f'<div class="hitl{f" {kind}" if kind else ""}">{"".join(parts)}</div>'


def card(*parts: str, kind: str = "") -> str:
    return block(*parts, kind=f"hitl-card{f' {kind}' if kind else ''}")


def line(given: str, kind: str = "hitl-dim") -> str:
    return f'<div class="{kind}">{text(given)}</div>'


def code(given: str) -> str:
    return f"<pre>{text(given)}</pre>"


def fold(title: str, inside: str, *, is_open: bool = False) -> str:
    """`title` is text, `inside` is HTML."""
    return f"<details{' open' if is_open else ''}><summary>{text(title)}</summary>{inside}</details>"


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Names and values, both text."""
    return f"<dl>{''.join(f'<dt>{text(name)}</dt><dd>{text(value)}</dd>' for name, value in pairs)}</dl>"


def shortened(given: str, more: str = "Show all of it") -> str:
    """The beginning of `given` as code, and all of it behind a fold."""
    if len(given) <= SHORT_CHARS and given.count("\n") < SHORT_LINES:
        return code(given)
    head = "\n".join(given[:SHORT_CHARS].split("\n")[:SHORT_LINES])
    size = f"{given.count(chr(10)) + 1} lines, {len(given)} characters"
    return code(head + "\n…") + fold(f"{more} ({size})", code(limited(given)))


def limited(given: str) -> str:
    left = len(given) - MAX_CHARS
    return given if left <= 0 else f"{given[:MAX_CHARS]}\n… {left} characters more: the REST API has them"


def diff(old: str, new: str) -> str:
    """Both texts whole, as a coloured diff."""
    kinds = {"+": "hitl-add", "-": "hitl-del"}
    lines = (
        f'<span class="{kinds.get(mark, "hitl-same")}">{mark} {text(content)}</span>'
        for mark, content in diff_lines(old, new)
    )
    return f"<pre>{''.join(lines)}</pre>"


# -- Markdown


class _Safe(RendererHTML):
    """Writes every text through `text`: an entity such as `&#x202e;` is decoded only after Markdown was read."""

    def text(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        return text(tokens[idx].content)

    def code_inline(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        return f"<code>{text(tokens[idx].content)}</code>"

    def code_block(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        return code(tokens[idx].content.rstrip("\n"))

    def fence(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        return self.code_block(tokens, idx, options, env)

    def link_open(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        href = str(tokens[idx].attrs.get("href", ""))
        return f'<a href="{escape(href)}" title="{escape(href)}" target="_blank" rel="noopener noreferrer">'


def _may_be_linked(url: str) -> bool:
    try:
        return urlsplit(url.strip()).scheme.lower() in LINKS
    except ValueError:
        return False


def _reader() -> MarkdownIt:
    reader = MarkdownIt("commonmark", {"html": False}, renderer_cls=_Safe).enable(["table", "strikethrough"])
    # A picture is fetched by the approver's browser: its address could carry away what the model knows.
    reader.disable(["image", "html_block", "html_inline"])
    reader.validateLink = _may_be_linked  # pyright: ignore[reportAttributeAccessIssue]
    return reader


_READER = _reader()


def markdown(given: str) -> str:
    """Markdown without raw HTML and pictures; links to http, https and mailto only, and they show where they lead."""
    return _READER.render(limited(given))
