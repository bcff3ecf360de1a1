"""Stages an image's build context in a folder: only checked and resolved files."""

import json
import tempfile
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from claude_hitl_template import __version__, code_version
from claude_hitl_template.config.build_info import python_minor
from claude_hitl_template.errors import ConfigError
from claude_hitl_template.image import labels
from claude_hitl_template.image.dependencies import Dependencies, locked_versions, read_dependencies
from claude_hitl_template.image.packages import NODE, fetch_npm, fetch_wheels, pin_npm, pin_python
from claude_hitl_template.image.plugins import Plugin, resolve_plugins
from claude_hitl_template.image.run import run
from claude_hitl_template.image.settings_layers import (
    PROJECT_LEVEL,
    USER_LEVEL,
    SettingsFile,
    managed_settings,
    read_levels,
)
from claude_hitl_template.image.trees import copy_file, copy_tree

PACKAGE = "claude_hitl_template"
_INGREDIENTS = (PACKAGE, USER_LEVEL, PROJECT_LEVEL, "Dockerfile", "requirements.lock")


@dataclass(frozen=True)
class Checkout:
    """A checkout after all checks that are possible before the build."""

    root: Path
    files: list[SettingsFile]
    lock: dict[str, str]
    dependencies: Dependencies
    commit: str

    @property
    def tag(self) -> str:
        """`<version>-<short commit>`, with `-dirty` where something that goes into the image was changed since."""
        commit, _, dirty = self.commit.partition("-")
        return "-".join(part for part in (__version__, commit[:7], dirty) if part and part != "unknown")


@dataclass(frozen=True)
class Staged:
    """A build context in `folder`. `manifest` is the file at labels.MANIFEST_PATH; `labels` are the image's."""

    folder: Path
    manifest: dict[str, Any]
    labels: dict[str, str]


def read_checkout(root: Path) -> Checkout:
    """Raises ConfigError, which names file, key or line, for what must not or cannot go into an image."""
    lock = locked_versions(root / "requirements.lock")
    for name in ("ray", "claude-agent-sdk"):
        if name not in lock:
            raise ConfigError(
                f"requirements.lock does not pin {name}", "take the lock of this project's repository"
            )
    return Checkout(
        root=root,
        files=read_levels(root),
        lock=lock,
        dependencies=read_dependencies(root, lock),
        commit=_commit(root),
    )


def stage(
    checkout: Checkout, folder: Path, *, base: str, offline: bool, base_digest: str | None = None
) -> Staged:
    """Fills `folder`, which is there and empty. `offline`: with all declared packages in it, so that nothing is
    fetched while the image is built. `base_digest`: what the name `base` stands for now. Raises ConfigError."""
    app, declared = folder / "app", folder / "declared"
    (declared / "wheels").mkdir(parents=True)
    _stage_levels(checkout.root, app)
    with tempfile.TemporaryDirectory() as scratch:
        plugins = resolve_plugins(checkout.files, app / "plugins", Path(scratch))
    hooks = {plugin.path: plugin.hooks for plugin in plugins}
    _write_json(folder / "etc" / "managed-settings.json", managed_settings(checkout.files, hooks))
    wanted = checkout.dependencies
    python = pin_python((*wanted.python, *([NODE] if wanted.npm else [])), checkout.lock, declared)
    npm = pin_npm(wanted.npm, declared / "npm")
    if offline:
        fetch_wheels(declared)
        fetch_npm(declared / "npm")
    (declared / "system-packages.txt").write_text("".join(f"{name}\n" for name in wanted.system))
    copy_tree(checkout.root / PACKAGE, folder / "code" / PACKAGE)
    copy_file(checkout.root / "requirements.lock", folder / "requirements.lock")
    copy_file(checkout.root / "Dockerfile", folder / "Dockerfile")
    manifest = {**_manifest(checkout, plugins, python, npm, base), "base_digest": base_digest}
    _write_json(app / Path(labels.MANIFEST_PATH).name, manifest)
    for path in (folder / "app").rglob("*"):
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o755)  # whatever the umask here is
    return Staged(folder, manifest, _labels(checkout, manifest))


def _stage_levels(root: Path, app: Path) -> None:
    for level, place in ((USER_LEVEL, labels.HOME), (PROJECT_LEVEL, labels.WORKSPACE)):
        target = app / Path(place).relative_to(labels.ROOT)
        (target / ".claude").mkdir(parents=True)
        if (root / level / ".claude").is_dir():
            copy_tree(root / level / ".claude", target / ".claude")
    if (root / PROJECT_LEVEL / "CLAUDE.md").is_file():
        copy_file(root / PROJECT_LEVEL / "CLAUDE.md", app / Path(labels.WORKSPACE).name / "CLAUDE.md")
    (app / Path(labels.PLUGINS).name).mkdir()


def _manifest(
    checkout: Checkout, plugins: list[Plugin], python: list[str], npm: list[str], base: str
) -> dict[str, Any]:
    locked = [f"{name}=={version}" for name, version in checkout.lock.items()]
    return {
        "version": __version__,
        "commit": checkout.commit,
        "base": base,
        "ray": checkout.lock["ray"],
        "python_version": python_minor(),
        "python": sorted([*locked, *python]),
        "npm": npm,
        "system": list(checkout.dependencies.system),
        "plugins": [plugin.as_json() for plugin in plugins],
    }


def _labels(checkout: Checkout, manifest: dict[str, Any]) -> dict[str, str]:
    return {
        labels.VERSION: __version__,
        labels.COMMIT: checkout.commit,
        labels.CODE: code_version(),
        labels.RAY: checkout.lock["ray"],
        labels.PYTHON: python_minor(),
        labels.LOCK: sha256((checkout.root / "requirements.lock").read_bytes()).hexdigest(),
        labels.BASE_NAME: manifest["base"],
        labels.BASE_DIGEST: manifest["base_digest"] or "",
        labels.MANIFEST: json.dumps(manifest, separators=(",", ":")),
    }


def _commit(root: Path) -> str:
    if not (root / ".git").exists():
        return "unknown"
    fix = "install git, or build from an exported tree without .git"
    commit = run(["git", "rev-parse", "HEAD"], fix, cwd=root).strip()
    changed = run(["git", "status", "--porcelain", "--", *_INGREDIENTS], fix, cwd=root).strip()
    return f"{commit}-dirty" if changed else commit


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")
    path.chmod(0o644)
