"""The result of one check, and its lines in `hitl doctor`, `hitl image verify` and similar commands."""

from dataclasses import dataclass
from typing import Literal

from claude_hitl_template.presentation.text import visible

Level = Literal["ok", "warning", "wrong"]


@dataclass(frozen=True)
class Check:
    """What was checked, what was found and, unless it is ok, how to fix it (`mend`)."""

    name: str
    level: Level
    found: str
    fix: str = ""


def lines(check: Check) -> list[str]:
    """The lines of a check, with hidden characters escaped."""
    sign = {"ok": "ok      ", "warning": "warning ", "wrong": "WRONG   "}[check.level]
    fix = [f"         Fix: {check.fix}"] if check.fix else []
    return [visible(line) for line in [f"{sign} {check.name}: {check.found}", *fix]]
