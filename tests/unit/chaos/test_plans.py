"""A chaos run is reproducible: its seed determines messages and decisions, and its journal shows what ran."""

from datetime import UTC, datetime
from pathlib import Path

import pytest

from claude_hitl_template.model.scenario import Scenarios
from tests.chaos.dump import read_journal
from tests.chaos.oracle import tokens
from tests.chaos.plans import EIGHT, KINDS, Planner

JOURNAL = Path("/somewhere/journal.txt")


def test_the_same_seed_makes_the_same_conversations_and_another_seed_others():
    first, again, other = ([Planner(seed, JOURNAL).plan(n) for n in range(40)] for seed in (7, 7, 8))
    assert first == again
    assert first != other


def test_the_first_conversations_are_one_of_each_kind():
    assert [Planner(7, JOURNAL).plan(n).kind for n in range(len(KINDS))] == list(KINDS)


@pytest.mark.parametrize("number", range(len(KINDS)))
def test_the_offline_model_follows_every_plan(number: int):
    plan = Planner(7, JOURNAL).plan(number)
    steps = Scenarios().steps_for(plan.prompt)
    assert len(steps) == len(plan.steps) + 1
    asked = [call.input for step in steps for call in step.tools]
    assert set().union(*map(tokens, asked)) == set(plan.decisions)


def test_no_two_inputs_share_a_token():
    plans = [Planner(7, JOURNAL).plan(n) for n in range(200)]
    proposed = [token for plan in plans for token in plan.decisions]
    edits = [
        said["updated_input"]
        for plan in plans
        for all_said in plan.decisions.values()
        for said in all_said
        if "updated_input" in said
    ]
    found = [*proposed, *(token for edit in edits for token in tokens(edit))]
    assert len(set(found)) == len(found)


def test_eight_decide_at_once_and_not_all_the_same():
    [said] = Planner(7, JOURNAL).plan(KINDS.index("eight at once")).decisions.values()
    assert len(said) == EIGHT
    assert len({str(one) for one in said}) > 1


def test_a_line_of_the_journal_says_what_ran_when_and_under_which_owner(tmp_path: Path):
    path = tmp_path / "journal.txt"
    assert read_journal(path) == []
    path.write_text("run-0123456789ab 1893456000.250000000 /x/run/sesn_01-12/claude-resume-1 2\n")
    [run] = read_journal(path)
    assert (run.token, run.session_id, run.epoch) == ("run-0123456789ab", "sesn_01", 12)
    assert run.at == datetime(2030, 1, 1, 0, 0, 0, 250000, UTC)


def test_a_journal_that_cannot_be_read_is_an_error(tmp_path: Path):
    path = tmp_path / "journal.txt"
    path.write_text("run-0123456789ab\n")
    with pytest.raises(ValueError, match="unpack"):
        read_journal(path)
