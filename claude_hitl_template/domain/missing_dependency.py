"""What an agent reports when its image lacks something: one tool of an MCP server of our own, and what a human reads of it.

The server runs in the session's owner (`claude/report.py`), in images only. No human is asked about a report: it does
nothing but tell one.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SERVER = "hitl"
TOOL = "report_missing_dependency"
FULL_NAME = f"mcp__{SERVER}__{TOOL}"
MAX_WHY_CHARS = 1000

_SYSTEM = re.compile(r"[a-z0-9][a-z0-9+.-]{0,99}(:[a-z0-9]+)?(=[A-Za-z0-9.+:~-]{1,99})?")
_PYTHON = re.compile(
    r"[A-Za-z0-9]([A-Za-z0-9._-]{0,98}[A-Za-z0-9])?(\[[A-Za-z0-9._, -]{1,99}\])?([ ]?[<>=!~][<>=!~A-Za-z0-9.*+, -]{0,99})?"
)
_NPM = re.compile(r"(@[a-z0-9][a-z0-9._-]{0,99}/)?[a-z0-9][a-z0-9._-]{0,99}(@[A-Za-z0-9^~<>=.*+-]{1,99})?")


@dataclass(frozen=True)
class Kind:
    """What it is called, the file that declares it, and which names it may have."""

    noun: str
    file: str
    names: re.Pattern[str]


KINDS: Mapping[str, Kind] = {
    "system": Kind("system package", "system-packages.txt", _SYSTEM),
    "python": Kind("Python package", "requirements.txt", _PYTHON),
    "npm": Kind("npm package", "package.json", _NPM),
}


def problem(given: Mapping[str, Any]) -> str | None:
    """The problem with a report, in words for the model that made it; None if it can be passed on."""
    kind, name, why = (given.get(field) for field in ("kind", "name", "why"))
    if not isinstance(kind, str) or kind not in KINDS:
        return f"kind must be one of {', '.join(KINDS)}"
    if not isinstance(name, str) or not KINDS[kind].names.fullmatch(name):
        return f"name must be that of one {KINDS[kind].noun}, as it would stand in {KINDS[kind].file}"
    if not isinstance(why, str) or not 1 <= len(why.strip()) <= MAX_WHY_CHARS:
        return f"why must say in 1 to {MAX_WHY_CHARS} characters what it is needed for"
    return None


def is_report(event: Mapping[str, Any]) -> bool:
    """Whether an event of a session's log is a report that can be passed on."""
    is_ours = event.get("mcp_server_name") == SERVER and event.get("name") == TOOL
    return is_ours and problem(event.get("input") or {}) is None


def advice(given: Mapping[str, Any]) -> str:
    """What a human can do about a report in which `problem` finds none. Without its `why`."""
    kind = KINDS[given["kind"]]
    return (
        f"The agent misses `{given['name']}` ({kind.noun}): add it to template_project/dependencies/{kind.file}, "
        "then ./hitl image build"
    )
