"""The working tree as a package of Ray: its files without secrets, named by a hash of the content."""

import ast
import io
import os
import stat
import subprocess
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from hashlib import sha256
from pathlib import Path, PurePosixPath

from claude_hitl_template.config import build_info
from claude_hitl_template.config.build_info import Origin
from claude_hitl_template.errors import ConfigError
from claude_hitl_template.presentation.text import size

LIMIT_BYTES = 500 * 1024**2  # Ray's own is 512 MiB, and it tells only after the upload
LARGEST = 3  # files that are named when there is too much
# Never uploaded, ignored by git or not: by name, at any depth.
SECRET_NAMES = (
    ".env",
    ".env.*",
    "*.pem",
    "*.key",
    "id_rsa*",
    "id_ed25519*",
    "id_ecdsa*",
    ".netrc",
    ".pgpass",
    ".npmrc",
)
SECRET_FOLDERS = ("secrets", ".ssh", ".aws")
SHORTEST_SECRET = 8  # shorter values also match unrelated text, and protect nothing
PROFILES = "profiles"
EXAMPLE = ".example"
CODE = "claude_hitl_template"
# Python runs it first. Ray puts the folder in which it, or who deployed before, was started before the package on the
# path of its workers, and that may be a checkout of this project; modules that are loaded already are not searched there.
FIRST = "sitecustomize.py"
FIRST_CODE = f"import {CODE}\n"
_ZIP_TIME = (1980, 1, 1, 0, 0, 0)
_GIT = "install git (on macOS: xcode-select --install)"


@dataclass(frozen=True)
class Package:
    """`content`: the zip. `left_out`: paths that are kept here, as secrets or data."""

    origin: Origin
    content: bytes
    files: int
    left_out: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"hitl-{self.origin.package}.zip"

    @property
    def uri(self) -> str:
        return f"gcs://{self.name}"


def build(root: Path, *, data_dir: Path, secrets: Sequence[str]) -> Package:
    """Packs the working tree. `secrets`: values that no file of it may hold.

    Raises ConfigError for code that cannot be read, for a file that holds a secret, and for a tree that is too large.
    """
    listed = listed_files(root)
    left_out = tuple(path for path in listed if is_secret(path) or _within(root / path, data_dir))
    wanted = [path for path in listed if path not in (*left_out, build_info.FILE, FIRST)]
    if f"{CODE}/query.py" not in wanted:
        raise ConfigError(f"{root} is not a checkout of this project", "run ./hitl deploy in one")
    _check_size(root, wanted)
    files = {path: (root / path).read_bytes() for path in wanted} | {FIRST: FIRST_CODE.encode()}
    _check_content(files, [value for value in secrets if len(value) >= SHORTEST_SECRET])
    modes = {path: _mode(root / path) for path in wanted} | {FIRST: 0o644}
    origin = _with_hash(_origin(root, wanted), files, modes)
    content = _zip({**files, build_info.FILE: origin.as_json().encode()}, modes)
    return Package(origin, content, len(files) + 1, left_out)


