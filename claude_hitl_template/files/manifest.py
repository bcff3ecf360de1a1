"""A saved workspace: its files, links and empty folders, and the blobs that hold the content.

A blob is named by the SHA-256 of its content. A small manifest is a blob itself. A larger one consists of shards, which are
named by a blob of their own: the hash of its path decides in which shard a file is, so that a workspace with one changed
file shares all shards but one with the workspace before. Earlier versions cut large manifests into parts.
"""

import asyncio
import hashlib
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import batched
from typing import Any, cast

from claude_hitl_template.errors import InvalidInput

CHUNK_BYTES = (
    3 * 1024 * 1024
)  # Serve's replicas take messages of up to 4 MiB (ray/serve/_private/constants.py)
MAX_PATH_BYTES, MAX_NAME_BYTES = 4095, 255  # Linux's own
_DIGEST = re.compile(r"[0-9a-f]{64}")
SHARD_BYTES = 8 * 1024  # what a shard has at most, on average; a manifest up to twice that is one blob
MAX_SHARDS = 1024
_AT_ONCE = 32  # shards or parts that are read at once
_VERSION, _SHARDED = 1, 2
_MAX_NUMBER = 1 << 63

type GetBlobs = Callable[[Sequence[str]], Awaitable[list[bytes]]]


def blob_name(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def is_blob_name(name: str) -> bool:
    return _DIGEST.fullmatch(name) is not None


def check_blob_name(name: str) -> str:
    """Raises InvalidInput unless it is 64 hexadecimal digits: it becomes a path."""
    if not is_blob_name(name):
        raise InvalidInput("a blob is named by the SHA-256 of its content, in hexadecimal", "blob")
    return name


@dataclass(frozen=True, slots=True)
class SavedFile:
    """`mode` has the nine permission bits; the content is that of `chunks`, one behind the other, `size` bytes."""

    path: str
    mode: int
    size: int
    mtime_ns: int
    chunks: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SavedLink:
    """`target` is data: nothing of ours ever follows it."""

    path: str
    target: str


@dataclass(frozen=True)
class Manifest:
    """Everything sorted by path, so that equal workspaces have equal manifests. `folders` are the empty ones.

    Names that are not UTF-8 hold lone surrogates, as Python has them from the file system.
    """

    files: tuple[SavedFile, ...] = ()
    links: tuple[SavedLink, ...] = ()
    folders: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, files: Iterable[SavedFile], links: Iterable[SavedLink] = (), folders: Iterable[str] = ()
    ) -> "Manifest":
        return cls(
            tuple(sorted(files, key=lambda f: f.path)),
            tuple(sorted(links, key=lambda x: x.path)),
            tuple(sorted(folders)),
        )

    @property
    def size_bytes(self) -> int:
        return sum(f.size for f in self.files)

    def chunks(self) -> set[str]:
        return {chunk for file in self.files for chunk in file.chunks}

    def with_added(self, files: Iterable[SavedFile]) -> "Manifest":
        """With these files in the place of what had their paths."""
        added = {f.path: f for f in files}
        return Manifest.of(
            [*(f for f in self.files if f.path not in added), *added.values()],
            [x for x in self.links if x.path not in added],
            [folder for folder in self.folders if folder not in added],
        )

    def without(self, names: frozenset[str]) -> "Manifest":
        """Without these top-level names and everything below them."""

        def stays(path: str) -> bool:
            return path.partition("/")[0] not in names

        return replace(
            self,
            files=tuple(f for f in self.files if stays(f.path)),
            links=tuple(x for x in self.links if stays(x.path)),
            folders=tuple(folder for folder in self.folders if stays(folder)),
        )

    def encode(self) -> list[bytes]:
        """The blobs that a manifest is; the last one names it."""
        whole = self.text()
        if len(whole) <= 2 * SHARD_BYTES:
            return [whole]
        shards = self._shards(len(whole))
        if max(map(len, shards)) <= CHUNK_BYTES:
            return [*shards, _dump({"version": _SHARDED, "shards": [blob_name(shard) for shard in shards]})]
        parts = [whole[at : at + CHUNK_BYTES] for at in range(0, len(whole), CHUNK_BYTES)]
        return [*parts, _dump({"version": _VERSION, "parts": [blob_name(part) for part in parts]})]

    def _shards(self, size_bytes: int) -> list[bytes]:
        """Manifests of a share of the paths each. Their number is a power of two, so that it changes seldom."""
        count = 2
        while count * SHARD_BYTES < size_bytes and count < MAX_SHARDS:
            count *= 2
        files, links = _shared(self.files, count), _shared(self.links, count)
        folders = _shared(self.folders, count)
        shares = [Manifest(*each) for each in zip(files, links, folders, strict=True)]
        return [share.text() for share in shares]

    def text(self) -> bytes:
        """The manifest as one piece of JSON, of any length."""
        return _dump({
            "version": _VERSION,
            "files": [[f.path, f.mode, f.size, f.mtime_ns, list(f.chunks)] for f in self.files],
            "links": [[x.path, x.target] for x in self.links],
            "folders": list(self.folders),
        })  # fmt: skip

    @classmethod
    def read(cls, text: bytes) -> "Manifest":
        """Raises InvalidInput unless it is a blob's name."""
        return _manifest(_parse(text))


