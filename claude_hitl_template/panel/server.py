"""Kodosumi's panel behind our checks, as `hitl up` starts it: a program that runs in the panel's folder."""

import argparse
from collections.abc import Awaitable, Callable, Sequence
from urllib.parse import urlsplit

import uvicorn
from kodosumi.config import InternalSettings
from kodosumi.service.app import create_app
from kodosumi.service.auth import get_user_details
from kodosumi.service.jwt import parse_token
from litestar import Litestar
from litestar.connection import ASGIConnection
from litestar.exceptions import NotAuthorizedException
from starlette.types import Scope

from claude_hitl_template.config import logs
from claude_hitl_template.domain.rate_limit import Throttle
from claude_hitl_template.panel import files
from claude_hitl_template.panel.protect import ProtectedPanel


def build(settings: InternalSettings, logins: Throttle | None = None) -> ProtectedPanel:
    """Builds the panel.

    Args:
        settings: Of Kodosumi; `CORS_ORIGINS` are all addresses of the panel.
        logins: As `ProtectedPanel` takes it.
    """
    files.install()
    app = create_app(**settings.model_dump())
    hosts = [urlsplit(origin).netloc for origin in settings.CORS_ORIGINS]
    return ProtectedPanel(
        app,  # pyright: ignore[reportArgumentType]  (Litestar's own types of the same protocol)
        hosts=hosts,
        secret=settings.SECRET_KEY,
        may_act=_may_act(app),
        logins=logins,
    )


def _may_act(app: Litestar) -> Callable[[Scope], Awaitable[bool]]:
    async def may_act(scope: Scope) -> bool:
        try:
            role_id = parse_token(ASGIConnection({**scope, "app": app, "state": {}})).sub  # pyright: ignore
        except NotAuthorizedException:
            return True  # Kodosumi refuses it itself where a login is required
        try:
            async with app.state["session_maker_class"]() as session:
                role = await get_user_details(role_id, session)
        except (NotAuthorizedException, ValueError):
            return False
        return role is not None and role.active

    return may_act


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="claude_hitl_template.panel.server", description=__doc__)
    parser.add_argument("--register", action="append", default=[], help="address of entries to list")
    given = parser.parse_args(arguments)
    logs.configure("INFO")
    settings = InternalSettings(REGISTER_FLOW=given.register)
    at = urlsplit(settings.APP_SERVER)
    uvicorn.run(
        build(settings),
        host=at.hostname or "127.0.0.1",
        port=at.port or 3370,
        log_level=settings.UVICORN_LEVEL.lower(),
        # Otherwise a client could choose the address under which its failed logins are counted.
        proxy_headers=False,
        server_header=False,
    )


if __name__ == "__main__":
    main()
