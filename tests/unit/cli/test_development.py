"""`hitl test` and `hitl check`: which tests they run, and their exit status."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from claude_hitl_template.cli.app import app
from claude_hitl_template.cli.commands import development

# In the place of pytest and of the suites: notes its arguments, and ends as the first line of `statuses` says.
STAND_IN = """
import json, pathlib, sys
statuses = pathlib.Path("statuses")
status, *left = statuses.read_text().split()
statuses.write_text(" ".join(left))
with pathlib.Path("calls").open("a") as calls:
    print(json.dumps([pathlib.Path(__file__).stem, *sys.argv[1:]]), file=calls)
sys.exit(int(status))
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "tests").mkdir()
    for name in ("pytest.py", "tests/suites.py", "tests/test_it.py"):
        (tmp_path / name).write_text(STAND_IN)
    (tmp_path / "statuses").write_text("0 0")
    monkeypatch.setattr(development, "ROOT", tmp_path)
    return tmp_path


def run(project: Path, *arguments: str) -> tuple[int, list[list[str]]]:
    """Runs `hitl test`; returns its exit status and the commands that it ran."""
    done = CliRunner().invoke(app, ["test", *arguments])
    calls = project / "calls"
    return done.exit_code, [
        json.loads(line) for line in calls.read_text().splitlines()
    ] if calls.exists() else []


def test_without_arguments_the_fast_tests_are_run_side_by_side(project: Path) -> None:
    status, [[name, *arguments]] = run(project)
    assert (status, name) == (0, "pytest")
    assert "--tier=fast" in arguments
    assert int(arguments[arguments.index("-n") + 1]) in range(2, development.MOST_WORKERS + 1)
    assert "--dist=loadfile" in arguments  # what a module shares is made once


def test_options_of_pytest_choose_among_the_fast_tests(project: Path) -> None:
    _, [[_, *arguments]] = run(project, "-k", "gate", "-n0")
    assert "--tier=fast" in arguments
    assert arguments[-3:] == ["-k", "gate", "-n0"]  # behind ours, so they win


def test_what_a_path_names_is_run_whatever_its_tier(project: Path) -> None:
    assert run(project, "tests/test_it.py::test_a", "-x") == (
        0,
        [["pytest", "tests/test_it.py::test_a", "-x"]],
    )


@pytest.mark.parametrize(("option", "tier"), [("--slow", "slow"), ("--all", "all")])
def test_with_arguments_a_tier_is_one_run(project: Path, option: str, tier: str) -> None:
    assert run(project, option, "-k", "gate") == (0, [["pytest", f"--tier={tier}", "-k", "gate"]])


def test_the_slow_tests_are_run_by_suite(project: Path) -> None:
    assert run(project, "--slow") == (0, [["suites"]])


def test_a_budget_and_the_record_are_passed_on(project: Path) -> None:
    assert run(project, "--slow", "--budget", "12", "--record") == (
        0,
        [["suites", "--budget", "12.0", "--record"]],
    )


@pytest.mark.parametrize(("statuses", "expected"), [("0 0", 0), ("1 0", 1), ("0 1", 1)])
def test_all_is_the_fast_tests_and_then_the_slow_ones_and_fails_with_either(
    project: Path, statuses: str, expected: int
) -> None:
    (project / "statuses").write_text(statuses)
    status, calls = run(project, "--all")
    assert status == expected
    assert [name for name, *_ in calls] == ["pytest", "suites"]


@pytest.mark.parametrize("option", [("--budget", "5"), ("--record",)])
def test_a_budget_without_the_slow_tests_is_wrong_usage(project: Path, option: tuple[str, ...]) -> None:
    assert run(project, *option) == (2, [])
