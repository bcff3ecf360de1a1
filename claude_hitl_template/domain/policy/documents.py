"""Reads policies that people write as YAML or JSON; an error names the line and the field."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from claude_hitl_template.errors import ConfigError


def read_file[T: BaseModel](path: Path, model: type[T], name: str, fix: str) -> T:
    """The document in a file, as `model`.

    Args:
        path: the file.
        model: what it must be.
        name: what an error calls it: the option or setting that names the file.
        fix: what an error advises.

    Raises:
        ConfigError: with the line and the field.
    """
    import yaml  # noqa: PLC0415  (every owner imports this module, and reads no file)

    try:
        text = path.read_text(encoding="utf-8")
        found, node = yaml.safe_load(text), yaml.compose(text, Loader=yaml.SafeLoader)
    except (OSError, UnicodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"{name}: {path} cannot be read: {why}", fix) from error
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{name}: {path}{line}: {problem or 'neither YAML nor JSON'}", fix) from error
    try:
        return model.model_validate({} if found is None else found)
    except ValidationError as error:
        # A misspelled name is reported as missing, too: name the misspelled one.
        first = min(
            error.errors(include_url=False, include_input=False), key=lambda e: e["type"] != "extra_forbidden"
        )
        problem = first["msg"].removeprefix("Value error, ")
        field = ".".join(map(str, first["loc"]))
        where = f", line {_line_of(node, first['loc'])}" if node is not None else ""
        raise ConfigError(f"{name}: {path}{where}: {field + ': ' if field else ''}{problem}", fix) from error


def _line_of(node: Any, place: Sequence[int | str]) -> int:
    """The line of the innermost part of `place` that is there."""
    line = node.start_mark.line + 1
    for part in place:
        if node.id == "sequence" and isinstance(part, int):
            node = node.value[part]
            line = node.start_mark.line + 1
            continue
        pairs = node.value if node.id == "mapping" else []
        found = [(key, value) for key, value in pairs if key.value == part]
        if not found:
            break
        key, node = found[0]
        line = key.start_mark.line + 1
    return line
