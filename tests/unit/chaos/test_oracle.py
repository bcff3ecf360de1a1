"""The oracle of chaos runs finds each broken promise in a hand-made history, and none in a clean one."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from claude_hitl_template.domain import events
from claude_hitl_template.domain.audit import Draft, Head, seal
from claude_hitl_template.domain.canonical_json import digest
from claude_hitl_template.domain.models import Approval, ApprovalState, Decision, Event, Lease, Session
from claude_hitl_template.domain.people import SERVICE
from tests.chaos.oracle import Acknowledged, Lost, Record, Run, Stream, judge

NOW = datetime(2030, 1, 1, tzinfo=UTC)
SID, CALL = "sesn_1", "toolu_1"
PROPOSED, EDITED = ({"command": f"echo run-{n * 12}"} for n in "ab")
DECIDED = ("approval.decided", {"result": "allow"})
TOKEN, EDITED_TOKEN = "run-" + "a" * 12, "run-" + "b" * 12


def at(seconds: float) -> datetime:
    return NOW + timedelta(seconds=seconds)


def event(seq: int, type_: str, id_: str, **payload: Any) -> Event:
    return Event(seq=seq, id=id_, type=type_, payload=payload, created_at=at(seq), processed_at=at(seq))


def clean() -> Record:
    """Returns the record of one call, allowed as proposed and run once in epoch 2."""
    approval = Approval(
        id="appr_1", session_id=SID, workspace_id="key_1", event_id=CALL, call_id=CALL, batch=(CALL,), tool_name="Bash",
        input=PROPOSED, digest=digest(PROPOSED), cwd="/w", state=ApprovalState.SUCCEEDED, created_at=at(2),
        decision=Decision(result="allow", decided_by="ann", decided_at=at(3)), run_input=PROPOSED,
        run_digest=digest(PROPOSED), claimed_epoch=2, claim_id="claim",
    )  # fmt: skip
    log = [
        event(1, "user.message", "sevt_1", content=events.text_blocks("go")),
        event(2, "agent.tool_use", CALL, input=PROPOSED),
        event(3, "user.tool_confirmation", "sevt_decision_appr_1", tool_use_id=CALL, result="allow"),
        event(4, "agent.tool_result", events.tool_result_id(CALL), tool_use_id=CALL),
        event(5, "session.status_idle", "sevt_5", stop_reason=events.END_TURN),
    ]
    session = Session(
        id=SID, workspace_id="key_1", created_at=NOW, updated_at=NOW, epoch=2, next_seq=6, stop_reason=events.END_TURN,
        metadata={"conversation": "1"},
    )  # fmt: skip
    asked = {"type": "user.tool_confirmation", "tool_use_id": CALL, "result": "allow"}
    return Record(
        sessions=[session],
        approvals=[approval],
        events={SID: log},
        acknowledged=[Acknowledged(at(3), "ann", SID, asked, log[2].wire())],
        created=[SID],
        streams=[Stream("ann", SID, [(e.seq, e.id) for e in log])],
        runs=[Run(TOKEN, at(3.5), SID, 2)],
        files={SID: f"{EDITED_TOKEN}\n{TOKEN}\n"},
        processes={SID: []},
        audit={"key_1": chain(DECIDED)},
    )


def chain(*entries: tuple[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns an audit log with these actions on the call of `clean`, and their details."""
    found, head = list[dict[str, Any]](), Head()
    for action, details in entries:
        entry = seal(Draft("key_1", action, SERVICE, "appr_1", details, NOW), head)
        found, head = [*found, entry.wire()], Head(entry.seq, entry.hash)
    return found


def with_approval(record: Record, **changes: Any) -> Record:
    """With an audit log that has the changed decision."""
    approval = record.approvals[0].but(**changes)
    entries: list[tuple[str, dict[str, Any]]] = []
    if approval.decision is not None:
        entries = [("approval.decided", {"result": approval.decision.result})]
    elif approval.state is ApprovalState.EXPIRED:
        entries = [("approval.expired", {})]
    return replace(record, approvals=[approval], audit={"key_1": chain(*entries)})


def with_session(record: Record, **changes: Any) -> Record:
    return replace(record, sessions=[record.sessions[0].but(**changes)])


def with_log(record: Record, log: list[Event]) -> Record:
    return replace(record, events={SID: log}, streams=[])


