"""`hitl chaos` reports wrong usage before it starts anything."""

from pathlib import Path

import pytest

from tests.commands import hitl


@pytest.mark.parametrize("arguments", [("--minutes", "0"), ("--minutes", "x"), ("--seed", "x"), ("now",)])
def test_wrong_usage_is_2(arguments: tuple[str, ...]):
    assert hitl("chaos", *arguments).returncode == 2


def test_a_report_that_cannot_be_written_is_told_before_anything_is_started(tmp_path: Path):
    done = hitl("chaos", "--report", str(tmp_path / "nowhere" / "report.json"))
    assert done.returncode == 1
    assert "there is no such folder" in done.stderr
    assert "Seed" not in done.stdout
