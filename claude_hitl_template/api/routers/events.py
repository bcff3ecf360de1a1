"""Events of a session: list, send, stream."""

from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, StreamingResponse

from claude_hitl_template.api import resources
from claude_hitl_template.api.auth import READ, TAKE_PART, AuthenticatorDep, CallerDep, presented_key
from claude_hitl_template.api.bodies import SendEvents
from claude_hitl_template.api.listing import Cursor, each_once
from claude_hitl_template.api.parameters import (
    CreatedAt,
    EventTypes,
    IdempotencyKey,
    LastEventId,
    Limit,
    Order,
    PageToken,
    Previews,
    SessionId,
)
from claude_hitl_template.api.routing import api_router, content, errors
from claude_hitl_template.api.service import FollowersDep, ServiceDep
from claude_hitl_template.api.streams import EventStream, ended
from claude_hitl_template.config.secret_files import hash_api_key
from claude_hitl_template.domain.events import UserToolConfirmation
from claude_hitl_template.domain.models import Event
from claude_hitl_template.domain.people import Action
from claude_hitl_template.errors import InvalidInput

router = api_router("events", READ)
inbound = api_router("events", TAKE_PART)


@router.get("/v1/sessions/{session_id}/events", response_model=resources.Events, responses=errors(404))
async def list_events(
    *,
    request: Request,
    session_id: SessionId,
    caller: CallerDep,
    service: ServiceDep,
    created: CreatedAt,
    limit: Limit = 100,
    page: PageToken = None,
    order: Order = "asc",
    types: EventTypes = None,
) -> JSONResponse:
    """List a session's committed events."""
    filters: dict[str, Any] = {"types": each_once(types), "created": created}
    cursor = Cursor.of(request, page, order=order, **filters)
    found = await service.store.list_events(
        session_id, caller.workspace_id, limit=limit, page=cursor.page, order=order, **filters
    )
    return cursor.response(found, Event.wire)


@inbound.post(
    "/v1/sessions/{session_id}/events",
    response_model=resources.SentEvents,
    responses=errors(404, 409, 413),
)
async def send_events(
    session_id: SessionId,
    body: SendEvents,
    caller: CallerDep,
    service: ServiceDep,
    idempotency_key: IdempotencyKey = None,
) -> JSONResponse:
    """Send messages, interrupts and decisions. All of them are accepted, or none; only a confirmation decides a call."""
    for event in body.events:
        caller.check(Action.DECIDE if isinstance(event, UserToolConfirmation) else Action.REQUEST)
    found = await service.store.send_events(
        session_id, caller.workspace_id, body.events, by=caller.actor, idempotency_key=idempotency_key
    )
    return JSONResponse({"data": [event.wire() for event in found]})


@router.get(
    "/v1/sessions/{session_id}/events/stream",
    response_class=StreamingResponse,
    responses={**content("text/event-stream", resources.reference("StreamFrame")), **errors(404)},
)
async def stream_events(
    *,
    request: Request,
    session_id: SessionId,
    caller: CallerDep,
    service: ServiceDep,
    authenticator: AuthenticatorDep,
    followers: FollowersDep,
    last_event_id: LastEventId = None,
    event_deltas: Previews = None,
) -> StreamingResponse:
    """Stream events as they are committed, as server-sent events. Without `Last-Event-ID` it begins with the next one."""
    session = await service.store.get_session(session_id, caller.workspace_id)
    newest = session.next_seq - 1
    after = newest if last_event_id is None else last_event_id
    if after > newest:
        raise InvalidInput(
            "not the id of an event of this stream; 0 starts at the beginning", "Last-Event-ID"
        )
    stream = EventStream(
        followers,
        authenticator,
        session_id,
        caller.workspace_id,
        hash_api_key(presented_key(request)),
        after,
        frozenset(event_deltas or ()),
    )
    is_over = session.status == "terminated" and after == newest
    return StreamingResponse(
        ended() if is_over else stream.messages(),
        media_type="text/event-stream",
        headers={"cache-control": "no-cache", "x-accel-buffering": "no"},
    )
