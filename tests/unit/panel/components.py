"""The macros of the templates, as functions from text to HTML."""

from collections.abc import Mapping
from typing import Any

from claude_hitl_template.panel.markup import macros
from claude_hitl_template.presentation.tools import tool_view

_components = macros("components.html.j2")
diff, facts, fold = _components.diff, _components.facts, _components.fold
line, shortened = _components.line, _components.shortened


def call_view(tool: str, given: Mapping[str, Any], *, folded: bool = False) -> str:
    return macros("call.html.j2").call_view(tool_view(tool, given), folded)
