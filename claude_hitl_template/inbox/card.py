"""What a card shows of one call: the whole input, and what helps to judge it."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar, Literal

from claude_hitl_template.domain.events import tool_result_id
from claude_hitl_template.domain.models import Approval, ApprovalState, Event, Session
from claude_hitl_template.domain.policy import Verdict, mcp_parts
from claude_hitl_template.domain.policy.offers import Offer, granted, offers
from claude_hitl_template.domain.policy.tiers import BY_DEFAULT, Requirement
from claude_hitl_template.errors import NotFound
from claude_hitl_template.files.manifest import SavedFile, contents
from claude_hitl_template.inbox.services import Pages
from claude_hitl_template.presentation.diff import CONTEXT, Diff, Row, diff, shifted
from claude_hitl_template.presentation.flags import Flag, Segment, marks
from claude_hitl_template.presentation.sessions import editable
from claude_hitl_template.presentation.text import hidden_count, leads_to, texts, without_hook
from claude_hitl_template.presentation.tools import pretty_json, tool_view
from claude_hitl_template.presentation.views import Code, Part, Question
from claude_hitl_template.presentation.views import Diff as DiffPart
from claude_hitl_template.store.protocol import EarlierDecision

MAX_FILE_BYTES = 512 * 1024  # of a saved file that a card compares with
LONG_CHARS, LONG_LINES = 3000, 60  # of an input that is read to its end before it is allowed
MAX_EDITED_CHARS = 200_000
RESULTS = 100  # of a session's last results, among which the call's is looked for
RESULT_CHARS = 20_000
_EXIT = re.compile(r"\s*Exit code (\d+)")
_RESULT_TYPES = ("agent.tool_result", "agent.mcp_tool_result")
_EDITED_FIELD: Mapping[str, tuple[str, str]] = {
    "Bash": ("command", "The command that runs instead"),
    "Write": ("content", "The content that is written instead"),
    "Edit": ("new_string", "The new text that is put there instead"),
    "NotebookEdit": ("new_source", "The source that is written instead"),
    "WebFetch": ("url", "The address that is read instead"),
}
_HEADINGS: Mapping[str, str] = {
    "Bash": "Run a command",
    "Monitor": "Watch a command",
    "Write": "Write a file",
    "Edit": "Edit a file",
    "NotebookEdit": "Edit a notebook",
    "Read": "Read a file",
    "WebFetch": "Read a web page",
    "WebSearch": "Search the web",
    "AskUserQuestion": "Answer a question",
    "ExitPlanMode": "Accept a plan",
    "Network": "Open a host of the network",
    "Agent": "Start a subagent",
    "Task": "Start a subagent",
}


@dataclass(frozen=True)
class Command:
    """A command as it would run. `pieces`: all of its text, each with the number of its simple command (0: none)."""

    kind: ClassVar = "command"
    pieces: tuple[tuple[str, int], ...]
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class Change:
    """A file before and after. `notes` say how far the file before is known."""

    kind: ClassVar = "change"
    title: str
    diff: Diff
    notes: tuple[Flag, ...] = ()
    content: str | None = None  # all of the new file


@dataclass(frozen=True)
class Note:
    """A sentence about the file of a call, which cannot be compared."""

    kind: ClassVar = "note"
    flag: Flag


type Block = Part | Command | Change | Note


@dataclass(frozen=True)
class Edit:
    """What the reader may change. `field`: a text of the input; None if a browser would not send it back unchanged."""

    field: str | None
    label: str
    text: str
    json: str


@dataclass(frozen=True)
class Outcome:
    """What was decided, and what happened then."""

    tone: Literal["good", "bad", "wait"]
    said: str
    decided_by: str
    reason: str
    result: str = ""


@dataclass(frozen=True)
class Ask:
    """Why a call asks: a rule in words, who must allow the call for it, and when its deadline passes."""

    rule: str
    reason: str
    who: str
    due_at: datetime | None
    on_deadline: str


@dataclass(frozen=True)
class Card:
    """A call as its card shows it. `questions`: those to answer, each with the beginning of the names of its inputs."""

    approval: Approval
    session: Session
    heading: str
    requester: str
    blocks: tuple[Block, ...]
    flags: tuple[Flag, ...]
    questions: tuple[tuple[str, Question], ...]
    offers: tuple[Offer, ...]
    edit: Edit | None
    is_long: bool
    leads_to: str
    last_words: str
    earlier: tuple[EarlierDecision, ...]
    asks: tuple[Ask, ...]
    outcome: Outcome | None

    @property
    def waits(self) -> bool:
        return self.approval.state is ApprovalState.PENDING


async def load(pages: Pages, approval: Approval) -> Card:
    """Reads what the card of this call shows. Raises NotFound if its session is deleted meanwhile."""
    workspace_id = approval.workspace_id
    session = await pages.store.get_session(approval.session_id, workspace_id)
    found = marks(approval.tool_name, approval.input, folder=approval.folder, targets=approval.targets)
    blocks = await _blocks(pages, approval, _judged(approval, found.segments))
    waits = approval.state is ApprovalState.PENDING
    questions: tuple[Question, ...] = ()
    if approval.kind == "question" and waits:  # shown with their choices instead
        questions = tuple(block for block in blocks if isinstance(block, Question))
        blocks = [block for block in blocks if not isinstance(block, Question)]
    return Card(
        approval=approval,
        session=session,
        heading=_heading(approval),
        requester=await _name_of(pages, session.created_by),
        blocks=tuple(blocks),
        flags=found.flags,
        questions=tuple((f"{approval.id}.q{number}", asked) for number, asked in enumerate(questions)),
        offers=offers_for(approval) if waits else (),
        edit=edit_of(approval) if waits and _is_editable(approval) else None,
        is_long=is_long(approval),
        leads_to=leads_to(approval.input, approval.targets),
        last_words=await _last_words(pages, approval),
        asks=tuple(_ask(one) for one in approval.requirements),
        earlier=tuple(await pages.store.list_same_calls(approval.id, workspace_id)),
        outcome=None if waits else await _outcome(pages, approval),
    )


def _judged(approval: Approval, segments: Sequence[Segment]) -> list[Segment]:
    """The commands of a line with what the policy says of each."""
    asked = {(one.start, one.end) for one in approval.segments if one.verdict is not Verdict.allow}
    sources = {(one.start, one.end): one.source for one in approval.segments}
    return [
        replace(one, asked=(one.start, one.end) in asked, rule=sources.get((one.start, one.end), ""))
        for one in segments
    ]


def _ask(requirement: Requirement) -> Ask:
    people = "One" if requirement.quorum == 1 else str(requirement.quorum)
    who = f"{people} of {requirement.approvers}" + (
        ", but not who asked for the session" if requirement.exclude_requester else ""
    )
    rule = "" if requirement.rule == BY_DEFAULT else requirement.rule
    later = requirement.escalate_to if requirement.escalated_at is None else None
    on_deadline = f"then {later} may decide, too" if later else "then it is denied"
    return Ask(rule, requirement.reason, who, requirement.due_at, on_deadline)


async def _name_of(pages: Pages, principal_id: str | None) -> str:
    """The name of who created a session; "" if that is not known."""
    if principal_id is None:
        return ""
    try:
        return (await pages.store.get_principal(principal_id)).name
    except NotFound:
        return ""


def offers_for(approval: Approval) -> tuple[Offer, ...]:
    """The rules that "allow and remember" offers, the narrowest first."""
    if approval.kind not in ("tool", "network") or approval.folder not in (None, "."):
        return ()
    folder = Path(approval.cwd)
    found = offers(approval.tool_name, approval.input, folder, approval.segments)
    if not found:
        return ()
    narrowest = granted(approval.tool_name, approval.input, folder, approval.segments)
    # A rule with a digest has no text to name it by: it can be chosen only where "remember" alone records it.
    return tuple(one for one in found if one.rule.digest is None or one.rule == narrowest)


def is_long(approval: Approval) -> bool:
    """Whether the input is too long to be seen at once, so that it is allowed only after it was scrolled through."""
    if approval.kind == "question":
        return False
    shown = pretty_json(approval.input)  # a line break in a text is "\\n" there
    return len(shown) > LONG_CHARS or shown.count("\\n") + shown.count("\n") > LONG_LINES


def _heading(approval: Approval) -> str:
    server, tool = mcp_parts(approval.tool_name)
    return f"{server}: {tool}" if server else _HEADINGS.get(approval.tool_name, approval.tool_name)


def edit_of(approval: Approval) -> Edit:
    """What the reader may change of a call."""
    field, label = _EDITED_FIELD.get(approval.tool_name, ("", ""))
    text = approval.input.get(field)
    # A browser sends line breaks as CRLF, and hidden characters cannot be seen while they are edited.
    plain = isinstance(text, str) and not hidden_count(text)
    return Edit(field if plain else None, label, str(text) if plain else "", editable(approval.input))


def _is_editable(approval: Approval) -> bool:
    """Larger inputs are edited in a terminal: a browser would get them three times."""
    return approval.kind == "tool" and len(pretty_json(approval.input)) <= MAX_EDITED_CHARS


async def _last_words(pages: Pages, approval: Approval) -> str:
    """The agent's last message before the call, as Markdown; "" if there is none."""
    page = await pages.store.list_events(
        approval.session_id, approval.workspace_id, limit=20, order="desc", types=["agent.message"]
    )
    before = [event for event in page.data if event.created_at <= approval.created_at]
    return texts(before[0].payload["content"]) if before else ""


