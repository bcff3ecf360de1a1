"""Secrets that are sent to a running service: set, removed and named, but never shown."""

import hmac
from typing import Any

from fastapi import APIRouter, Depends, Request

from claude_hitl_template.api import schema
from claude_hitl_template.api.auth import Authenticator, presented_key
from claude_hitl_template.api.strict_json import parse, read_json
from claude_hitl_template.api.undeclared import DECLARED
from claude_hitl_template.config.secret_files import SENT, SecretFiles, hash_api_key


def secret_routes(
    shelf: SecretFiles, operator_key: str, authenticator: Authenticator, max_request_bytes: int
) -> APIRouter:
    """`operator_key` opens these routes, and the first API key; no other key does."""

    async def check(request: Request) -> None:
        presented = presented_key(request)
        if hmac.compare_digest(presented.encode(), operator_key.encode()):
            return
        key = await authenticator.find(hash_api_key(presented))
        if key is None or not key.first:
            why = "only the service's first API key, or ./hitl on its own machine, opens this"
            raise authenticator.wrong_keys.refusal(request, why)

    router = APIRouter(tags=["secrets"], dependencies=[Depends(check), *DECLARED])

    @router.get("/v1/internal/secrets")
    async def names() -> Any:
        there = shelf.names()
        return {"data": [{"name": name, "set": name in there} for name in SENT]}

    @router.put("/v1/internal/secrets/{name}")
    async def put(name: str, request: Request) -> Any:
        shelf.path(name)  # an unknown name is told before what is wrong with the value
        body = parse(schema.Secret, await read_json(request, max_request_bytes))
        shelf.put(name, body.value)
        return {"name": name, "set": True}

    @router.delete("/v1/internal/secrets/{name}")
    async def remove(name: str) -> Any:
        return {"name": name, "set": False, "removed": shelf.remove(name)}

    return router
