"""Refuses headers and parameters that a route does not declare: ignoring one would change the request's meaning.

The declarations are read from the route's signature, through FastAPI's `Dependant`.
"""

import difflib
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Self

from fastapi import Request
from fastapi.dependencies.models import Dependant

from claude_hitl_template.api.strict_json import read_body
from claude_hitl_template.errors import InvalidInput, NotFound, TooLarge

MAX_NAME_CHARS = 100  # of a caller's name that an error repeats
MAX_ID_CHARS = 256
NO_BODY_BYTES = 64  # more than "{}" with its spaces
PROTOCOL_BETA = "managed-agents-2026-04-01"
_PROTOCOL_BETAS = "managed-agents-"
# Headers of the protocol that do not change the meaning. Any other `anthropic-` header that a route does not declare would.
_HARMLESS = frozenset({"anthropic-version", "anthropic-beta", "anthropic-dangerous-direct-browser-access"})
# Conditions and method overrides: a server that ignores them does what the client meant to prevent.
_CONDITIONS = frozenset({"if-match", "if-unmodified-since", "x-http-method-override"})
_OF_SOME_ROUTES = frozenset({"last-event-id", "idempotency-key"})
_SINGLE = frozenset({"x-api-key", "authorization", "content-type"})


@dataclass(frozen=True)
class Declared:
    """The parameters that a route takes.

    Attributes:
        query: Names in the order of the signature; a list is named `states[]`.
        lists: Those of them that are lists. A client may also write `states=a`, without the brackets.
        may_be_empty: Those of them whose type accepts an empty value.
        headers: Lower-case names.
    """

    query: tuple[str, ...]
    lists: frozenset[str]
    may_be_empty: frozenset[str]
    headers: frozenset[str]

    @classmethod
    def of(cls, dependant: Dependant) -> Self:
        """Reads the signature of a route and of its dependencies."""
        fields = [field for part in _walk(dependant) for field in part.query_params]
        headers = [field.alias.lower() for part in _walk(dependant) for field in part.header_params]
        return cls(
            query=tuple(field.alias for field in fields),
            lists=frozenset(field.alias for field in fields if field.alias.endswith("[]")),
            may_be_empty=frozenset(f.alias for f in fields if not f.validate("", {}, loc=("query",))[1]),
            headers=frozenset(headers),
        )

    def check(self, request: Request) -> None:
        """Raises InvalidInput that names the first header or query parameter which the route does not take."""
        self._check_headers(request)
        self._check_query(request)

    def _check_query(self, request: Request) -> None:
        given = request.query_params
        for name, value in given.multi_items():
            if "\x00" in name + value:
                raise InvalidInput("contains a NUL character", name)
            listed = f"{name}[]"
            if name not in self.query and listed not in self.lists:
                raise InvalidInput(_unknown(name, self.query), name[:MAX_NAME_CHARS])
            if not value and name not in self.may_be_empty:
                raise InvalidInput("is empty; leave it out instead", name)
            if name in self.query and name not in self.lists and len(given.getlist(name)) > 1:
                raise InvalidInput("is given more than once", name)
            if listed in self.lists and listed in given:
                raise InvalidInput(f"is also given as {listed}; use one of them", name)

    def _check_headers(self, request: Request) -> None:
        names = set(request.headers)
        for name in sorted(names):
            if name.startswith("anthropic-") and name not in _HARMLESS | self.headers:
                raise InvalidInput("this service does not support this header; leave it out", name)
            if name in _CONDITIONS or (name in _OF_SOME_ROUTES and name not in self.headers):
                raise InvalidInput("this route does not take this header; leave it out", name)
        for name in sorted(names & (_SINGLE | self.headers)):
            if len(request.headers.getlist(name)) > 1:
                raise InvalidInput("is given more than once", name)
        _check_betas(request.headers.getlist("anthropic-beta"))


def check_path(request: Request) -> None:
    """Raises NotFound for an id that is not well-formed."""
    for value in request.path_params.values():
        if "\x00" in value or len(value) > MAX_ID_CHARS:
            raise NotFound("not found, or not visible to this caller")


async def check_no_body(request: Request) -> None:
    """Raises InvalidInput for a body. An empty object counts as none: some clients send one with every POST."""
    try:
        body = await read_body(request, NO_BODY_BYTES)
    except TooLarge as error:
        raise InvalidInput("this route takes none", "body") from error
    if body.strip() and "".join(body.decode(errors="replace").split()) != "{}":
        raise InvalidInput("this route takes none", "body")


def _walk(dependant: Dependant) -> Iterator[Dependant]:
    yield dependant
    for below in dependant.dependencies:
        yield from _walk(below)


def _unknown(name: str, taken: Collection[str]) -> str:
    if not taken:
        return "no such parameter; this route takes none"
    near = difflib.get_close_matches(name[:MAX_NAME_CHARS].lower(), taken, 1)
    hint = f"; did you mean {near[0]}?" if near else "."
    return f"no such parameter{hint} This route takes {', '.join(taken)}"


def _check_betas(given: Iterable[str]) -> None:
    """Other betas belong to other routes of the protocol: a client may send them with every request."""
    for beta in ",".join(given).split(","):
        if beta.strip().startswith(_PROTOCOL_BETAS) and beta.strip() != PROTOCOL_BETA:
            raise InvalidInput(f"this service speaks {PROTOCOL_BETA}", "anthropic-beta")
