"""Runs of `./hitl chaos`: a hundred kills break no promise, and a safeguard that is taken away is missed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from claude_hitl_template import faults
from tests.postgres import require

ROOT = Path(__file__).parents[2]
SEED = 18


@pytest.fixture(scope="module")
def kills(request: pytest.FixtureRequest) -> int:
    """On each database."""
    asked: int = request.config.getoption("--chaos")
    if asked == 0:
        pytest.skip("takes many minutes: --chaos 50")
    return asked


def chaos(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "claude_hitl_template.cli", "chaos", "--seed", str(SEED), *options],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("options", [(), ("--postgres",)], ids=["sqlite", "postgres"])
def test_every_promise_is_kept_while_everything_is_struck(
    kills: int, options: tuple[str, ...], tmp_path: Path
):
    if options:
        require()
    report = tmp_path / "report.json"
    done = chaos("--kills", str(kills), "--report", str(report), *options)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(report.read_text())
    assert told["kept"]
    assert told["kills"] >= kills
    assert told["faults beside cut streams"] > told["kills"]
    assert told["counts"]["decisions acknowledged"] > 0
    assert told["counts"]["calls that ran"] > 0


@pytest.mark.usefixtures("kills")
def test_a_run_that_breaks_a_promise_says_so_and_fails(tmp_path: Path):
    report = tmp_path / "report.json"
    # What broke is kept where temporary files are.
    bug = {faults.BUGS_VARIABLE: "claims_are_not_counted", "TMPDIR": str(tmp_path)}
    done = chaos("--kills", "1", "--report", str(report), **bug)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "PROMISES WERE BROKEN" in done.stdout
    told = json.loads(report.read_text())
    assert not told["kept"]
    assert told["violations"]
    assert all(violation["history"] for violation in told["violations"])
