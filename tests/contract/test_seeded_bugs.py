"""Every safeguard of the Store that is taken away is missed by a test: one that no test misses would not be tested."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from claude_hitl_template import faults

ROOT = Path(__file__).parents[2]
STORE = "tests/contract/test_store.py"
# By seeded bug, a test that must fail with it.
MISSED_BY = {
    "stale_owners_write": "test_a_stale_owner_writes_nothing",
    "any_input_runs": "test_the_edited_input_is_what_may_run",
    "refused_calls_run": "test_a_denied_call_is_never_claimed",
    "claims_are_not_counted": "test_an_allowed_call_is_claimed_once",
    "the_last_decision_wins": "test_of_decisions_at_once_the_first_wins",
    "a_message_decides": "test_a_message_decides_nothing",
    "time_allows": "test_what_is_due_expires_and_nothing_else",
    "unknown_calls_run_again": "test_a_claimed_call_without_a_result_becomes_unknown_once",
    "events_repeat": "test_the_same_event_id_is_committed_once",
    "nobody_is_told": "test_a_decision_wakes_the_owner",
    "interrupted_calls_run": "test_nothing_is_claimed_once_interrupted",
    "acknowledged_before_it_is_kept": "test_the_edited_input_is_what_may_run",
    "idempotency_keys_are_forgotten": "test_an_idempotency_key_repeats_the_reply",
    "what_waits_is_deleted": "test_what_waits_is_never_too_old",
    "epochs_are_not_raised": "test_an_owner_that_is_replaced_hears_of_it",
}


def run(bug: str, test: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", STORE, "-k", f"{test} and memory"],
        env={**os.environ, faults.BUGS_VARIABLE: bug},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_seeded_bug_has_a_test_that_misses_the_safeguard():
    assert set(MISSED_BY) == set(faults.BUGS)
    assert len(faults.BUGS) >= 12


def test_without_a_bug_those_tests_pass():
    done = run("", " or ".join(sorted(set(MISSED_BY.values()))).join("()"))
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("bug", faults.BUGS)
def test_a_safeguard_that_is_taken_away_is_missed(bug: str):
    done = run(bug, MISSED_BY[bug])
    assert done.returncode == 1, done.stdout
    assert "1 failed" in done.stdout


def test_in_production_no_safeguard_is_missing():
    assert not any(faults.seeded(bug) for bug in faults.BUGS)
