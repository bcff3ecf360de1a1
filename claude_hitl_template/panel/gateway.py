"""The application on the Serve port: /v1 and /model as they are, the rest Kodosumi's, behind the guard."""

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
from claude_hitl_template.panel.users import Guard, note_registered, panel_user

log = structlog.get_logger()
_LOCK = re.compile(r"/_lock_/([^/]+)/[^/]+/?")
_gone = PlainTextResponse("This window has closed, and nothing is lost: go on in Approvals.", 404)
OPEN = "/openapi.json"  # the panel reads it with no login; it names the entries, and nothing else


class Gateway(ServeAPI):
    """Kodosumi's routes, with what stands beside them.

    Kodosumi's middleware would buffer streams and show tracebacks, so that /v1 and /model never reach it.
    """

    def __init__(
        self,
        *,
        api: ASGIApp,
        model: ASGIApp,
        guard: Guard,
        own_url: str,
        panel_url: str,
        answers: Callable[[str], Awaitable[bool]],
    ) -> None:
        """`answers` says whether the runner of a flow, by its id, answers."""
        super().__init__(title="claude-hitl", docs_url=None, redoc_url=None)
        self._api, self._model, self._guard = api, _below("/model", model), guard
        self._answers = answers
        self._trusted = {KODOSUMI_BASE: own_url, KODOSUMI_URL: panel_url}
        for kind in (Exception, ValidationException, HTTPException):
            self.add_exception_handler(kind, _failed)

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
        return super().__call__ if path == OPEN else self._guarded

    def _has(self, scope: Scope) -> bool:
        return any(route.matches(scope)[0] is not Match.NONE for route in self.router.routes)

    async def _guarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        connection = HTTPConnection(scope)
        try:
            await self._guard.recognise(connection)
        except (Unauthorized, Unavailable) as error:
            await _answer(error)(scope, receive, send)
            return
        flow_id = _lock_of(connection)
        if flow_id is not None and not await self._answers(flow_id):
            await _gone(scope, receive, send)
            return
        # What Kodosumi believes of these headers (whose flow it is, where its locks and its files are) comes from us.
        note_registered(connection)
        trusted = {**self._trusted, KODOSUMI_USER: panel_user(Request(scope)).id}
        await super().__call__({**scope, "headers": _with(scope, trusted)}, receive, send)


def _lock_of(connection: HTTPConnection) -> str | None:
    """The flow whose lock is asked for. Kodosumi asks its runner with the whole process waiting, /v1 included."""
    found = _LOCK.fullmatch(connection.scope["path"].removeprefix(connection.scope.get("root_path", "")))
    return found[1] if found else None


def _below(prefix: str, app: ASGIApp) -> ASGIApp:
    async def below(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, "root_path": scope.get("root_path", "") + prefix}, receive, send)

    return below


def _with(scope: Scope, trusted: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    names = {name.lower().encode() for name in trusted}
    kept = [(name, value) for name, value in scope["headers"] if name.lower() not in names]
    return [*kept, *((name.lower().encode(), value.encode()) for name, value in trusted.items())]


def _answer(error: HitlError) -> PlainTextResponse:
    """Escaped: the panel puts the answer into its page as it is."""
    status = 401 if isinstance(error, Unauthorized) else 503 if isinstance(error, Unavailable) else 400
    headers = {"retry-after": f"{error.retry_after_s:.0f}"} if isinstance(error, Unavailable) else None
    return PlainTextResponse(escape(str(error)), status, headers)


async def _failed(request: Request, error: Exception) -> PlainTextResponse:
    """Kodosumi answers with tracebacks, and wraps what a handler raised in an HTTPException."""
    cause: Any = error.__cause__ or error.__context__ if isinstance(error, HTTPException) else error
    if isinstance(cause, HitlError):
        return _answer(cause)
    if isinstance(error, HTTPException) and error.status_code < 500:
        return PlainTextResponse(escape(str(error.detail)), error.status_code)
    log.error("a request of the panel failed", path=request.url.path, exc_info=error)
    return PlainTextResponse("the service failed on this request; its log says why", 500)
