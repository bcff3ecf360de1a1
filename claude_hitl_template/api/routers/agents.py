"""The agents that sessions may use: there is one, built in."""

from typing import Annotated, Any

from fastapi import Path
from fastapi.responses import JSONResponse

from claude_hitl_template.api import resources
from claude_hitl_template.api.agents import agent_wire
from claude_hitl_template.api.auth import READ
from claude_hitl_template.api.listing import single_page
from claude_hitl_template.api.parameters import Limit, PageToken, Version
from claude_hitl_template.api.routing import api_router, errors
from claude_hitl_template.api.service import ServiceDep
from claude_hitl_template.domain.models import Agent
from claude_hitl_template.errors import NotFound

_CREATED_AT = "2026-01-01T00:00:00+00:00"  # built in, so it has no creation time

router = api_router("agents", READ)


@router.get("/v1/agents", response_model=resources.Agents)
async def list_agents(service: ServiceDep, limit: Limit = 20, page: PageToken = None) -> JSONResponse:
    """List the agents that sessions may use."""
    return single_page([_wire(service.agent)], page)


@router.get("/v1/agents/{agent_id}", response_model=resources.Agent, responses=errors(404))
async def get_agent(
    agent_id: Annotated[str, Path(description="The id of an agent.")],
    service: ServiceDep,
    version: Version = None,
) -> JSONResponse:
    """Retrieve an agent."""
    if agent_id != service.agent.id:
        raise NotFound(f"no agent {agent_id!r}")
    if version not in (None, service.agent.version):
        raise NotFound(f"agent {agent_id!r} has no version {version}")
    return JSONResponse(_wire(service.agent))


def _wire(agent: Agent) -> dict[str, Any]:
    times = {"archived_at": None, "created_at": _CREATED_AT, "updated_at": _CREATED_AT}
    return {**agent_wire(agent), **times, "metadata": {}}
