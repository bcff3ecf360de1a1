"""The API document. It comes from the routes; only what FastAPI cannot know is added here.

JSON Schema cannot express some things that are refused all the same: NUL and lone surrogates in texts, numbers beyond
64 bits, names that are given twice.
"""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from claude_hitl_template.api import event_resources, resources
from claude_hitl_template.api.resources import reference

_SECURITY_SCHEMES = {
    "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    "bearer": {"type": "http", "scheme": "bearer"},
}
# Where `./hitl up` starts the service, unless the settings say otherwise.
_SERVER = {"url": "http://127.0.0.1:8001/claude-hitl", "description": "A service on this machine."}
_INTERNAL = "/v1/internal/"  # for the command line of the same version only
# The messages of an event stream, which the route writes itself: FastAPI has no model of them.
_STREAMED = (resources.StreamFrame, event_resources.Event, resources.Preview, resources.Ping)


def install(app: FastAPI) -> None:
    """Makes `app.openapi()` return the document, without internal routes. It is built once, on the first call."""
    app.openapi = lambda: app.openapi_schema or _publish(app)


def _publish(app: FastAPI) -> dict[str, Any]:
    document = describe(app)
    paths = document["paths"].items()
    document["paths"] = {path: methods for path, methods in paths if not path.startswith(_INTERNAL)}
    schemas = document["components"]["schemas"]
    while unused := [name for name in schemas if reference(name) not in _references(document)]:
        for name in unused:
            del schemas[name]
    app.openapi_schema = document
    return document


def _references(part: Any) -> list[dict[str, Any]]:
    """All references in a part of the document."""
    if isinstance(part, dict):
        own = [{"$ref": part["$ref"]}] if "$ref" in part else []
        return own + [found for value in part.values() for found in _references(value)]
    return [found for value in part for found in _references(value)] if isinstance(part, list) else []


def describe(app: FastAPI) -> dict[str, Any]:
    """The document with the internal routes, too."""
    document = get_openapi(
        title=app.title,
        version=app.version,
        routes=app.routes,
        servers=[_SERVER],
        separate_input_output_schemas=False,  # two schemas of one title are one class for generators of clients
    )
    components = document["components"]
    _, streamed = models_json_schema(
        [(model, "validation") for model in _STREAMED], ref_template=resources.REFERENCE
    )
    schemas = {**streamed["$defs"], **components["schemas"]}
    for name in ("HTTPValidationError", "ValidationError"):
        del schemas[name]
    components["schemas"] = dict(sorted(schemas.items()))
    components["responses"] = _shared_errors(document)
    components["securitySchemes"] = _SECURITY_SCHEMES
    return document


def _shared_errors(document: dict[str, Any]) -> dict[str, Any]:
    """Replaces the errors that operations have in common by references, which the returned components resolve."""
    shared: dict[str, Any] = {}
    for operation in (one for path in document["paths"].values() for one in path.values()):
        responses = operation["responses"]
        responses.pop("422", None)  # FastAPI assumes it; ours is the documented 400
        for status in responses.keys() - {"200"}:
            name = f"Error{status}"
            if shared.setdefault(name, responses[status]) == responses[status]:
                responses[status] = {"$ref": f"#/components/responses/{name}"}
    return dict(sorted(shared.items()))