# -- the input


async def _blocks(pages: Pages, approval: Approval, segments: Sequence[Segment]) -> list[Block]:
    blocks: list[Block] = list(tool_view(approval.tool_name, approval.input).parts)
    if approval.tool_name in ("Bash", "Monitor"):
        return [
            _command(b.text, segments) if isinstance(b, Code) and b.title == "command" else b for b in blocks
        ]
    if approval.tool_name == "Edit" and any(isinstance(block, DiffPart) for block in blocks):
        return _with_edit(blocks, await _saved_text(pages, approval), approval)
    if approval.tool_name == "Write" and any(isinstance(block, Code) for block in blocks):
        return _with_write(blocks, await _saved_text(pages, approval))
    return blocks


def _command(text: str, segments: Sequence[Segment]) -> Command:
    pieces: list[tuple[str, int]] = []
    at = 0
    for number, segment in enumerate(segments, 1):
        if segment.start < at:
            continue  # inside of the one before, as a substitution is
        pieces += [(text[at : segment.start], 0), (text[segment.start : segment.end], number)]
        at = segment.end
    pieces.append((text[at:], 0))
    return Command(tuple(piece for piece in pieces if piece[0]), tuple(segments))


@dataclass(frozen=True)
class _Saved:
    """The file of a call as it was saved last. Without `text` it is not known, and `why` says so."""

    text: str | None
    why: str
    is_new: bool = False
    is_later: bool = False  # saved with a time after the call


