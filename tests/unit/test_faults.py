"""Fault points do what is planned when they are switched on, and nothing otherwise; every listed one is in the code."""

import ast
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

import claude_hitl_template
from claude_hitl_template import fault_points
from tests import faults, mutants

CHILD = """
import asyncio, sys
from claude_hitl_template import fault_points
async def main():
    for point in sys.argv[1:]:
        try:
            await fault_points.reach(point)
        except Exception as error:
            print(type(error).__name__)
asyncio.run(main())
print("went on")
"""


def child(
    folder: Path, *points: str, environment: Mapping[str, str] | None = None
) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, *points],
        env={**os.environ, **(environment or faults.environment(folder))},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def plan(folder: Path, **points: dict[str, str]) -> None:
    (folder / "plan.json").write_text(json.dumps({k.replace("__", "."): v for k, v in points.items()}))


def hits(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "hits.jsonl").read_text().splitlines()]


def test_at_least_forty_points_with_names_of_their_own():
    assert len(set(fault_points.POINTS)) == len(fault_points.POINTS) >= 40


def test_no_environment_variable_alone_switches_anything_on(tmp_path: Path):
    plan(tmp_path, claim__after_commit={"1": "kill"})
    code = "from claude_hitl_template.store.owners import OwnerRules; print(OwnerRules.claim.__code__.co_filename)"
    only = {faults.VARIABLE: str(tmp_path), mutants.VARIABLE: "any_input_runs"}
    went_on = child(tmp_path, "claim.after_commit", environment=only)
    assert went_on.communicate()[0] == "went on\n"
    assert not (tmp_path / "hits.jsonl").exists()
    run = [sys.executable, "-c", code]
    unchanged = subprocess.check_output(run, env={**os.environ, **only}, text=True)
    assert unchanged.strip().endswith("owners.py")
    changed = subprocess.check_output(
        run, env={**os.environ, **only, **faults.environment(tmp_path)}, text=True
    )
    assert changed.strip() == "<OwnerRules.claim>"


def test_the_planned_hit_kills_and_no_other(tmp_path: Path):
    plan(tmp_path, claim__after_commit={"2": "kill"})
    died = child(
        tmp_path, "claim.after_commit", "hold.before_commit", "claim.after_commit", "claim.after_commit"
    )
    assert died.communicate()[0] == ""
    assert died.returncode == -signal.SIGKILL
    went_on = child(tmp_path, "claim.after_commit")  # the third, counted across processes
    assert went_on.communicate()[0] == "went on\n"
    assert [(h["point"], h["hit"], h["did"]) for h in hits(tmp_path)] == [
        ("claim.after_commit", 1, ""),
        ("hold.before_commit", 1, ""),
        ("claim.after_commit", 2, "kill"),
        ("claim.after_commit", 3, ""),
    ]


@pytest.mark.parametrize(
    ("action", "said"),
    [
        ("fail", "Unavailable"),
        ("lose", "StoreUnreachable"),
        ("nonsense", "AssertionError"),
        ("delay x", "ValueError"),
    ],
)
def test_a_planned_error_is_raised(tmp_path: Path, action: str, said: str):
    plan(tmp_path, claim__after_commit={"1": action})
    assert child(tmp_path, "claim.after_commit").communicate()[0] == f"{said}\nwent on\n"


def test_a_planned_delay_passes(tmp_path: Path):
    plan(tmp_path, claim__after_commit={"1": "delay 0.3"})
    started = time.monotonic()
    assert child(tmp_path, "claim.after_commit").communicate()[0] == "went on\n"
    assert time.monotonic() - started > 0.3


def test_a_stopped_process_stands_still_until_it_is_told_to_go_on(tmp_path: Path):
    plan(tmp_path, claim__after_commit={"1": "stop"})
    stopped = child(tmp_path, "claim.after_commit")
    _, status = os.waitpid(stopped.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    stopped.send_signal(signal.SIGCONT)
    assert stopped.communicate()[0] == "went on\n"


def test_a_point_that_is_not_listed_is_an_error(tmp_path: Path):
    assert child(tmp_path, "typo").communicate()[0] == "AssertionError\nwent on\n"


def test_every_point_is_in_the_code_and_every_one_in_the_code_is_listed():
    writes, steps = set[str](), set[str]()
    for path in Path(claude_hitl_template.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            constants = [a.value for a in node.args if isinstance(a, ast.Constant)]
            if (
                node.func.attr in ("_changing", "_writing")
                and path.parent.name == "store"
                and path.name != "base.py"
            ):
                writes.add(constants[-1])
            elif node.func.attr == "reach" and constants:
                steps.add(constants[0])
    named = {point for step in fault_points.STEPS for point in (f"{step}.before", f"{step}.after")}
    assert writes == set(fault_points.WRITES)
    # Which of these two it is, session/runner.py decides when it starts the CLI.
    assert steps == named - {"spawn.before", "spawn.after", "resume.before", "resume.after"}
