"""An error of a body names the field as its sender knows it, without the names that pydantic puts in between."""

from typing import Any

import pytest

from claude_hitl_template.api.bodies import SendEvents
from claude_hitl_template.api.validation import parse
from claude_hitl_template.errors import InvalidInput

TEXT: dict[str, Any] = {"type": "text", "text": "x"}


def image(data: str) -> dict[str, Any]:
    return {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}}


@pytest.mark.parametrize(
    ("content", "field"),
    [
        ([{**TEXT, "nonsense": 1}], "events.0.content.0.nonsense"),  # `text` is a kind and a field
        ([{"type": "text"}], "events.0.content.0.text"),
        ([{**TEXT, "text": 1}], "events.0.content.0.text"),
        ([TEXT, image("!")], "events.0.content.1.source.data"),
        ([TEXT, TEXT, TEXT, image("!")], "events.0.content.3.source.data"),
        ([image("aGk="), {**image("aGk="), "image": 1}], "events.0.content.1.image"),
        ([{"type": "image"}], "events.0.content.0.source"),
        ([{"type": "document"}], "events.0.content.0"),
        ([], "events.0.content"),
    ],
)
def test_a_field_is_named_by_its_path_in_what_was_sent(content: list[Any], field: str):
    with pytest.raises(InvalidInput) as refused:
        parse(SendEvents, {"events": [{"type": "user.message", "content": content}]})
    assert refused.value.field == field
