"""The composition root: the application and the Ray Serve deployments it is made of.

    python -m claude_hitl_template.query      deploys to the cluster at RAY_ADDRESS and waits until it is healthy

`fast_app` is what Serve deploys: an ingress over the ledger and the supervisor.
"""

import logging
import sys
from importlib.metadata import version
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.exceptions import TaskCancelledError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from claude_hitl_template import __version__, code_version, logs
from claude_hitl_template.api import problems
from claude_hitl_template.api.app import Service, build_app
from claude_hitl_template.errors import ConfigError, NotFound, Unauthorized
from claude_hitl_template.ledger import APP_NAME, LedgerService, remote_store
from claude_hitl_template.model import tokens
from claude_hitl_template.model.endpoint import (
    AnthropicUpstream,
    OfflineUpstream,
    Upstream,
    build_router,
    upstream_client,
)
from claude_hitl_template.model.offline import Scenarios
from claude_hitl_template.models import Agent, Environment
from claude_hitl_template.secrets import (
    hash_api_key,
    operator_key,
    read_api_key,
    read_model_key,
    read_signing_key,
)
from claude_hitl_template.settings import Settings
from claude_hitl_template.supervisor import SupervisorService

ROUTE = "/claude-hitl"
_LIGHT: dict[str, Any] = {
    "num_cpus": 0
}  # Serve asks for a CPU a replica otherwise, and sessions then wait for ever
_STREAMS = 10_000  # requests that may be under way in one replica: a stream is one

# Serve pickles the outer application when it is deployed; what stands behind it is built in the replica.
_inner: dict[str, ASGIApp] = {}


async def _api(scope: Scope, receive: Receive, send: Send) -> None:
    await _inner["api"](scope, _until_gone(receive), send)


async def _model(scope: Scope, receive: Receive, send: Send) -> None:
    await _inner["model"](scope, _until_gone(receive), send)


def _until_gone(receive: Receive) -> Receive:
    """Serve tells of a client that went by an error; ASGI has a message for it."""

    async def until_gone() -> Message:
        try:
            return await receive()
        except TaskCancelledError:
            return {"type": "http.disconnect"}

    return until_gone


def _stand_behind(**apps: ASGIApp) -> None:
    """A function of this module, so that it fills this module's table: the deployment's class is a pickled copy."""
    _inner.update(apps)


outer = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
problems.install(outer)  # for what misses both mounts
outer.mount("/model", _model)
outer.mount("/", _api)


@serve.deployment(
    name="Ledger",
    num_replicas=1,
    max_ongoing_requests=_STREAMS,
    ray_actor_options=_LIGHT,
    logging_config={"enable_access_log": False},  # a line for each call of the Store says nothing
)
class Ledger(LedgerService):
    """The only process with a database connection."""


@serve.deployment(name="Supervisor", num_replicas=1, max_ongoing_requests=100, ray_actor_options=_LIGHT)
class Supervisor(SupervisorService):
    """Starts, watches and recovers owners."""


@serve.deployment(name="Ingress", max_ongoing_requests=_STREAMS, ray_actor_options=_LIGHT)
@serve.ingress(outer)  # pyright: ignore[reportUntypedClassDecorator]
class Ingress:
    """REST, event streams, and the model endpoint. Stateless."""

    def __init__(self, ledger: Any, supervisor: Any) -> None:
        settings = Settings.load()
        logs.configure(settings.log_level)
        self._store = remote_store(ledger)
        upstream, model = _upstream(settings)
        signing_key = read_signing_key(settings)

        async def verify(token: str) -> None:
            session_id, epoch = tokens.check(signing_key, token)
            try:
                lease = (await self._store.get_session(session_id)).lease
            except NotFound:
                lease = None
            if lease is None or lease.epoch != epoch:
                raise Unauthorized("another process drives this session now")

        async def drain(grace_s: float) -> int:
            return await supervisor.drain.remote(grace_s)

        service = Service(
            store=self._store,
            agent=Agent(model=settings.model),
            environment=Environment(),
            facts={
                "version": __version__,
                "code": code_version(),
                "model": model,
                "ray": version("ray"),
            },
            drain=drain,
            operator_key=operator_key(settings),
            max_request_bytes=settings.max_request_bytes,
            requests_per_minute=settings.requests_per_minute,
        )
        model_app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        model_app.include_router(build_router(upstream, verify))
        _stand_behind(model=model_app, api=build_app(service))
        self._first_key = hash_api_key(read_api_key(settings))

    async def reconfigure(self, _user_config: Any) -> None:
        await self._store.add_key("first key", self._first_key)


def _upstream(settings: Settings) -> tuple[Upstream, str]:
    """What answers the sessions' model requests, and its name for humans."""
    key = read_model_key(settings)
    if key is None:
        return OfflineUpstream(Scenarios.load()), "offline"
    upstream = AnthropicUpstream(settings.anthropic_base_url, key, upstream_client())
    return upstream, settings.anthropic_base_url


def build(settings: Settings) -> Any:
    code = {"code": code_version()}
    ledger = Ledger.bind()
    supervisor = Supervisor.bind(ledger)
    ingress = Ingress.options(num_replicas=settings.ingress_replicas, user_config=code)
    return ingress.bind(ledger, supervisor)


def main() -> None:
    """Deploys, and returns when the application answers. Raises ConfigError."""
    settings = Settings.load()
    ray.init(namespace="serve", log_to_driver=False, logging_level=logging.WARNING)
    serve.start(
        proxy_location="EveryNode",
        http_options={"host": settings.host, "port": settings.serve_port, "request_timeout_s": None},
    )
    serve.run(build(settings), name=APP_NAME, route_prefix=ROUTE)


if __name__ == "__main__":
    # Under its own name, so that replicas import it instead of copying it.
    from claude_hitl_template import query  # noqa: PLW0406

    logs.configure("INFO")
    try:
        query.main()
    except ConfigError as error:
        sys.exit(f"error: {error}")
