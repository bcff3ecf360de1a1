"""Copies folders into the build context: no link leads out of the copied tree, and everything is readable for all."""

import hashlib
import os
import shutil
import stat
from pathlib import Path

from claude_hitl_template.errors import ConfigError

_LEFT_OUT = frozenset({".git", "__pycache__", ".DS_Store"})


def copy_tree(source: Path, target: Path) -> None:
    """Copies files, folders and links that stay inside; raises ConfigError, which names it, for anything else."""
    root = source.resolve()
    for folder, names, files in os.walk(source):
        names[:] = sorted(set(names) - _LEFT_OUT)
        here = target / Path(folder).relative_to(source)
        here.mkdir(parents=True, exist_ok=True, mode=0o755)
        for name in [*names, *sorted(set(files) - _LEFT_OUT)]:
            _copy_one(Path(folder) / name, here / name, root)


def copy_file(source: Path, target: Path) -> None:
    """One file, with its time, readable for all, runnable for all if its owner may run it."""
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
    shutil.copy2(source, target)
    target.chmod(0o755 if source.stat().st_mode & stat.S_IXUSR else 0o644)


def digest_tree(folder: Path) -> str:
    """SHA-256 (hex) over names, contents and links of a folder."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        content = (
            os.readlink(path).encode() if path.is_symlink() else path.read_bytes() if path.is_file() else b""
        )
        name = path.relative_to(folder).as_posix().encode()
        found.update(b"%d %d\n" % (len(name), len(content)) + name + content)
    return found.hexdigest()


def _copy_one(source: Path, target: Path, root: Path) -> None:
    if source.is_symlink():
        link = os.readlink(source)
        # Check the text of the link as well: the copy has another path.
        written = os.path.normpath(os.path.join(source.parent.resolve().relative_to(root), link))
        if written.startswith(("/", "..")) or not source.resolve().is_relative_to(root):
            raise ConfigError(
                f"{source} is a link that leads out of {root}: {link}", "replace it with what it leads to"
            )
        target.symlink_to(link)
    elif source.is_file():
        copy_file(source, target)
    elif not source.is_dir():
        raise ConfigError(f"{source} is neither a file nor a folder", "remove it")
