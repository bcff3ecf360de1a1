"""Reading requests: bodies that are what JSON should be, parsed with errors that name the field."""

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Self, cast

from fastapi import Request
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from starlette.requests import ClientDisconnect

from claude_hitl_template.domain.canonical_json import digest
from claude_hitl_template.errors import InvalidInput, NotFound, TooLarge
from claude_hitl_template.store.protocol import TimeRange

MAX_DEPTH = 64
MAX_ID_CHARS = 256
_LISTING_CHARS = 16
_RFC_3339 = re.compile(r"\d{4}-\d\d-\d\d[Tt]\d\d:\d\d:\d\d(\.\d{1,9})?([Zz]|[+-]\d\d:\d\d)", re.ASCII)
_MAX_DIGITS = 9  # of a number in a URL: more than any limit, and always quick to read


async def read_json(request: Request, max_bytes: int) -> Any:
    """The body as JSON. Raises TooLarge, or InvalidInput for what is not UTF-8 JSON or could not be stored as text."""
    _check_headers(request)
    raw = await read_body(request, max_bytes)
    try:
        value = json.loads(raw.decode(), parse_constant=_no_constant, object_pairs_hook=_object)
    except (UnicodeDecodeError, RecursionError, ValueError) as error:
        raise InvalidInput(f"the body is not JSON: {error}") from error
    _check(value)
    return value


