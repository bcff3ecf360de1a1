"""API keys, which `./hitl keys` manages, and the decisions of sessions that were deleted."""

from typing import Annotated, Any

from fastapi import Path, Request
from fastapi.responses import JSONResponse

from claude_hitl_template.api import resources
from claude_hitl_template.api.auth import OPERATOR
from claude_hitl_template.api.bodies import NewKey
from claude_hitl_template.api.listing import Cursor
from claude_hitl_template.api.parameters import IdempotencyKey, Limit, PageToken
from claude_hitl_template.api.routing import api_router, errors
from claude_hitl_template.api.service import ServiceDep
from claude_hitl_template.config.secret_files import api_key_for, hash_api_key, new_api_key, public_prefix
from claude_hitl_template.domain.models import ApiKey, KeptDecision
from claude_hitl_template.errors import Conflict

KeyId = Annotated[str, Path(description="The id of an API key.")]

router = api_router("keys", OPERATOR)


@router.get("/v1/internal/keys", response_model=resources.Keys)
async def list_keys(service: ServiceDep) -> JSONResponse:
    """List all API keys, also those that were revoked."""
    return JSONResponse({"data": [_wire(key) for key in await service.store.list_keys()]})


@router.post("/v1/internal/keys", response_model=resources.KeyWithSecret, responses=errors(409, 413))
async def create_key(
    request: Request, body: NewKey, service: ServiceDep, idempotency_key: IdempotencyKey = None
) -> JSONResponse:
    """Create an API key."""
    secret = _secret(request, idempotency_key, service.operator_key)
    made = await service.store.add_key(body.name, hash_api_key(secret), public_prefix(secret))
    if made.name != body.name:
        raise Conflict("this Idempotency-Key came with another request before; use a new one")
    return JSONResponse({**_wire(made), "secret": secret})


@router.delete("/v1/internal/keys/{key_id}", response_model=resources.Key, responses=errors(404, 409))
async def revoke_key(key_id: KeyId, service: ServiceDep) -> JSONResponse:
    """Revoke an API key. Its sessions remain."""
    return JSONResponse(_wire(await service.store.revoke_key(key_id)))


@router.post(
    "/v1/internal/keys/{key_id}/rotate",
    response_model=resources.KeyWithSecret,
    responses=errors(404, 409),
)
async def rotate_key(
    request: Request, key_id: KeyId, service: ServiceDep, idempotency_key: IdempotencyKey = None
) -> JSONResponse:
    """Give an API key a new secret. The previous one stops working."""
    secret = _secret(request, idempotency_key, service.operator_key)
    key = await service.store.rotate_key(key_id, hash_api_key(secret), public_prefix(secret))
    if key.first:
        service.shelf.keep_api_key(secret)
    return JSONResponse({**_wire(key), "secret": secret})


@router.get("/v1/internal/decisions", response_model=resources.KeptDecisions)
async def list_kept_decisions(
    request: Request, service: ServiceDep, limit: Limit = 100, page: PageToken = None
) -> JSONResponse:
    """List the decisions of deleted sessions, of all workspaces, oldest first."""
    cursor = Cursor.of(request, page)
    found = await service.store.list_kept_decisions(limit=limit, page=cursor.page)
    return cursor.response(found, _kept)


def _secret(request: Request, idempotency_key: str | None, operator_key: str) -> str:
    """A new secret. A repeated request, which has the same idempotency key, gets the same one."""
    if idempotency_key is None:
        return new_api_key()
    return api_key_for(f"{request.url.path}\n{idempotency_key}", operator_key)


def _wire(key: ApiKey) -> dict[str, Any]:
    return {"type": "api_key", **key.model_dump(mode="json", exclude={"secret_hash"})}


def _kept(decision: KeptDecision) -> dict[str, Any]:
    known = decision.model_dump(mode="json", exclude={"id"}, by_alias=False)
    return {"type": "kept_decision", "approval_id": decision.id, **known}
