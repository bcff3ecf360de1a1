"""Every route of the API, as its own document has it."""

from typing import Any

from claude_hitl_template.api.app import application

# By "METHOD /path": the operation of the OpenAPI document.
OPERATIONS: dict[str, dict[str, Any]] = {
    f"{method.upper()} {path}": operation
    for path, methods in application("testing").openapi()["paths"].items()
    for method, operation in methods.items()
}


def parameters(route: str, where: str = "query") -> list[dict[str, Any]]:
    """What a route takes in its query or headers."""
    return [p for p in OPERATIONS[route].get("parameters", ()) if p["in"] == where]


def takes_empty(parameter: dict[str, Any]) -> bool:
    """Whether an empty value is one of the parameter's own."""
    schema = parameter["schema"]
    return schema.get("type") == "string" and not {"minLength", "enum", "format"} & set(schema)
