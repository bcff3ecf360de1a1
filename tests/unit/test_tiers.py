"""Tiers: a run has the requested tests, and a fast test that takes long fails the run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiers import Clock

ROOT = Path(__file__).parents[2]
CONFTEST = """
from tests import tiers

tiers.LIMIT_S = 0.2

def pytest_addoption(parser):
    parser.addoption("--tier")

def pytest_configure(config):
    config.addinivalue_line("markers", "slow")
    config.addinivalue_line("markers", "takes_long(reason)")
    config.pluginmanager.register(tiers.Tiers(tiers.chosen(config)))
"""
TESTS = """
import time
import pytest

def work():
    end = time.process_time() + 0.6
    while time.process_time() < end:
        pass

def test_quick(): pass

def test_long(): work()

@pytest.mark.takes_long("it has to")
def test_excused(): work()

@pytest.mark.slow
def test_slow(): work()

@pytest.mark.parametrize("n", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_each(n): pass
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    (folder / "pytest.ini").write_text(f"[pytest]\npythonpath = {ROOT}\ntestpaths = tests\n")
    (folder / "tests").mkdir()
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "tests/test_it.py").write_text(TESTS)
    return folder


def ended(project: Path, *arguments: str) -> dict[str, str]:
    """Returns the outcome of each test of the project."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rA", *arguments]
    alone = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # others' plugins take seconds to start
    done = subprocess.run(command, cwd=project, env=alone, capture_output=True, text=True, check=False)
    lines = [line.split() for line in done.stdout.splitlines() if "::" in line]
    found = {words[1].partition("::")[2]: words[0] for words in lines if words[0] in ("PASSED", "FAILED")}
    assert found, done.stdout + done.stderr
    return found


FAST = {"test_quick": "PASSED", "test_long": "FAILED", "test_excused": "PASSED", "test_each[1]": "PASSED"}
SLOW = {"test_slow": "PASSED", "test_each[2]": "PASSED"}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), FAST),
        (("--tier=slow",), SLOW),
        (("--tier=all",), FAST | SLOW),
        (("tests/test_it.py",), FAST | SLOW),
        (("tests/test_it.py::test_slow",), {"test_slow": "PASSED"}),
        (("--tier=fast", "tests"), FAST),
        (("-m", "slow"), SLOW),
    ],
)
def test_a_run_has_the_tier_that_it_is_asked_for_and_a_fast_test_that_takes_long_fails(
    project: Path, arguments: tuple[str, ...], expected: dict[str, str]
) -> None:
    assert ended(project, *arguments) == expected


BEFORE = Clock(wall=100.0, cpu=10.0, pressure=50.0)


@pytest.mark.parametrize(
    ("after", "seconds"),
    [
        (Clock(106.0, 10.1, 50.0), 6.0),  # it waited, and the machine had room
        (Clock(106.0, 10.1, 50.2), 5.6),  # ... for most of the time
        (
            Clock(112.0, 10.1, 55.0),
            5.0,
        ),  # others had the machine, and the last two seconds of it may not be counted yet
        (Clock(115.0, 21.0, 65.0), 5.5),  # it used the CPU while others did, too
        (Clock(106.0, 15.5, 50.1), 5.8),  # it worked alone
        (Clock(106.0, 10.2, None), 0.1),  # nothing is known of the machine
    ],
)
def test_only_what_a_test_certainly_took_is_counted(after: Clock, seconds: float) -> None:
    assert after.least_since(BEFORE) == pytest.approx(seconds)
