"""Nothing of a deleted session stays, and owners leave nothing in Ray: by counts, not by times."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.suites import ROOT

pytestmark = pytest.mark.slow
OF_SESSIONS = ("sessions", "events", "approvals", "transcripts")


def test_after_deleted_sessions_no_row_file_or_class_is_left(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    command = [sys.executable, "-m", "tools.soak", "--minutes", "0", "--json", figures]
    subprocess.run(command, cwd=ROOT, check=True)
    found = json.loads(figures.read_text())
    assert found["work"]["sessions"] == 1
    kept = [f"rows of {table}" for table in OF_SESSIONS]
    for name in (*kept, "files of sessions", "classes and functions in the GCS"):
        assert found["slopes"][name]["session"] == 0, (name, found["slopes"][name])
