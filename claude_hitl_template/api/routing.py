"""The class of every route: authentication first, nothing undeclared, and bodies of strict JSON."""

from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.routing import APIRoute
from starlette.datastructures import QueryParams

from claude_hitl_template.api import resources
from claude_hitl_template.api.auth import PUBLIC, Access
from claude_hitl_template.api.declared import Declared, check_no_body, check_path
from claude_hitl_template.api.service import Service
from claude_hitl_template.api.strict_json import check_content_headers, loads, read_body

_ERRORS = {
    400: "Invalid request; the message names the field.",
    401: "No API key, or one that is unknown, has expired or was revoked.",
    403: "The caller's role, or the scope of its key, does not permit this.",
    404: "Not found, or not visible to this caller.",
    409: "Conflicts with what is recorded: decided otherwise, archived, still running, or an Idempotency-Key that came "
    "with another request.",
    412: "It was changed meanwhile; the message names the current version.",
    413: "The body is too large.",
    429: "Too many requests with this key, or too many wrong keys from this address; `retry-after` says when to try again.",
    503: "The store is unavailable now; the request may be repeated.",
}
_REQUEST_ID: dict[str, Any] = {"request-id": {"required": True, "schema": {"type": "string"}}}
_SHOULD_RETRY: dict[str, Any] = {"x-should-retry": {"required": True, "schema": {"const": "false"}}}
_RETRY_AFTER: dict[str, Any] = {
    "retry-after": {"required": True, "schema": {"type": "integer", "minimum": 0}}
}
_HEADERS = {409: _SHOULD_RETRY, 412: _SHOULD_RETRY, 429: _RETRY_AFTER, 503: _RETRY_AFTER}

Responses = dict[int | str, dict[str, Any]]


def errors(*statuses: int) -> Responses:
    """Documents errors of a route, for its `responses=`."""
    return {
        status: {
            "model": resources.Problem,
            "description": _ERRORS[status],
            "headers": {**_REQUEST_ID, **_HEADERS.get(status, {})},
        }
        for status in statuses
    }


def content(media_type: str, schema: dict[str, Any]) -> Responses:
    """Documents a response that is not JSON, for the `responses=` of a route."""
    return {200: {"headers": _REQUEST_ID, "content": {media_type: {"schema": schema}}}}


def api_router(tag: str, access: Access) -> APIRouter:
    """A router whose routes are strict, admit `access` only, and document the errors that every route may answer."""
    known = (400, 503) if access is PUBLIC else (400, 401, 429, 503)
    if access.needs:
        known = (*known, 403, 404)
    return APIRouter(
        tags=[tag],
        dependencies=[Depends(access)],
        responses={200: {"headers": _REQUEST_ID}, **errors(*known)},
        route_class=Route,
    )


class Route(APIRoute):
    """A route that checks a request before FastAPI reads its parameters, in this order: the caller, ids, undeclared
    headers and query parameters, the body.

    Parameters, a body model, `responses=` and the docstring of the function are the API document.
    """

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        options["strict_content_type"] = False  # a body without a Content-Type is JSON, too
        super().__init__(path, endpoint, **options)
        security: list[Any] = [] if self.access is PUBLIC else [{"key": []}, {"bearer": []}]
        self.openapi_extra = {"security": security, **(self.openapi_extra or {})}

    @property
    def access(self) -> Access:
        """Who may call. Raises AssertionError unless the route says it exactly once."""
        calls = {below.call for below in self.dependant.dependencies if isinstance(below.call, Access)}
        if len(calls) != 1:
            raise AssertionError(f"{self.path} does not say who may call it: depend on one Access")
        return calls.pop()  # pyright: ignore[reportReturnType]

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle, access = super().get_route_handler(), self.access
        declared, takes_body = Declared.of(self.dependant), self.body_field is not None

        async def strict(request: Request) -> Response:
            await access.admit(request)
            check_path(request)
            declared.check(request)
            service: Service = request.app.state.service
            checked = StrictRequest(request, declared.lists, service.max_request_bytes)
            if takes_body:
                await checked.json()  # here, because FastAPI replaces errors of reading a body by its own
            else:
                await check_no_body(checked)
            return await handle(checked)

        return strict


class StrictRequest(Request):
    """A request whose body is strict JSON, and whose lists may be named with and without brackets."""

    def __init__(self, request: Request, lists: Iterable[str], max_bytes: int) -> None:
        super().__init__(request.scope, request.receive)
        self._max_bytes = max_bytes
        plain = {name.removesuffix("[]"): name for name in lists}
        given = request.query_params
        if any(name in plain for name in given):
            given = QueryParams([(plain.get(name, name), value) for name, value in given.multi_items()])
        self._given = given

    @property
    def query_params(self) -> QueryParams:
        return self._given

    async def body(self) -> bytes:
        if not hasattr(self, "_body"):
            self._body = await read_body(self, self._max_bytes)
        return self._body

    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            check_content_headers(self)
            self._json = loads(await self.body())
        return self._json
