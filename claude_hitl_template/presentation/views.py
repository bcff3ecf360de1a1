"""Views of tool calls and events that name no medium. The terminal and the panel render them; both escape every text.

`presentation/tools.py` makes the view of a call, `presentation/events.py` that of an event.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

# -- parts of a call


@dataclass(frozen=True)
class Field:
    """A name and its value. `strong`: the value decides what the call does and stands out."""

    name: str
    value: str
    strong: bool = False


@dataclass(frozen=True)
class Fields:
    """Short values, one below the other."""

    kind: ClassVar = "fields"
    fields: tuple[Field, ...]


@dataclass(frozen=True)
class Code:
    """Text whose every character counts. `title` is its role: `command`, `content`, `input`."""

    kind: ClassVar = "code"
    title: str
    text: str


@dataclass(frozen=True)
class Diff:
    """A text that replaces another."""

    kind: ClassVar = "diff"
    title: str
    old: str
    new: str


@dataclass(frozen=True)
class Prose:
    """Markdown for a person to read."""

    kind: ClassVar = "prose"
    title: str
    text: str


@dataclass(frozen=True)
class Option:
    """One choice that a question offers."""

    label: str
    description: str


@dataclass(frozen=True)
class Question:
    """A question to the user. `answer` is "" until there is one."""

    kind: ClassVar = "question"
    text: str
    several: bool
    options: tuple[Option, ...]
    answer: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of as many cells as there are columns."""

    kind: ClassVar = "table"
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Caution:
    """A sentence that an approver must not overlook."""

    kind: ClassVar = "caution"
    text: str


type Part = Fields | Code | Diff | Prose | Question | Table | Caution


@dataclass(frozen=True)
class ToolView:
    """What one call of a tool does.

    Attributes:
        name: The tool's full name, which rules use: `Bash`, `mcp__server__tool`.
        title: The name for people: `Bash`, `server: tool`.
        summary: The call on one line; hidden characters are escapes already.
        parts: The whole input. Every field of it appears in some part.
    """

    name: str
    title: str
    summary: str
    parts: tuple[Part, ...]


# -- events

type Permission = Literal["allow", "ask", "deny"]
type Tone = Literal["info", "strong", "warning", "action", "error"]

PERMISSION_TEXT: Mapping[Permission, str] = {
    "allow": "allowed by the policy",
    "ask": "asks first",
    "deny": "denied by a rule",
}


@dataclass(frozen=True)
class Message:
    """Text of the user, or Markdown of the agent."""

    kind: ClassVar = "message"
    author: Literal["user", "agent"]
    text: str


@dataclass(frozen=True)
class Thinking:
    """The agent thinks. `text` is "" when the model does not show its thoughts."""

    kind: ClassVar = "thinking"
    text: str


@dataclass(frozen=True)
class Call:
    """The agent calls a tool. `permission` is the policy's verdict; None if the event has none."""

    kind: ClassVar = "call"
    tool: ToolView
    permission: Permission | None
    by_subagent: bool


@dataclass(frozen=True)
class Result:
    """What a tool returned. `outcome_unknown`: whether the call took effect is not known."""

    kind: ClassVar = "result"
    text: str
    failed: bool
    outcome_unknown: bool


@dataclass(frozen=True)
class Decision:
    """A person decided on a call.

    Attributes:
        allowed: False for a denial, whose `reason` the agent receives.
        by: Who decided; "" if the event does not say.
        answers: To a question, by its text; None for other calls.
        edited_input: What runs instead of the proposed input; None if it runs as proposed.
        rule: What was remembered for later calls; "" if nothing was.
    """

    kind: ClassVar = "decision"
    allowed: bool
    by: str
    reason: str = ""
    answers: Mapping[str, str] | None = None
    edited_input: Mapping[str, Any] | None = None
    rule: str = ""


@dataclass(frozen=True)
class Notice:
    """Something the service reports. `action`: a person should do something; `detail` says why."""

    kind: ClassVar = "notice"
    text: str
    tone: Tone
    detail: str = ""


type EventView = Message | Thinking | Call | Result | Decision | Notice
