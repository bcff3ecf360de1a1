"""Writes what was saved into a folder. Blocking.

The files may come from anywhere, and the folder may hold links that an agent made: every step of a path is opened
as the folder it must be, so that nothing is ever written through a link.
"""

import os
import secrets
import shutil
import stat
from collections.abc import Container, Iterable, Mapping
from pathlib import Path

from claude_hitl_template.errors import InvalidInput
from claude_hitl_template.files.manifest import SavedFile, SavedLink, shown
from claude_hitl_template.files.safe_open import FOLDER
from claude_hitl_template.workspace.scan import UNFINISHED, Stamp


class TreeWriter:
    """Below `folder`, which exists. `stamps` has those of the files that were finished, by path.

    New files get the folder's owner: an agent's sandbox may run as another user than the service.
    """

    def __init__(self, folder: Path) -> None:
        self._root = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        found = os.fstat(self._root)
        self._owner = (found.st_uid, found.st_gid) if os.getuid() == 0 != found.st_uid else None
        self._near: tuple[str, int] | None = None
        self._open: tuple[int, int, str] | None = (
            None  # the file that is written, its folder, its name for now
        )
        self._written_bytes = 0
        self.stamps: dict[str, Stamp] = {}

    def __enter__(self) -> "TreeWriter":
        return self

    def __exit__(self, *_: object) -> None:
        if self._open is not None:
            handle, parent, unfinished = self._open
            os.close(handle)
            os.unlink(unfinished, dir_fd=parent)
        if self._near is not None:
            os.close(self._near[1])
        os.close(self._root)

    def write(self, pieces: Iterable[tuple[SavedFile, int]], contents: Mapping[str, bytes]) -> None:
        """Goes on with the files whose chunks these are, in order; (file, 0) for one without any.

        Raises OSError, and InvalidInput when a content is not of the size that was saved.
        """
        for file, number in pieces:
            if number == 0:
                self._begin(file)
            if file.chunks:
                self._add(contents[file.chunks[number]])
            if number >= len(file.chunks) - 1:
                self._finish(file)

    def _begin(self, file: SavedFile) -> None:
        parent, name = self._parent(file.path), UNFINISHED + secrets.token_hex(8)
        handle = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600, dir_fd=parent)
        if self._owner is not None:
            os.fchown(handle, *self._owner)
        self._open, self._written_bytes = (handle, parent, name), 0

    def _writing(self) -> tuple[int, int, str]:
        if self._open is None:
            raise AssertionError("a file's pieces come in order")
        return self._open

    def _add(self, content: bytes) -> None:
        handle, left = self._writing()[0], memoryview(content)
        while left:
            left = left[os.write(handle, left) :]
        self._written_bytes += len(content)

    def _finish(self, file: SavedFile) -> None:
        handle, parent, unfinished = self._writing()
        if self._written_bytes != file.size:
            raise InvalidInput(f"{shown(file.path)} is not of the size that was saved", "manifest")
        os.fchmod(handle, file.mode & 0o777)
        os.utime(handle, ns=(file.mtime_ns, file.mtime_ns))
        name = file.path.rpartition("/")[2]
        os.replace(unfinished, name, src_dir_fd=parent, dst_dir_fd=parent)
        self.stamps[file.path] = Stamp.of(os.fstat(handle))
        self._open = None
        os.close(handle)

    def link(self, link: SavedLink) -> None:
        name, parent = link.path.rpartition("/")[2], self._parent(link.path)
        os.symlink(link.target, name, dir_fd=parent)
        if self._owner is not None:
            os.chown(name, *self._owner, dir_fd=parent, follow_symlinks=False)

    def folder(self, path: str) -> None:
        self._parent(f"{path}/x")

    def _parent(self, path: str) -> int:
        """The parent folder of `path`, created if missing. Open until the next one is requested."""
        inside = path.rpartition("/")[0]
        if self._near is not None and self._near[0] == inside:
            return self._near[1]
        handle = os.dup(self._root)
        for part in inside.split("/") if inside else ():
            upper = handle
            try:
                handle = _step(upper, part, self._owner)
            finally:
                os.close(upper)
        if self._near is not None:
            os.close(self._near[1])
        self._near = inside, handle
        return handle


def _step(upper: int, name: str, owner: tuple[int, int] | None) -> int:
    try:
        return os.open(name, FOLDER, dir_fd=upper)
    except FileNotFoundError:
        os.mkdir(name, 0o755, dir_fd=upper)
        made = os.open(name, FOLDER, dir_fd=upper)
        if owner is not None:
            os.fchown(made, *owner)
        return made


def wipe(folder: Path, baked: Container[str] = ()) -> None:
    """Removes everything in the folder but what the image baked. Raises OSError when something stays."""
    with os.scandir(folder) as entries:
        found = [entry for entry in entries if entry.name not in baked]
    for entry in found:
        if not entry.is_dir(follow_symlinks=False):
            os.unlink(entry.path)
            continue
        try:
            shutil.rmtree(entry.path)
        except PermissionError:  # the agent may have made read-only folders
            _open_up(entry.path)
            shutil.rmtree(entry.path)


def _open_up(folder: str) -> None:
    left = [folder]
    while left:
        path = left.pop()
        os.chmod(path, stat.S_IRWXU)
        with os.scandir(path) as entries:
            left += [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
