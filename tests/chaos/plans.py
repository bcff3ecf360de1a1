"""Conversations made from a seed: what the scripted model calls in each, and what its people decide."""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KINDS = (
    "allow",
    "deny",
    "edit",
    "batch",
    "two turns of calls",
    "question",
    "interrupt",
    "long tool",
    "decided while parked",
    "message while it waits",
    "eight at once",
    "subagent",
)
QUESTION = "Which colour?"
EIGHT = 8
WORK = "work.txt"  # in each workspace: the tokens of what ran there


@dataclass(frozen=True)
class Plan:
    """One conversation.

    Attributes:
        decisions: By the token in a call's input, the decisions that are sent on it concurrently.
        steps: The calls in each of the model's answers.
    """

    number: int
    kind: str
    steps: Sequence[Sequence[Mapping[str, Any]]]
    decisions: Mapping[str, Sequence[Mapping[str, Any]]]

    @property
    def prompt(self) -> str:
        return _script(self.steps)


class Planner:
    """Makes conversations; the same seed and number give the same one."""

    def __init__(self, seed: int, journal: Path) -> None:
        self._seed, self._journal = seed, journal

    def plan(self, number: int) -> Plan:
        chance = random.Random(f"{self._seed} conversation {number}")
        kind = KINDS[number % len(KINDS)] if number < len(KINDS) else chance.choice(KINDS)
        counts = {"batch": (3,), "two turns of calls": (1, 1)}.get(kind, (1,))
        steps: list[list[Mapping[str, Any]]] = []
        decisions: dict[str, Sequence[Mapping[str, Any]]] = {}
        for count in counts:
            made = [new_token(chance) for _ in range(count)]
            steps.append([self._call(kind, token) for token in made])
            decisions |= {token: self._decisions(kind, token, chance) for token in made}
        return Plan(number, kind, steps, decisions)

    def _call(self, kind: str, token: str) -> Mapping[str, Any]:
        if kind == "question":
            options = [{"label": colour, "description": token} for colour in ("Blue", "Green")]
            asked = {"question": QUESTION, "header": "Colour", "multiSelect": False, "options": options}
            return {"name": "AskUserQuestion", "input": {"questions": [asked]}}
        bash = {
            "name": "Bash",
            "input": {"command": self._command(token, " && sleep 3" * (kind == "long tool"))},
        }
        if kind != "subagent":
            return bash
        handed = {
            "description": "One command",
            "prompt": _script([[bash]]),
            "subagent_type": "general-purpose",
        }
        return {"name": "Agent", "input": {**handed, "run_in_background": False}}

    def _command(self, token: str, more: str = "") -> str:
        """A command that records its token, the time, and its owner's folder for the CLI, which names the lease epoch."""
        line = f"printf '%s %s %s\\n' {token} $(date +%s.%N) \"$CLAUDE_CONFIG_DIR\" >> {self._journal}"
        return f"{line}; echo {token} >> {WORK}{more}"

    def _decisions(self, kind: str, token: str, chance: random.Random) -> Sequence[Mapping[str, Any]]:
        match kind:
            case "deny":
                return [self._deny(token, 0)]
            case "edit":
                return [self._edit(chance)]
            case "question":
                return [{"result": "allow", "answers": {QUESTION: chance.choice(("Blue", "Green"))}}]
            case "interrupt":
                return []
            case "eight at once":
                return [self._any(token, chance, n) for n in range(EIGHT)]
            case "batch" | "two turns of calls":
                return [self._any(token, chance, 0)]
            case _:
                return [{"result": "allow"}]

    def _any(self, token: str, chance: random.Random, number: int) -> Mapping[str, Any]:
        said = chance.choice(("allow", "allow", "deny", "edit"))
        if said == "allow":
            return {"result": "allow"}
        return self._deny(token, number) if said == "deny" else self._edit(chance)

    def _deny(self, token: str, number: int) -> Mapping[str, Any]:
        return {"result": "deny", "deny_message": f"number {number} does not want {token}"}

    def _edit(self, chance: random.Random) -> Mapping[str, Any]:
        return {"result": "allow", "updated_input": {"command": self._command(new_token(chance))}}


def _script(steps: Sequence[Sequence[Mapping[str, Any]]]) -> str:
    """A prompt that has the offline model make these calls, answer by answer."""
    said = [{"text": "[offline model] To work.", "tools": list(calls)} for calls in steps]
    return f"```scenario\n{json.dumps([*said, {'text': 'Done.'}])}\n```"


def new_token(chance: random.Random) -> str:
    return f"run-{chance.getrandbits(48):012x}"
