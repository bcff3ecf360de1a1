"""Hard limits of one sandbox, which the kernel enforces at once; the owner's watch (`cluster/actor.py`) acts a second late.

Two kinds. Resource limits hold on every machine: `launch.py` sets them inside of the sandbox's user namespace, so that the
number of tasks counts for this sandbox alone. Control groups also limit memory, where this process may make one: v1, v2
delegated to the service's user, or root.
"""

import contextlib
import os
import re
import resource
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from claude_hitl_template.presentation.text import size

PREFIX = "hitl-"
# Threads count as tasks, and the CLI alone has two dozen. The watch counts processes, and must get to see too many of them.
# Commands may not use those of the CLI, which ends when it cannot start a thread.
TASKS_PER_PROCESS, TASKS_OF_THE_CLI = 4, 128
# The kernel ends a process at its limit without a reason, so that the watch gets to see too much memory first.
MEMORY_ABOVE_SHARE = 1.25
# Below this part of its share, what a session wrote is not why a disk fills.
WRITTEN_PART = 8
# Before it, the number of tasks counted for a user of the machine, whatever the namespace.
TASKS_COUNT_BY_NAMESPACE = (5, 14)
CGROUP, MOUNTINFO = Path("/proc/self/cgroup"), Path("/proc/self/mountinfo")


@dataclass(frozen=True)
class HardLimits:
    """`processes`, `memory_bytes`, `disk_bytes`: the session's share, as the watch has it; the hard limits are above it.

    `open_files`: of one process. No file is larger than the share of the disk.
    """

    processes: int = 256
    memory_bytes: int = 1024**3
    open_files: int = 4096
    disk_bytes: int = 10 * 1024**3

    @property
    def tasks(self) -> int:
        """Processes and threads, all of them."""
        return self.processes * TASKS_PER_PROCESS + TASKS_OF_THE_CLI

    @property
    def most_memory_bytes(self) -> int:
        return int(self.memory_bytes * MEMORY_ABOVE_SHARE)

    def resources(self, release: str | None = None) -> list[tuple[int, int]]:
        """What `setrlimit` takes: resource and value. `release` is the kernel's."""
        found = [
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_NOFILE, self.open_files),
            (resource.RLIMIT_FSIZE, self.disk_bytes),
        ]
        if counts_by_namespace(release or os.uname().release):
            found.append((resource.RLIMIT_NPROC, self.tasks))
        return found


def over_memory(used_bytes: int, share_bytes: int) -> str:
    """Why a session is stopped, for its log."""
    return (
        f"the session's processes used {size(used_bytes)} of memory, and {size(share_bytes)} are its share "
        "(HITL_SESSION_MEMORY_BYTES): they were stopped. Send a message to go on, with work in smaller pieces"
    )


