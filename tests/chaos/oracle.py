"""The oracle of a chaos run: pure functions that find the broken promises of the README in the run's record.

The record contains the store at rest, the requests that the service acknowledged, the events that clients received in
their streams, and the runs: each gated command writes its token, the time and its owner's epoch into a journal. A token
is in one input only, and an edited input has another token, so a line of the journal identifies the input that ran. No
message is sent twice in a session.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Any

from claude_hitl_template.domain.audit.entries import GENESIS, hash_of
from claude_hitl_template.domain.audit.receipts import CLOSING
from claude_hitl_template.domain.events import tool_result_id
from claude_hitl_template.domain.models import Approval, ApprovalState, Event, Session

TOKEN = re.compile(r"run-[0-9a-f]{12}\b")  # what is before it may be an escaped line break of JSON
CLAIMED = {ApprovalState.CLAIMED, ApprovalState.SUCCEEDED, ApprovalState.FAILED, ApprovalState.UNKNOWN}
SHOWN = 12  # entries of a violation's history; its middle is left out


@dataclass(frozen=True)
class Acknowledged:
    """A request that was answered with 2xx, and the committed event in the answer."""

    at: datetime
    client: str
    session_id: str
    asked: Mapping[str, Any]
    event: Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """A line of the journal."""

    token: str
    at: datetime
    session_id: str
    epoch: int


@dataclass(frozen=True)
class Stream:
    """A session's log as one client received it, over one or more connections: pairs of cursor and event id."""

    client: str
    session_id: str
    seen: Sequence[tuple[int, str]]


@dataclass(frozen=True)
class Lost:
    """The machine was lost with all workspaces. `over` are the sessions whose turn had ended, so all files were saved."""

    at: datetime
    over: frozenset[str]


@dataclass(frozen=True)
class Violation:
    """A broken promise, and the shortest history that shows it, oldest first."""

    promise: int
    session_id: str
    what: str
    history: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = "".join(f"\n    {line}" for line in self.history)
        return f"promise {self.promise}, {self.session_id}: {self.what}{lines}"


@dataclass(frozen=True)
class Record:
    """The data that is judged.

    Attributes:
        files: By session, the saved content of the file into which its commands write their tokens.
        processes: By session at rest, the ids of its remaining processes.
        audit: By workspace, the entries of its audit log in order; None if the log was not read.
    """

    sessions: Sequence[Session]
    approvals: Sequence[Approval]
    events: Mapping[str, Sequence[Event]]
    acknowledged: Sequence[Acknowledged] = ()
    created: Sequence[str] = ()
    streams: Sequence[Stream] = ()
    runs: Sequence[Run] = ()
    files: Mapping[str, str] = field(default_factory=dict[str, str])
    processes: Mapping[str, Sequence[int]] = field(default_factory=dict[str, Sequence[int]])
    lost: Sequence[Lost] = ()
    audit: Mapping[str, Sequence[Mapping[str, Any]]] | None = None

    @cached_property
    def session(self) -> Mapping[str, Session]:
        return {s.id: s for s in self.sessions}

    @cached_property
    def approval(self) -> Mapping[tuple[str, str], Approval]:
        return {(a.session_id, a.event_id): a for a in self.approvals}

    @cached_property
    def asking(self) -> Mapping[str, Sequence[Approval]]:
        """By token, the approvals whose proposed or allowed input contains it."""
        found: dict[str, list[Approval]] = defaultdict(list)
        for approval in self.approvals:
            for token in tokens(approval.input) | tokens(approval.run_input):
                found[token].append(approval)
        return found

    def log(self, session_id: str) -> Mapping[str, Event]:
        return {e.id: e for e in self.events.get(session_id, ())}


def _ran_as(approval: Approval) -> set[str]:
    """The tokens that the call writes when it runs. A question has a token, too, but runs nothing."""
    return tokens(approval.run_input) if approval.kind == "tool" else set()


def tokens(given: Any) -> set[str]:
    return set(TOKEN.findall(json.dumps(given)))


def judge(record: Record) -> list[Violation]:
    """Returns the broken promises; [] if all were kept."""
    return [violation for check in CHECKS for violation in check(record)]


# -- 1: an acknowledged decision is never lost


def decisions_are_kept(record: Record) -> Iterator[Violation]:
    for session_id in record.created:
        if session_id not in record.session:
            yield Violation(1, session_id, "a session that was acknowledged is not there")
    for said in record.acknowledged:
        yield from _kept(record, said)
    yield from _done_once(record)


