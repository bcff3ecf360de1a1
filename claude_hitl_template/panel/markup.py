"""The panel's templates. Kodosumi escapes nothing, so everything that the panel shows is rendered here.

The templates are in `templates/`, style and script in `static/`; `presentation/html.py` says how they are read.
"""

import re
from functools import cache
from pathlib import Path
from typing import Any

from markupsafe import Markup

from claude_hitl_template.presentation.html import excerpt, line_count, templates
from claude_hitl_template.presentation.text import diff_lines
from claude_hitl_template.presentation.views import PERMISSION_TEXT

FOLDED_LINES = 30  # in the timeline, a text of more lines is behind a fold
_FOLDER = Path(__file__).parent


def render(template: str, **context: Any) -> Markup:
    """The HTML of a template. What is `Markup` in the context is HTML already; everything else is text."""
    return Markup(_TEMPLATES.get_template(template).render(context))  # noqa: S704  (the templates escape)


def macros(template: str) -> Any:
    """The macros of a template as functions that return Markup."""
    return _TEMPLATES.get_template(template).module


def inert(given: str, width: int) -> str:
    """A short name that is safe where Kodosumi's own scripts build HTML from it without escaping."""
    kept = re.sub(r"[^\w .,:;!?()/+=@#%-]", "·", " ".join(given.split()), flags=re.ASCII)
    return kept if len(kept) <= width else kept[: width - 1] + "…"


@cache
def static(name: str) -> Markup:
    """A file of `static/` for the inside of a page: Kodosumi's pages have no style sheet or script of ours."""
    return Markup((_FOLDER / "static" / name).read_text())  # noqa: S704  (a file of this package)


_TEMPLATES = templates(
    _FOLDER / "templates",
    static=static,
    excerpt=excerpt,
    diff_lines=diff_lines,
    line_count=line_count,
    FOLDED_LINES=FOLDED_LINES,
    PERMISSION_TEXT=PERMISSION_TEXT,
)
