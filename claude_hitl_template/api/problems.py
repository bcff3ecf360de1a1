"""Errors as the wire protocol shows them: {"type": "error", "error": {"type", "message"}, "request_id"}."""

from collections.abc import Mapping

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from claude_hitl_template.api.schema import OPERATIONS
from claude_hitl_template.config import logs
from claude_hitl_template.errors import (
    Conflict,
    HitlError,
    InvalidInput,
    NotFound,
    NotWaiting,
    RateLimited,
    TooLarge,
    Unauthorized,
    Unavailable,
)

log = structlog.get_logger()
MAX_MESSAGE_CHARS = 2000  # an error may quote what the caller sent

# The first class that fits decides.
_STATUS: tuple[tuple[type[HitlError], int, str], ...] = (
    (TooLarge, 413, "request_too_large"),
    (InvalidInput, 400, "invalid_request_error"),
    (NotWaiting, 400, "invalid_request_error"),
    (Unauthorized, 401, "authentication_error"),
    (NotFound, 404, "not_found_error"),
    (Conflict, 409, "invalid_request_error"),
    (RateLimited, 429, "rate_limit_error"),
    (Unavailable, 503, "overloaded_error"),
)
_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
}
# The official SDK repeats 408, 409, 429 and all from 500 on, unless a header forbids it. A conflict stays one, and a defect
# may have done what it was asked: the same again would do it twice.
_NOT_REPEATED = {408, 409, 500}


def problem(status: int, kind: str, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    shown = message[:MAX_MESSAGE_CHARS].encode("utf-8", "backslashreplace").decode()
    body = {
        "type": "error",
        "error": {"type": kind, "message": shown},
        "request_id": logs.request_id() or None,
    }
    once = {"x-should-retry": "false"} if status in _NOT_REPEATED else {}
    return JSONResponse(body, status_code=status, headers={**once, **(headers or {})})


def install(app: FastAPI) -> None:
    """Makes every failure of `app` answer in the protocol's shape, with no traceback in it."""
    app.add_exception_handler(HitlError, _ours)
    app.add_exception_handler(RequestValidationError, _validation)
    install_bare(app)


def install_bare(app: FastAPI) -> None:
    """The same for an application that answers our errors by itself: unknown addresses and methods, and defects."""
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _unexpected)


def _ours(request: Request, error: Exception) -> JSONResponse:
    for kind, status, name in _STATUS:
        if isinstance(error, kind):
            waits = isinstance(error, RateLimited | Unavailable)
            headers = {"retry-after": f"{error.retry_after_s:.0f}"} if waits else None
            if status >= 500:
                log.warning("request cannot be answered now", path=request.url.path, why=str(error))
            return problem(status, name, str(error), headers)
    return _unexpected(request, error)


def _validation(_request: Request, error: Exception) -> JSONResponse:
    first = error.errors()[0] if isinstance(error, RequestValidationError) else {"loc": (), "msg": str(error)}
    field = ".".join(str(part) for part in first["loc"][1:])
    return problem(400, "invalid_request_error", f"{field}: {first['msg']}")


def _http(request: Request, error: Exception) -> JSONResponse:
    """What Starlette refuses by itself: an address or a method that no route has."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    given = (error.headers or {}) if isinstance(error, HTTPException) else {}
    headers = {name.lower(): value for name, value in given.items()}
    message = str(error.detail) if isinstance(error, HTTPException) else "error"
    if status == 404:
        message = "there is nothing at this address; GET /v1/openapi.json lists what there is"
        if "/v1/v1/" in f"{request.url.path}/":
            message = "the address has /v1 twice: clients add it themselves, so give them the base address without it"
    if status == 405:
        # Starlette's own list is that of one route, and a path has several.
        headers["allow"] = _methods(request.scope.get("route")) or headers.get("allow", "")
        message = f"{request.method} is not taken at this address; {headers['allow']} is"
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    return problem(status, kind, message, headers)


def _methods(route: object) -> str:
    """Those that the routes of one path take."""
    path = getattr(route, "path_format", "")
    return ", ".join(sorted(known.split()[0] for known in OPERATIONS if known.split()[1] == path))


def _unexpected(request: Request, error: Exception) -> JSONResponse:
    return unexpected(request.url.path, error)


def unexpected(path: str, error: Exception) -> JSONResponse:
    """A defect: the traceback is in the log, and not in the answer."""
    log.error("request failed", path=path, exc_info=error)
    return problem(500, "api_error", "the service failed on this request; its log says why")
