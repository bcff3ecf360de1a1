"""Hard limits: which ones hold on which kernel, and where a control group can be made."""

import os
import resource
from pathlib import Path

import pytest

from claude_hitl_template.claude.limits import ControlGroups, HardLimits

LIMITS = HardLimits(processes=10, memory_bytes=1000, open_files=100)


def machine(
    root: Path, lines: list[str], mounts: list[tuple[str, str, str]], release: str = "5.10.0"
) -> ControlGroups:
    """What the kernel says of this process: its groups, and the mounted hierarchies as place, kind and options."""
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
    """Elsewhere all processes of the service's user would count, Ray's too."""
    names = {
        release: {kind for kind, _ in LIMITS.resources(release)} for release in ("5.13.9", "5.14.0", "6.1")
    }
    assert [resource.RLIMIT_NPROC in found for found in names.values()] == [False, True, True]
    assert (resource.RLIMIT_CORE, 0) in LIMITS.resources("4.18.0-553.el8")


def test_the_size_of_files_is_limited_only_where_a_setting_says_so():
    assert resource.RLIMIT_FSIZE not in dict(LIMITS.resources())
    assert dict(HardLimits(file_bytes=7).resources())[resource.RLIMIT_FSIZE] == 7


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
    """To join one takes 10 ms of each start."""
    group(tmp_path / "pids")
    group(tmp_path / "memory")
    mounts = [("pids", "cgroup", "rw,pids"), ("memory", "cgroup", "rw,memory")]
    [joined] = machine(tmp_path, ["8:pids:/", "4:memory:/"], mounts, "6.1.0").make(LIMITS)
    assert Path(joined).parents[1] == tmp_path / "memory"


def test_in_version_2_the_nearest_group_that_limits_what_is_below_it_is_taken(tmp_path: Path):
    """The service's own group has processes, so that it cannot limit groups below it."""
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