def _kept(record: Record, said: Acknowledged) -> Iterator[Violation]:
    found = record.log(said.session_id).get(str(said.event["id"]))
    if found is None:
        yield _around(
            record, 1, said.session_id, f"{said.event['type']} was acknowledged and is not in the log", said
        )
    elif said.asked["type"] == "user.tool_confirmation":
        call = str(said.asked["tool_use_id"])
        approval = record.approval.get((said.session_id, call))
        if approval is None or not _says(approval, said.asked):
            what = (
                f"the decision on {call} was acknowledged to {said.client}, and another one or none is kept"
            )
            yield _around(record, 1, said.session_id, what, said, approval)


def _says(approval: Approval, asked: Mapping[str, Any]) -> bool:
    decision = approval.decision
    if decision is None or decision.result != asked["result"]:
        return False
    if decision.result == "deny":
        return decision.deny_message == asked.get("deny_message")
    answers = asked.get("answers")
    wanted = {**approval.input, "answers": answers} if answers else asked.get("updated_input", approval.input)
    return approval.run_input == wanted


def _done_once(record: Record) -> Iterator[Violation]:
    """Requests that were repeated for lack of an answer had one effect, and allowed calls were tried."""
    made = Counter(s.metadata.get("conversation") for s in record.sessions if "conversation" in s.metadata)
    for name, count in made.items():
        if count > 1:
            yield Violation(1, str(name), f"a session that was asked for once was created {count} times")
    for approval in record.approvals:
        if approval.decision is None or approval.decision.result != "allow":
            continue
        session = record.session[approval.session_id]
        over = (session.stop_reason or {}).get("type") == "end_turn"
        left = approval.state is ApprovalState.ALLOWED and over
        dropped = approval.state is ApprovalState.SUPERSEDED and not _interrupted(record, session.id)
        if left or dropped:
            what = f"{approval.event_id} was allowed and is {approval.state.value}: it was never tried"
            yield _around(record, 1, session.id, what, None, approval)


def _interrupted(record: Record, session_id: str) -> bool:
    return any(e.type == "user.interrupt" for e in record.events.get(session_id, ()))


# -- 2, 3, 6: at most once, only what was allowed, by one owner


def what_ran_was_allowed(record: Record) -> Iterator[Violation]:
    spent: set[str] = set()
    for run in sorted(record.runs, key=lambda r: r.at):
        asked = record.asking.get(run.token, ())
        claims = [a for a in asked if a.state in CLAIMED and run.token in tokens(a.run_input)]
        owned = [a for a in claims if a.claimed_epoch == run.epoch and a.session_id == run.session_id]
        fresh = next((a for a in owned if a.id not in spent), None)
        if fresh is None:
            promise, what = _why_not(run, asked, claims, owned)
            yield _around(record, promise, run.session_id, what, None, *asked, token=run.token)
            continue
        spent.add(fresh.id)
        if fresh.decision is None or run.at < fresh.decision.decided_at:
            yield _around(
                record,
                3,
                run.session_id,
                f"{run.token} ran before it was allowed",
                None,
                fresh,
                token=run.token,
            )
    yield from _claims_are_true(record, spent)


def _why_not(
    run: Run, asked: Sequence[Approval], claims: Sequence[Approval], owned: Sequence[Approval]
) -> tuple[int, str]:
    if not asked:
        return 2, f"{run.token} ran, and no approval was requested"
    if owned:
        return 2, f"{run.token} ran again after {owned[0].event_id} had been used up"
    if claims:
        return 6, f"{run.token} ran in epoch {run.epoch}, and epoch {claims[0].claimed_epoch} had the claim"
    states = ", ".join(sorted({a.state.value for a in asked}))
    if any(
        a.decision and a.decision.result == "allow" and run.token not in tokens(a.run_input) for a in asked
    ):
        return 2, f"{run.token} ran, and another input was allowed"
    return 3, f"{run.token} ran, and its call is {states}"


def _claims_are_true(record: Record, spent: set[str]) -> Iterator[Violation]:
    for approval in record.approvals:
        wrong = _wrong_with(record, approval, approval.id in spent)
        if wrong is not None:
            yield _around(record, wrong[0], approval.session_id, wrong[1], None, approval)


