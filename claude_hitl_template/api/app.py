"""The application under /v1: the routers, put together with the service they serve."""

import json

from fastapi import FastAPI

from claude_hitl_template import __version__
from claude_hitl_template.api import openapi, problems
from claude_hitl_template.api.auth import Authenticator, WrongKeys
from claude_hitl_template.api.followers import Followers
from claude_hitl_template.api.routers import ROUTERS
from claude_hitl_template.api.service import Service


def build_app(service: Service) -> FastAPI:
    """The API of `service`. Every failure is JSON in the protocol's shape, so mount it; do not merge it into another."""
    app = application(str(service.facts().get("version", "")))
    app.state.service = service
    app.state.followers = Followers(service.store.wait_events)
    app.state.authenticator = Authenticator(
        service.store,
        operator_key=service.operator_key,
        requests_per_minute=service.requests_per_minute,
        wrong_keys=WrongKeys(service.wrong_keys_per_minute),
    )
    return app


def application(version: str) -> FastAPI:
    """The routes and their document, without a service: no request can be answered."""
    # No pages of documentation: they would be open to everyone, and load their scripts from elsewhere.
    app = FastAPI(
        title="claude-hitl",
        version=version,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        generate_unique_id_function=lambda route: route.name,
    )
    problems.install(app)
    for router in ROUTERS:
        app.include_router(router)
    openapi.install(app)
    return app


def document() -> str:
    """The API document of this version, as `docs/openapi.json` has it."""
    return json.dumps(application(__version__).openapi(), indent=2, ensure_ascii=False) + "\n"
