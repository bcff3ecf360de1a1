"""Hard limits: which ones are set on which kernel, and where a control group can be created."""

import os
import resource
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from claude_hitl_template.claude import limits
from claude_hitl_template.claude.limits import ControlGroups, DiskUse, HardLimits

MIB = 1024**2
LIMITS = HardLimits(processes=10, memory_bytes=1000, open_files=100)


def machine(
    root: Path, lines: list[str], mounts: list[tuple[str, str, str]], release: str = "5.10.0"
) -> ControlGroups:
    """The kernel's description of this process: its groups, and the mounted hierarchies with path, type and options."""
    (root / "cgroup").write_text("".join(f"{line}\n" for line in lines))
    described = [
        f"31 24 0:27 / {root / place} rw - {kind} cgroup {options}\n" for place, kind, options in mounts
    ]
    (root / "mountinfo").write_text("".join(described))
    return ControlGroups(root / "cgroup", root / "mountinfo", release)


def group(folder: Path, enabled: str = "", *, procs: bool = True) -> None:
    folder.mkdir(parents=True)
    (folder / "cgroup.subtree_control").write_text(enabled)
    if procs:
        (folder / "cgroup.procs").touch()


def test_tasks_are_limited_only_where_the_kernel_counts_them_for_each_sandbox():
    """Otherwise all processes of the service's user would count, including Ray's."""
    names = {
        release: {kind for kind, _ in LIMITS.resources(release)} for release in ("5.13.9", "5.14.0", "6.1")
    }
    assert [resource.RLIMIT_NPROC in found for found in names.values()] == [False, True, True]
    assert (resource.RLIMIT_CORE, 0) in LIMITS.resources("4.18.0-553.el8")


class Disk:
    """A disk of 1,000 bytes, and a session's folder on it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.used, self.looks = folder, 0, 0
        monkeypatch.setattr(limits.shutil, "disk_usage", self._usage)

    def _usage(self, _: Path) -> Any:
        self.looks += 1
        return SimpleNamespace(used=self.used, free=1000 * MIB - self.used)

    def write(self, name: str, mib: int) -> None:
        with (self.folder / name).open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, mib * MIB)
        self.used += mib * MIB


def test_files_are_measured_where_the_disk_fills_and_only_their_own_session_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    disk = Disk(tmp_path, monkeypatch)
    use = DiskUse([tmp_path, tmp_path / "missing"], 10 * MIB)
    assert use.over() is None
    disk.write("small", 4)
    assert use.over() is None
    disk.used += 900 * MIB  # by others
    assert use.over() is None
    disk.write("more", 7)
    assert "HITL_SESSION_DISK_BYTES" in (use.over() or "")
    assert use.over() is None  # it may go on, and remove files


def test_where_less_than_its_share_is_free_a_session_takes_most_of_it_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    disk = Disk(tmp_path, monkeypatch)
    disk.write("before", 3)
    disk.used = 990 * MIB
    use = DiskUse([tmp_path], 100 * MIB)
    assert use.over() is None
    disk.write("one", 5)
    assert use.over() is None
    disk.write("two", 5)
    assert "12.0 MiB" in (use.over() or "")


def test_a_session_that_starts_over_its_share_is_not_stopped_for_what_others_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """It is there to remove files. What it writes itself counts."""
    disk = Disk(tmp_path, monkeypatch)
    disk.write("before", 30)
    use = DiskUse([tmp_path], 16 * MIB)
    assert use.over() is None
    time.sleep(0.05)  # the clock of a file system ticks every 10 ms at most
    disk.write("its transcript", 1)
    for _ in range(5):
        disk.used += 100 * MIB  # by others
        assert use.over() is None
    disk.write("copy", 9)
    assert "40.0 MiB" in (use.over() or "")


def test_hard_limits_are_above_the_share_so_that_the_watch_gives_the_reason():
    assert LIMITS.tasks > LIMITS.processes
    assert LIMITS.most_memory_bytes > LIMITS.memory_bytes


def test_in_version_1_each_controller_has_a_group_of_its_own(tmp_path: Path):
    for name in ("memory/service", "pids"):
        group(tmp_path / name)
    groups = machine(
        tmp_path, ["8:pids:/", "4:memory:/service", "2:cpuacct:/"],
        [("memory", "cgroup", "rw,memory"), ("pids", "cgroup", "rw,pids"), ("cpuacct", "cgroup", "rw,cpuacct")],
    )  # fmt: skip
    joined = groups.make(LIMITS)
    assert [str(Path(path).parents[1]) for path in joined] == [
        str(tmp_path / "pids"),
        str(tmp_path / "memory/service"),
    ]
    groups.remove()
    assert not list(tmp_path.glob("*/hitl-*")), list(tmp_path.glob("memory/service/hitl-*"))


def test_tasks_have_no_group_where_the_kernel_counts_them_for_each_sandbox(tmp_path: Path):
    """Joining a group takes 10 ms of each start."""
    group(tmp_path / "pids")
    group(tmp_path / "memory")
    mounts = [("pids", "cgroup", "rw,pids"), ("memory", "cgroup", "rw,memory")]
    [joined] = machine(tmp_path, ["8:pids:/", "4:memory:/"], mounts, "6.1.0").make(LIMITS)
    assert Path(joined).parents[1] == tmp_path / "memory"


def test_in_version_2_the_nearest_group_that_limits_what_is_below_it_is_taken(tmp_path: Path):
    """The service's own group contains processes, so it cannot limit groups below it."""
    group(tmp_path / "unified/user/app", "memory pids")
    group(tmp_path / "unified/user/app/hitl.service")
    groups = machine(tmp_path, ["0::/user/app/hitl.service"], [("unified", "cgroup2", "rw,nsdelegate")])
    [joined] = groups.make(LIMITS)
    assert Path(joined).parents[1] == tmp_path / "unified/user/app"


@pytest.mark.parametrize("enabled", ["", "cpu"])
def test_where_no_group_can_be_limited_none_is_made(tmp_path: Path, enabled: str):
    group(tmp_path / "unified/system", enabled)
    groups = machine(tmp_path, ["0::/system"], [("unified", "cgroup2", "rw")])
    assert groups.make(LIMITS) == []
    assert not groups.ended_for_memory()
    assert ControlGroups(tmp_path / "none", tmp_path / "none").make(LIMITS) == []


def test_groups_of_owners_that_were_killed_are_removed_and_no_others(tmp_path: Path):
    group(tmp_path / "pids")
    (tmp_path / f"pids/hitl-{os.getpid()}-1").mkdir()
    (tmp_path / "pids/hitl-4194999-1").mkdir()  # above the largest process id that there is
    machine(tmp_path, ["8:pids:/"], [("pids", "cgroup", "rw,pids")]).make(LIMITS)
    left = {path.name for path in tmp_path.glob("pids/hitl-*")}
    assert f"hitl-{os.getpid()}-1" in left
    assert "hitl-4194999-1" not in left


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("memory.events", "low 0\nhigh 3\nmax 9\noom 1\noom_kill {n}\noom_group_kill 0\n"),
        ("memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill {n}\n"),
    ],
)
def test_a_process_that_the_kernel_ended_is_known_in_both_versions(tmp_path: Path, name: str, text: str):
    group(tmp_path / "memory")
    groups = machine(tmp_path, ["4:memory:/"], [("memory", "cgroup", "rw,memory")])
    [joined] = groups.make(LIMITS)
    assert not groups.ended_for_memory()
    for ended in (0, 1):
        Path(joined).with_name(name).write_text(text.format(n=ended))
        assert groups.ended_for_memory() is bool(ended)
