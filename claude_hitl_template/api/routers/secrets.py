"""Secrets that are sent to a running service: set, removed and named, but never shown."""

from typing import Annotated

from fastapi import Depends, Path
from fastapi.responses import JSONResponse

from claude_hitl_template.api import resources
from claude_hitl_template.api.auth import FIRST_KEY
from claude_hitl_template.api.bodies import Secret
from claude_hitl_template.api.routing import api_router, errors
from claude_hitl_template.api.service import ServiceDep
from claude_hitl_template.config.secret_files import SENT

router = api_router("secrets", FIRST_KEY)


async def _known(name: Annotated[str, Path(description="The name of a secret.")], service: ServiceDep) -> str:
    """Raises NotFound for an unknown name, before the body is validated."""
    service.secret_files.path(name)
    return name


SecretName = Annotated[str, Depends(_known)]


@router.get("/v1/internal/secrets", response_model=resources.SecretStates)
async def list_secrets(service: ServiceDep) -> JSONResponse:
    """List which secrets are set."""
    there = service.secret_files.names()
    return JSONResponse({"data": [{"name": name, "set": name in there} for name in SENT]})


@router.put("/v1/internal/secrets/{name}", response_model=resources.SecretState, responses=errors(404, 413))
async def put_secret(name: SecretName, body: Secret, service: ServiceDep) -> JSONResponse:
    """Set a secret."""
    service.secret_files.put(name, body.value)
    return JSONResponse({"name": name, "set": True})


@router.delete("/v1/internal/secrets/{name}", response_model=resources.SecretState, responses=errors(404))
async def delete_secret(name: SecretName, service: ServiceDep) -> JSONResponse:
    """Remove a secret."""
    return JSONResponse({"name": name, "set": False, "removed": service.secret_files.remove(name)})
