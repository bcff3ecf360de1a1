"""Draining, which `./hitl` does before it stops or replaces the service."""

from fastapi.responses import JSONResponse

from claude_hitl_template.api import resources
from claude_hitl_template.api.auth import OPERATOR
from claude_hitl_template.api.bodies import Drain
from claude_hitl_template.api.parameters import IdempotencyKey
from claude_hitl_template.api.routing import api_router, errors
from claude_hitl_template.api.service import ServiceDep

MAX_GRACE_S = 300

router = api_router("internal", OPERATOR)


@router.get("/v1/internal/drain", response_model=resources.DrainState)
async def get_drain(service: ServiceDep) -> JSONResponse:
    """Show for how many more seconds no turn is started."""
    return JSONResponse({"drained_s": round(await service.drained_s(), 1)})


@router.post("/v1/internal/drain", response_model=resources.Drained, responses=errors(413))
async def drain(
    body: Drain,
    service: ServiceDep,
    idempotency_key: IdempotencyKey = None,  # draining twice is draining once, with any key
) -> JSONResponse:
    """Stop starting turns, and wait for those that run."""
    still_running = await service.drain(min(max(body.grace_s, 0), MAX_GRACE_S))
    return JSONResponse({"still_running": still_running})


@router.delete("/v1/internal/drain", response_model=resources.DrainState)
async def undrain(service: ServiceDep) -> JSONResponse:
    """Start turns again."""
    await service.undrain()
    return JSONResponse({"drained_s": 0.0})
