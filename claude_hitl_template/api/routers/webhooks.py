"""Webhooks of a workspace: where events are posted, signed by the Standard Webhooks scheme."""

from typing import Annotated, Any

from fastapi import Path, Request
from fastapi.responses import JSONResponse

from claude_hitl_template.api import resources
from claude_hitl_template.api.auth import MANAGE, Caller, CallerDep
from claude_hitl_template.api.bodies import ChangeWebhook, NewWebhook
from claude_hitl_template.api.parameters import IdempotencyKey
from claude_hitl_template.api.routers.notifications import state_wire, wire
from claude_hitl_template.api.routing import api_router, errors
from claude_hitl_template.api.service import Service, ServiceDep
from claude_hitl_template.config.secret_files import api_key_for
from claude_hitl_template.domain.canonical_json import digest
from claude_hitl_template.domain.models import new_id, utcnow
from claude_hitl_template.domain.notices import Channel
from claude_hitl_template.errors import Conflict, NotFound
from claude_hitl_template.notify.webhook import new_secret, rotated, secret_of

router = api_router("webhooks", MANAGE)
WebhookId = Annotated[str, Path(description="The id of a webhook of the workspace.")]
ID_CHARS = 26


@router.post("/v1/webhooks", response_model=resources.WebhookWithSecret, responses=errors(409, 413))
async def create_webhook(
    request: Request,
    body: NewWebhook,
    caller: CallerDep,
    service: ServiceDep,
    idempotency_key: IdempotencyKey = None,
) -> JSONResponse:
    """Register a webhook. The secret that signs its events is in this response only."""
    service.targets.check(body.url)
    seed = _seed(request, caller, service, idempotency_key)
    secret = new_secret() if seed is None else secret_of(seed)
    made = Channel(
        id=new_id("wbhk") if seed is None else f"wbhk_{digest(seed)[:ID_CHARS]}",
        kind="webhook",
        workspace_id=caller.workspace_id,
        name=body.name,
        settings={"url": body.url},
        kinds=tuple(dict.fromkeys(body.events)),
        min_severity=body.min_severity,
        created_at=utcnow(),
    )
    found = await service.store.add_channel(made, {"signing": secret}, by=caller.actor)
    if found.but(created_at=made.created_at, state=made.state) != made:
        raise Conflict("this Idempotency-Key came with another request before; use a new one")
    return JSONResponse({**_webhook(found), "secret": secret})


@router.get("/v1/webhooks", response_model=resources.Webhooks)
async def list_webhooks(caller: CallerDep, service: ServiceDep) -> JSONResponse:
    """List the webhooks of the workspace."""
    found = await service.store.list_channels(caller.workspace_id)
    return JSONResponse({"data": [_webhook(one) for one in found if one.kind == "webhook"]})


@router.get("/v1/webhooks/{webhook_id}", response_model=resources.Webhook)
async def get_webhook(webhook_id: WebhookId, caller: CallerDep, service: ServiceDep) -> JSONResponse:
    """Retrieve a webhook."""
    return JSONResponse(_webhook(await _found(webhook_id, caller, service)))


@router.post("/v1/webhooks/{webhook_id}", response_model=resources.Webhook, responses=errors(409, 413))
async def update_webhook(
    webhook_id: WebhookId,
    body: ChangeWebhook,
    caller: CallerDep,
    service: ServiceDep,
    idempotency_key: IdempotencyKey = None,  # the same change twice is one, with any key
) -> JSONResponse:
    """Change a webhook. One that was gone or failing counts as working again."""
    await _found(webhook_id, caller, service)
    given = body.model_dump(exclude_unset=True)
    changes: dict[str, Any] = {
        name: given[name] for name in ("name", "min_severity", "enabled") if name in given
    }
    if body.url is not None:
        service.targets.check(body.url)
        changes["settings"] = {"url": body.url}
    if body.events is not None:
        changes["kinds"] = tuple(dict.fromkeys(body.events))
    changed = await service.store.change_channel(webhook_id, caller.workspace_id, changes, by=caller.actor)
    return JSONResponse(_webhook(changed))


@router.delete("/v1/webhooks/{webhook_id}", response_model=resources.Removed, responses=errors(409))
async def delete_webhook(webhook_id: WebhookId, caller: CallerDep, service: ServiceDep) -> JSONResponse:
    """Remove a webhook, with what was not sent yet."""
    await _found(webhook_id, caller, service)
    await service.store.remove_channel(webhook_id, caller.workspace_id, by=caller.actor)
    return JSONResponse({"id": webhook_id, "type": "webhook_deleted"})


@router.post(
    "/v1/webhooks/{webhook_id}/rotate", response_model=resources.WebhookWithSecret, responses=errors(409)
)
async def rotate_webhook_secret(
    request: Request,
    webhook_id: WebhookId,
    caller: CallerDep,
    service: ServiceDep,
    idempotency_key: IdempotencyKey = None,
) -> JSONResponse:
    """Give a webhook a new secret, which is in this response only. For a day events are signed by both."""
    found = await _found(webhook_id, caller, service)
    before = await service.store.channel_secret(webhook_id)
    seed = _seed(request, caller, service, idempotency_key)
    secret = new_secret() if seed is None else secret_of(seed)
    if before["signing"] != secret:
        after = rotated(before, secret, utcnow())
        found = await service.store.change_channel(
            webhook_id, caller.workspace_id, {}, secret=after, by=caller.actor
        )
    return JSONResponse({**_webhook(found), "secret": secret})


@router.post("/v1/webhooks/{webhook_id}/test", response_model=resources.Notification, responses=errors(409))
async def try_webhook(
    request: Request,
    webhook_id: WebhookId,
    caller: CallerDep,
    service: ServiceDep,
    idempotency_key: IdempotencyKey = None,
) -> JSONResponse:
    """Post an event of the type `test`. What came out of it: `GET /v1/notifications`."""
    await _found(webhook_id, caller, service)
    seed = _seed(request, caller, service, idempotency_key)
    notice_id = new_id("ntc") if seed is None else f"ntc_{digest(seed)[:ID_CHARS]}"
    made = await service.store.send_test(
        webhook_id, caller.workspace_id, notice_id=notice_id, by=caller.actor
    )
    return JSONResponse(wire(made))


async def _found(webhook_id: str, caller: Caller, service: Service) -> Channel:
    found = await service.store.get_channel(webhook_id, caller.workspace_id)
    if found.kind != "webhook":
        raise NotFound(f"there is no webhook {webhook_id!r}")
    return found


def _seed(request: Request, caller: Caller, service: Service, idempotency_key: str | None) -> str | None:
    """What a repeated request makes the same id and secret of; only this service can compute it."""
    if idempotency_key is None:
        return None
    return api_key_for(f"{request.url.path}\n{caller.workspace_id}\n{idempotency_key}", service.operator_key)


def _webhook(channel: Channel) -> dict[str, Any]:
    same = ("id", "workspace_id", "name", "min_severity", "enabled", "created_at")
    return {
        "type": "webhook",
        **channel.model_dump(mode="json", include=set(same)),
        "url": channel.settings.get("url", ""),
        "events": list(channel.kinds),
        "state": state_wire(channel),
    }
