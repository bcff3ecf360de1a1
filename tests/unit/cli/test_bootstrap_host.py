"""What makes a host fit says plainly where it cannot; .ci/run runs it for real."""

import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "claude_hitl_template" / "bin" / "bootstrap-host"


def run(tools: Path, **programs: str) -> "subprocess.CompletedProcess[str]":
    """On a host whose only programs are these, by name with what each does."""
    for name, script in programs.items():
        (tools / name).write_text(f"#!/bin/sh\n{script}\n")
        (tools / name).chmod(0o755)
    return subprocess.run(
        ["/bin/bash", SCRIPT], env={"PATH": str(tools)}, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("uid", "why", "fix"),
    [("1000", "only root can", "sudo ./hitl bootstrap-host"), ("0", "no Debian or Ubuntu", "./hitl doctor")],
)
def test_where_it_cannot_work_it_says_so_and_does_nothing(
    tmp_path: Path, uid: str, why: str, fix: str
) -> None:
    done = run(tmp_path, id=f"echo {uid}")
    assert done.returncode == 1
    assert why in done.stderr
    assert fix in done.stderr.partition("Fix: ")[2]


def test_a_package_that_cannot_be_installed_ends_it_there(tmp_path: Path) -> None:
    fakes = {
        "id": "echo 0",
        "dpkg-query": "exit 1",
        "grep": "exit 1",
        "apt-get": "echo unreachable >&2; exit 100",
    }
    done = run(tmp_path, **fakes)
    assert done.returncode == 100
    assert "unreachable" in done.stderr
    assert "ready" not in done.stdout