class DiskUse:
    """What a session's folders use of the disk. They are measured only after the disk filled by half of the session's share
    (or of what was free): a look at the disk as a whole is all that a session costs otherwise.

    A session that is over its share at the first look may go on, and remove files, whatever others write meanwhile: it is
    over only when it also wrote a part of its share since.
    """

    def __init__(self, folders: Iterable[Path], share_bytes: int) -> None:
        self._folders, self._most = tuple(folders), share_bytes
        self._least: int | None = None  # bytes of the disk that were used since the last measurement
        self._room = self._may_write = 0
        self._since_ns = 0  # of the first look

    def over(self) -> str | None:
        """Why the session is stopped, for its log. Blocking."""
        used, free = self._disk()
        if self._least is None:
            self._since_ns = time.time_ns()
            self._least, self._room = used, min(self._most, free)
            self._may_write = self._room // WRITTEN_PART
            if free < self._most:  # a session takes most of it at most: the service needs the rest
                self._most = min(self._most, self._measured()[0] + free * 9 // 10)
            return None
        self._least = min(self._least, used)
        if used - self._least < self._room / 2:
            return None
        (measured, written), self._least = self._measured(), used
        if measured <= self._most:
            self._room = min(self._most - measured, free)
            return None
        if written <= self._may_write:
            return None
        return (
            f"the session's files take {size(measured)} of the disk, and {size(self._most)} are the most "
            "(HITL_SESSION_DISK_BYTES): its processes were stopped. Send a message to go on, and have files removed first"
        )

    def _there(self) -> list[Path]:
        return [folder for folder in self._folders if folder.is_dir()]

    def _disk(self) -> tuple[int, int]:
        """Used and free bytes of the disks with the folders."""
        disks = {folder.stat().st_dev: shutil.disk_usage(folder) for folder in self._there()}.values()
        return sum(disk.used for disk in disks), min((disk.free for disk in disks), default=0)

    def _measured(self) -> tuple[int, int]:
        """Bytes on the disk of the files in the folders, and of those that changed since the first look; links are not
        followed."""
        found = written = 0
        for folder in self._there():
            for _, _, names, descriptor in os.fwalk(folder, follow_symlinks=False):
                for name in names:
                    with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                        file = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
                        taken = file.st_blocks * 512
                        found += taken
                        if file.st_ctime_ns > self._since_ns:
                            written += taken
        return found, written


def counts_by_namespace(release: str) -> bool:
    """Whether this kernel counts the tasks of a sandbox for itself."""
    found = re.match(r"(\d+)\.(\d+)", release)
    return found is not None and (int(found[1]), int(found[2])) >= TASKS_COUNT_BY_NAMESPACE


@dataclass
class ControlGroups:
    """The control groups of one sandbox. `make` first, `remove` when its processes have ended; both block.

    `cgroup`, `mountinfo`: what the kernel says of this process, in the files of these names. `release` is the kernel's:
    where it counts tasks for each sandbox, a group that does it too would only make the start 10 ms longer.
    """

    cgroup: Path = CGROUP
    mountinfo: Path = MOUNTINFO
    release: str = field(default_factory=lambda: os.uname().release)
    _made: list[Path] = field(default_factory=list[Path])

    def make(self, limits: HardLimits) -> list[str]:
        """Returns the files that a process joins by writing 0 to each; none where no control group can be made."""
        name = f"{PREFIX}{os.getpid()}-{secrets.token_hex(4)}"
        wanted = {"memory"} if counts_by_namespace(self.release) else {"memory", "pids"}
        for parent, controllers in _parents(self.cgroup, self.mountinfo, wanted):
            _remove_left(parent)
            group = parent / name
            with contextlib.suppress(OSError):
                group.mkdir()
                self._made.append(group)
                _limit(group, controllers, limits)
        return [str(group / "cgroup.procs") for group in self._made]

    def ended_for_memory(self) -> bool:
        """Whether the kernel has ended a process of the sandbox at the memory limit."""
        return any(_oom_kills(group) for group in self._made)

    def remove(self) -> None:
        """Removes the groups. The next sandbox removes one that still has processes, after this process has ended."""
        for group in self._made:
            with contextlib.suppress(OSError):
                group.rmdir()
        self._made.clear()


def _limit(group: Path, controllers: Iterable[str], limits: HardLimits) -> None:
    values = {
        "pids": {"pids.max": limits.tasks},
        "memory": {
            "memory.max": limits.most_memory_bytes,
            "memory.swap.max": 0,
            "memory.limit_in_bytes": limits.most_memory_bytes,
        },
    }
    for controller in controllers:
        for name, value in values[controller].items():
            if (group / name).exists():
                (group / name).write_text(str(value))


def _oom_kills(group: Path) -> int:
    for name in ("memory.events", "memory.oom_control"):
        with contextlib.suppress(OSError):
            found = re.search(r"^oom_kill (\d+)", (group / name).read_text(), re.MULTILINE)
            return int(found[1]) if found else 0
    return 0


def _remove_left(parent: Path) -> None:
    """Removes the groups of killed owners, except those that still have processes."""
    for left in parent.glob(f"{PREFIX}*-*"):
        owner = left.name.removeprefix(PREFIX).partition("-")[0]
        if not Path("/proc", owner).exists():
            with contextlib.suppress(OSError):
                left.rmdir()


def _parents(cgroup: Path, mountinfo: Path, wanted: set[str]) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """Groups below which this process may make one and move a process to it, each with those of the wanted controllers
    that it has."""
    try:
        lines, mounts = cgroup.read_text().splitlines(), list(_mounts(mountinfo.read_text()))
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        here = wanted & {*controllers.split(",")}
        for kind, options, root, point in mounts:
            if kind == "cgroup" and here and here <= options and path.startswith(root):
                own = point / path.removeprefix(root).lstrip("/")
                if _may_add(own):
                    yield own, tuple(sorted(here))
            elif kind == "cgroup2" and not controllers and path.startswith(root):
                yield from _unified(point / path.removeprefix(root).lstrip("/"), point, wanted)


def _unified(own: Path, top: Path, wanted: set[str]) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """The nearest group of version 2 that limits what is below it: one with processes of its own does not."""
    for group in (own, *own.parents):
        with contextlib.suppress(OSError):
            enabled = (group / "cgroup.subtree_control").read_text().split()
            controllers = tuple(sorted(wanted & {*enabled}))
            if controllers and _may_add(group):
                yield group, controllers
                return
        if group == top:
            return


def _may_add(group: Path) -> bool:
    """Whether this process may move processes into the group, for which it must be able to write to both files."""
    return os.access(group, os.W_OK) and os.access(group / "cgroup.procs", os.W_OK)


def _mounts(mountinfo: str) -> Iterator[tuple[str, set[str], str, Path]]:
    """Kind, options, root and place of the mounted hierarchies."""
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ", 2)
        if kind in ("cgroup", "cgroup2"):
            root, point = before.split(" ")[3:5]
            yield kind, set(options.split(",")), root, Path(point)
