"""Validation errors that name the field as the caller knows it."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from fastapi.exceptions import RequestValidationError
from pydantic import TypeAdapter, ValidationError

from claude_hitl_template.errors import InvalidInput

_NOT_AN_OBJECT = {"model_type", "model_attributes_type", "dict_type"}


def parse[T](kind: type[T] | TypeAdapter[T], value: Any, at: str = "") -> T:
    """Validates `value` as a `kind`. `at` is the dotted path of `value` in the request.

    Raises InvalidInput with the path of the first thing that is wrong.
    """
    adapter: TypeAdapter[T] = kind if isinstance(kind, TypeAdapter) else TypeAdapter(kind)
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidInput(
            _message(first), ".".join([*([at] if at else []), *_path(first, value)])
        ) from error


def invalid_request(error: RequestValidationError) -> InvalidInput:
    """What FastAPI found wrong first, as our error: `limit: ...`, `events.0.content: ...`."""
    first = error.errors()[0]
    where, *loc = first["loc"]
    if where != "body":  # a list may be sent with and without brackets
        return InvalidInput(_message(first), str(loc[0]).removesuffix("[]"))
    return InvalidInput(_message(first), ".".join(_path({**first, "loc": loc}, error.body)))


def _message(error: Mapping[str, Any]) -> str:
    if error["type"] in _NOT_AN_OBJECT:
        return "a JSON object"
    return str(error["msg"]).removeprefix("Value error, ")


def _path(error: Mapping[str, Any], value: Any) -> list[str]:
    """The error's location without the names of types that pydantic puts between the fields of a union.

    A part that is not in `value` is such a name, except for the last part of a missing field. A part that is in it may
    be one, too: `text` is both a type of content and a field of it. Then the reading that finds the last part is right.
    """
    return _readings(error["loc"], value, error["type"] == "missing")[1]


def _readings(loc: Sequence[str | int], inside: Any, missing: bool) -> tuple[bool, list[str]]:
    """The best reading of `loc`: whether it finds the last part, and the path."""
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
