"""An approved command can exhaust only its own session's resources: a fork bomb, open files, memory. In real sandboxes."""

import resource
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

from claude_hitl_template.claude.limits import TASKS_OF_THE_CLI, ControlGroups, HardLimits
from claude_hitl_template.claude.sandbox import SandboxConfig
from claude_hitl_template.domain.policy import PermissionPolicy, Rule
from claude_hitl_template.domain.policy.floor import Floor
from claude_hitl_template.session.runner import SessionRunner
from tests.contract.test_layers import bash, script
from tests.contract.test_session import House, house, model_url, user
from tests.sandboxed import run_in_sandbox, sandboxed

with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # Ray Serve's own
    from claude_hitl_template.cluster.actor import Share, watch
    from claude_hitl_template.cluster.owner import first_of

__all__ = ["model_url"]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="there are sandboxes on Linux alone")
FEW = HardLimits(processes=8)
OF_COMMANDS = FEW.tasks - TASKS_OF_THE_CLI  # the rest stays for the CLI
# Says how many processes it came to, and keeps them.
FORKS = """python3 -c '
import os, time
made, why = 0, ""
while made < 400:
    try:
        if os.fork() == 0:
            time.sleep(60)
    except OSError as error:
        why = error.strerror
        break
    made += 1
print(made, why, flush=True)
open("full", "w").close()
time.sleep({keep_s})
'"""
MIB = 1024**2
by_namespace = pytest.mark.skipif(
    resource.RLIMIT_NPROC not in dict(HardLimits().resources()), reason="this kernel counts tasks for each user"
)  # fmt: skip


def can_limit_memory() -> bool:
    groups = ControlGroups()
    try:
        return any("memory" in path for path in groups.make(FEW))
    finally:
        groups.remove()


def open_them(count: int) -> str:
    return f"import os\ntry:\n for n in range({count}): os.open('/dev/null', 0)\nexcept OSError as e: print(n, e.strerror)"


@by_namespace
def test_a_sandbox_full_of_processes_takes_none_from_another_one_of_the_same_user(tmp_path: Path):
    full = tmp_path / "full/workspace/full"
    with sandboxed(tmp_path / "full", FORKS.format(keep_s=60), SandboxConfig(limits=FEW)) as one:
        deadline = time.monotonic() + 30
        while not full.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        other = run_in_sandbox(tmp_path / "other", FORKS.format(keep_s=0), SandboxConfig(limits=FEW))
        assert int(other.split()[0]) > OF_COMMANDS // 2, other
        subprocess.run(["true"], check=True)  # nor from the owner
        assert one.poll() is None


@by_namespace
def test_a_fork_bomb_comes_to_no_more_tasks_than_the_limit(tmp_path: Path):
    said = run_in_sandbox(tmp_path, FORKS.format(keep_s=0), SandboxConfig(limits=FEW))
    made, _, why = said.strip().partition(" ")
    assert OF_COMMANDS // 2 < int(made) <= OF_COMMANDS
    assert why == "Resource temporarily unavailable"


def test_a_hundred_thousand_open_files_are_refused_at_the_limit(tmp_path: Path):
    said = run_in_sandbox(tmp_path, f'python3 -c "{open_them(100_000)}"')
    opened, _, why = said.strip().partition(" ")
    assert int(opened) <= HardLimits().open_files
    assert why == "Too many open files"


def test_no_command_raises_its_limits_or_leaves_a_core(tmp_path: Path):
    said = run_in_sandbox(tmp_path, "ulimit -Hc; ulimit -Hn; ulimit -n 100000 || echo refused")
    assert said.split()[:2] == ["0", "4096"]
    assert "refused" in said


def test_a_command_makes_no_namespaces_in_which_it_has_capabilities(tmp_path: Path):
    """In such a namespace it could mount folders in memory of any size, and try system calls that only root may use."""
    assert (
        run_in_sandbox(tmp_path, "unshare --user --map-root-user true 2>/dev/null || echo none").strip()
        == "none"
    )


def test_folders_in_memory_are_small(tmp_path: Path):
    """Files in memory belong to no process, so the owner's watch of processes does not count them."""
    look = "df --block-size=1M --output=target,size,fstype | grep tmpfs"
    fill = "dd if=/dev/zero of=$at/x bs=1M count=200 2>/dev/null; stat -c %s $at/x"
    into = f"for at in /dev /dev/shm /run /run/hitl /sys; do {fill}; done"
    said = run_in_sandbox(tmp_path, f"{into} 2>/dev/null; {look}")
    sizes = [int(line) for line in said.splitlines() if line.isdigit()]
    assert sum(sizes) <= 64 * MIB, said


