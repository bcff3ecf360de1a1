"""Runs of `./hitl chaos`: a hundred kills break no promise, and without a safeguard the run fails."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import mutants
from tests.postgres import require

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SEED = 18
STORES = {"sqlite": (), "postgres": ("--postgres",)}


def chaos(report: Path, *options: str, **environment: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "claude_hitl_template.cli", "chaos"),
            *("--seed", str(SEED), "--report", str(report), *options),
        ],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def ends(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run on each database said, its exit code, and where its report is; they run at once, for they mostly wait."""
    kills: int = request.config.getoption("--chaos")
    stores = dict(STORES)
    try:
        require()
    except pytest.skip.Exception:
        del stores["postgres"]
    folder = tmp_path_factory.mktemp("chaos")
    reports = {name: folder / f"{name}.json" for name in stores}
    runs = {name: chaos(reports[name], "--kills", str(kills), *stores[name]) for name in stores}
    return {name: (run.communicate()[0], run.returncode, reports[name]) for name, run in runs.items()}


@pytest.mark.parametrize("store", STORES)
def test_every_promise_is_kept_while_everything_is_struck(
    store: str, ends: dict[str, Any], request: pytest.FixtureRequest
):
    if store == "postgres":
        require()
    said, code, report = ends[store]
    assert code == 0, said
    told = json.loads(report.read_text())
    assert told["kept"]
    assert told["kills"] >= request.config.getoption("--chaos")
    assert told["faults without cut streams"] > told["kills"]
    assert told["counts"]["decisions acknowledged"] > 0
    assert told["counts"]["calls that ran"] > 0


def test_a_run_that_breaks_a_promise_says_so_and_fails(tmp_path: Path):
    report = tmp_path / "report.json"
    # What broke is kept where temporary files are.
    bug = {mutants.VARIABLE: "claims_are_not_counted", "TMPDIR": str(tmp_path)}
    run = chaos(report, "--kills", "1", **bug)
    said, _ = run.communicate()
    assert run.returncode == 1, said
    assert "PROMISES WERE BROKEN" in said
    told = json.loads(report.read_text())
    assert not told["kept"]
    assert told["violations"]
    assert all(violation["history"] for violation in told["violations"])
