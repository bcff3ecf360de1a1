"""Fault points are reached by the work that they are named after."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from claude_hitl_template import fault_points
from tests import faults
from tests.postgres import Server

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def test_every_point_is_reached_by_all_writes_and_a_conversation(postgres_server: Server, tmp_path: Path):
    for name in ("faults", "data"):
        (tmp_path / name).mkdir()
    with postgres_server.database() as url:
        run = subprocess.run(
            [sys.executable, "-m", "tests.contract.reaching", url, tmp_path / "data"],
            env={**os.environ, **faults.environment(tmp_path / "faults")},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
    assert run.returncode == 0, run.stderr
    lines = (tmp_path / "faults" / "hits.jsonl").read_text().splitlines()
    reached = {json.loads(line)["point"] for line in lines}
    assert reached == set(fault_points.POINTS)
