"""The page of what a session's last turn changed in its files: the diff of two saved states of the workspace."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fastapi import APIRouter, Request
from starlette.responses import Response

from claude_hitl_template.domain.models import Session
from claude_hitl_template.errors import NotFound
from claude_hitl_template.files.manifest import (
    GetBlobs,
    Manifest,
    SavedFile,
    SavedLink,
    contents,
    load_together,
    shown,
)
from claude_hitl_template.inbox import pages
from claude_hitl_template.inbox.forms import PagesDep, UserDep
from claude_hitl_template.inbox.sessions import session_for
from claude_hitl_template.presentation.diff import Diff, diff, effort
from claude_hitl_template.presentation.text import size

router = APIRouter()
MAX_FILES = 100  # of one page
MAX_FILE_BYTES = 64 * 1024  # of a text that is compared
MAX_ROWS = 2000  # of the diffs of one page
MAX_EFFORT = 5_000_000  # of one page (`presentation.diff.effort`); any two texts of MAX_FILE_BYTES take less

type Saved = SavedFile | SavedLink | None


@dataclass(frozen=True)
class _Changed:
    """A path, and the entry there before and after; None: there is none."""

    path: str
    was: Saved
    now: Saved


@dataclass(frozen=True)
class FileView:
    """A path that is not what it was. Without `diff`, `note` says why there is none; `is_left_out`: it is on a page of its
    own."""

    path: str
    what: str
    is_there: bool
    diff: Diff | None = None
    note: str = ""
    is_left_out: bool = False


@router.get("/sessions/{session_id}/changes")
async def show_changes(session_id: str, request: Request, services: PagesDep, user: UserDep) -> Response:
    """What the last turn changed; `path`: in this file."""
    session = await session_for(services, user, session_id)
    wanted = request.query_params.get("path", "")
    found = await _changes(session, services.store.get_blobs)
    if wanted:
        found = [one for one in found if shown(one.path) == wanted]
        if not found:
            raise NotFound("the last turn did not change such a file")
    return pages.page(
        request,
        "changes.html.j2",
        user=user.principal,
        reader=user,
        nav="sessions",
        session=session,
        title=session.title or session.first_words or session.id,
        views=await _views(found[:MAX_FILES], services.store.get_blobs),
        more=max(len(found) - MAX_FILES, 0),
    )


async def _changes(session: Session, get: GetBlobs) -> list[_Changed]:
    if session.turn_base is None:
        raise NotFound("no turn of this session has begun since its files are kept for comparison")
    before = await load_together(session.turn_base, get)
    after = await load_together(session.manifests, get)
    return await asyncio.to_thread(_compare, before, after)


def _compare(before: Manifest, after: Manifest) -> list[_Changed]:
    """What differs, by path. Times and empty folders do not count."""
    old = {one.path: one for one in (*before.files, *before.links)}
    new = {one.path: one for one in (*after.files, *after.links)}
    pairs = [_Changed(path, old.get(path), new.get(path)) for path in sorted(old.keys() | new.keys())]
    return [pair for pair in pairs if _timeless(pair.was) != _timeless(pair.now)]


def _timeless(one: Saved) -> Saved:
    return replace(one, mtime_ns=0) if isinstance(one, SavedFile) else one


async def _views(changes: Sequence[_Changed], get: GetBlobs) -> list[FileView]:
    """Each change, with its diff as long as the page has room. A page of one file has room for some of any diff."""
    found: list[FileView] = []
    rows = spent = 0
    for change in changes:
        view = FileView(shown(change.path), _what(change), change.now is not None)
        try:
            old, new = await _texts(change, get)
        except _NotShownError as error:
            found.append(replace(view, note=str(error)))
            continue
        cost = effort(old, new)
        made = await asyncio.to_thread(diff, old, new) if spent + cost <= MAX_EFFORT else None
        if made is None or (rows + len(made.rows) > MAX_ROWS and len(changes) > 1):
            found.append(replace(view, is_left_out=True))
            continue
        rows, spent = rows + len(made.rows), spent + cost
        note = "" if len(made.rows) <= MAX_ROWS else f"These are the first {MAX_ROWS:,} lines of the diff."
        shortened = replace(made, rows=made.rows[:MAX_ROWS])
        found.append(replace(view, diff=shortened if made.rows else None, note=note))
    return found


def _what(change: _Changed) -> str:
    was, now = change.was, change.now
    if now is None:
        return "deleted"
    kind = "link" if isinstance(now, SavedLink) else "file"
    if was is None:
        is_program = isinstance(now, SavedFile) and now.mode & 0o111
        return f"new {'executable ' if is_program else ''}{kind}"
    if isinstance(was, SavedFile) and isinstance(now, SavedFile) and was.mode != now.mode:
        same = was.chunks == now.chunks
        return f"{'' if same else 'changed, '}mode {was.mode:03o}, now {now.mode:03o}"
    return "changed" if type(was) is type(now) else f"now a {kind}"


class _NotShownError(Exception):
    """Says why the content of a file is not shown."""


async def _texts(change: _Changed, get: GetBlobs) -> tuple[str, str]:
    """Both contents. Raises _NotShownError."""
    was, now = change.was, change.now
    if isinstance(was, SavedFile) and isinstance(now, SavedFile) and was.chunks == now.chunks:
        return "", ""
    return await _text(was, get), await _text(now, get)


async def _text(one: Saved, get: GetBlobs) -> str:
    match one:
        case None:
            return ""
        case SavedLink():
            return f"link to {shown(one.target)}\n"
        case SavedFile():
            return _decoded(await _content(one, get))


async def _content(file: SavedFile, get: GetBlobs) -> bytes:
    """The content of a small file. Its size is what the agent's machine said, so the content is counted, too."""
    content = b""
    if file.size <= MAX_FILE_BYTES:
        try:
            async for piece in contents(file, get):
                content += piece
                if len(content) > MAX_FILE_BYTES:
                    break
        except NotFound as error:
            raise _NotShownError(str(error)) from error
    if max(len(content), file.size) > MAX_FILE_BYTES:
        raise _NotShownError(f"Too large to be shown: more than {size(MAX_FILE_BYTES)}.")
    return content


def _decoded(content: bytes) -> str:
    if b"\0" not in content:
        try:
            return content.decode()
        except UnicodeDecodeError:
            pass
    raise _NotShownError("Not text.")
