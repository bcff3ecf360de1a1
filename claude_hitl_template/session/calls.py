"""Finds the call that the CLI means when it uses an id of the model's server.

Those ids are data: some servers restart them with each answer, give one twice in an answer, or make them 949 characters
long. Each call gets an id of ours when the model issues it. The CLI's questions also name the tool and its input, so
that each is answered for exactly the call that it is about.
"""

import os.path
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from claude_hitl_template.domain.models import Approval, new_id
from claude_hitl_template.session.engine import ToolResult, ToolUse

type Step = Literal["asked", "permitted"]


@dataclass
class Issued:
    """One call. `use` has our id, and the input as the model gave it. `unheard`: the CLI asked before its message came."""

    use: ToolUse
    unheard: bool = False
    asked: bool = False
    permitted: bool = False
    ended: bool = False
    held: bool = False
    ambiguous: bool = False


class IssuedCalls:
    """The calls of one turn of one process."""

    def __init__(self, workspace: Path) -> None:
        self._workspace = workspace
        self._issued: dict[str, Issued] = {}

    def forget(self) -> None:
        self._issued.clear()

    def issue(self, use: ToolUse, *, unheard: bool = False) -> ToolUse | None:
        """`use` with an id of ours; None if the call got one before its message arrived. If several calls wait under one
        id, the CLI keeps one result only, so none of them may run."""
        model_id = use.call_id
        for issued in self._named(use):
            if issued.unheard and self._same_input(use.input, issued.use.input):
                issued.unheard = False
                return None
        twins = [i for i in self._with(model_id) if not i.ended and i.use.thread == use.thread]
        for twin in twins:
            twin.ambiguous = True
        ours = replace(use, call_id=new_id("sevt"), model_id=model_id)
        self._issued[ours.call_id] = Issued(ours, unheard=unheard, ambiguous=bool(twins))
        return ours

    def take_up(self, approval: Approval) -> None:
        """A call of an earlier process, which the CLI will ask about again."""
        use = ToolUse(approval.call_id, approval.tool_name, approval.input, model_id=approval.model_id)
        self._issued.setdefault(use.call_id, Issued(use))

    def find(self, asked: ToolUse, step: Step) -> Issued | None:
        """The call that the CLI asks about, at a step not taken yet; None if there is none or several fit."""
        fitting = [i for i in self._named(asked) if not getattr(i, step) and not i.ended]
        same = [i for i in fitting if self._same_input(i.use.input, asked.input)]
        if same:
            return next((i for i in same if i.asked), same[0])
        return fitting[0] if len(fitting) == 1 else None

    def repeated(self, asked: ToolUse) -> Issued | None:
        """The call, if the CLI asks about it a second time."""
        return next(
            (i for i in self._named(asked) if not i.ended and self._same_input(i.use.input, asked.input)),
            None,
        )

    def end(self, result: ToolResult) -> Issued | None:
        """The call that this is the result of."""
        left = [i for i in self._with(result.call_id) if not i.ended and i.use.thread == result.thread]
        found = next((i for i in left if i.asked or i.permitted), left[0] if left else None)
        if found is not None:
            found.ended = True
        return found

    def get(self, call_id: str) -> Issued | None:
        return self._issued.get(call_id)

    def permitted(self) -> list[Issued]:
        """The calls that the CLI asked the permission callback about and that have no result yet."""
        return [i for i in self._issued.values() if i.permitted and not i.ended and not i.held]

    def spawned_by(self, model_id: str) -> str | None:
        """Our id of the call that began a subagent."""
        return next((i.use.call_id for i in reversed(list(self._with(model_id)))), None)

    def _with(self, model_id: str) -> Iterable[Issued]:
        return [i for i in self._issued.values() if i.use.model_id == model_id]

    def _named(self, asked: ToolUse) -> list[Issued]:
        found = [i for i in self._with(asked.call_id) if i.use.name == asked.name]
        return [i for i in found if (i.use.thread is None) == (asked.thread is None)]

    def _same_input(self, issued: object, asked: object) -> bool:
        """The CLI asks with paths made absolute. What a model sends may be no object."""
        if not isinstance(issued, dict) or not isinstance(asked, dict):
            return issued == asked
        return issued.keys() == asked.keys() and all(self._same(issued[k], asked[k]) for k in issued)

    def _same(self, issued: Any, asked: Any) -> bool:
        if issued == asked:
            return type(issued) is type(asked)
        if not isinstance(issued, str) or not isinstance(asked, str):
            return False
        return os.path.normpath(self._workspace / os.path.expanduser(issued)) == asked