EMPTY = Manifest()


async def load(name: str | None, get: GetBlobs) -> Manifest:
    """The manifest of that name; the empty one for None. Raises InvalidInput if the blob is not a manifest."""
    return EMPTY if name is None else (await load_with_parts(name, get))[0]


async def load_together(names: Sequence[str], get: GetBlobs) -> Manifest:
    """The first manifest with the files of the others in it, each in the place of what had its path. Raises what `load`
    does."""
    found = EMPTY
    for position, name in enumerate(names):
        one = await load(name, get)
        found = found.with_added(one.files) if position else one
    return found


async def load_with_parts(name: str, get: GetBlobs) -> tuple[Manifest, list[str]]:
    """A manifest, and the names of the blobs that it is itself."""
    [first] = await get([name])
    found = await asyncio.to_thread(_parse, first, _SHARDED)
    key = "shards" if found["version"] == _SHARDED else "parts"
    if key == "parts" and key not in found:
        return await asyncio.to_thread(_manifest, found), [name]
    names = _names(found.get(key))
    content = [blob for some in batched(dict.fromkeys(names), _AT_ONCE) for blob in await get(list(some))]
    joined = partial(_joined, names, content) if key == "parts" else partial(_merged, content)
    whole = await asyncio.to_thread(joined)
    return await asyncio.to_thread(_manifest, whole), [name, *names]


async def contents(file: SavedFile, get: GetBlobs) -> AsyncIterator[bytes]:
    """The content of a file, piece by piece. Raises what `get` does."""
    for chunk in file.chunks:
        yield (await get([chunk]))[0]