def _wrong_with(record: Record, approval: Approval, ran: bool) -> tuple[int, str] | None:
    call, decision = approval.event_id, approval.decision
    if approval.digest != approval.digest_of(approval.input):
        return 2, f"{call} shows an input that is not the one of its digest"
    if approval.run_input is not None and approval.run_digest != approval.digest_of(approval.run_input):
        return 2, f"{call} has an allowed input that is not the one of its digest"
    if approval.state in CLAIMED | {ApprovalState.ALLOWED} and (
        decision is None or decision.result != "allow"
    ):
        return 3, f"{call} is {approval.state.value}, and no decision allowed it"
    by_human = decision is not None and not decision.decided_by.startswith("rule:")
    if by_human and f"sevt_decision_{approval.id}" not in record.log(approval.session_id):
        return 3, f"{call} was decided, and no decision is in the log"
    if approval.state is ApprovalState.SUCCEEDED and _ran_as(approval) and not ran:
        return 2, f"{call} is said to have run, and it did not"
    if approval.state is ApprovalState.CLAIMED:
        return 2, f"{call} was claimed, and its outcome is neither told nor called unknown"
    if approval.state is ApprovalState.UNKNOWN:
        result = record.log(approval.session_id).get(tool_result_id(approval.event_id))
        if result is None or result.payload.get("outcome") != "unknown":
            return 2, f"the outcome of {call} is unknown, and the log does not say so"
    epoch = record.session[approval.session_id].epoch
    if (approval.claimed_epoch or 0) > epoch:
        return 6, f"{call} was claimed in epoch {approval.claimed_epoch}, and the session is in {epoch}"
    return None


# -- 4: the log has no gap, no repeat, one order


def logs_are_whole(record: Record) -> Iterator[Violation]:
    for session in record.sessions:
        log = record.events.get(session.id, ())
        at = next((i for i, event in enumerate(log) if event.seq != i + 1), None)
        if at is not None:
            yield Violation(4, session.id, f"the log has {log[at].seq} where {at + 1} is due", _near(log, at))
        elif len(log) != session.next_seq - 1:
            what = f"the log ends at {len(log)}, and the session counted {session.next_seq - 1}"
            yield Violation(4, session.id, what, _near(log, len(log)))
        yield from _repeats(session.id, log)


def _repeats(session_id: str, log: Sequence[Event]) -> Iterator[Violation]:
    first: dict[str, Event] = {}
    for at, event in enumerate(log):
        said = event.type == "user.message"
        for mark in (event.id, *([json.dumps(event.payload.get("content"))] if said else [])):
            if mark in first:
                what = f"{event.type} {event.id} is in the log twice, at {first[mark].seq} and {event.seq}"
                yield Violation(4, session_id, what, (_line(first[mark]), *_near(log, at)))
                break
            first[mark] = event


def streams_are_the_log(record: Record) -> Iterator[Violation]:
    for stream in record.streams:
        log = record.events.get(stream.session_id, ())
        for at, (cursor, event_id) in enumerate(stream.seen):
            due = (at + 1, log[at].id) if at < len(log) else (at + 1, "the end")
            if (cursor, event_id) != due:
                what = f"{stream.client} was sent {cursor} {event_id}, and {due[0]} {due[1]} was due"
                seen = tuple(f"sent {c} {e}" for c, e in stream.seen[max(at - 2, 0) : at + 1])
                yield Violation(4, stream.session_id, what, (*seen, *_near(log, at)))
                break


# -- 5, 7: parked means parked, and the work is kept


def what_rests_is_parked(record: Record) -> Iterator[Violation]:
    for session in record.sessions:
        if session.status not in ("idle", "terminated") or session.lease is not None:
            what = f"it does not rest: {session.status}, lease {session.lease and session.lease.epoch}"
            yield _around(record, 5, session.id, what, None)
    for session_id, left in record.processes.items():
        if left:
            yield _around(record, 5, session_id, f"it is parked, and processes {list(left)} are left", None)


def work_is_kept(record: Record) -> Iterator[Violation]:
    for approval in record.approvals:
        if approval.state is ApprovalState.SUCCEEDED and approval.session_id in record.files:
            lost = _ran_as(approval) - tokens(record.files[approval.session_id])
            if lost and not _may_be_lost(record, approval):
                what = (
                    f"what {approval.event_id} wrote is not among the saved files: {', '.join(sorted(lost))}"
                )
                yield _around(record, 7, approval.session_id, what, None, approval)


