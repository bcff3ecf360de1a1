"""Files that a session saved."""

from typing import Annotated

from fastapi import Query, Request
from fastapi.responses import JSONResponse, StreamingResponse

from claude_hitl_template.api import resources
from claude_hitl_template.api.auth import READ, CallerDep
from claude_hitl_template.api.files import download, file_wire
from claude_hitl_template.api.listing import Cursor
from claude_hitl_template.api.parameters import Limit, PageToken, SessionId
from claude_hitl_template.api.routing import api_router, content, errors
from claude_hitl_template.api.service import ServiceDep

router = api_router("workspace", READ)


@router.get(
    "/v1/sessions/{session_id}/workspace", response_model=resources.WorkspaceFiles, responses=errors(404)
)
async def list_workspace(
    *,
    request: Request,
    session_id: SessionId,
    caller: CallerDep,
    service: ServiceDep,
    limit: Limit = 100,
    page: PageToken = None,
) -> JSONResponse:
    """List a session's saved files by path."""
    cursor = Cursor.of(request, page)
    found = await service.store.list_workspace(session_id, caller.workspace_id, limit=limit, page=cursor.page)
    return cursor.response(found, file_wire)


@router.get(
    "/v1/sessions/{session_id}/workspace/files",
    response_class=StreamingResponse,
    responses={**content("application/octet-stream", {"type": "string", "format": "binary"}), **errors(404)},
)
async def get_workspace_file(
    session_id: SessionId,
    caller: CallerDep,
    service: ServiceDep,
    path: Annotated[str, Query(description="The path of a file, as the listing has it.")] = "",
) -> StreamingResponse:
    """Download a saved file."""
    file = await service.store.workspace_file(session_id, caller.workspace_id, path)
    return await download(service.store, file)
