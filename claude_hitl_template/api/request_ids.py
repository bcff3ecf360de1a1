"""Every answer has a `request-id`, and the log names it: on the line of the request, and on every line that came of it."""

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
    """`app` with an id for each request; to be put around everything that is served. A failure of `app` is a 500 that
    has one, too."""

    async def identified(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        with structlog.contextvars.bound_contextvars(**{logs.REQUEST_ID: new_id("req")}):
            answer = _Answer(scope, send)
            try:
                await app(scope, receive, answer)
            except Exception as error:
                if answer.begun:
                    raise  # the server breaks the connection off: what was sent is not whole
                await unexpected(scope["path"], error)(scope, receive, answer)

    return identified


class _Answer:
    """Sends on, with the header. One that is there already is of the model's service: the log has both ids."""

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
            self._tell(message["status"], theirs)
            message = {**message, "headers": headers}
        await self._send(message)

    def _tell(self, status: int, theirs: list[str]) -> None:
        """When the answer begins: a stream may take hours. Without the query, which is not always fit for a log."""
        log.info(
            "request",
            method=self._scope["method"],
            path=quote(self._scope["path"]),
            status=status,
            ms=round((time.monotonic() - self._started) * 1000),
            **({"upstream_request_id": theirs[0]} if theirs else {}),
        )
