"""The database's JSON text: any value that Python's own JSON takes is written and read."""

import json
from typing import Any

import pytest

from claude_hitl_template.store import json_text


def nested(levels: int) -> Any:
    return [nested(levels - 1)] if levels else "ü \u2028"


@pytest.mark.parametrize(
    "value",
    [
        {"ü": [None, True, 1.5, -0.0, 1e22, 2**70], "empty": {}},
        nested(150),
        nested(220),  # read by Python's JSON
        nested(300),  # written by it, too
        float("inf"),
    ],
)
def test_a_value_is_read_as_it_was_written(value: Any) -> None:
    text = json_text.dumps(value)
    assert json_text.loads(text) == json.loads(text) == value


def test_half_a_surrogate_pair_that_was_written_escaped_is_read() -> None:
    assert json_text.loads('"\\ud800"') == "\ud800"


def test_what_is_not_json_is_refused() -> None:
    with pytest.raises(TypeError):
        json_text.dumps({"a": object()})
    with pytest.raises(ValueError):
        json_text.loads("{'a': 1}")
