"""The environments that sessions may run in."""

import asyncio
from typing import Annotated, Any

from fastapi import Path
from fastapi.responses import JSONResponse

from claude_hitl_template.api import resources
from claude_hitl_template.api.auth import READ
from claude_hitl_template.api.listing import single_page
from claude_hitl_template.api.parameters import Limit, PageToken
from claude_hitl_template.api.routing import api_router, errors
from claude_hitl_template.api.service import Service, ServiceDep
from claude_hitl_template.api.wire import environment_wire
from claude_hitl_template.domain.models import Environment
from claude_hitl_template.errors import NotFound

router = api_router("environments", READ)


@router.get("/v1/environments", response_model=resources.Environments)
async def list_environments(service: ServiceDep, limit: Limit = 20, page: PageToken = None) -> JSONResponse:
    """List the environments that sessions may run in."""
    found = await asyncio.gather(*(_wire(service, one) for one in service.environments.values()))
    return single_page(found, page)


@router.get("/v1/environments/{environment_id}", response_model=resources.Environment, responses=errors(404))
async def get_environment(
    environment_id: Annotated[str, Path(description="The id of an environment.")], service: ServiceDep
) -> JSONResponse:
    """Retrieve an environment."""
    environment = service.environments.get(environment_id)
    if environment is None:
        raise NotFound(f"no environment {environment_id!r}")
    return JSONResponse(await _wire(service, environment))


async def _wire(service: Service, environment: Environment) -> dict[str, Any]:
    facts = await service.image_facts(environment.image) if environment.image else None
    return environment_wire(environment, facts, sandboxed=service.facts().get("sandbox") == "on")
