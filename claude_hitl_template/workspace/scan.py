"""Lists a workspace's folder and reads its files in batches. Blocking; follows no link and changes nothing."""

import os
import stat
import time
from collections.abc import Container, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from claude_hitl_template.errors import InvalidInput, TooLarge
from claude_hitl_template.files.manifest import (
    CHUNK_BYTES,
    SavedFile,
    SavedLink,
    blob_name,
    check_path,
    parents,
    shown,
)
from claude_hitl_template.files.safe_open import open_file, open_folder

MAX_FILES = 200_000  # a manifest has a line for each, and is read as a whole
BATCH_BLOBS = 2_000
UNFINISHED = ".hitl-unfinished-"  # how a file that we write ourselves is called until it is whole
READ_BYTES = 64 * 1024 * 1024  # of content that is known already, before it is time to say how far it is
_KINDS = {
    stat.S_IFSOCK: "a socket",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class Stamp(NamedTuple):
    """The attributes of a file that change with its content."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, found: os.stat_result) -> "Stamp":
        return cls(found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)


class Found(NamedTuple):
    path: str
    mode: int
    stamp: Stamp


@dataclass
class Listing:
    """All entries of a folder. `left_out`: paths that cannot be saved, with the reason; excluded ones are not listed."""

    began_ns: int = field(default_factory=time.time_ns)
    files: list[Found] = field(default_factory=list[Found])
    links: list[SavedLink] = field(default_factory=list[SavedLink])
    folders: set[str] = field(default_factory=set[str])
    left_out: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])

    @property
    def size_bytes(self) -> int:
        return sum(f.stamp.size for f in self.files)

    def empty_folders(self) -> set[str]:
        entries = [*(f.path for f in self.files), *(x.path for x in self.links), *self.folders]
        return self.folders - {parent for path in entries for parent in parents(path)}


def excluded(path: str, patterns: Iterable[str], *, is_folder: bool) -> bool:
    """Whether a glob fits: one with a `/` inside fits the whole path, another one the name; one that ends in `/` fits
    folders only."""
    name = path.rpartition("/")[2]
    for pattern in patterns:
        if pattern.endswith("/") and not is_folder:
            continue
        glob = pattern.rstrip("/")
        if fnmatchcase(path if "/" in glob else name, glob):
            return True
    return False


def list_folder(
    folder: Path, *, exclude: Iterable[str] = (), baked: Container[str] = (), max_files: int = MAX_FILES
) -> Listing:
    """Raises OSError when the folder itself cannot be read, TooLarge for too many files."""
    listing = Listing()
    os.scandir(folder).close()
    left = [""]
    while left:
        inside = left.pop()
        try:
            with _listed(folder, inside) as (at, entries):
                for entry in entries:
                    path = f"{inside}/{entry.name}" if inside else entry.name
                    if path not in baked and not entry.name.startswith(UNFINISHED):
                        left += _note(listing, entry, path, at, exclude)
        except FileNotFoundError:  # removed or replaced meanwhile
            continue
        except OSError as error:
            listing.left_out.append((inside, _reason(error)))
        if len(listing.files) + len(listing.folders) > max_files:
            raise TooLarge(
                f"it holds more than {max_files:,} files and folders. Have some removed, or leave folders out "
                "(HITL_WORKSPACE_EXCLUDE)"
            )
    return listing


@contextmanager
def _listed(folder: Path, inside: str) -> Generator[tuple[int, "Iterator[os.DirEntry[str]]"]]:
    """A descriptor of a folder below `folder`, and its entries."""
    at = open_folder(folder, inside)
    try:
        with os.scandir(at) as entries:
            yield at, entries
    finally:
        os.close(at)


def _note(
    listing: Listing, entry: "os.DirEntry[str]", path: str, at: int, exclude: Iterable[str]
) -> list[str]:
    """Puts one entry of the folder `at` where it belongs; returns the folder to look into, if it is one."""
    try:
        found = entry.stat(follow_symlinks=False)
        if excluded(path, exclude, is_folder=stat.S_ISDIR(found.st_mode)):
            return []
        check_path(path)
        if stat.S_ISDIR(found.st_mode):
            listing.folders.add(path)
            return [path]
        if stat.S_ISLNK(found.st_mode):
            listing.links.append(SavedLink(path, os.readlink(entry.name, dir_fd=at)))
        elif stat.S_ISREG(found.st_mode):
            listing.files.append(Found(path, found.st_mode & 0o777, Stamp.of(found)))
        else:
            listing.left_out.append((path, _KINDS.get(stat.S_IFMT(found.st_mode), "no file")))
    except FileNotFoundError:
        return []
    except InvalidInput:
        listing.left_out.append((path, "its path is too long"))
    except OSError as error:
        listing.left_out.append((path, _reason(error)))
    return []


def _reason(error: OSError) -> str:
    return f"it cannot be read: {(error.strerror or 'unknown error').lower()}"


@dataclass
class Batch:
    """Data read since the last batch: blobs that may be new, and the files that were read to their end."""

    blobs: dict[str, bytes] = field(default_factory=dict[str, bytes])
    files: list[tuple[SavedFile, Stamp]] = field(default_factory=list[tuple[SavedFile, Stamp]])
    left_out: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    held_bytes: int = 0
    read_bytes: int = 0

    def is_full(self, more_bytes: int) -> bool:
        return (
            self.held_bytes + more_bytes > CHUNK_BYTES
            or len(self.blobs) >= BATCH_BLOBS
            or self.read_bytes >= READ_BYTES
        )


def read(folder: Path, files: Iterable[Found], known: Container[str]) -> Iterator[Batch]:
    """The files' content, in batches that fit a call. Blobs that are `known` are hashed, and not handed out.

    A file that disappears or changes its type meanwhile is skipped; the next scan sees the change.
    """
    batch = Batch()
    for found in files:
        chunks: list[str] = []
        size = 0
        try:
            with open_file(folder, found.path) as file:
                stamp = Stamp.of(os.fstat(file.fileno()))
                while size < stamp.size:  # of a file that keeps growing, its size when it was opened
                    data = file.read(min(CHUNK_BYTES, stamp.size - size))
                    if not data:
                        break
                    name = blob_name(data)
                    if batch.is_full(len(data)):
                        yield batch
                        batch = Batch()
                    if name not in known and name not in batch.blobs:
                        batch.blobs[name] = data
                        batch.held_bytes += len(data)
                    batch.read_bytes += len(data)
                    chunks.append(name)
                    size += len(data)
        except FileNotFoundError:
            continue
        except OSError as error:
            batch.left_out.append((found.path, _reason(error)))
            continue
        saved = SavedFile(found.path, found.mode, size, stamp.mtime_ns, tuple(chunks))
        batch.files.append((saved, stamp))
    yield batch


def largest(listing: Listing, count: int) -> list[tuple[str, int]]:
    """The largest files, as they are shown, with their sizes in bytes."""
    by_size = sorted(listing.files, key=lambda f: f.stamp.size, reverse=True)
    return [(shown(f.path), f.stamp.size) for f in by_size[:count]]
