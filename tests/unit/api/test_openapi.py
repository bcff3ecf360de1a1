"""The API document comes from the routes, and changes only when someone accepts the change."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from claude_hitl_template.api.app import document

COMMITTED = Path(__file__).parents[3] / "docs/openapi.json"


@pytest.fixture(scope="module")
def generated() -> dict[str, Any]:
    return json.loads(document())


def operations(found: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, methods in found["paths"].items():
        for method, operation in methods.items():
            yield f"{method.upper()} {path}", operation


def parts(found: dict[str, Any]) -> dict[str, Any]:
    """What a change may concern, by a name that says where to look."""
    return (
        dict(operations(found))
        | found["components"]["schemas"]
        | found["components"]["responses"]
        | {"info": found["info"]}
    )


def test_the_api_is_the_committed_one(generated: dict[str, Any]):
    committed = json.loads(COMMITTED.read_text())
    before, now = parts(committed), parts(generated)
    changed = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    accept = "If this is intended, run ./hitl openapi and commit docs/openapi.json."
    assert not changed, f"the API changed: {', '.join(changed)}. {accept}"
    assert committed == generated, f"the API document changed outside of its operations and schemas. {accept}"


def test_every_operation_has_a_name_and_a_description(generated: dict[str, Any]):
    ids = [operation["operationId"] for _, operation in operations(generated)]
    assert len(set(ids)) == len(ids)
    for route, operation in operations(generated):
        assert operation["operationId"].isidentifier(), route
        assert operation["description"], route
        assert len(operation["tags"]) == 1, route


def test_every_operation_documents_the_errors_that_its_kind_has(generated: dict[str, Any]):
    for route, operation in operations(generated):
        needed = {"200", "400", "503"}
        needed |= {"401", "429"} if operation["security"] else set()
        needed |= {"413"} if "requestBody" in operation else set()
        needed |= {"404"} if "{" in route else set()
        assert needed <= set(operation["responses"]), route
        for status, response in operation["responses"].items():
            name = response.get("$ref", "").rpartition("/")[2]
            found = generated["components"]["responses"][name] if name else response
            assert "request-id" in found["headers"], (route, status)


@pytest.mark.parametrize("kind", ["schemas", "responses"])
def test_every_reference_leads_somewhere_and_nothing_is_left_over(generated: dict[str, Any], kind: str):
    named = {text.split('"')[0] for text in json.dumps(generated).split(f'"#/components/{kind}/')[1:]}
    assert named == set(generated["components"][kind])
