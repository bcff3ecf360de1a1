"""Reading requests: bodies that are what JSON should be, parsed with errors that name the field."""

import json
from collections.abc import Iterator
from datetime import datetime
from typing import Any

from fastapi import Request
from pydantic import BaseModel, TypeAdapter, ValidationError

from claude_hitl_template.errors import InvalidInput, TooLarge
from claude_hitl_template.store.protocol import TimeRange

MAX_DEPTH = 64


async def read_json(request: Request, max_bytes: int) -> Any:
    """The body as JSON. Raises TooLarge, or InvalidInput for what is not UTF-8 JSON or could not be stored as text."""
    raw = bytearray()
    async for chunk in request.stream():
        raw += chunk
        if len(raw) > max_bytes:
            raise TooLarge(f"the request is over {max_bytes} bytes")
    try:
        value = json.loads(bytes(raw).decode(), parse_constant=_no_constant)
    except (UnicodeDecodeError, RecursionError, ValueError) as error:
        raise InvalidInput(f"the body is not JSON: {error}") from error
    _check(value)
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON value")


def _check(value: Any) -> None:
    for path, item, depth in _walk(value):
        if depth > MAX_DEPTH:
            raise InvalidInput(f"nested deeper than {MAX_DEPTH}", path[:200])
        if isinstance(item, str):
            if "\x00" in item:
                raise InvalidInput("holds a NUL character", path)
            if any("\ud800" <= char <= "\udfff" for char in item):
                raise InvalidInput("holds a lone surrogate; send well-formed Unicode", path)
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
        path = ".".join([*([at] if at else []), *(str(part) for part in first["loc"])])
        raise InvalidInput(str(first["msg"]), path) from error


def query_list(request: Request, name: str) -> list[str]:
    """`name[]=a&name[]=b`, as the official SDK sends it, or `name=a&name=b`."""
    return [*request.query_params.getlist(f"{name}[]"), *request.query_params.getlist(name)]


def query_choice[T](request: Request, name: str, kind: TypeAdapter[T]) -> list[T]:
    return [parse(kind, value, name) for value in query_list(request, name)]


def query_times(request: Request) -> TimeRange:
    """`created_at[gt]` and so on."""
    found: dict[str, datetime] = {}
    for bound in ("gt", "gte", "lt", "lte"):
        name = f"created_at[{bound}]"
        if name in request.query_params:
            at = parse(datetime, request.query_params[name], name)
            if at.tzinfo is None:
                raise InvalidInput("give the time zone, as in 2026-01-31T12:00:00Z", name)
            found[bound] = at
    return TimeRange(**found)


def query_limit(request: Request, default: int = 20, most: int = 1000) -> int:
    raw = request.query_params.get("limit", str(default))
    if not raw.isdecimal() or not 1 <= int(raw[:9]) <= most:
        raise InvalidInput(f"a whole number from 1 to {most}", "limit")
    return int(raw)


def query_order(request: Request, default: str) -> Any:
    order = request.query_params.get("order", default)
    if order not in ("asc", "desc"):
        raise InvalidInput("asc or desc", "order")
    return order


def query_page(request: Request) -> str | None:
    return request.query_params.get("page") or None


class Body(BaseModel):
    """Base of request bodies: an unknown field is an error, so that a typing mistake is not silently ignored."""

    model_config = {"extra": "forbid"}
