"""Passwords and browser sessions of users, as far as administrators change them."""

from typing import Annotated

from fastapi import Path
from fastapi.responses import JSONResponse

from claude_hitl_template.api import resources
from claude_hitl_template.api.auth import ADMINISTER, CallerDep
from claude_hitl_template.api.bodies import Password
from claude_hitl_template.api.routing import api_router, errors
from claude_hitl_template.api.service import ServiceDep

UserId = Annotated[str, Path(description="The id of a user.")]

router = api_router("admin", ADMINISTER)


@router.put(
    "/v1/admin/principals/{user_id}/password",
    response_model=resources.PasswordSet,
    responses=errors(413),
)
async def set_password(
    user_id: UserId, body: Password, caller: CallerDep, service: ServiceDep
) -> JSONResponse:
    """Set a user's password for the pages of the service, and sign the user's browsers out."""
    await service.store.get_principal(user_id)  # before the work of hashing
    hashed = await service.passwords.hash(body.password)
    await service.store.set_password(user_id, hashed, by=caller.actor)
    return JSONResponse({"type": "password", "principal_id": user_id})


@router.delete("/v1/admin/principals/{user_id}/browser_sessions", response_model=resources.SignedOut)
async def sign_out(user_id: UserId, caller: CallerDep, service: ServiceDep) -> JSONResponse:
    """Sign a user's browsers out."""
    await service.store.get_principal(user_id)
    ended = await service.store.list_browser_sessions(user_id)
    await service.store.end_browser_sessions(user_id, by=caller.actor)
    return JSONResponse({"type": "signed_out", "principal_id": user_id, "browsers": len(ended)})
