"""Notices of a workspace: what was sent over which channel, and what came out of it."""

from typing import Annotated, Any

from fastapi import Path, Query, Request
from fastapi.responses import JSONResponse

from claude_hitl_template.api import resources
from claude_hitl_template.api.auth import MANAGE, CallerDep
from claude_hitl_template.api.listing import Cursor, each_once
from claude_hitl_template.api.parameters import IdempotencyKey, Limit, NonEmpty, Omitted, PageToken
from claude_hitl_template.api.routing import api_router, errors
from claude_hitl_template.api.service import ServiceDep
from claude_hitl_template.domain.notices import Channel, Delivery, DeliveryState
from claude_hitl_template.domain.people import Action

router = api_router("notifications", MANAGE)
NotificationId = Annotated[str, Path(description="The id of a notification of the workspace.")]
NotificationStates = Annotated[
    list[DeliveryState] | Omitted,
    Query(alias="states[]", description="Only notifications in one of these states."),
]


@router.get("/v1/notifications", response_model=resources.Notifications)
async def list_notifications(
    *,
    request: Request,
    caller: CallerDep,
    service: ServiceDep,
    limit: Limit = 20,
    page: PageToken = None,
    channel_id: Annotated[NonEmpty | Omitted, Query(description="Only those of this channel.")] = None,
    session_id: Annotated[NonEmpty | Omitted, Query(description="Only those about this session.")] = None,
    states: NotificationStates = None,
) -> JSONResponse:
    """List what was sent, or is to be sent, the newest first. It is kept for two weeks."""
    chosen = each_once(states)
    cursor = Cursor.of(
        request,
        page,
        workspace_id=caller.workspace_id,
        channel_id=channel_id,
        session_id=session_id,
        states=chosen,
    )
    found = await service.store.list_deliveries(
        caller.workspace_id,
        limit=limit,
        page=cursor.page,
        channel_id=channel_id,
        session_id=session_id,
        states=chosen,
    )
    return cursor.response(found, wire)


@router.get("/v1/notifications/channels", response_model=resources.Channels)
async def list_channels(caller: CallerDep, service: ServiceDep) -> JSONResponse:
    """List the channels of the workspace; for an administrator of the service, all channels, also those of people."""
    everything = Action.ADMINISTER in caller.actions
    found = await service.store.list_channels(None if everything else caller.workspace_id)
    return JSONResponse({"data": [_channel(one) for one in found]})


@router.post(
    "/v1/notifications/{notification_id}/redeliver",
    response_model=resources.Notification,
    responses=errors(409),
)
async def redeliver(
    notification_id: NotificationId,
    caller: CallerDep,
    service: ServiceDep,
    idempotency_key: IdempotencyKey = None,  # repeated at once it is sent once, with any key
) -> JSONResponse:
    """Send a notification again, whatever came out of it before. Its event has the same id as before."""
    again = await service.store.redeliver(notification_id, caller.workspace_id, by=caller.actor)
    return JSONResponse(wire(again))


def wire(delivery: Delivery) -> dict[str, Any]:
    """A delivery in the API's form."""
    known = delivery.model_dump(
        mode="json",
        include={"id", "channel_id", "over", "state", "attempts", "created_at", "last_error", "closed_at"},
    )
    about = delivery.notice.model_dump(
        mode="json", include={"kind", "title", "workspace_id", "session_id", "approval_id"}
    )
    next_at = delivery.next_at.isoformat() if delivery.state == "pending" else None
    return {"type": "notification", **known, **about, "next_at": next_at}


def state_wire(channel: Channel) -> dict[str, Any]:
    """How a channel does, in the API's form."""
    known = channel.state.model_dump(mode="json", exclude={"gone"})
    return {"status": channel.state.status, **known}


def _channel(channel: Channel) -> dict[str, Any]:
    """Without `settings`, which may have an address of a person."""
    known = channel.model_dump(mode="json", exclude={"settings", "state", "quiet_hours", "digest_s"})
    return {"type": "channel", **known, "state": state_wire(channel)}
