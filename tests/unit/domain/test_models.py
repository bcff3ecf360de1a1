"""Identifiers sort by time, and states change only by the tables of transitions."""

import re
import uuid
from datetime import UTC, datetime
from itertools import pairwise, product
from typing import get_args

import pytest
from pydantic import ValidationError

from claude_hitl_template.domain import models
from claude_hitl_template.domain.models import (
    APPROVAL_TRANSITIONS,
    SESSION_TRANSITIONS,
    Approval,
    ApprovalState,
    Environment,
    Event,
    Session,
    SessionStatus,
    Usage,
    check_session_transition,
    new_id,
)
from claude_hitl_template.errors import IllegalTransition

NOW = datetime(2030, 1, 1, tzinfo=UTC)


def approval(state: ApprovalState) -> Approval:
    return Approval(
        id="appr_1", session_id="sesn_1", workspace_id="key_1", event_id="toolu_1", call_id="toolu_1",
        batch=("toolu_1",), tool_name="Bash", input={}, digest="", cwd="/", state=state, created_at=NOW,
    )  # fmt: skip


@pytest.mark.parametrize(("old", "new"), list(product(ApprovalState, repeat=2)))
def test_an_approval_changes_only_as_the_table_says(old: ApprovalState, new: ApprovalState):
    if new in APPROVAL_TRANSITIONS[old]:
        assert approval(old).to(new).state is new
    else:
        with pytest.raises(IllegalTransition):
            approval(old).to(new)


def test_only_an_allowed_approval_can_be_claimed():
    assert [s for s in ApprovalState if ApprovalState.CLAIMED in APPROVAL_TRANSITIONS[s]] == [
        ApprovalState.ALLOWED
    ]


def test_closed_states_are_final():
    final = {s for s in ApprovalState if not APPROVAL_TRANSITIONS[s]}
    assert final == set(ApprovalState) - {
        ApprovalState.PENDING,
        ApprovalState.ALLOWED,
        ApprovalState.CLAIMED,
    }


@pytest.mark.parametrize(("old", "new"), list(product(get_args(SessionStatus), repeat=2)))
def test_a_session_changes_only_as_the_table_says(old: SessionStatus, new: SessionStatus):
    if new in SESSION_TRANSITIONS[old]:
        check_session_transition(old, new)
    else:
        with pytest.raises(IllegalTransition):
            check_session_transition(old, new)


def test_an_id_is_its_prefix_and_26_characters():
    assert re.fullmatch("sevt_[0-9a-hjkmnp-tv-z]{26}", new_id("sevt"))


def test_ids_sort_by_time(monkeypatch: pytest.MonkeyPatch):
    made: list[str] = []
    for millisecond in range(1_900_000_000_000, 1_900_000_000_200):
        monkeypatch.setattr(models.time, "time", lambda at=millisecond: at / 1000 + 0.0001)
        made.append(new_id("sevt"))
    assert all(a < b for a, b in pairwise(made))


def test_ids_do_not_repeat():
    assert len({new_id("x") for _ in range(1000)}) == 1000


def test_a_value_is_immutable_and_has_no_undeclared_field():
    with pytest.raises(ValidationError):
        approval(ApprovalState.PENDING).state = ApprovalState.ALLOWED  # type: ignore[misc]
    with pytest.raises(ValidationError):
        Usage.model_validate({"tokens": 1})


def test_usage_adds_up_field_by_field():
    total = Usage(input_tokens=1, output_tokens=2, cost_usd=0.5).plus(Usage(input_tokens=3, cost_usd=0.25))
    assert total == Usage(input_tokens=4, output_tokens=2, cost_usd=0.75)


def test_a_transcript_id_is_a_uuid_that_stays_the_same():
    session = Session(id="sesn_1", workspace_id="key_1", created_at=NOW, updated_at=NOW)
    assert (
        session.transcript_id == session.but(epoch=7).transcript_id == str(uuid.UUID(session.transcript_id))
    )


def test_an_event_on_the_wire_is_its_payload_with_id_type_and_time():
    event = Event(seq=1, id="e", type="t", payload={"a": 1}, created_at=NOW, processed_at=None)
    assert event.wire() == {"id": "e", "type": "t", "processed_at": None, "a": 1}
    assert event.but(processed_at=NOW).wire()["processed_at"] == "2030-01-01T00:00:00+00:00"


IMAGES = (
    "claude-hitl-worker",
    "localhost/claude-hitl-worker:0.1.0-4219e3a",
    "127.0.0.1:5000/team/worker:latest",
    "registry.example.org/team/worker@sha256:" + "0a" * 32,
    "registry.example.org:443/a/b__c/d-e.f:T_1@sha256:" + "0a" * 32,
)


@pytest.mark.parametrize("image", IMAGES)
def test_an_environment_takes_the_name_of_an_image(image: str):
    assert Environment(image=image).image == image


@pytest.mark.parametrize(
    "image",
    [
        "", " ", "-v", "--privileged", "a b", "a'b", "a;b", "$(id)", "`id`", "a:$(id)", "a\nb", "a\n", "A", "/a", "a/",
        "a//b", "a:", "a@", "a@sha256:00", "a@md5:" + "0" * 64, "../a", "a/../b", "a:b:c", "a" * 256, "http://a/b", "ä",
    ],
)  # fmt: skip
def test_nothing_else_is_taken_for_an_image(image: str):
    with pytest.raises(ValidationError, match="not an image reference"):
        Environment(image=image)
