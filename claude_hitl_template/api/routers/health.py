"""Whether the service works, what runs, and the API document."""

import asyncio

from fastapi import Request
from fastapi.responses import JSONResponse

from claude_hitl_template.api import resources
from claude_hitl_template.api.auth import PUBLIC, READ
from claude_hitl_template.api.routing import api_router
from claude_hitl_template.api.service import ServiceDep
from claude_hitl_template.errors import Unavailable

PING_S = 10
PUBLIC_FACTS = ("version", "code", "ray", "model")  # GET /v1/version, which needs a key, shows all

public = api_router("health", PUBLIC)
router = api_router("health", READ)


@public.get("/v1/health", response_model=resources.Health)
async def get_health(service: ServiceDep) -> JSONResponse:
    """Check that the service and its store work. Needs no key."""
    try:
        await asyncio.wait_for(service.store.ping(write=False), PING_S)
    except TimeoutError as error:
        raise Unavailable("the store does not answer") from error
    facts = service.facts()
    return JSONResponse({"status": "ok", **{name: facts.get(name) for name in PUBLIC_FACTS}})


@router.get("/v1/version", response_model=resources.Version)
async def get_version(service: ServiceDep) -> JSONResponse:
    """Show which code and which model answer; of a deploy also `commit`, `dirty` and `package`."""
    return JSONResponse(service.facts())


@router.get("/v1/openapi.json", response_model=resources.Document)
async def get_openapi(request: Request) -> JSONResponse:
    """Get this document."""
    return JSONResponse(await asyncio.to_thread(request.app.openapi))  # the first call builds it
