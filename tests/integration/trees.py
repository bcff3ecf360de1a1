"""Working trees of a "development machine": no Ray, a data folder of their own, and profiles that name clusters."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from claude_hitl_template.cli.deploy.package import listed_files
from tests.integration.harness import KEY, Service, wait_for

ROOT = Path(__file__).parents[2]
CODE = "claude_hitl_template"
BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Tree:
    root: Path

    @classmethod
    def check_out(cls, root: Path) -> "Tree":
        """Copies this project into a repository with one commit; without tests, because one of them contains KEY."""
        for name in listed_files(ROOT):
            if not name.startswith("tests/"):
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, root / name)
        git = ["git", "-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
        for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "first"]):
            subprocess.run([*git, *command], cwd=root, check=True, capture_output=True)
        return cls(root)

    def run(
        self, *command: str | Path, stdin: str = "", **environment: str
    ) -> "subprocess.CompletedProcess[str]":
        ours = ("HITL_", "ANTHROPIC_", "KODO_", "RAY_")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        return subprocess.run(
            command,
            env={**inherited, "HITL_HOME": str(self.root), **environment},
            cwd=self.root,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )

    def hitl(self, *args: str, stdin: str = "") -> "subprocess.CompletedProcess[str]":
        return self.run(sys.executable, "-m", f"{CODE}.cli", *args, stdin=stdin)

    def koco(self, *args: str, dashboard: str, **login: str) -> "subprocess.CompletedProcess[str]":
        """Runs koco. `login` is `Service.ray_login` of a test cluster."""
        return self.run(BIN / "koco", *args, RAY_DASHBOARD_ADDRESS=dashboard, **login)

    def profile(self, name: str, **variables: str) -> None:
        text = "".join(f"{variable}={value}\n" for variable, value in variables.items())
        (self.root / "profiles" / f"{name}.env").write_text(text)

    def deploy(self, profile: str = "vm") -> str:
        """Deploys, asserts success, and returns the output."""
        done = self.hitl("deploy", "--profile", profile)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def fails_to_deploy(self, profile: str = "vm") -> str:
        done = self.hitl("deploy", "--profile", profile)
        assert done.returncode == 1, done.stdout + done.stderr
        assert "Traceback (most recent call last)" not in done.stderr.splitlines()[0]
        return done.stderr

    def name_version(self, version: str) -> None:
        self.replace(f"{CODE}/__init__.py", r'__version__ = ".*"', f'__version__ = "{version}"')

    def replace(self, path: str, pattern: str, text: str) -> None:
        file = self.root / path
        changed, count = re.subn(pattern, text, file.read_text())
        assert count, (path, pattern)
        file.write_text(changed)

    @contextmanager
    def spoilt(self, path: str, text: str) -> Generator[None]:
        """Appends `text` to a file for the duration of the context."""
        file = self.root / path
        before = file.read_text()
        file.write_text(before + text)
        try:
            yield
        finally:
            file.write_text(before)


def addresses(cluster: Service) -> dict[str, str]:
    """Returns a profile's settings for a cluster."""
    port = cluster.environment
    return {
        "HITL_DASHBOARD_URL": f"http://127.0.0.1:{port['HITL_DASHBOARD_PORT']}",
        "HITL_RAY_ADDRESS": f"ray://127.0.0.1:{port['HITL_RAY_CLIENT_PORT']}",
        "HITL_SERVE_URL": f"http://127.0.0.1:{port['HITL_SERVE_PORT']}",
        "HITL_PANEL_PORT": port["HITL_PANEL_PORT"],
        "HITL_API_KEY": KEY,
        "HITL_RAY_TOKEN": cluster.ray_token,
    }


def applications(cluster: Service) -> dict[str, Any]:
    """Returns Serve's status of each application, by name."""
    return cluster.dashboard("/api/serve/applications/").json()["applications"]


def status(cluster: Service) -> str | None:
    """Returns the status of our application; None if Serve has none."""
    return applications(cluster).get("claude-hitl", {}).get("status")


def empty(cluster: Service) -> None:
    """Deletes Serve's applications, and waits until their processes have ended; Ray keeps running."""
    assert cluster.dashboard("/api/serve/applications/", "DELETE").is_success
    wait_for("Serve to end", lambda: not cluster.processes("ServeReplica:") or None)