def test_memory_that_no_process_has_mapped_is_limited_where_control_groups_can_be_made(tmp_path: Path):
    if not can_limit_memory():
        pytest.skip("no control group can be made here")
    write = (
        "import os\nf = os.memfd_create('x')\nfor _ in range(300): os.write(f, b'x' * 2**20)\nprint('all')"
    )
    said = run_in_sandbox(
        tmp_path, f'python3 -c "{write}"; echo $?', SandboxConfig(limits=HardLimits(memory_bytes=100 * MIB))
    )
    assert said.split()[-1] == "137", said


def test_a_file_of_a_hundred_gibibytes_is_refused_at_the_limit(tmp_path: Path):
    """At once, and before it takes the disk's place: a file need not be written to take it."""
    said = run_in_sandbox(
        tmp_path,
        "fallocate -l 100G huge; head -c 9M /dev/zero > large; stat -c %s huge large",
        SandboxConfig(limits=HardLimits(disk_bytes=8 * MIB)),
    )
    assert [int(line) for line in said.splitlines() if line.isdigit()] == [0, 8 * MIB], said


# -- a whole session, with the watch of its owner


async def approved(root: Path, model_url: str, command: str, limits: HardLimits) -> House:
    """Runs a session with the command, which a rule allows, under an owner's watch."""
    rules = (Rule(rule="Bash", policy="always_allow"),)
    steps = script({"tools": [bash(command)]})
    h = await house(root, model_url, steps, policy=PermissionPolicy(rules=rules), floor=Floor(rules=rules))
    h.sandbox = SandboxConfig(limits=limits)
    share = Share(0.25, limits.memory_bytes, limits.processes, limits.disk_bytes)

    async def run(runner: SessionRunner) -> None:
        await first_of(runner.run(), watch(runner, share, [h.root]))

    h.runs = run
    await h.drive()
    return h


async def why_it_was_stopped(h: House) -> str:
    assert (await h.until_idle())["type"] == "retries_exhausted"
    return (await h.log("session.error"))[-1].payload["error"]["message"]


async def test_a_fork_bomb_is_stopped_with_the_reason_and_a_message_goes_on(tmp_path: Path, model_url: str):
    h = await approved(tmp_path, model_url, ":(){ :|:& };:; sleep 60", HardLimits(processes=30))
    assert "HITL_SESSION_PROCESSES" in await why_it_was_stopped(h)
    await h.send(user(script({"text": "It goes on."})))
    await h.drive()
    assert (await h.until_idle())["type"] == "end_turn"
    assert "It goes on." in await h.said()


async def test_a_session_whose_command_the_kernel_ended_for_its_memory_is_stopped_with_the_reason(
    tmp_path: Path, model_url: str
):
    if not can_limit_memory():
        pytest.skip("no control group can be made here")
    unseen = "import os; f = os.memfd_create('x')\nfor _ in range(2000): os.write(f, b'x' * 2**20)"
    h = await approved(
        tmp_path,
        model_url,
        f"python3 -c '{unseen.replace(chr(39), chr(34))}'; sleep 60",
        HardLimits(memory_bytes=600 * MIB),
    )
    assert "HITL_SESSION_MEMORY_BYTES" in await why_it_was_stopped(h)


@pytest.mark.parametrize("elsewhere", [False, True])
async def test_a_session_whose_files_fill_the_disk_is_stopped_with_the_reason_and_can_remove_them(
    tmp_path: Path, model_url: str, elsewhere: bool
):
    """On another machine as well, where its files are written again before it can remove any."""
    h = await approved(
        tmp_path,
        model_url,
        "for n in 1 2 3 4; do head -c 30M /dev/zero > large$n; done; sleep 60",
        HardLimits(disk_bytes=40 * MIB),
    )
    assert "HITL_SESSION_DISK_BYTES" in await why_it_was_stopped(h)
    if elsewhere:
        shutil.rmtree(h.workspace)
    await h.send(user(script({"tools": [bash("rm large*")]}, {"text": "They are gone."})))
    await h.drive()
    assert (await h.until_idle())["type"] == "end_turn"
    assert not list(h.workspace.glob("large*"))