def listed_files(root: Path) -> list[str]:
    """Paths below `root`, as .gitignore files have it, whether it is a repository or not. Raises ConfigError."""
    command = ["ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    if _in_repository(root):
        found = _git(root, *command)
    else:
        with tempfile.TemporaryDirectory() as folder:
            _git(root, "init", "--quiet", "--bare", folder)
            found = _git(root, f"--git-dir={folder}", f"--work-tree={root}", *command)
    names = {name for name in found.split("\0") if name}
    return sorted(name for name in names if _is_ours(root, name))


def is_secret(path: str) -> bool:
    """Whether a path is one of a secret by its name; an .example is none."""
    pure = PurePosixPath(path)
    if pure.name.endswith(EXAMPLE):
        return False
    named = any(fnmatch(pure.name.lower(), pattern) for pattern in SECRET_NAMES)
    profile = pure.parts[0] == PROFILES and pure.suffix == ".env"
    return named or profile or any(part in SECRET_FOLDERS for part in pure.parts[:-1])


def _in_repository(root: Path) -> bool:
    return (root / ".git").exists()


def _is_ours(root: Path, name: str) -> bool:
    """Whether a listed path is a file of this tree: not deleted, and not another repository's folder. Raises ConfigError
    for a link that leads out, which would lead elsewhere on the cluster."""
    path = root / name
    if path.is_symlink() and not path.resolve().is_relative_to(root.resolve()):
        raise ConfigError(
            f"{name} is a link that leads out of {root}",
            "replace it with what it leads to, or ignore it in .gitignore",
        )
    return path.is_file()


def _within(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def _check_size(root: Path, names: Sequence[str]) -> None:
    sizes = {name: (root / name).stat().st_size for name in names}
    if sum(sizes.values()) <= LIMIT_BYTES:
        return
    largest = sorted(sizes, key=lambda name: sizes[name], reverse=True)[:LARGEST]
    shown = ", ".join(f"{name} ({size(sizes[name])})" for name in largest)
    raise ConfigError(
        f"the working tree has {size(sum(sizes.values()))}, and {size(LIMIT_BYTES)} are possible; the largest: {shown}",
        "name in .gitignore what the service does not need",
    )


def _check_content(files: dict[str, bytes], secrets: Sequence[str]) -> None:
    for path, content in files.items():
        if any(value.encode() in content for value in secrets):
            raise ConfigError(
                f"{path} holds a secret of this machine's settings; nothing was uploaded",
                f"remove it from {path}",
            )
        if path.startswith(f"{CODE}/") and path.endswith(".py"):
            try:
                ast.parse(content, path)
            except (SyntaxError, ValueError) as error:
                line = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
                raise ConfigError(
                    f"{path}{line}: {getattr(error, 'msg', error)}; nothing was uploaded",
                    "correct it, then deploy again",
                ) from error


def _origin(root: Path, names: Sequence[str]) -> Origin:
    from claude_hitl_template.image.dependencies import locked_versions  # noqa: PLC0415  (slow to import)

    commit, dirty = "unknown", True
    if _in_repository(root):
        commit = _git(root, "rev-parse", "--verify", "--quiet", "HEAD", may_fail=True).strip() or "unknown"
        changed = _git(root, "status", "--porcelain", "-z").split("\0")
        dirty = commit == "unknown" or any(entry for entry in changed)
    locked = locked_versions(root / "requirements.lock") if "requirements.lock" in names else {}
    return Origin(commit, dirty, "", build_info.python_minor(), locked)


def _with_hash(origin: Origin, files: dict[str, bytes], modes: dict[str, int]) -> Origin:
    found = sha256(origin.as_json().encode())
    for path, content in sorted(files.items()):
        found.update(f"\n{len(path.encode())} {len(content)} {modes[path]:o} {path}".encode() + content)
    return replace(origin, package=found.hexdigest()[:12])


def _zip(files: dict[str, bytes], modes: dict[str, int]) -> bytes:
    """The same bytes for the same content."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as package:
        for path, content in sorted(files.items()):
            entry = zipfile.ZipInfo(path, _ZIP_TIME)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = (stat.S_IFREG | modes.get(path, 0o644)) << 16
            package.writestr(entry, content)
    return target.getvalue()


def _mode(path: Path) -> int:
    return 0o755 if path.stat().st_mode & stat.S_IXUSR else 0o644


def _git(root: Path, *arguments: str, may_fail: bool = False) -> str:
    # Its own variables, as in a hook, would name another repository.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(  # noqa: S603
            ["git", *arguments],  # noqa: S607
            cwd=root, env=environment, stdin=subprocess.DEVNULL, capture_output=True, check=False,
        )  # fmt: skip
    except OSError as error:
        raise ConfigError(f"git cannot be run: {error.strerror}", _GIT) from error
    if done.returncode and not may_fail:
        reason = os.fsdecode(done.stderr).strip()
        raise ConfigError(f"git cannot read {root}: {reason}", "correct that, then deploy again")
    return os.fsdecode(done.stdout)
