"""The report of a chaos run contains the strikes, the recovery times and the broken promises."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from claude_hitl_template.domain.models import Event
from tests.chaos.faults import Strike
from tests.chaos.oracle import Record, Violation
from tests.chaos.report import Report

NOW = datetime(2030, 1, 1, tzinfo=UTC)


def event(seq: int, seconds: float, type_: str) -> Event:
    at = NOW + timedelta(seconds=seconds)
    return Event(seq=seq, id=f"sevt_{seq}", type=type_, payload={}, created_at=at, processed_at=at)


def strike(kind: str, seconds: float, session_id: str | None = None) -> Strike:
    return Strike(kind, NOW + timedelta(seconds=seconds), "x", session_id, 2.5)


def report(strikes: list[Strike], **more: Any) -> Report:
    log = [
        event(1, 0, "session.status_running"),
        event(2, 8, "user.message"),
        event(3, 9, "session.status_rescheduled"),
        event(4, 10, "session.status_idle"),
        event(5, 30, "session.status_running"),
    ]
    made: dict[str, Any] = {"violations": [], "unanswered": [], **more}
    return Report({"seed": 7}, strikes, 3, Record([], [], {"sesn_1": log}), **made)


def test_a_session_that_ran_goes_on_when_its_next_owner_has_written_something():
    running, waiting = strike("kill the owner", 5, "sesn_1"), strike("kill the CLI", 12, "sesn_1")
    found = report([running, waiting, strike("kill the ledger", 20)]).recovery()
    assert found["CLI or owner killed: the session goes on"] == {"p50": 5.0, "p95": 5.0, "count": 1}
    assert found["a part killed: the service answers"]["count"] == 1


@pytest.mark.parametrize("other", [strike("kill the ledger", 3), strike("lock the database", 8)])
def test_a_session_that_goes_on_while_other_things_are_struck_is_counted_apart(other: Strike):
    found = report([strike("kill the CLI", 5, "sesn_1"), other]).recovery()
    assert "CLI or owner killed: the session goes on" not in found
    assert found["... while other things were struck"]["count"] == 1


def test_after_the_whole_cluster_the_first_call_that_runs_is_measured():
    log = [
        event(1, 2, "agent.tool_result"),
        event(2, 9, "agent.tool_result"),
        event(3, 12, "agent.tool_result"),
    ]
    made = Report({}, [strike("kill the raylet", 4)], 0, Record([], [], {"sesn_1": log}), [], [])
    assert made.recovery()["the cluster killed: the first call runs"]["p50"] == 5.0


def test_faults_are_counted_by_kind():
    struck = [strike("kill the owner", 5), strike("kill the owner", 6), strike("kill the proxy", 7)]
    assert report(struck).faults() == {"kill the owner": 2, "kill the proxy": 1, "cut an event stream": 3}


def test_a_promise_that_was_broken_is_in_the_report_with_its_history():
    broken = report([], violations=[Violation(3, "sesn_1", "it ran", ("one", "two"))])
    told = json.loads(broken.as_json())
    assert (broken.kept, told["kept"]) == (False, False)
    assert told["broken"]["runs of what was not allowed"] == 1
    assert told["violations"] == [
        {"promise": 3, "session_id": "sesn_1", "what": "it ran", "history": ["one", "two"]}
    ]


def test_a_conversation_that_did_not_end_is_no_success():
    assert report([]).kept
    assert not report([], unanswered=["session sesn_1 does not come to rest"]).kept
