"""Runs an image and checks whether sessions of this checkout can run in it; each failed check names its fix."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from packaging.utils import canonicalize_name

from claude_hitl_template import code_version
from claude_hitl_template.config.build_info import python_minor
from claude_hitl_template.errors import ConfigError
from claude_hitl_template.image import labels
from claude_hitl_template.image.dependencies import locked_versions
from claude_hitl_template.image.run import run
from claude_hitl_template.image.tools import Tool, check_reference
from claude_hitl_template.presentation.checks import Check

REBUILD = "./hitl image build"
ANY_UID = 12345  # a uid without an account: writable folders must be writable for everyone
_PROBE = Path(__file__).with_name("probe.py")
_WRITABLE = (labels.HOME, labels.WORKSPACE, "/tmp")  # noqa: S108
_LAYERS = (f"{labels.HOME}/.claude", f"{labels.WORKSPACE}/.claude", labels.PLUGINS, labels.MANAGED_SETTINGS)
_OWNED = (*_LAYERS, *(f"{labels.WORKSPACE}/{name}" for name in labels.PROJECT_LAYER), labels.MANIFEST_PATH)
MANY = 5


def verify(image: str, tool: Tool, root: Path) -> list[Check]:
    """Every check of a local image against the checkout at `root`. Raises ConfigError where it cannot be run at all."""
    config = tool.inspect(check_reference(image))["Config"]
    lock = locked_versions(root / "requirements.lock")
    try:
        found = _look_inside(image, tool)
    except ConfigError as error:
        return [*label_checks(config), Check("Start", "wrong", error.message, error.fix)]
    return [*label_checks(config), *inside_checks(found, config, lock)]


def inside_checks(
    found: Mapping[str, Any], config: Mapping[str, Any], lock: Mapping[str, str]
) -> Iterator[Check]:
    """Compares the probe's findings with the lock and the image's manifest."""
    found_labels: Mapping[str, str] = config.get("Labels") or {}
    yield _same("Python", found["python"], python_minor(), "Ray needs the minor version of the cluster")
    yield package_check({canonicalize_name(n): str(v) for n, v in found["versions"].items()}, lock)
    yield _code_check(found["code"])
    works = bool(found["cli"][:1].isdigit())
    yield Check("Claude Code CLI", "ok" if works else "wrong", found["cli"], "" if works else REBUILD)
    yield _user_check(str(config.get("User") or ""), found)
    yield _places(
        "Writable places", found["not_writable"], "cannot be written by a session", ", ".join(_WRITABLE)
    )
    yield _places("Settings layers", found["missing"], "missing", "user, project, plugins, managed")
    yield _places(
        "Fixed places", found["changeable"], "can be changed by a session", "a session cannot change them"
    )
    yield _manifest_check(found["manifest"], found_labels.get(labels.MANIFEST))


def package_check(found: Mapping[str, str], lock: Mapping[str, str]) -> Check:
    """Every locked package is there in its version."""
    other = [
        f"{name} {found.get(name, 'missing')} (locked: {wanted})"
        for name, wanted in lock.items()
        if found.get(name) != wanted
    ]
    if not other:
        return Check("Packages", "ok", f"Ray {lock['ray']} and {len(lock) - 1} others, as locked")
    other.sort(key=lambda text: not text.startswith("ray "))
    more = f" and {len(other) - MANY} others" if len(other) > MANY else ""
    return Check("Packages", "wrong", "; ".join(other[:MANY]) + more, REBUILD)


def _look_inside(image: str, tool: Tool) -> dict[str, Any]:
    asked = {
        "cli_folder": "_bundled",
        "writable": _WRITABLE,
        "expected": _LAYERS,
        "owned": _OWNED,
        "manifest": labels.MANIFEST_PATH,
    }
    # First as Ray runs it, which root cannot do; then as a uid without an account.
    who = (
        "--userns=keep-id"
        if tool.name == "podman" and os.getuid() != 0
        else f"--user={os.getuid() or ANY_UID}"
    )
    options = ["--rm", "--interactive", "--network=none", who, "--entrypoint=python"]
    output = run(
        [tool.program, "run", *options, check_reference(image), "-", json.dumps(asked)],
        "the image must start as Ray starts it: `python` on its PATH, for a user without root",
        stdin=_PROBE.read_text(),
        cwd=Path("/"),
    )
    return dict(json.loads(output.strip().splitlines()[-1]))


def label_checks(config: Mapping[str, Any]) -> Iterator[Check]:
    found_labels: Mapping[str, str] = config.get("Labels") or {}
    names = (
        labels.VERSION,
        labels.COMMIT,
        labels.CODE,
        labels.RAY,
        labels.PYTHON,
        labels.LOCK,
        labels.MANIFEST,
    )
    missing = [name for name in names if name not in found_labels]
    shown = f"{found_labels.get(labels.VERSION)} of {found_labels.get(labels.COMMIT)}"
    yield _places("Labels", missing, "missing", shown)
    yield _base_check(found_labels)
    entry = config.get("Entrypoint")
    yield Check("No ENTRYPOINT", "wrong" if entry else "ok", f"{entry or 'none'}", REBUILD if entry else "")


def _base_check(told: Mapping[str, str]) -> Check:
    """Which image it was built on: a name alone may stand for another one by now."""
    name, digest = told.get(labels.BASE_NAME) or "a base", told.get(labels.BASE_DIGEST)
    if digest:
        return Check("Base image", "ok", f"{name}, {digest}")
    return Check("Base image", "warning", f"{name}, whose digest was not recorded", REBUILD)


def _same(name: str, found: str, wanted: str, why: str) -> Check:
    if found == wanted:
        return Check(name, "ok", found)
    return Check(name, "wrong", f"{found}, and {wanted} here: {why}", REBUILD)


def _code_check(found: str | None) -> Check:
    if found is None:
        return Check("Package", "wrong", "claude_hitl_template is not in it", REBUILD)
    if found != code_version():
        return Check(
            "Package", "warning", f"{found}, and {code_version()} here; the cluster's code is used", REBUILD
        )
    return Check("Package", "ok", found)


def _user_check(user: str, found: Mapping[str, Any]) -> Check:
    root = user.partition(":")[0] in ("", "0", "root") or found["uid"] == 0
    if root or found["becomes_root"]:
        why = "it runs as root" if root else f"{' and '.join(found['becomes_root'])} can make it root"
        return Check("User", "wrong", why, REBUILD)
    return Check("User", "ok", f"{user}, without sudo")


def _places(name: str, bad: list[str], what: str, good: str) -> Check:
    return Check(name, "wrong", f"{', '.join(bad)}: {what}", REBUILD) if bad else Check(name, "ok", good)


def _manifest_check(inside: str | None, label: str | None) -> Check:
    try:
        same = inside is not None and label is not None and json.loads(inside) == json.loads(label)
    except ValueError:
        same = False
    if same:
        return Check("Manifest", "ok", f"{labels.MANIFEST_PATH}, as the label has it")
    return Check(
        "Manifest", "wrong", f"{labels.MANIFEST_PATH} and the label {labels.MANIFEST} differ", REBUILD
    )
