"""Without any one of the Store's safeguards a test fails: a safeguard that no test misses would not be tested.

All of them are taken away in one process of pytest, one after the other, in tests of the fast tier: see seeding.py.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.contract.seeding import NONE, RESULTS_VARIABLE
from tests.mutants import MUTANTS

ROOT = Path(__file__).parents[2]

type Results = dict[str, dict[str, str]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """By seeded bug, the outcome of each test that ran with it."""
    path = tmp_path_factory.mktemp("seeded") / "results.json"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "tests.contract.seeding"),
            *("--tier=fast", "tests/contract/test_store.py", "tests/contract/test_votes.py"),
        ],
        env={**os.environ, RESULTS_VARIABLE: str(path)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert path.exists(), done.stdout + done.stderr
    return json.loads(path.read_text())


@pytest.mark.takes_long("it runs the tests that miss the bugs")
def test_without_a_bug_those_tests_pass(results: Results):
    assert results[NONE] == dict.fromkeys((mutant.missed_by for mutant in MUTANTS.values()), "passed")


@pytest.mark.parametrize("bug", MUTANTS)
def test_a_safeguard_that_is_taken_away_is_missed(bug: str, results: Results):
    assert results[bug] == {MUTANTS[bug].missed_by: "failed"}
