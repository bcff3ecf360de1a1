"""Every slow test is in one suite, suites that a change touches start first, and each has its turn."""

import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from threading import Barrier
from time import monotonic

import pytest

from tests.suites import (
    GREEN,
    LANES,
    PACKAGE,
    ROOT,
    SUITES,
    Ran,
    Suite,
    arguments,
    every,
    failed_in,
    failures,
    in_order,
    read_green,
    record,
    suite_of,
    told,
    touched_by,
    within,
)

FEW = [
    Suite(name, (f"tests/{name}/",), seconds, (f"{name}/",))
    for name, seconds in zip("abcd", (50, 60, 70, 20), strict=True)
]


def names(suites: list[Suite]) -> str:
    return "".join(suite.name for suite in suites)


def test_each_test_file_is_run_by_one_suite() -> None:
    def runs(suite: Suite, path: str) -> bool:
        given = arguments(suite)
        left = [part.removeprefix("--ignore=") for part in given if part.startswith("--ignore=")]
        return path.startswith(suite.paths) and not path.startswith(tuple(left))

    paths = [str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py")]
    assert {path: [s for s in SUITES if runs(s, path)] for path in paths} == {p: [suite_of(p)] for p in paths}


def test_what_a_suite_names_is_there() -> None:
    beginnings = {part for suite in SUITES for part in suite.touched_by}
    there = [str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if ".venv" not in path.parts]
    assert {
        part for part in beginnings if not any(p.startswith((part, PACKAGE + part)) for p in there)
    } == set()
    assert all((ROOT / path).exists() for suite in SUITES for path in suite.paths)
    assert set(read_green()) <= {suite.name for suite in SUITES}


def test_a_part_of_the_product_that_no_suite_names_touches_all() -> None:
    assert names(touched_by(FEW, ["claude_hitl_template/b/x.py", "claude_hitl_template/new.py"])) == "abcd"
    assert names(touched_by(FEW, ["claude_hitl_template/b/x.py", "docs/new.md"])) == "b"


def test_each_suite_fits_into_the_budget_of_ci() -> None:
    [minutes] = re.findall(r"--budget (\d+)", (ROOT / ".ci/run").read_text())
    assert max(suite.seconds for suite in SUITES) <= int(minutes) * 60


def test_what_a_change_touches_comes_first_and_then_the_others() -> None:
    assert names(in_order(FEW, ["claude_hitl_template/c/x.py", "README.md"], 0)) == "cabd"
    assert names(in_order(FEW, ["d/test_x.py", "a/x"], 0)) == "adbc"
    assert names(in_order(FEW, [], 0)) == "abcd"
    assert names(in_order(FEW, ["tests/conftest.py"], 0)) == "abcd"


def test_over_some_commits_each_suite_is_the_first_of_its_group() -> None:
    changed = ["claude_hitl_template/a/x.py", "claude_hitl_template/b/x.py"]
    orders = [names(in_order(FEW, changed, turn)) for turn in range(4)]
    assert orders == ["abcd", "badc", "abcd", "badc"]
    assert {names(in_order(FEW, [], turn))[0] for turn in range(4)} == set("abcd")


@pytest.mark.parametrize(
    ("speed", "ran"),
    [
        (1.0, "abd"),
        (0.5, "abcd"),
        (2.0, "ad"),
    ],  # on a machine as it was measured on, on a fast one, on a slow one
)
def test_a_suite_is_started_if_its_known_cost_fits_into_what_is_left(speed: float, ran: str) -> None:
    now = 0.0

    def run(suite: Suite) -> tuple[bool, tuple[str, ...]]:
        nonlocal now
        now += suite.seconds * speed
        return suite.name != "a", ("test_x: why",) if suite.name == "a" else ()

    done = within(140, FEW, run, lambda: now)
    assert "".join(one.suite.name for one in done) == ran
    assert [(one.suite.name, one.failed) for one in done if not one.passed] == [("a", ("test_x: why",))]


def test_without_a_budget_all_run_the_busy_ones_alone_and_the_others_side_by_side_the_longest_first() -> None:
    suites = [FEW[3], FEW[0], replace(FEW[1], busy=True), FEW[2]]
    together, order = Barrier(LANES), list[str]()

    def run(suite: Suite) -> tuple[bool, tuple[str, ...]]:
        order.append(suite.name)
        if suite.name in "ac":
            together.wait(60)  # each of them waits for the other
        return suite.name != "d", ()

    done = every(suites, run, monotonic)
    assert (order[0], set(order[1:3]), order[3]) == ("b", {"a", "c"}, "d")
    assert {one.suite.name: one.passed for one in done} == {"a": True, "b": True, "c": True, "d": False}


def test_what_ran_and_what_did_not_is_told_with_when_it_last_passed() -> None:
    green = {"c": {"commit": "abc", "day": "2030-01-01"}}
    assert told(FEW, [Ran(FEW[0], 51.0, True), Ran(FEW[1], 9.0, False, ("test_x: why",))], green) == [
        "a              passed in 51 s",
        "b              FAILED in 9 s; no run of it that passed is recorded\n    test_x: why",
        "c              did not run (about 70 s); last recorded to pass at abc, 2030-01-01",
        "d              did not run (about 20 s); no run of it that passed is recorded",
    ]


def test_what_passed_is_recorded_and_what_failed_keeps_its_last_time(tmp_path: Path) -> None:
    path = tmp_path / "green.json"
    record([Ran(FEW[0], 1.0, True), Ran(FEW[1], 1.0, True)], "first", "2030-01-01", path)
    record([Ran(FEW[0], 1.0, False), Ran(FEW[1], 1.0, True)], "second", "2030-01-02", path)
    assert {name: last["commit"] for name, last in read_green(path).items()} == {"a": "first", "b": "second"}


def test_the_tests_that_failed_are_named_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "import pytest\n@pytest.fixture\ndef broken():\n    raise OSError('no disk')\n"
        "def test_a():\n    assert 1 == 2, 'not equal'\ndef test_b(broken):\n    pass\ndef test_c():\n    pass\n"
    )
    report = tmp_path / "report.xml"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        f"--junit-xml={report}",
        "test_it.py",
    ]
    subprocess.run(command, cwd=tmp_path, capture_output=True, check=False)
    a, b = sorted(failed_in(report))
    assert a.startswith("test_it::test_a: AssertionError: not equal")
    assert b.startswith("test_it::test_b: ")
    assert "no disk" in b
    assert failed_in(tmp_path / "none.xml") == ()


def test_suites_have_names_of_their_own() -> None:
    assert Counter(suite.name for suite in SUITES).most_common(1)[0][1] == 1
    assert GREEN.exists()


def test_in_a_budget_a_suite_fails_the_run_once_it_is_recorded_to_have_passed() -> None:
    ran = [Ran(FEW[0], 5.0, False), Ran(FEW[1], 5.0, False), Ran(FEW[2], 5.0, True)]
    green = {"b": {"commit": "abc", "day": "2030-01-01"}}
    assert [one.suite.name for one in failures(ran, green, in_budget=True)] == ["b"]
    assert [one.suite.name for one in failures(ran, green, in_budget=False)] == ["a", "b"]
