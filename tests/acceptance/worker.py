"""A service with sessions in containers, run by a user other than root with its own checkout and Python."""

import json
import os
import pwd
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.integration.harness import Conversation, Service

ROOT = Path(__file__).parents[2]
USER = "ray"
NEEDED = ("podman", "buildah", "runc", "fuse-overlayfs", "newuidmap", "mmdebstrap", "runuser")
MAKE_FIT = "run ./hitl bootstrap-host as root on a Debian machine"


def require_containers() -> None:
    """Skips a test if this machine is not prepared for containers; in CI it fails instead."""
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if sys.platform != "linux" or os.getuid() != 0:
        missing.append("root on Linux")
    if not missing and USER not in {user.pw_name for user in pwd.getpwall()}:
        missing.append(f"the user {USER}")
    if missing:
        why = f"sessions in containers cannot be tested without {', '.join(missing)}: {MAKE_FIT}"
        if os.environ.get("CI"):
            pytest.fail(why)
        pytest.skip(why)


def as_user(*command: str, timeout_s: float = 300, check: bool = True) -> str:
    """Runs a command as the other user, and returns its output."""
    done = subprocess.run(
        ["runuser", "-u", USER, "--", "env", f"HOME={home()}", *command],
        cwd="/",
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def home() -> Path:
    return Path(pwd.getpwnam(USER).pw_dir)


def settle(folder: Path) -> Path:
    """Gives the other user its own checkout and Python, which reads this one's packages. Returns the Python."""
    base, packages = folder / "python", Path(sys.prefix) / "lib/python3.12/site-packages"
    _copy(Path(sys.base_prefix), base)
    run(str(base / "bin/python3.12"), "-m", "venv", "--without-pip", str(folder / "venv"), libraries=base)
    _copy(packages, folder / "venv/lib/python3.12/site-packages")
    found = folder / "venv/lib/python3.12/site-packages/claude_hitl.pth"
    found.unlink(missing_ok=True)  # a link to this checkout's own, which must stay as it is
    found.write_text(str(folder / "checkout"))
    for script in (Path(sys.prefix) / "bin").iterdir():
        text = script.read_bytes()
        if script.is_file() and text.startswith(b"#!") and b"python" in text.splitlines()[0]:
            body = text.partition(b"\n")[2]
            copy = folder / "venv/bin" / script.name
            copy.write_bytes(f"#!{folder}/venv/bin/python\n".encode() + body)
            copy.chmod(0o755)
    shutil.copytree(
        ROOT / "claude_hitl_template",
        folder / "checkout/claude_hitl_template",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    (folder / "data").mkdir()
    shutil.chown(folder / "data", USER, USER)
    return folder / "venv/bin/python"


def run(*command: str, libraries: Path | None = None) -> None:
    more = {"LD_LIBRARY_PATH": str(libraries / "lib")} if libraries else {}
    done = subprocess.run(
        command, env={**os.environ, **more}, capture_output=True, text=True, timeout=1200, check=False
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"


def _copy(source: Path, target: Path) -> None:
    """Copies a folder, with hard links if both are on one disk: it is larger than a gigabyte, and never written to."""
    target.mkdir(parents=True, exist_ok=True)
    how = "-al" if source.stat().st_dev == target.stat().st_dev else "-a"
    run("cp", how, f"{source}/.", str(target))


@dataclass
class Worker(Service):
    """A service that runs as the other user, as do its containers."""

    raylet_folder: Path = Path()

    def containers(self) -> list[dict[str, Any]]:
        return json.loads(as_user("podman", "ps", "--all", "--format", "json") or "[]") or []

    def processes(self, name: str) -> list[psutil.Process]:
        """Returns the user's processes: those in containers are not children of the service's processes."""
        uid = pwd.getpwnam(USER).pw_uid
        found: list[psutil.Process] = []
        for process in psutil.process_iter():
            try:
                if process.uids().real == uid and name in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def container_of(self, session: Conversation) -> str:
        """Returns the id of the container in which the session's CLI runs."""
        mounts = Path(f"/proc/{self.cli_of(session).pid}/mountinfo").read_text()
        (mount,) = [line for line in mounts.splitlines() if "/run/.containerenv " in line]
        return mount.split("/overlay-containers/")[1].split("/")[0]

    def shared(self, session: Conversation) -> Path:
        """A folder of the host that containers can access, through which a test observes a running call."""
        folder = self.raylet_folder / "shared" / f"test-{session.id}"
        folder.mkdir(exist_ok=True, parents=True)
        folder.chmod(0o777)
        return folder