DENIED = Decision(result="deny", decided_by="bob", decided_at=at(3))
REFUSED = {"decision": DENIED, "state": ApprovalState.DENIED, "run_input": None, "claimed_epoch": None}


def broken(name: str) -> tuple[int, Record]:
    """Returns the broken promise, and a record that shows it."""
    record = clean()
    log = list(record.events[SID])
    [run], [said] = record.runs, record.acknowledged
    match name:
        case "a session that was acknowledged is not there":
            return 1, replace(record, created=[SID, "sesn_2"])
        case "was acknowledged and is not in the log":
            return 1, replace(record, acknowledged=[replace(said, event={**said.event, "id": "sevt_other"})])
        case "another one or none is kept":
            asked = {**said.asked, "result": "deny"}
            return 1, replace(record, acknowledged=[said, replace(said, client="bob", asked=asked)])
        case "was created 2 times":
            twin = record.sessions[0].but(id="sesn_2", next_seq=1)
            return 1, replace(record, sessions=[*record.sessions, twin])
        case "it was never tried":
            return 1, replace(with_approval(record, state=ApprovalState.ALLOWED, claimed_epoch=None), runs=[])
        case "no approval was requested":
            return 2, replace(record, runs=[run, Run("run-" + "c" * 12, at(4), SID, 2)])
        case "ran again":
            return 2, replace(record, runs=[run, replace(run, at=at(4))])
        case "another input was allowed":
            edited = {"run_input": EDITED, "run_digest": digest(EDITED)}
            ran = [replace(run, token=EDITED_TOKEN), run]
            asked = {**said.asked, "updated_input": EDITED}
            changed = with_approval(replace(record, runs=ran, files={}), **edited)
            return 2, replace(changed, acknowledged=[replace(said, asked=asked)])
        case "had the claim":
            return 6, replace(with_approval(record, state=ApprovalState.FAILED), runs=[replace(run, epoch=1)])
        case "its call is denied":
            return 3, replace(with_approval(record, **REFUSED), acknowledged=[])
        case "its call is expired":
            gone = {**REFUSED, "decision": None, "state": ApprovalState.EXPIRED}
            return 3, replace(with_approval(record, **gone), acknowledged=[])
        case "its call is pending":
            gone = {**REFUSED, "decision": None, "state": ApprovalState.PENDING}
            return 3, replace(with_approval(record, **gone), acknowledged=[])
        case "ran before it was allowed":
            return 3, replace(record, runs=[replace(run, at=at(2.5))])
        case "no decision allowed it":
            return 3, replace(with_approval(record, decision=DENIED), acknowledged=[])
        case "no decision is in the log":
            log[2] = event(3, "user.message", "sevt_3", content=events.text_blocks("yes, do it"))
            return 3, with_log(replace(record, acknowledged=[]), log)
        case "is said to have run, and it did not":
            return 2, replace(record, runs=[])
        case "neither told nor called unknown":
            return 2, with_approval(record, state=ApprovalState.CLAIMED)
        case "the log does not say so":
            return 2, with_approval(record, state=ApprovalState.UNKNOWN)
        case "the one of its digest":
            return 2, with_approval(record, digest=digest(EDITED))
        case "and the session is in 1":
            return 6, with_session(record, epoch=1)
        case "where 4 is due":
            return 4, with_log(record, [*log[:3], log[4]])
        case "the session counted 5":
            return 4, with_log(record, log[:4])
        case "is in the log twice":
            return 4, with_log(with_session(record, next_seq=7), [*log, log[0].model_copy(update={"seq": 6})])
        case "was due":
            seen = record.streams[0].seen
            return 4, replace(record, streams=[Stream("ann", SID, [*seen[:2], *seen[1:]])])
        case "it does not rest":
            return 5, with_session(record, lease=Lease(epoch=2, holder="x", expires_at=NOW))
        case "processes [7] are left":
            return 5, replace(record, processes={SID: [7]})
        case "not among the saved files":
            return 7, replace(record, files={SID: "something else"})
        case "it has 2 where 1 is due":
            return 9, replace(record, audit={"key_1": chain(("key.created", {}), DECIDED)[1:]})
        case "entry 2 does not follow":
            one, two = chain(("key.created", {}), DECIDED)
            return 9, replace(record, audit={"key_1": [one, {**two, "previous": two["hash"]}]})
        case "entry 1 does not follow":
            [one] = chain(DECIDED)
            return 9, replace(record, audit={"key_1": [{**one, "time": "2030-01-02T00:00:00Z"}]})
        case "the audit log has [] for it":
            return 9, replace(record, audit={})
        case "the audit log has ['allow', 'allow'] for it":
            return 9, replace(record, audit={"key_1": chain(DECIDED, DECIDED)})
        case "the audit log has ['deny'] for it":
            denied = chain(("approval.decided", {"result": "deny"}))
            return 9, replace(record, audit={"key_1": denied})
        case _:
            raise AssertionError(name)