async def _saved_text(pages: Pages, approval: Approval) -> _Saved:
    inside = [target[2:] for target in approval.targets or () if target.startswith("./")]
    if len(inside) != 1 or len(approval.targets or ()) != 1:
        return _Saved(None, "The file is not in the session's workspace, so it cannot be compared here.")
    try:
        file = await pages.store.workspace_file(approval.session_id, approval.workspace_id, inside[0])
        if file.size > MAX_FILE_BYTES:
            return _Saved(None, "The saved file is too large to be compared here.")
        raw = await _content(pages, approval.session_id, file)
        is_later = file.mtime_ns / 1e9 > approval.created_at.timestamp()
        return _Saved(raw.decode(), "", is_later=is_later)
    except NotFound:
        return _Saved(None, "The saved workspace has no such file.", is_new=True)
    except UnicodeDecodeError:
        return _Saved(None, "The saved file is not text.")


async def _content(pages: Pages, session_id: str, file: SavedFile) -> bytes:
    async def get(names: Sequence[str]) -> list[bytes]:
        return await pages.store.get_blobs(names, session_id=session_id)

    return b"".join([piece async for piece in contents(file, get)])


_LATER = Flag("danger", "The saved file is newer than this call: it changed since the agent made it.")


def _with_write(blocks: Sequence[Block], saved: _Saved) -> list[Block]:
    found: list[Block] = []
    for block in blocks:
        if not isinstance(block, Code) or block.title != "content":
            found.append(block)
        elif saved.text is None:
            said = "New file: the saved workspace has none of this name." if saved.is_new else saved.why
            found += [Note(Flag("note" if saved.is_new else "warning", said)), block]
        elif saved.text == block.text:
            found += [Note(Flag("warning", "The saved file has this content already.")), block]
        else:
            notes = (_LATER,) if saved.is_later else ()
            found.append(Change("replaces the saved file", diff(saved.text, block.text), notes, block.text))
    return found


def _with_edit(blocks: Sequence[Block], saved: _Saved, approval: Approval) -> list[Block]:
    found: list[Block] = []
    for block in blocks:
        if isinstance(block, DiffPart):
            found.append(_edited(block, saved, replaces_all=approval.input.get("replace_all") is True))
        else:
            found.append(block)
    return found


def _edited(part: DiffPart, saved: _Saved, *, replaces_all: bool) -> Change:
    """The edit at its place in the saved file, or alone where the place is not known."""
    count = saved.text.count(part.old) if saved.text is not None and part.old else 0
    if saved.text is None or not count:
        why = (
            saved.why
            or "The saved file does not have the text that is replaced: it changed since, or is not saved yet."
        )
        level = "warning" if saved.text is None else "danger"
        return Change("change", diff(part.old, part.new, context=None), (Flag(level, why),))
    notes: list[Flag] = [_LATER] if saved.is_later else []
    if count > 1:
        places = f"The text is in the saved file {count} times"
        said = (
            "; each of them is replaced, the first is shown." if replaces_all else ", and must be there once."
        )
        notes.append(Flag("warning", places + said))
    return Change("change", _in_place(saved.text, part), tuple(notes))


