"""Saved files of a session on the wire, and the download of one."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

from fastapi.responses import StreamingResponse

from claude_hitl_template.files.manifest import SavedFile, contents, shown
from claude_hitl_template.store.protocol import Clients


def file_wire(file: SavedFile) -> dict[str, Any]:
    """A saved file. `mode` is octal; `modified_at` is None for a time outside of the calendar."""
    try:
        modified_at = datetime.fromtimestamp(file.mtime_ns / 1e9, UTC).isoformat()
    except (OverflowError, ValueError, OSError):
        modified_at = None
    return {
        "type": "workspace_file",
        "path": shown(file.path),
        "size_bytes": file.size,
        "mode": f"{file.mode:03o}",
        "modified_at": modified_at,
    }


async def download(store: Clients, file: SavedFile) -> StreamingResponse:
    """Streams a file's content. Raises NotFound or Unavailable before anything is sent."""
    pieces = contents(file, store.get_blobs)
    first = await anext(pieces, b"")

    async def stream() -> AsyncIterator[bytes]:
        yield first
        async for piece in pieces:
            yield piece

    name = quote(shown(file.path).rpartition("/")[2])
    headers = {
        "content-length": str(file.size),
        "content-disposition": f"attachment; filename*=utf-8''{name}",
        "x-content-type-options": "nosniff",  # an agent wrote it: a browser must not render it
        "content-security-policy": "sandbox",
    }
    return StreamingResponse(stream(), media_type="application/octet-stream", headers=headers)
