"""The routes of the API, internal ones included, from its own OpenAPI document."""

from typing import Any

from claude_hitl_template.api import openapi
from claude_hitl_template.api.app import application

# By "METHOD /path": the operation of the OpenAPI document.
OPERATIONS: dict[str, dict[str, Any]] = {
    f"{method.upper()} {path}": operation
    for path, methods in openapi.describe(application("testing"))["paths"].items()
    for method, operation in methods.items()
}


def parameters(route: str, where: str = "query") -> list[dict[str, Any]]:
    """Returns a route's parameters in its query or headers."""
    return [p for p in OPERATIONS[route].get("parameters", ()) if p["in"] == where]


def takes_empty(parameter: dict[str, Any]) -> bool:
    """Whether an empty value is valid for the parameter."""
    schema = parameter["schema"]
    return schema.get("type") == "string" and not {"minLength", "enum", "format"} & set(schema)
