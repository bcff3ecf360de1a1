"""Builds the application of the pages, for the paths below the service's own that begin with one of `PARTS`."""

from collections.abc import Mapping

import structlog
from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from claude_hitl_template.errors import (
    Conflict,
    Forbidden,
    HitlError,
    InvalidInput,
    NotFound,
    NotWaiting,
    RateLimited,
    TooLarge,
    Unauthorized,
    Unavailable,
)
from claude_hitl_template.inbox import approvals, changes, decisions, notifications, pages, sessions, slack
from claude_hitl_template.inbox.services import Pages

log = structlog.get_logger()
PARTS = frozenset({"inbox", "sessions", "slack"})  # the first part of each path of these pages
# The first matching class applies.
_PROBLEMS: tuple[tuple[type[HitlError], int, str], ...] = (
    (TooLarge, 413, "This is too large"),
    (InvalidInput, 400, "This does not fit"),
    (NotWaiting, 400, "This call does not wait"),
    (Unauthorized, 403, "Sign in first"),
    (Forbidden, 403, "You may not do this"),
    (NotFound, 404, "Not found"),
    (Conflict, 409, "Something else was first"),
    (RateLimited, 429, "Too many requests"),
    (Unavailable, 503, "The service does not answer now"),
)


def build_inbox_app(services: Pages) -> ASGIApp:
    """The pages over these services."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.state.pages = services
    for kind in (HitlError, HTTPException, Exception):
        app.add_exception_handler(kind, _problem)
    services.install(app)
    app.add_api_route("/inbox/static/{name}", pages.static_file)
    app.add_api_route("/inbox/manifest.webmanifest", pages.manifest)
    app.add_api_route("/inbox/worker.js", pages.worker)
    app.add_api_route("/inbox/offline", pages.offline)
    app.include_router(approvals.router)
    app.include_router(decisions.router)
    app.include_router(notifications.router)
    app.include_router(sessions.router)
    app.include_router(changes.router)
    app.include_router(slack.router)
    return pages.secured(app)


def with_pages(api: ASGIApp, others: Mapping[frozenset[str], ASGIApp]) -> ASGIApp:
    """Serves paths by their first part: those of `others` by the application named there, every other path by `api`."""
    by_part = {part: app for parts, app in others.items() for part in parts}

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        await by_part.get(path.lstrip("/").partition("/")[0], api)(scope, receive, send)

    return serve


async def _problem(request: Request, error: Exception) -> Response:
    """The page about a request that failed. The cause of an unexpected one is in the log only."""
    if isinstance(error, HTTPException):
        return _page(
            request, error.status_code, "Not found" if error.status_code == 404 else "Not possible", ""
        )
    for kind, status, heading in _PROBLEMS:
        if isinstance(error, kind):
            return _page(request, status, heading, str(error))
    log.error("a page failed", path=request.url.path, exc_info=error)
    return _page(request, 500, "The service failed on this request", "Its log says why.")


def _page(request: Request, status: int, heading: str, said: str) -> Response:
    if pages.is_partial(request):  # a whole page would be put into a part of the page
        response = pages.page(request, "flash.html.j2", status=status, heading=heading, said=said)
        response.headers.update({"hx-retarget": "#flash", "hx-reswap": "innerHTML"})
        return response
    return pages.page(request, "problem.html.j2", status=status, heading=heading, said=said)
