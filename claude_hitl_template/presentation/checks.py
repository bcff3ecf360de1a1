"""One thing that was looked at, and what was found: the lines of `hitl doctor`, `hitl image verify` and the like."""

from dataclasses import dataclass
from typing import Literal

from claude_hitl_template.presentation.text import visible

Level = Literal["ok", "warning", "wrong"]


@dataclass(frozen=True)
class Check:
    """What was looked at, what was found, and, unless it is ok, what mends it."""

    name: str
    level: Level
    found: str
    fix: str = ""


def lines(check: Check) -> list[str]:
    sign = {"ok": "ok      ", "warning": "warning ", "wrong": "WRONG   "}[check.level]
    fix = [f"         Fix: {check.fix}"] if check.fix else []
    return [visible(line) for line in [f"{sign} {check.name}: {check.found}", *fix]]
