"""The canonical JSON text of a value."""

import math

import pytest

from claude_hitl_template.domain.canonical_json import canonical_json, digest
from claude_hitl_template.errors import InvalidInput


def test_canonical_json_is_one_text_for_one_value() -> None:
    assert canonical_json({"b": [1, True, None], "a": "é\n"}) == '{"a":"é\\n","b":[1,true,null]}'
    assert digest({"b": 1, "a": 2}) == digest({"a": 2, "b": 1})
    assert digest({}) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"


@pytest.mark.parametrize("value", [math.nan, math.inf, "\ud800", {"\udfff": 1}, {1, 2}, b"x", {1: 1, "a": 2}])
def test_what_json_cannot_say_is_refused(value: object) -> None:
    for refuse in (canonical_json, digest):
        with pytest.raises(InvalidInput):
            refuse(value)
