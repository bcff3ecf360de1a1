"""The steps that create and run the VM, with a program `orb` that only records its calls, so no Mac is needed."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
FAKE = """#!/bin/sh
echo "$*" >>"{log}"
case "$*" in
  *bootstrap-fails*) exit 3 ;;
  "info claude-hitl") [ -e "{there}" ] ;;
  "create "*) : >"{there}" ;;
  *"bash -s") cat >"{given}" ;;
  *"tar -xf"*) tar -tf - >"{files}" ;;
  *"cat "*) echo key-of-the-vm ;;
esac
"""
type Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs `./hitl vm` with these arguments; `orb=False`, on a machine without OrbStack."""
    tools, home = tmp_path / "tools", tmp_path / "home"
    tools.mkdir()
    home.mkdir()
    names = {name: tmp_path / name for name in ("log", "there", "given", "files")}

    def vm(*words: str, orb: bool = True, program: str = FAKE) -> "subprocess.CompletedProcess[str]":
        path = tools / "orb"
        path.unlink(missing_ok=True)
        if orb:
            path.write_text(program.format(**names))
            path.chmod(0o755)
        (names["log"]).write_text("")
        return subprocess.run(
            [sys.executable, "-m", "claude_hitl_template.cli", "vm", *words],
            env={**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "HITL_HOME": str(home)},
            cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip

    return vm


def asked(tmp_path: Path) -> list[str]:
    return (tmp_path / "log").read_text().splitlines()


@pytest.mark.skipif(shutil.which("orb") is not None, reason="OrbStack is here")
def test_create_makes_an_isolated_machine_that_has_the_commit_and_runs_and_a_profile_for_it(
    run: Run, tmp_path: Path
) -> None:
    done = run("create")
    assert done.returncode == 0, done.stdout + done.stderr
    as_ray = "-m claude-hitl -u ray"
    assert asked(tmp_path) == [
        "info claude-hitl",
        "create --isolated ubuntu:noble claude-hitl",
        "-m claude-hitl -u root bash -s",
        f"{as_ray} mkdir -p /home/ray/claude-hitl",
        f"{as_ray} tar -xf - -C /home/ray/claude-hitl",
        f"{as_ray} /home/ray/claude-hitl/hitl up",
        f"{as_ray} cat /home/ray/claude-hitl/.hitl/secrets/api-key",
        f"{as_ray} cat /home/ray/claude-hitl/.hitl/secrets/ray-token",
    ]
    script = (ROOT / "claude_hitl_template/bin/bootstrap-host").read_text()
    assert (tmp_path / "given").read_text() == script
    assert {"hitl", "requirements.lock"} <= set((tmp_path / "files").read_text().split())
    profile = tmp_path / "home/profiles/vm.env"
    assert {"HITL_API_KEY=key-of-the-vm", "HITL_RAY_TOKEN=key-of-the-vm"} <= set(
        profile.read_text().splitlines()
    )
    assert profile.stat().st_mode & 0o077 == 0
    assert "key-of-the-vm" not in done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].endswith("http://localhost:3370")


def test_a_machine_that_is_there_is_not_made_again_and_a_profile_stays_as_it_is(
    run: Run, tmp_path: Path
) -> None:
    run("create")
    profile = tmp_path / "home/profiles/vm.env"
    profile.write_text("HITL_PANEL_PORT=3371\n")
    done = run("create")
    assert not [line for line in asked(tmp_path) if line.startswith("create")]
    assert profile.read_text() == "HITL_PANEL_PORT=3371\n"
    assert done.stdout.splitlines()[-1].endswith(":3371")


@pytest.mark.parametrize(
    ("verb", "lines"),
    [
        ("stop", ["-m claude-hitl -u ray /home/ray/claude-hitl/hitl down", "stop claude-hitl"]),
        ("status", ["info claude-hitl", "-m claude-hitl -u ray /home/ray/claude-hitl/hitl status"]),
    ],
)
def test_stop_and_status_ask_the_service_and_the_machine(
    run: Run, tmp_path: Path, verb: str, lines: list[str]
) -> None:
    run("create")
    assert run(verb).returncode == 0
    assert asked(tmp_path) == lines


def test_start_ends_with_the_panels_address(run: Run, tmp_path: Path) -> None:
    run("create")
    done = run("start")
    assert asked(tmp_path) == ["start claude-hitl", "-m claude-hitl -u ray /home/ray/claude-hitl/hitl up"]
    assert done.stdout.splitlines()[-1].endswith("http://localhost:3370")


def test_delete_deletes_only_when_told_to(run: Run, tmp_path: Path) -> None:
    kept = run("delete")
    assert (kept.returncode, asked(tmp_path)) == (0, [])
    assert run("delete", "--yes").returncode == 0
    assert asked(tmp_path) == ["delete -f claude-hitl"]


def test_a_step_that_fails_is_named_and_the_next_is_not_taken(run: Run, tmp_path: Path) -> None:
    done = run("create", program=FAKE.replace("*bootstrap-fails*", '*"bash -s"'))
    assert done.returncode == 1
    assert "bash -s" in done.stderr
    assert "(3)" in done.stderr
    assert asked(tmp_path)[-1] == "-m claude-hitl -u root bash -s"


@pytest.mark.skipif(shutil.which("orb") is not None, reason="OrbStack is here")
@pytest.mark.parametrize("verb", ["create", "start", "stop", "status", "delete"])
def test_without_orbstack_the_steps_are_printed_as_commands_for_any_host_and_nothing_is_done(
    run: Run, verb: str
) -> None:
    done = run(verb, orb=False)
    assert done.returncode == 1
    lines = [line for line in done.stdout.splitlines() if line.startswith("    ")]
    assert lines
    assert all("ssh HOST sudo -iu " in line for line in lines)
    for line in lines:
        subprocess.run(["sh", "-n", "-c", line], check=True)
