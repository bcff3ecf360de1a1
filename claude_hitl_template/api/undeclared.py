"""Refuses whatever a request has that its route does not declare: a parameter that is ignored changes what is meant.

`schema.OPERATIONS` declares, for each route, its query parameters, its headers and whether it takes a body; the
OpenAPI document is made of the same. A route that is not declared there does not start (`schema.install`).
"""

import difflib
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from fastapi import APIRouter, Depends, Request

from claude_hitl_template.api.schema import MAX_KEY_CHARS, OPERATIONS, Operation
from claude_hitl_template.api.strict_json import check_url, read_body
from claude_hitl_template.errors import InvalidInput, TooLarge

MAX_NAME_CHARS = 100  # of a caller's name that an error repeats
NO_BODY_BYTES = 64  # more than "{}" with its spaces
PROTOCOL_BETA = "managed-agents-2026-04-01"
_BETAS_OF_PROTOCOL = "managed-agents-"
# Headers of the protocol that ask for nothing. Whatever else begins with `anthropic-` would: a workspace, a user profile.
_ASKS_NOTHING = frozenset(
    {"anthropic-version", "anthropic-beta", "anthropic-dangerous-direct-browser-access"}
)
# Conditions and methods: a server that knows nothing of them does what it was told not to do.
_CONDITIONS = frozenset({"if-match", "if-unmodified-since", "x-http-method-override"})
_OF_SOME_ROUTES = frozenset({"last-event-id", "idempotency-key"})
_ONCE = frozenset({"x-api-key", "authorization", "content-type"})


async def refuse_undeclared(request: Request) -> None:
    """A dependency of every route. Raises InvalidInput that names the first parameter which the route does not take."""
    operation = OPERATIONS[f"{request.method} {request.scope['route'].path_format}"]
    _check_headers(request, operation)
    _check_query(request, operation)
    if operation.body is None:
        await _check_no_body(request)


# What every router depends on, behind whatever finds out who calls: a stranger learns nothing else.
DECLARED = (Depends(check_url), Depends(refuse_undeclared))


def check_covered(router: APIRouter) -> None:
    """Raises AssertionError for a router whose routes would take what they do not declare."""
    if refuse_undeclared not in [found.dependency for found in router.dependencies]:
        raise AssertionError(f"the routes {router.routes} do not depend on DECLARED")


def _declared(operation: Operation, where: str) -> dict[str, Mapping[str, Any]]:
    return {p["name"]: p for p in operation.parameters if p["in"] == where}


def _check_query(request: Request, operation: Operation) -> None:
    taken = _declared(operation, "query")
    given = request.query_params
    for name, value in given.multi_items():
        listed = f"{name}[]"
        declared = taken.get(name) or taken.get(
            listed
        )  # `states=a`: as clients other than the SDK write a list
        if declared is None:
            raise InvalidInput(_unknown(name, taken), name[:MAX_NAME_CHARS])
        if not value and not declared.get("allowEmptyValue"):
            raise InvalidInput("is empty; leave it out instead", name)
        if declared["schema"]["type"] != "array" and len(given.getlist(name)) > 1:
            raise InvalidInput("is given more than once", name)
        if listed in taken and listed in given:
            raise InvalidInput(f"is given as {listed}, too; use one of them", name)


def _unknown(name: str, taken: Collection[str]) -> str:
    if not taken:
        return "no such parameter; this route takes none"
    near = difflib.get_close_matches(name[:MAX_NAME_CHARS].lower(), taken, 1)
    hint = f"; did you mean {near[0]}?" if near else "."
    return f"no such parameter{hint} This route takes {', '.join(taken)}"


def _check_headers(request: Request, operation: Operation) -> None:
    taken = {name.lower() for name in _declared(operation, "header")}
    names = set(request.headers)
    for name in sorted(names):
        if name.startswith("anthropic-") and name not in _ASKS_NOTHING:
            raise InvalidInput("this service has nothing that this header could choose; leave it out", name)
        if name in _CONDITIONS or (name in _OF_SOME_ROUTES and name not in taken):
            raise InvalidInput("this route does not take this header; leave it out", name)
    for name in sorted(names & (_ONCE | taken)):
        if len(request.headers.getlist(name)) > 1:
            raise InvalidInput("is given more than once", name)
    if not 1 <= len(request.headers.get("idempotency-key", "k")) <= MAX_KEY_CHARS:
        raise InvalidInput(f"from 1 to {MAX_KEY_CHARS} characters", "Idempotency-Key")
    _check_betas(request.headers.getlist("anthropic-beta"))


def _check_betas(given: Iterable[str]) -> None:
    """The others belong to other routes of the protocol: a client may send them with every request."""
    for beta in ",".join(given).split(","):
        if beta.strip().startswith(_BETAS_OF_PROTOCOL) and beta.strip() != PROTOCOL_BETA:
            raise InvalidInput(f"this service speaks {PROTOCOL_BETA}", "anthropic-beta")


async def _check_no_body(request: Request) -> None:
    """An empty object is taken for none: some clients send one with every POST."""
    try:
        body = await read_body(request, NO_BODY_BYTES)
    except TooLarge as error:
        raise InvalidInput("this route takes none", "body") from error
    if body.strip() and "".join(body.decode(errors="replace").split()) != "{}":
        raise InvalidInput("this route takes none", "body")
