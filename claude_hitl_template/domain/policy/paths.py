"""Paths that a call may mean, and globs that may cover them. Nothing here knows of calls or rules."""

import os.path
import re
import unicodedata
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

GLOB_SYNTAX = frozenset("*?[]{}!\\")


def split_glob(parts: Sequence[str]) -> tuple[list[str], list[str]]:
    """The leading parts without wildcards, and the rest."""
    count = next((i for i, part in enumerate(parts) if GLOB_SYNTAX & set(part)), len(parts))
    fixed = list(parts[:count])
    return ["/", *fixed[1:]] if fixed[:1] == [""] else fixed, list(parts[count:])


def may_climb(glob: str, rest: Sequence[str]) -> bool:
    """Whether a search may leave the folder that the glob's leading parts name (`*/..`, `~`, `{/etc,x}`)."""
    return glob.startswith("~") or any(".." in part for part in rest) or bool(re.search(r"[{,][/~]", glob))


def path_readings(raw: str, cwd: Path) -> set[str]:
    """The possible meanings of `raw`: tidied by the CLI or not, with a home, with `..` before or after symlinks."""
    texts = {raw, unicodedata.normalize("NFC", raw).strip()}
    joined = {os.path.join(cwd, path) for text in texts for path in _with_home(text)}
    return joined | {os.path.normpath(path) for path in joined}


def _with_home(text: str) -> set[str]:
    """The CLI expands `~` and `~/x` (measured on 2.1.330) but not `~user/x`, which is read both ways."""
    try:
        home = os.path.expanduser(text)
    except ValueError:  # `~` and a NUL
        return {text}
    return {home} if text == "~" or text.startswith("~/") else {home, text}


def path_pattern(spec: str, workspace: Path) -> tuple[Path, list[str]]:
    """The folder a pattern starts from, and its parts below that."""
    base, below = workspace, spec
    if spec.startswith("//"):
        base, below = Path("/"), spec
    elif spec.startswith("~"):
        base, below = Path(os.path.expanduser("~")).resolve(), spec[1:]
    parts = [part for part in below.split("/") if part not in ("", ".")]
    return base, [*parts, "**"] if not parts or spec.endswith("/") else parts


def is_below(spot: Path, base: Path, parts: list[str]) -> bool:
    return spot.is_relative_to(base) and _glob_matches(parts, spot.relative_to(base).parts)


def folded(path: Path) -> Path:
    """The path in the form that file systems compare which ignore case and accent forms (macOS): `SECRETS` is `secrets`."""
    return Path(unicodedata.normalize("NFC", unicodedata.normalize("NFC", str(path)).casefold()))


def matches_within(parts: Sequence[str], names: Sequence[str]) -> bool:
    places = _after_stars(parts, {0})
    for name in names:
        met = {
            i if "**" in parts[i] else i + 1 for i in places if i < len(parts) and _may_match(parts[i], name)
        }
        places = _after_stars(parts, met)
    return any(i < len(parts) for i in places)


def _after_stars(parts: Sequence[str], places: set[int]) -> set[int]:
    return places | {
        j + 1 for i in places for j in range(i, len(parts)) if all("**" in part for part in parts[i : j + 1])
    }


def _may_match(part: str, name: str) -> bool:
    return bool(set(part) & set("{}[]!\\()")) or fnmatchcase(name, part.casefold())


def overlap(one: Path, other: Path) -> bool:
    return one.is_relative_to(other) or other.is_relative_to(one)


def resolved(path: Path) -> Path | None:
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError):  # a loop of symlinks, a NUL, a surrogate
        return None


def _glob_matches(parts: Sequence[str], names: Sequence[str]) -> bool:
    """Whether the parts match all names; `**` is any number of them. At most parts times names steps."""
    part = name = 0
    star, taken = -1, 0
    while name < len(names):
        if part < len(parts) and parts[part] == "**":
            star, taken = part, name
            part += 1
        elif part < len(parts) and fnmatchcase(names[name], parts[part]):
            part, name = part + 1, name + 1
        elif star >= 0:
            taken += 1
            part, name = star + 1, taken
        else:
            return False
    return all(left == "**" for left in parts[part:])
