"""Errors in the wire protocol's shape: {"type": "error", "error": {"type", "message"}, "request_id"}."""

from collections.abc import Mapping

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import iter_route_contexts
from starlette.exceptions import HTTPException

from claude_hitl_template.api.validation import invalid_request
from claude_hitl_template.config import logs
from claude_hitl_template.errors import (
    Conflict,
    Forbidden,
    HitlError,
    InvalidInput,
    NotFound,
    NotWaiting,
    Outdated,
    RateLimited,
    TooLarge,
    Unauthorized,
    Unavailable,
)

log = structlog.get_logger()
MAX_MESSAGE_CHARS = 2000  # an error may quote the request

# The first matching class applies.
_STATUS: tuple[tuple[type[HitlError], int, str], ...] = (
    (TooLarge, 413, "request_too_large"),
    (InvalidInput, 400, "invalid_request_error"),
    (NotWaiting, 400, "invalid_request_error"),
    (Unauthorized, 401, "authentication_error"),
    (Forbidden, 403, "permission_error"),
    (NotFound, 404, "not_found_error"),
    (Outdated, 412, "invalid_request_error"),
    (Conflict, 409, "invalid_request_error"),
    (RateLimited, 429, "rate_limit_error"),
    (Unavailable, 503, "overloaded_error"),
)
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
}
# The official SDK retries 408, 409, 429 and 5xx unless a header forbids it. A conflict does not go away, and a request that
# failed with a defect may have taken effect: a retry could do it twice.
_NOT_REPEATED = {408, 409, 412, 500}


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
    """Makes `app` answer every failure in the protocol's shape, without a traceback."""
    app.add_exception_handler(HitlError, _ours)
    app.add_exception_handler(RequestValidationError, _validation)
    install_bare(app)


def install_bare(app: FastAPI) -> None:
    """The same for an application that handles HitlError itself: unknown addresses, wrong methods, defects."""
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _unexpected)


def _ours(request: Request, error: Exception) -> JSONResponse:
    for kind, status, name in _STATUS:
        if isinstance(error, kind):
            waits = isinstance(error, RateLimited | Unavailable)
            headers = {"retry-after": f"{error.retry_after_s:.0f}"} if waits else None
            if status >= 500:
                log.warning("request failed for now", path=request.url.path, why=str(error))
            return problem(status, name, str(error), headers)
    return _unexpected(request, error)


def _validation(request: Request, error: Exception) -> JSONResponse:
    return _ours(request, invalid_request(error) if isinstance(error, RequestValidationError) else error)


def _http(request: Request, error: Exception) -> JSONResponse:
    """An address or a method that no route has, which Starlette refuses."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    given = (error.headers or {}) if isinstance(error, HTTPException) else {}
    headers = {name.lower(): value for name, value in given.items()}
    message = str(error.detail) if isinstance(error, HTTPException) else "error"
    if status == 404:
        message = "no such address; GET /v1/openapi.json lists all of them"
        if "/v1/v1/" in f"{request.url.path}/":
            message = "the address has /v1 twice: clients add it themselves, so give them the base address without it"
    if status == 405:
        headers["allow"] = _methods(request) or headers.get("allow", "")
        message = f"{request.method} is not allowed here; {headers['allow']} is"
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    return problem(status, kind, message, headers)


def _methods(request: Request) -> str:
    """The methods of all routes with the requested path; Starlette's own list has only those of one route."""
    path = getattr(request.scope.get("route"), "path_format", None)
    routes = [route for route in iter_route_contexts(request.app.routes) if route.path_format == path]
    return ", ".join(sorted({method for route in routes for method in route.methods or ()}))


def _unexpected(request: Request, error: Exception) -> JSONResponse:
    return unexpected(request.url.path, error)


def unexpected(path: str, error: Exception) -> JSONResponse:
    """Answers a defect. The traceback goes to the log, not into the response."""
    log.error("request failed", path=path, exc_info=error)
    return problem(
        500, "api_error", "internal error; the service's log has the traceback under this request_id"
    )
