"""Sessions: create, list, retrieve, update, archive, delete."""

from typing import Annotated, Any

from fastapi import Query, Request
from fastapi.responses import JSONResponse

from claude_hitl_template.api import resources
from claude_hitl_template.api.agents import build_agent, check_servers
from claude_hitl_template.api.auth import READ, REQUEST, CallerDep
from claude_hitl_template.api.bodies import CreateSession, UpdateSession
from claude_hitl_template.api.listing import Cursor, each_once
from claude_hitl_template.api.parameters import (
    CreatedAt,
    Flag,
    IdempotencyKey,
    Limit,
    NonEmpty,
    Omitted,
    Order,
    PageToken,
    SessionId,
    Statuses,
)
from claude_hitl_template.api.routing import api_router, errors
from claude_hitl_template.api.service import ServiceDep
from claude_hitl_template.api.wire import session_wire
from claude_hitl_template.errors import NotFound

router = api_router("sessions", READ)
changes = api_router("sessions", REQUEST)


@changes.post("/v1/sessions", response_model=resources.Session, responses=errors(404, 409, 413))
async def create_session(
    body: CreateSession, caller: CallerDep, service: ServiceDep, idempotency_key: IdempotencyKey = None
) -> JSONResponse:
    """Create a session. With `initial_events` it starts to work at once."""
    environment = service.environments.get(body.environment_id)
    if environment is None:
        known = ", ".join(service.environments)
        raise NotFound(f"environment_id: there is no environment {body.environment_id!r}; available: {known}")
    check_servers(body.agent, environment)
    session = await service.store.create_session(
        caller.workspace_id,
        agent=build_agent(body.agent, service.agent, service.floor),
        environment=environment,
        title=body.title,
        metadata=body.metadata,
        initial=body.initial_events,
        by=caller.actor,
        idempotency_key=idempotency_key,
    )
    return JSONResponse(session_wire(session))


@router.get("/v1/sessions", response_model=resources.Sessions)
async def list_sessions(
    *,
    request: Request,
    caller: CallerDep,
    service: ServiceDep,
    created: CreatedAt,
    limit: Limit = 20,
    page: PageToken = None,
    order: Order = "desc",
    statuses: Statuses = None,
    agent_id: Annotated[NonEmpty | Omitted, Query(description="Only sessions of this agent.")] = None,
    include_archived: Annotated[Flag, Query(description="Also archived sessions.")] = False,
) -> JSONResponse:
    """List the workspace's sessions."""
    filters: dict[str, Any] = {
        "statuses": each_once(statuses),
        "agent_id": agent_id,
        "created": created,
        "include_archived": include_archived,
    }
    cursor = Cursor.of(request, page, order=order, **filters)
    found = await service.store.list_sessions(
        caller.workspace_id, limit=limit, page=cursor.page, order=order, **filters
    )
    return cursor.response(found, session_wire)


@router.get("/v1/sessions/{session_id}", response_model=resources.Session, responses=errors(404))
async def get_session(session_id: SessionId, caller: CallerDep, service: ServiceDep) -> JSONResponse:
    """Retrieve a session."""
    return JSONResponse(session_wire(await service.store.get_session(session_id, caller.workspace_id)))


@changes.post("/v1/sessions/{session_id}", response_model=resources.Session, responses=errors(404, 409, 413))
async def update_session(
    session_id: SessionId,
    body: UpdateSession,
    caller: CallerDep,
    service: ServiceDep,
    idempotency_key: IdempotencyKey = None,
) -> JSONResponse:
    """Change a session's title or metadata."""
    session = await service.store.update_session(
        session_id,
        caller.workspace_id,
        changes=body.model_dump(exclude_unset=True),
        by=caller.actor,
        idempotency_key=idempotency_key,
    )
    return JSONResponse(session_wire(session))


@changes.delete(
    "/v1/sessions/{session_id}", response_model=resources.SessionDeleted, responses=errors(404, 409)
)
async def delete_session(session_id: SessionId, caller: CallerDep, service: ServiceDep) -> JSONResponse:
    """Delete a session that does not run. A record of each decision remains."""
    await service.store.delete_session(session_id, caller.workspace_id, by=caller.actor)
    return JSONResponse({"type": "session_deleted", "id": session_id})


@changes.post(
    "/v1/sessions/{session_id}/archive", response_model=resources.Session, responses=errors(404, 409)
)
async def archive_session(
    session_id: SessionId,
    caller: CallerDep,
    service: ServiceDep,
    idempotency_key: IdempotencyKey = None,  # archiving twice is archiving once, with any key
) -> JSONResponse:
    """Archive a session that does not run. Calls that wait for a decision are superseded."""
    archived = await service.store.archive_session(session_id, caller.workspace_id, by=caller.actor)
    return JSONResponse(session_wire(archived))
