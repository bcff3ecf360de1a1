"""JSON bodies that every reader understands in the same way, and that can be stored as text."""

import json
import math
from collections.abc import Iterator
from typing import Any

from fastapi import Request
from pydantic import BaseModel, ConfigDict
from starlette.requests import ClientDisconnect

from claude_hitl_template.errors import InvalidInput, TooLarge

MAX_DEPTH = 64


class Body(BaseModel):
    """Base of request bodies. Unknown fields are errors, so that a typing mistake is not silently ignored, and so are
    values of another type: "false" is not a boolean."""

    model_config = ConfigDict(extra="forbid", strict=True)


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Reads the whole body.

    Raises:
        TooLarge: As soon as more than `max_bytes` arrived.
        InvalidInput: The client disconnected before the end.
    """
    raw = bytearray()
    try:
        async for chunk in request.stream():
            raw += chunk
            if len(raw) > max_bytes:
                raise TooLarge(f"the request is over {max_bytes} bytes")
    except ClientDisconnect as error:
        raise InvalidInput("the connection ended before the body did") from error
    return bytes(raw)


def check_content_headers(request: Request) -> None:
    """Raises InvalidInput unless the headers announce uncompressed JSON, or nothing."""
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise InvalidInput("send application/json", "Content-Type")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise InvalidInput("send the body uncompressed", "Content-Encoding")


def loads(raw: bytes) -> Any:
    """Parses a body.

    Raises InvalidInput for what is not UTF-8 JSON, and for duplicate names, NaN, Infinity, numbers beyond 64 bits, NUL
    characters, lone surrogates and nesting deeper than `MAX_DEPTH`; its field names the place.
    """
    try:
        value = json.loads(raw.decode(), parse_constant=_refuse_constant, object_pairs_hook=_unique_names)
    except (UnicodeDecodeError, RecursionError, ValueError) as error:
        raise InvalidInput(f"the body is not JSON: {error}") from error
    _check_values(value)
    return value


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON value")


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Parsers differ in which of two equal names they take: what is shown and what is stored must not differ."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidInput("is given twice", twice)
    return found


def _check_values(root: Any) -> None:
    for path, item, depth in _walk(root):
        if depth > MAX_DEPTH:
            raise InvalidInput(f"nested deeper than {MAX_DEPTH}", path[:200])
        if isinstance(item, str):
            if "\x00" in item:
                raise InvalidInput("contains a NUL character", path)
            if any("\ud800" <= char <= "\udfff" for char in item):
                raise InvalidInput("contains a lone surrogate; send well-formed Unicode", path)
        if isinstance(item, float) and not math.isfinite(item):
            raise InvalidInput("is too large a number", path)
        if isinstance(item, int) and not isinstance(item, bool) and abs(item) >= 1 << 63:
            raise InvalidInput("is too large a number", path)


def _walk(root: Any) -> Iterator[tuple[str, Any, int]]:
    """(dotted path, value, depth) of each value and each name."""
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
