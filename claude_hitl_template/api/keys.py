"""API keys, made, listed, replaced and revoked by `./hitl keys`; and the decisions of sessions that were deleted."""

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Depends, Request

from claude_hitl_template.api import schema
from claude_hitl_template.api.strict_json import Place, parse, query_limit, read_json
from claude_hitl_template.api.undeclared import DECLARED
from claude_hitl_template.config.secret_files import (
    SecretFiles,
    api_key_for,
    hash_api_key,
    new_api_key,
    public_prefix,
)
from claude_hitl_template.domain.models import ApiKey, KeptDecision
from claude_hitl_template.errors import Conflict
from claude_hitl_template.store.protocol import Clients


def key_routes(
    store: Clients, shelf: SecretFiles, operator_key: str, check: Callable[..., Any], max_request_bytes: int
) -> APIRouter:
    """`check` is the dependency that lets only who has the `operator_key` in: `./hitl` on the service's own machine."""

    def new_secret(request: Request) -> str:
        """With an idempotency key, which the repeated request has too, the same again."""
        given = request.headers.get("idempotency-key")
        return new_api_key() if given is None else api_key_for(f"{request.url.path}\n{given}", operator_key)

    router = APIRouter(tags=["keys"], dependencies=[Depends(check), *DECLARED])

    @router.get("/v1/internal/keys")
    async def listed() -> Any:
        return {"data": [_wire(key) for key in await store.list_keys()]}

    @router.post("/v1/internal/keys")
    async def create(request: Request) -> Any:
        body = parse(schema.NewKey, await read_json(request, max_request_bytes))
        secret = new_secret(request)
        made = await store.add_key(body.name, hash_api_key(secret), public_prefix(secret))
        if made.name != body.name:
            raise Conflict(
                "this Idempotency-Key came before with another request; use a new key for a new request"
            )
        return {**_wire(made), "secret": secret}

    @router.delete("/v1/internal/keys/{key_id}")
    async def revoke(key_id: str) -> Any:
        return _wire(await store.revoke_key(key_id))

    @router.post("/v1/internal/keys/{key_id}/rotate")
    async def rotate(key_id: str, request: Request) -> Any:
        secret = new_secret(request)
        key = await store.rotate_key(key_id, hash_api_key(secret), public_prefix(secret))
        if key.first:
            shelf.keep_api_key(secret)
        return {**_wire(key), "secret": secret}

    @router.get("/v1/internal/decisions")
    async def decisions(request: Request) -> Any:
        place = Place.of(request)
        page = await store.list_kept_decisions(limit=query_limit(request, 100), page=place.page)
        return {"data": [_kept(one) for one in page.data], "next_page": place.behind(page.next_page)}

    return router


def _wire(key: ApiKey) -> dict[str, Any]:
    return {"type": "api_key", **key.model_dump(mode="json", exclude={"secret_hash"})}


def _kept(decision: KeptDecision) -> dict[str, Any]:
    known = decision.model_dump(mode="json", exclude={"id"})
    return {"type": "kept_decision", "approval_id": decision.id, **known}
