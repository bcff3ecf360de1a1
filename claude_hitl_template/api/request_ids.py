"""Gives every response a `request-id` header, which every log line about the request has, too."""

import time
from urllib.parse import quote

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from claude_hitl_template.api.problems import unexpected
from claude_hitl_template.config import logs
from claude_hitl_template.domain.models import new_id

log = structlog.get_logger()
_HEADER = b"request-id"


def with_request_ids(app: ASGIApp) -> ASGIApp:
    """Wraps an application so that each request has an id. Use it around everything that is served: a failure of `app`
    becomes a 500 with an id."""

    async def identified(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        with structlog.contextvars.bound_contextvars(**{logs.REQUEST_ID: new_id("req")}):
            response = _Response(scope, send)
            try:
                await app(scope, receive, response)
            except Exception as error:
                if response.begun:
                    raise  # the server closes the connection, so that the client sees an incomplete response
                await unexpected(scope["path"], error)(scope, receive, response)

    return identified


class _Response:
    """Sends the response with the header. A header that is already there is the model service's; the log has both ids."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self._scope, self._send, self._started = scope, send, time.monotonic()
        self.begun = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.begun = True
            headers = list(message.get("headers", ()))
            theirs = [value.decode("latin-1") for name, value in headers if name.lower() == _HEADER]
            if not theirs:
                headers.append((_HEADER, logs.request_id().encode()))
            self._log(message["status"], theirs)
            message = {**message, "headers": headers}
        await self._send(message)

    def _log(self, status: int, theirs: list[str]) -> None:
        """Logs when the response begins, because a stream may take hours; without the query, which may hold secrets."""
        log.info(
            "request",
            method=self._scope["method"],
            path=quote(self._scope["path"]),
            status=status,
            ms=round((time.monotonic() - self._started) * 1000),
            **({"upstream_request_id": theirs[0]} if theirs else {}),
        )