def _may_be_lost(record: Record, approval: Approval) -> bool:
    """Whether the machine was lost during the turn that wrote the file, or the log reports that it could not be saved."""
    wrote_at = approval.closed_at or approval.created_at
    if any(lost.at >= wrote_at and approval.session_id not in lost.over for lost in record.lost):
        return True
    return any(
        e.type == "session.error" and e.payload.get("error", {}).get("concerns") == "workspace"
        for e in record.events.get(approval.session_id, ())
        if e.created_at >= approval.created_at
    )


# -- 9: every decision can be proved


def chains_are_whole(record: Record) -> Iterator[Violation]:
    """Each audit log is one chain without gap or fork, and has each decision of the store once."""
    for workspace_id, entries in (record.audit or {}).items():
        previous = GENESIS
        for due, entry in enumerate(entries, 1):
            if entry["seq"] != due:
                yield _of_the_chain(workspace_id, entries, due, f"it has {entry['seq']} where {due} is due")
                break
            if entry["previous"] != previous or hash_of(entry) != entry["hash"]:
                yield _of_the_chain(workspace_id, entries, due, f"entry {due} does not follow the one before")
                break
            previous = entry["hash"]
    if record.audit is not None:
        yield from _decisions_are_recorded(record, record.audit)


def _decisions_are_recorded(
    record: Record, audit: Mapping[str, Sequence[Mapping[str, Any]]]
) -> Iterator[Violation]:
    recorded: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for entry in (entry for entries in audit.values() for entry in entries):
        if entry["action"] in CLOSING:
            recorded[entry["target"]].append(entry)
    for approval in record.approvals:
        decision = approval.decision
        due = decision.result if decision else None
        decided = decision is not None or approval.state is ApprovalState.EXPIRED
        found = [entry["details"].get("result") for entry in recorded[approval.id]]
        if found != ([due] if decided else []):
            what = f"{approval.event_id} is {approval.state.value}, and the audit log has {found} for it"
            yield _around(record, 9, approval.session_id, what, None, approval)


def _of_the_chain(workspace_id: str, entries: Sequence[Mapping[str, Any]], due: int, what: str) -> Violation:
    near = entries[max(due - 3, 0) : due + 1]
    history = tuple(f"{e['seq']} {e['action']} {e['target']} {e['hash'][:12]}" for e in near)
    return Violation(9, workspace_id, f"the audit log is broken: {what}", history)


CHECKS: Sequence[Callable[[Record], Iterable[Violation]]] = (
    decisions_are_kept,
    what_ran_was_allowed,
    logs_are_whole,
    streams_are_the_log,
    what_rests_is_parked,
    work_is_kept,
    chains_are_whole,
)


# -- the shortest history


def _around(
    record: Record,
    promise: int,
    session_id: str,
    what: str,
    said: Acknowledged | None,
    *approvals: Approval | None,
    token: str = "",
) -> Violation:
    """Builds the violation, with the history of these approvals and of the session's status only."""
    known = [a for a in approvals if a]
    names = {name for a in known for name in (a.event_id, a.call_id, a.id)} | ({token} if token else set())
    names |= {t for a in known for t in tokens(a.input) | tokens(a.run_input)}
    if said is not None:
        names |= {str(said.event["id"]), str(said.asked.get("tool_use_id", said.event["id"]))}
    lines = [
        (event.created_at, _line(event))
        for event in record.events.get(session_id, ())
        if event.type.startswith("session.status") or _mentions(event.model_dump_json(), names)
    ]
    lines += [
        (a.at, f"{a.client} received: {a.event['id']} for {json.dumps(a.asked)[:200]}")
        for a in record.acknowledged
        if a.session_id == session_id and _mentions(json.dumps([a.asked, a.event]), names)
    ]
    lines += [(r.at, f"ran: {r.token} in epoch {r.epoch}") for r in record.runs if r.token in names]
    told = [f"{at:%H:%M:%S.%f} {line}" for at, line in sorted(lines)]
    if len(told) > SHOWN:
        told = [*told[: SHOWN // 2], f"... {len(told) - SHOWN} more ...", *told[-SHOWN // 2 :]]
    ends = [f"ends as {a.state.value}, claimed in epoch {a.claimed_epoch}: {a.event_id}" for a in known]
    return Violation(promise, session_id, what, (*told, *ends))


def _mentions(text: str, names: set[str]) -> bool:
    return any(name in text for name in names)


def _near(log: Sequence[Event], at: int) -> tuple[str, ...]:
    return tuple(_line(event) for event in log[max(at - 2, 0) : at + 2])


def _line(event: Event) -> str:
    return f"{event.seq} {event.type} {event.id} {json.dumps(event.payload, default=str)[:160]}"