def _in_place(text: str, part: DiffPart) -> Diff:
    """The first place of an edit, in whole lines: every line of the edit, with a few of the file around it."""
    at = text.index(part.old)
    start = text.rfind("\n", 0, at) + 1
    end = text.find("\n", at + len(part.old))
    end = len(text) if end < 0 else end + 1
    before, after = text[:start].split("\n")[:-1], text[end:].split("\n")
    if after[-1] == "":
        after.pop()
    old, new = text[start:end], text[start:at] + part.new + text[at + len(part.old) : end]
    changed = diff(old, new, context=None)
    above, below = before[-CONTEXT:], after[:CONTEXT]
    rows: list[Row] = []
    if len(before) > len(above):
        rows.append(Row("gap", hidden=len(before) - len(above)))
    rows += shifted(
        diff("\n".join([*above, ""]), "\n".join([*above, ""]), context=None).rows, len(before) - len(above)
    )
    rows += shifted(changed.rows, len(before))
    last_old, last_new = len(before) + old.count("\n"), len(before) + new.count("\n")
    if below:
        same = diff("\n".join([*below, ""]), "\n".join([*below, ""]), context=None).rows
        rows += shifted(same, last_old, last_new)
    if len(after) > len(below):
        rows.append(Row("gap", hidden=len(after) - len(below)))
    return replace(changed, rows=tuple(rows))


# -- afterwards


async def _outcome(pages: Pages, approval: Approval) -> Outcome:
    decision, state = approval.decision, approval.state
    by = decision.decided_by if decision else ""
    reason = (decision.deny_message or "") if decision else ""
    event = await _result_of(pages, approval)
    said = texts(event.payload.get("content") or ()).rstrip("\n") if event else ""
    failed = bool(event and event.payload.get("is_error"))
    tone, words = _words(approval, said)
    shown = without_hook(said) if failed else said
    has_run = state in (ApprovalState.SUCCEEDED, ApprovalState.FAILED) and approval.kind == "tool"
    return Outcome(tone, words, by, reason, shown[:RESULT_CHARS] if has_run else "")


_UNKNOWN = (
    "Outcome unknown: something died while it ran. It may have taken effect and is not repeated; check before the agent "
    "goes on."
)
type _Tone = Literal["good", "bad", "wait"]
_BY_STATE: Mapping[ApprovalState, tuple[_Tone, str]] = {
    ApprovalState.ALLOWED: ("wait", "It has not run yet."),
    ApprovalState.CLAIMED: ("wait", "It is running."),
    ApprovalState.SUCCEEDED: ("good", "It ran."),
    ApprovalState.FAILED: ("bad", "It ran and failed."),
    ApprovalState.UNKNOWN: ("bad", _UNKNOWN),
    ApprovalState.DENIED: ("good", "It never runs."),
    ApprovalState.EXPIRED: ("bad", "It expired: no decision came in time. It never ran."),
    ApprovalState.SUPERSEDED: ("bad", "It was superseded: the session went on without it. It never ran."),
}
_BY_KIND: Mapping[tuple[str, ApprovalState], str] = {
    ("network", ApprovalState.ALLOWED): "The host is open.",
    ("network", ApprovalState.SUCCEEDED): "The host was open, and is closed again.",
    ("question", ApprovalState.SUCCEEDED): "The agent has the answers.",
    ("question", ApprovalState.DENIED): "The agent goes on without an answer.",
    ("plan", ApprovalState.SUCCEEDED): "The agent goes on with the plan.",
    ("plan", ApprovalState.DENIED): "The agent plans again.",
}


def _words(approval: Approval, said: str) -> tuple[_Tone, str]:
    tone, words = _BY_STATE[approval.state]
    words = _BY_KIND.get((approval.kind, approval.state), words)
    if approval.tool_name == "Bash":
        exit_code = _EXIT.match(said)
        if approval.state is ApprovalState.FAILED and exit_code:
            words = f"It ran and failed: exit status {exit_code[1]}."
        elif approval.state is ApprovalState.SUCCEEDED:
            words = "It ran: exit status 0."
    return tone, words


async def _result_of(pages: Pages, approval: Approval) -> Event | None:
    page = await pages.store.list_events(
        approval.session_id, approval.workspace_id, limit=RESULTS, order="desc", types=_RESULT_TYPES
    )
    wanted = tool_result_id(approval.event_id)
    return next((event for event in page.data if event.id == wanted), None)


def changed_input(approval: Approval, edit: Edit, text: str) -> dict[str, Any]:
    """The input with its plain field replaced."""
    return dict(approval.input) if edit.field is None else {**approval.input, edit.field: text}