def shown(path: str) -> str:
    """A path as printable text: bytes that are not UTF-8 are escaped."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _dump(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _wrong(why: str) -> InvalidInput:
    return InvalidInput(f"this is not a saved workspace: {why}", "manifest")


def _names(found: Any) -> list[str]:
    if not isinstance(found, list) or not all(isinstance(name, str) for name in cast(list[Any], found)):
        raise _wrong("its parts are not a list of names")
    return [check_blob_name(name) for name in cast(list[str], found)]


def _joined(names: list[str], content: list[bytes]) -> dict[str, Any]:
    """The manifest whose text was cut into these parts. `content`: of each name once, in order."""
    by_name = dict(zip(dict.fromkeys(names), content, strict=True))
    return _parse(b"".join(by_name[name] for name in names))


def _merged(content: list[bytes]) -> dict[str, Any]:
    """The manifest that has all that the shards have."""
    shards = [_parse(shard) for shard in content]
    try:
        return {
            kind: [row for shard in shards for row in shard[kind]] for kind in ("files", "links", "folders")
        }
    except (KeyError, TypeError) as error:
        raise _wrong("a shard has no list of files, links or folders") from error


def _shared[T: SavedFile | SavedLink | str](items: Iterable[T], count: int) -> list[tuple[T, ...]]:
    """The items in the shares that the hashes of their paths choose, each share in their order."""
    shares: list[list[T]] = [[] for _ in range(count)]
    for item in items:
        path = item if isinstance(item, str) else item.path
        digest = hashlib.sha256(path.encode("utf-8", "surrogatepass")).digest()
        shares[int.from_bytes(digest[:4]) % count].append(item)
    return [tuple(share) for share in shares]


def _parse(raw: bytes, newest: int = _VERSION) -> dict[str, Any]:
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise _wrong("it is not JSON") from error
    version = cast(dict[str, Any], found).get("version") if isinstance(found, dict) else None
    if version not in range(_VERSION, newest + 1):
        raise _wrong(f"its version is not {_VERSION}{f' or {newest}' if newest > _VERSION else ''}")
    return cast(dict[str, Any], found)


def _manifest(found: dict[str, Any]) -> Manifest:
    try:
        files = [_file(*row) for row in found["files"]]
        links = [SavedLink(check_path(path), _target(target)) for path, target in found["links"]]
        folders = [check_path(path) for path in found["folders"]]
    except (TypeError, ValueError, KeyError) as error:
        raise _wrong("a field is missing, or is of another kind") from error
    _check_places([f.path for f in files], [x.path for x in links], folders)
    return Manifest.of(files, links, folders)


def _file(path: Any, mode: Any, size: Any, mtime_ns: Any, chunks: Any) -> SavedFile:
    for number, least, most in (
        (mode, 0, 0o777),
        (size, 0, _MAX_NUMBER),
        (mtime_ns, -_MAX_NUMBER, _MAX_NUMBER),
    ):
        if not isinstance(number, int) or isinstance(number, bool) or not least <= number <= most:
            raise _wrong(f"{number!r:.40} is not a valid number there")
    if not isinstance(chunks, list):
        raise _wrong("the content of a file is not a list of blobs")
    return SavedFile(
        check_path(path),
        mode,
        size,
        mtime_ns,
        tuple(check_blob_name(str(c)) for c in cast(list[Any], chunks)),
    )


def _target(target: Any) -> str:
    if not isinstance(target, str) or not target or "\0" in target:
        raise _wrong("a link leads nowhere")
    return target


def check_path(path: Any) -> str:
    """A path that stays below the folder it starts from. Raises InvalidInput for any other."""
    if not isinstance(path, str) or not path or "\0" in path:
        raise _wrong("a path is empty, or no text")
    try:
        encoded = [part.encode("utf-8", "surrogateescape") for part in path.split("/")]
    except UnicodeEncodeError as error:
        raise _wrong("a path cannot be a path of this system") from error
    if any(part in (b"", b".", b"..") for part in encoded):
        raise _wrong(f"the path {shown(path[:200])!r} is absolute, or leads out of it")
    if len(encoded) - 1 + sum(map(len, encoded)) > MAX_PATH_BYTES or max(map(len, encoded)) > MAX_NAME_BYTES:
        raise _wrong(f"the path {shown(path[:200])!r}... is too long")
    return path


def _check_places(files: list[str], links: list[str], folders: list[str]) -> None:
    """No path twice, and nothing below a file or a link: writing there would go through the link."""
    taken = {*files, *links}
    if len(taken | {*folders}) != len(files) + len(links) + len(folders):
        raise _wrong("a path is there twice")
    for path in (*files, *links, *folders):
        for parent in parents(path):
            if parent in taken:
                raise _wrong(f"{shown(path[:200])!r} is below {shown(parent[:200])!r}, which is not a folder")


def parents(path: str) -> Iterator[str]:
    """The parent folders of a path, innermost first."""
    while "/" in path:
        path = path.rpartition("/")[0]
        yield path
