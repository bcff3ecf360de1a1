"""Opens what an agent may have written: below a folder, and through no link.

An agent may put a link in place of a folder or a file at any moment, and the service can read what the agent must not.
"""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
# Without O_NONBLOCK, opening a named pipe blocks.
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
_A_LINK = (errno.ELOOP, errno.ENOTDIR)


def open_folder(root: Path, path: str) -> int:
    """A descriptor of the folder `path` below `root`; of `root` itself for "". Raises as `open_file` does."""
    at = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    for name in path.split("/") if path else ():
        above = at
        try:
            at = _step(above, name, FOLDER)
        finally:
            os.close(above)
    return at


def open_file(root: Path, path: str) -> BinaryIO:
    """The regular file `path` below `root`, to be read.

    Raises FileNotFoundError where it, or a folder on the way, is not there or is something else, such as a link; OSError.
    """
    inside, _, name = path.rpartition("/")
    at = open_folder(root, inside)
    try:
        found = _step(at, name, _FILE)
    finally:
        os.close(at)
    if not stat.S_ISREG(os.fstat(found).st_mode):
        os.close(found)
        raise FileNotFoundError(errno.ENOENT, "not a file", path)
    return os.fdopen(found, "rb")


def _step(at: int, name: str, flags: int) -> int:
    if name in ("", ".", ".."):
        raise FileNotFoundError(errno.ENOENT, "no name of a file", name)
    try:
        return os.open(name, flags, dir_fd=at)
    except OSError as error:
        if error.errno in _A_LINK:
            raise FileNotFoundError(errno.ENOENT, "not what it was", name) from error
        raise
