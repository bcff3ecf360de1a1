"""Copies files between the panel and a session's workspace.

Kodosumi's scripts build HTML from file names, in its file input and in its dashboard. So the panel only gets inert names:
uploads are numbered, and a field of our own has their real names. `static/upload.js` is the part in the browser.
"""

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from claude_hitl_template.errors import InvalidInput, NotFound, TooLarge, Unavailable
from claude_hitl_template.files.manifest import GetBlobs, SavedFile, contents, shown
from claude_hitl_template.panel.markup import inert
from claude_hitl_template.presentation.text import is_hidden, size

FIELD = "files"
MAX_FILES = 100
MAX_NAME_BYTES = 200
SKIPPED_FOLDERS = frozenset({".git", "node_modules", "__pycache__"})  # their files are not offered
TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Uploads:
    """The files that a browser uploaded to the panel.

    Attributes:
        batch: Identifies the upload in the panel.
        items: Kodosumi's description of each file, by upload id.
        names: The number and the name of each file.
    """

    batch: str
    items: Mapping[str, Mapping[str, Any]]
    names: Sequence[tuple[str, str]]


def parse(given: str) -> Uploads | None:
    """Parses the field `files`, which the script filled in; None if no file was chosen. Raises InvalidInput."""
    if not given.strip():
        return None
    try:
        state = json.loads(given)
        items: dict[str, dict[str, Any]] = {
            str(uuid.UUID(upload)): {
                "filename": str(int(item["filename"])),
                "totalChunks": int(item["totalChunks"]),
            }
            for upload, item in state["items"].items()
        }
        names = {str(int(number)): str(name) for number, name in state["names"].items()}
        batch = str(uuid.UUID(state["batch"]))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InvalidInput("the list of files cannot be read; choose them again", FIELD) from error
    if len(items) > MAX_FILES:
        raise InvalidInput(f"at most {MAX_FILES} files", FIELD)
    numbers = [item["filename"] for item in items.values()]
    return Uploads(
        batch, items, _distinct([(number, safe_name(names.get(number, ""))) for number in numbers])
    )


def safe_name(given: str) -> str:
    """A file's name without path, leading dots, and characters that hide or act."""
    last = given.replace("\\", "/").rsplit("/", 1)[-1]
    kept = "".join(c for c in last if c not in "\n\t" and not is_hidden(c)).strip().lstrip(".").strip()
    while len(kept.encode()) > MAX_NAME_BYTES:
        stem, dot, ending = kept.rpartition(".")
        kept = f"{stem[:-1]}{dot}{ending}" if len(stem) > 1 and len(ending) < 20 else kept[:-1]
    return kept or "file"


def _distinct(named: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    taken: set[str] = set()
    result: list[tuple[str, str]] = []
    for number, name in named:
        free, count = name, 2
        while free in taken:
            stem, dot, ending = name.rpartition(".")
            free = f"{stem} ({count}).{ending}" if dot and stem else f"{name} ({count})"
            count += 1
        taken.add(free)
        result.append((number, free))
    return result


async def receive(uploads: Uploads, folder: Path, client: httpx.AsyncClient, max_bytes: int) -> list[str]:
    """Moves the uploaded files from the panel into a folder.

    Args:
        uploads: The files.
        folder: Where they are written to.
        client: Sends requests to the panel as the user.
        max_bytes: The most that all files may have together.

    Returns:
        The names of the files.

    Raises:
        TooLarge: The files are larger.
        InvalidInput: A file did not arrive.
        Unavailable: The panel does not answer.
    """
    folder_url = f"/files/{uploads.batch}/in"
    try:
        done = await client.post(f"/files/complete/{uploads.batch}/{uploads.batch}/in", json=uploads.items)
        done.raise_for_status()
        try:
            await _check(await client.get(folder_url), uploads, max_bytes)
            for number, name in uploads.names:
                await _copy(client, f"{folder_url}/{number}", folder / name)
        finally:
            await client.delete(f"{folder_url}/")
    except httpx.HTTPError as error:
        raise Unavailable("the uploaded files could not be fetched from the panel; try again") from error
    return [name for _, name in uploads.names]


async def _check(listing: httpx.Response, uploads: Uploads, max_bytes: int) -> None:
    listing.raise_for_status()
    sizes = {Path(found["path"]).name: int(found["size"]) for found in listing.json()}
    missing = [name for number, name in uploads.names if number not in sizes]
    if missing:
        raise InvalidInput(f"{len(missing)} of the files did not arrive; choose them again", FIELD)
    total = sum(sizes.values())
    if total > max_bytes:
        raise TooLarge(f"the files have {size(total)} together; the limit is {size(max_bytes)}", FIELD)


async def _copy(client: httpx.AsyncClient, address: str, target: Path) -> None:
    async with client.stream("GET", address) as answer:
        answer.raise_for_status()
        with target.open("xb") as file:
            async for chunk in answer.aiter_bytes():
                file.write(chunk)


# -- files that a turn changed


@dataclass(frozen=True)
class Downloads:
    """Copies of changed files, ready for download.

    Attributes:
        files: The name in the workspace, the name of the copy, and bytes.
        left_out: The name of each file that is not offered, and why.
    """

    files: Sequence[tuple[str, str, int]]
    left_out: Sequence[tuple[str, str]]


async def collect(changed: Sequence[SavedFile], get: GetBlobs, target: Path, max_bytes: int) -> Downloads:
    """Copies these files of a saved workspace into `target`, up to `max_bytes` together."""
    files: list[tuple[str, str, int]] = []
    left_out: list[tuple[str, str]] = []
    room = max_bytes
    for file in changed:
        name = shown(file.path)
        if not SKIPPED_FOLDERS.isdisjoint(name.split("/")[:-1]):
            continue
        if len(files) == MAX_FILES:
            left_out.append((name, f"only {MAX_FILES} files are offered"))
            break
        if file.size > room:
            left_out.append((name, f"{size(file.size)}, and the limit for all is reached"))
            continue
        stored = f"{len(files) + 1}-{inert(name.rpartition('/')[2], 80).replace('/', '·').replace(' ', '_')}"
        try:
            await _fetch(file, get, target / stored)
        except NotFound:
            left_out.append((name, "it was changed again, or its content is lost"))
            continue
        files.append((name, stored, file.size))
        room -= file.size
    return Downloads(files, left_out)


async def _fetch(file: SavedFile, get: GetBlobs, target: Path) -> None:
    with target.open("wb") as copy:
        async for piece in contents(file, get):
            copy.write(piece)