def _check_headers(request: Request) -> None:
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise InvalidInput("send application/json", "Content-Type")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise InvalidInput("send the body as it is, not compressed", "Content-Encoding")


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Raises TooLarge as soon as it is longer, InvalidInput when the client goes before its end."""
    raw = bytearray()
    try:
        async for chunk in request.stream():
            raw += chunk
            if len(raw) > max_bytes:
                raise TooLarge(f"the request is over {max_bytes} bytes")
    except ClientDisconnect as error:
        raise InvalidInput("the connection ended before the body did") from error
    return bytes(raw)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON value")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Readers differ in which of two equal names they take: what was shown and what is stored must not."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidInput("is given twice", twice)
    return found


def _check(value: Any) -> None:
    for path, item, depth in _walk(value):
        if depth > MAX_DEPTH:
            raise InvalidInput(f"nested deeper than {MAX_DEPTH}", path[:200])
        if isinstance(item, str):
            if "\x00" in item:
                raise InvalidInput("holds a NUL character", path)
            if any("\ud800" <= char <= "\udfff" for char in item):
                raise InvalidInput("holds a lone surrogate; send well-formed Unicode", path)
        if isinstance(item, float) and not math.isfinite(item):
            raise InvalidInput("is a number too large to keep", path)
        if isinstance(item, int) and not isinstance(item, bool) and abs(item) >= 1 << 63:
            raise InvalidInput("is a number too large to keep", path)


def _walk(root: Any) -> Iterator[tuple[str, Any, int]]:
    left: list[tuple[str, Any, int]] = [("", root, 0)]
    while left:
        path, value, depth = left.pop()
        yield path, value, depth
        if depth > MAX_DEPTH:
            continue
        if isinstance(value, dict):
            for key, item in value.items():
                here = f"{path}.{key}" if path else str(key)
                left.append((here, item, depth + 1))
                left.append((f"{here} (its name)", key, depth + 1))
        elif isinstance(value, list):
            left += [(f"{path}.{i}" if path else str(i), item, depth + 1) for i, item in enumerate(value)]


def parse[T](kind: type[T] | TypeAdapter[T], value: Any, at: str = "") -> T:
    """`value` as a `kind`. Raises InvalidInput with the dotted path of the first thing that is wrong."""
    adapter: TypeAdapter[T] = kind if isinstance(kind, TypeAdapter) else TypeAdapter(kind)
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join([*([at] if at else []), *_path(first["loc"], value, first["type"] == "missing")])
        wrong = (
            "a JSON object"
            if first["type"] in _NO_OBJECT
            else str(first["msg"]).removeprefix("Value error, ")
        )
        raise InvalidInput(wrong, path) from error


_NO_OBJECT = {"model_type", "model_attributes_type", "dict_type"}


def _path(loc: Sequence[str | int], value: Any, missing: bool) -> list[str]:
    """`loc` without the names of types that pydantic puts between the fields of a union.

    What is not in `value` is such a name, but for the last part when it is `missing`. What is in it may be one, too:
    `text` is a kind of content and a field of it. Then the reading that finds the last part is the right one.
    """
    return _readings(loc, value, missing)[1]


def _readings(loc: Sequence[str | int], inside: Any, missing: bool) -> tuple[bool, list[str]]:
    """The best reading: whether it finds the last part, and the path."""
    if not loc:
        return True, []
    part, rest = loc[0], loc[1:]
    found: list[tuple[bool, list[str]]] = [(True, [str(part)]) if missing and not rest else (False, [])]
    if isinstance(inside, list) and isinstance(part, int):  # never the name of a type
        if part < len(inside):
            found.append(_below(part, _readings(rest, inside[part], missing)))
        return max(found, key=_quality)
    if rest:
        found.append(_readings(rest, inside, missing))
    if isinstance(inside, dict) and part in inside:
        found.append(_below(part, _readings(rest, cast(Any, inside)[part], missing)))
    return max(found, key=_quality)


def _below(part: str | int, reading: tuple[bool, list[str]]) -> tuple[bool, list[str]]:
    return reading[0], [str(part), *reading[1]]


def _quality(reading: tuple[bool, list[str]]) -> tuple[bool, int]:
    return reading[0], len(reading[1])


def query_list(request: Request, name: str) -> list[str]:
    """`name[]=a&name[]=b`, as the official SDK sends it, or `name=a&name=b`."""
    return [*request.query_params.getlist(f"{name}[]"), *request.query_params.getlist(name)]


def query_choice[T](request: Request, name: str, kind: TypeAdapter[T]) -> list[T]:
    return [parse(kind, value, name) for value in query_list(request, name)]


def query_times(request: Request) -> TimeRange:
    """`created_at[gt]` and so on."""
    names = {bound: f"created_at[{bound}]" for bound in ("gt", "gte", "lt", "lte")}
    given = {bound: name for bound, name in names.items() if name in request.query_params}
    return TimeRange(**{bound: _time(request.query_params[name], name) for bound, name in given.items()})


def _time(given: str, name: str) -> datetime:
    """RFC 3339, in UTC: pydantic alone would take numbers for seconds since 1970, too."""
    if not _RFC_3339.fullmatch(given):
        raise InvalidInput("a time with its zone, as in 2026-01-31T12:00:00Z", name)
    at = parse(datetime, given.upper(), name)
    try:
        return at.astimezone(UTC)
    except OverflowError as error:
        raise InvalidInput("is before the year 1 or after the year 9999", name) from error


def query_flag(request: Request, name: str) -> bool:
    """False when it is not given."""
    given = request.query_params.get(name, "false")
    if given not in ("true", "false"):
        raise InvalidInput("true or false", name)
    return given == "true"


def query_limit(request: Request, default: int = 20, most: int = 1000) -> int:
    raw = request.query_params.get("limit", str(default))
    number = read_number(raw)
    if number is None or not 1 <= number <= most:
        raise InvalidInput(f"a whole number from 1 to {most}", "limit")
    return number


def read_number(raw: str) -> int | None:
    """A whole number of at most nine digits; None for anything else."""
    return int(raw) if raw.isascii() and raw.isdecimal() and len(raw) <= _MAX_DIGITS else None


def check_url(request: Request) -> None:
    """Raises NotFound for an id that no id looks like, InvalidInput for a parameter that cannot be stored as text."""
    for value in request.path_params.values():
        if "\x00" in value or len(value) > MAX_ID_CHARS:
            raise NotFound("there is nothing of this id")
    for name, value in request.query_params.multi_items():
        if "\x00" in name + value:
            raise InvalidInput("holds a NUL character", name)


def query_order(request: Request, default: str) -> Any:
    order = request.query_params.get("order", default)
    if order not in ("asc", "desc"):
        raise InvalidInput("asc or desc", "order")
    return order


@dataclass(frozen=True)
class Place:
    """Where in a listing a page begins. `page` is the store's own cursor, None at the beginning.

    A cursor on the wire names, by a digest, the listing it belongs to: its address, filters and order. With others it
    would skip or repeat what was listed, without an error.
    """

    page: str | None
    listing: str

    @classmethod
    def of(cls, request: Request, **means: Any) -> Self:
        """`means`: filters and order, as they were understood. Raises InvalidInput for the cursor of another listing."""
        address = {"route": request.scope["route"].path_format, **request.path_params}
        known = TypeAdapter(dict[str, Any]).dump_python({**means, **address}, mode="json")
        listing = digest(known)[:_LISTING_CHARS]
        given = request.query_params.get("page")
        if given is None:
            return cls(None, listing)
        page, _, of_listing = given.rpartition(".")
        if not page or of_listing != listing:
            raise InvalidInput(
                "this is no cursor of this listing; send the request as it was, with next_page of its answer",
                "page",
            )
        return cls(page, listing)

    def behind(self, page: str | None) -> str | None:
        """`next_page` on the wire for the store's."""
        return None if page is None else f"{page}.{self.listing}"


class Body(BaseModel):
    """Base of request bodies: an unknown field is an error, so that a typing mistake is not silently ignored, and so is a
    value of another type: "false" is no boolean."""

    model_config = ConfigDict(extra="forbid", strict=True)
