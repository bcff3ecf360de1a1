"""The dependencies that the two levels declare: `requirements.txt`, `package.json`, `system-packages.txt`, merged.

Where both levels name a package, the project's entry is taken; where the two cannot both be met, that is an error which
names both. Only names and versions may be declared: nothing that could be an option, a path or an address.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.markers import Marker
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from claude_hitl_template.errors import ConfigError
from claude_hitl_template.image.settings_layers import PROJECT_LEVEL, USER_LEVEL, read_object

_NPM_NAME = re.compile(r"(@[a-z0-9~-][a-z0-9._~-]*/)?[a-z0-9~-][a-z0-9._~-]*")
_NPM_RANGE = re.compile(r"[0-9A-Za-z.+*^~<>=| -]{1,100}")
_NPM_EXACT = re.compile(r"=?v?\d+\.\d+\.\d+[0-9A-Za-z.+-]*")
_SYSTEM = re.compile(r"([a-z0-9][a-z0-9+.-]+)(?:=([0-9][0-9A-Za-z.+~:-]*))?")
_REFUSED_SYSTEM = frozenset({"sudo", "doas"})
_LOCKED = re.compile(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)(?: *; *([^\\\n]+))?", re.MULTILINE)
_LINUX = {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix"}


@dataclass(frozen=True)
class Entry:
    """One declared package. `text` is as it is handed on; `place` says where it was declared."""

    name: str
    text: str
    place: str


@dataclass(frozen=True)
class Dependencies:
    """What both levels declare together, by name, as pip, npm and apt have it."""

    python: tuple[str, ...] = ()
    npm: Mapping[str, str] | None = None
    system: tuple[str, ...] = ()


def read_dependencies(checkout: Path, lock: Mapping[str, str]) -> Dependencies:
    """Raises ConfigError, which names file and line or both sides of a conflict. `lock` is what the service needs."""
    folders = [checkout / level / "dependencies" for level in (USER_LEVEL, PROJECT_LEVEL)]
    python = _merge([_lines(f / "requirements.txt", _python_entry) for f in folders], _python_clash)
    npm = _merge([_npm_entries(f / "package.json") for f in folders], _npm_clash)
    system = _merge([_lines(f / "system-packages.txt", _system_entry) for f in folders], _system_clash)
    for entry in python.values():
        if entry.name in lock:
            locked = Entry(entry.name, f"{entry.name}=={lock[entry.name]}", "requirements.lock")
            _fail_on_clash(entry, locked, _python_clash)
    return Dependencies(
        python=tuple(entry.text for entry in python.values()),
        npm={name: entry.text for name, entry in npm.items()} or None,
        system=tuple(entry.text for entry in system.values()),
    )


def locked_versions(lock: Path) -> dict[str, str]:
    """Names and versions that a lock pins for Linux, which images and the hosts of clusters run.

    Raises ConfigError where it cannot be read.
    """
    try:
        found = _LOCKED.findall(lock.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{lock} cannot be read: {error.strerror}", "run it in a checkout") from error
    return {
        canonicalize_name(name): version
        for name, version, marker in found
        if not marker or Marker(marker).evaluate(_LINUX)
    }


def _merge(levels: list[list[Entry]], clash: Callable[[str, str], bool]) -> dict[str, Entry]:
    merged: dict[str, Entry] = {}
    for entries in levels:
        for entry in entries:
            if earlier := merged.get(entry.name):
                _fail_on_clash(earlier, entry, clash)
            merged[entry.name] = entry
    return dict(sorted(merged.items()))


def _fail_on_clash(one: Entry, other: Entry, clash: Callable[[str, str], bool]) -> None:
    if clash(one.text, other.text):
        raise ConfigError(
            f"{one.place} wants `{one.text}`, and {other.place} wants `{other.text}`",
            f"make the two agree on {one.name}, or remove one of them",
        )


def _lines(path: Path, read: Callable[[str], tuple[str, str] | None]) -> list[Entry]:
    """The entries of a file with one package a line; `#` begins a comment. No file: none."""
    found: list[Entry] = []
    if not path.exists():
        return found
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", f"correct {path.name}") from error
    for number, raw in enumerate(text.split("\n"), 1):
        line = re.sub(r"(^|\s)#.*", "", raw).strip()
        if not line:
            continue
        entry = read(line)
        if entry is None:
            raise ConfigError(
                f"{path}, line {number}: {raw.strip()!r} cannot be declared",
                "a line is the name of a package, with a version if you like; no options, no addresses, no paths",
            )
        found.append(Entry(*entry, place=f"{path} line {number}"))
    return found


def _python_entry(line: str) -> tuple[str, str] | None:
    try:
        requirement = Requirement(line)
    except InvalidRequirement:
        return None
    return None if requirement.url else (canonicalize_name(requirement.name), str(requirement))


def _python_clash(one: str, other: str) -> bool:
    """Whether one of the two pins a version that the other excludes. Ranges are left to pip."""
    sides = Requirement(one).specifier, Requirement(other).specifier
    return any(
        not wanted.contains(pin.version, prereleases=True)
        for pins, wanted in (sides, sides[::-1])
        for pin in pins
        if pin.operator in ("==", "===") and not pin.version.endswith(".*")
    )


def _system_entry(line: str) -> tuple[str, str] | None:
    match = _SYSTEM.fullmatch(line)
    return None if match is None or match[1] in _REFUSED_SYSTEM else (match[1], line)


def _system_clash(one: str, other: str) -> bool:
    versions = {text.partition("=")[2] for text in (one, other)} - {""}
    return len(versions) > 1


def _npm_entries(path: Path) -> list[Entry]:
    if not path.exists():
        return []
    declared: Any = read_object(path).get("dependencies", {})
    if not isinstance(declared, dict):
        raise ConfigError(f"{path}: `dependencies` is not a JSON object", "write it as npm has it")
    for name, wanted in declared.items():
        if not (_NPM_NAME.fullmatch(name) and isinstance(wanted, str) and _NPM_RANGE.fullmatch(wanted)):
            raise ConfigError(
                f"{path}: {name!r}: {wanted!r} cannot be declared",
                "name a package of the registry and a version or range; no addresses, no paths",
            )
    return [Entry(name, wanted, str(path)) for name, wanted in declared.items()]


def _npm_clash(one: str, other: str) -> bool:
    """Whether both pin a version, and not the same. Ranges are left to npm."""
    return one != other and bool(_NPM_EXACT.fullmatch(one) and _NPM_EXACT.fullmatch(other))