def test_a_clean_history_breaks_nothing():
    assert judge(clean()) == []


@pytest.mark.parametrize(
    "what",
    [
        "a session that was acknowledged is not there", "was acknowledged and is not in the log",
        "another one or none is kept", "was created 2 times", "it was never tried", "no approval was requested", "ran again",
        "another input was allowed", "had the claim", "its call is denied", "its call is expired",
        "its call is pending", "ran before it was allowed", "no decision allowed it", "no decision is in the log",
        "is said to have run, and it did not", "neither told nor called unknown", "the log does not say so",
        "the one of its digest", "and the session is in 1", "where 4 is due", "the session counted 5",
        "is in the log twice", "was due", "it does not rest", "processes [7] are left", "not among the saved files",
        "it has 2 where 1 is due", "entry 2 does not follow", "entry 1 does not follow", "the audit log has [] for it",
        "the audit log has ['allow', 'allow'] for it", "the audit log has ['deny'] for it",
    ],
)  # fmt: skip
def test_each_broken_promise_is_found_and_no_other(what: str):
    promise, record = broken(what)
    [found] = judge(record)
    assert (found.promise, found.session_id) in [
        (promise, SID),
        (promise, "sesn_2"),
        (promise, "1"),
        (promise, "key_1"),
    ]
    assert what in found.what


def test_a_call_that_was_interrupted_need_not_be_tried():
    record = clean()
    log = [*record.events[SID], event(6, "user.interrupt", "sevt_6")]
    changed = with_approval(record, state=ApprovalState.SUPERSEDED, claimed_epoch=None)
    assert judge(replace(with_session(with_log(changed, log), next_seq=7), runs=[])) == []


def test_a_question_that_was_answered_runs_nothing():
    assert judge(replace(with_approval(clean(), kind="question"), runs=[], files={SID: ""})) == []


def test_a_call_whose_outcome_is_unknown_may_have_run_or_not():
    record = clean()
    log = list(record.events[SID])
    log[3] = log[3].model_copy(update={"payload": {"tool_use_id": CALL, "outcome": "unknown"}})
    unknown = with_log(with_approval(record, state=ApprovalState.UNKNOWN), log)
    assert judge(unknown) == []
    assert judge(replace(unknown, runs=[])) == []


def test_the_history_of_a_violation_tells_of_its_call_and_of_no_other():
    record = clean()
    other = [event(6, "agent.message", "sevt_6", content=events.text_blocks("nothing to do with it"))]
    log = [*record.events[SID], *other]
    [found] = judge(
        replace(with_session(with_log(record, log), next_seq=7), runs=[*record.runs, *record.runs])
    )
    text = str(found)
    assert "promise 2" in text
    assert text.count(f"ran: {TOKEN} in epoch 2") == 2
    assert "ann received" in text
    assert "ends as succeeded" in text
    assert "nothing to do with it" not in text


def test_what_a_turn_wrote_when_its_machine_was_lost_may_be_lost_and_what_was_over_before_may_not():
    record = replace(with_approval(clean(), closed_at=at(4)), files={SID: ""})
    assert judge(replace(record, lost=[Lost(at(5), frozenset())])) == []
    for kept in (Lost(at(5), frozenset({SID})), Lost(at(3), frozenset())):
        [found] = judge(replace(record, lost=[kept]))
        assert found.promise == 7


def test_what_the_log_said_could_not_be_saved_may_be_missing():
    record = clean()
    told = events.workspace_unsaved("the disk is full").payload
    log = [*record.events[SID], event(6, "session.error", "sevt_6", **told)]
    unsaved = replace(with_session(with_log(record, log), next_seq=7), files={SID: ""})
    assert judge(unsaved) == []
