"""The application on the Serve port: /v1 and /model unchanged, and Kodosumi's routes behind the guard."""

import re
from collections.abc import Awaitable, Callable, Mapping
from html import escape
from typing import Any

import structlog
from fastapi.exceptions import ValidationException
from kodosumi.const import KODOSUMI_BASE, KODOSUMI_URL, KODOSUMI_USER
from kodosumi.core import ServeAPI
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection, Request
from starlette.responses import PlainTextResponse
from starlette.routing import Match
from starlette.types import ASGIApp, Receive, Scope, Send

from claude_hitl_template.errors import HitlError, Unauthorized, Unavailable
from claude_hitl_template.panel.users import Guard, panel_user, remember_entries_path

log = structlog.get_logger()
_LOCK = re.compile(r"/_lock_/([^/]+)/[^/]+/?")
_window_closed = PlainTextResponse("This window has closed, and nothing is lost: go on in Approvals.", 404)
PUBLIC_PATH = "/openapi.json"  # the panel reads it without a login; it lists the entries and nothing else


class Gateway(ServeAPI):
    """Kodosumi's routes behind the guard, next to our API.

    Kodosumi's middleware buffers streams and shows tracebacks, so requests to /v1 and /model never reach it.
    """

    def __init__(
        self,
        *,
        api: ASGIApp,
        model: ASGIApp,
        guard: Guard,
        own_url: str,
        panel_url: str,
        runner_responds: Callable[[str], Awaitable[bool]],
    ) -> None:
        """
        Args:
            api: Serves /v1 and every path that Kodosumi does not have.
            model: Serves /model.
            guard: Authenticates every request to Kodosumi's routes.
            own_url: The address of this application.
            panel_url: The address of the panel.
            runner_responds: Whether the runner of a flow, by the flow's id, responds.
        """
        super().__init__(title="claude-hitl", docs_url=None, redoc_url=None)
        self._api, self._model, self._guard = api, _mounted("/model", model), guard
        self._runner_responds = runner_responds
        self._trusted = {KODOSUMI_BASE: own_url, KODOSUMI_URL: panel_url}
        for kind in (Exception, ValidationException, HTTPException):
            self.add_exception_handler(kind, _unexpected_error)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app_for(scope)(scope, receive, send)

    def _app_for(self, scope: Scope) -> ASGIApp:
        if scope["type"] != "http":
            return super().__call__
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if path.startswith("/model/"):
            return self._model
        if path.startswith("/v1/") or not self._has(scope):
            return self._api
        return super().__call__ if path == PUBLIC_PATH else self._guarded

    def _has(self, scope: Scope) -> bool:
        return any(route.matches(scope)[0] is not Match.NONE for route in self.router.routes)

    async def _guarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        connection = HTTPConnection(scope)
        try:
            await self._guard.authenticate(connection)
        except (Unauthorized, Unavailable) as error:
            await _error_response(error)(scope, receive, send)
            return
        flow_id = _lock_of(connection)
        if flow_id is not None and not await self._runner_responds(flow_id):
            await _window_closed(scope, receive, send)
            return
        # Kodosumi trusts these headers (whose flow it is, where its locks and files are), so they are replaced by ours.
        remember_entries_path(connection)
        trusted = {**self._trusted, KODOSUMI_USER: panel_user(Request(scope)).id}
        await super().__call__({**scope, "headers": _headers_with(scope, trusted)}, receive, send)


def _lock_of(connection: HTTPConnection) -> str | None:
    """The flow whose lock is requested. Kodosumi would ask the flow's runner and block the whole process, /v1 included."""
    found = _LOCK.fullmatch(connection.scope["path"].removeprefix(connection.scope.get("root_path", "")))
    return found[1] if found else None


def _mounted(prefix: str, app: ASGIApp) -> ASGIApp:
    async def mounted(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, "root_path": scope.get("root_path", "") + prefix}, receive, send)

    return mounted


def _headers_with(scope: Scope, trusted: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    names = {name.lower().encode() for name in trusted}
    kept = [(name, value) for name, value in scope["headers"] if name.lower() not in names]
    return [*kept, *((name.lower().encode(), value.encode()) for name, value in trusted.items())]


def _error_response(error: HitlError) -> PlainTextResponse:
    """Escapes the error, because the panel puts the response into its page unescaped."""
    status = 401 if isinstance(error, Unauthorized) else 503 if isinstance(error, Unavailable) else 400
    headers = {"retry-after": f"{error.retry_after_s:.0f}"} if isinstance(error, Unavailable) else None
    return PlainTextResponse(escape(str(error)), status, headers)


async def _unexpected_error(request: Request, error: Exception) -> PlainTextResponse:
    """Replaces Kodosumi's handler, which responds with tracebacks. It wraps what a route raised in an HTTPException."""
    cause: Any = error.__cause__ or error.__context__ if isinstance(error, HTTPException) else error
    if isinstance(cause, HitlError):
        return _error_response(cause)
    if isinstance(error, HTTPException) and error.status_code < 500:
        return PlainTextResponse(escape(str(error.detail)), error.status_code)
    log.error("a request of the panel failed", path=request.url.path, exc_info=error)
    return PlainTextResponse("the service failed on this request; its log says why", 500)
