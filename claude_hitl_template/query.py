"""The composition root: the application and the Ray Serve deployments it is made of.

    python -m claude_hitl_template.query      deploys to the cluster at RAY_ADDRESS and waits until it is healthy

`fast_app` is what Serve builds from a config file: an ingress over the ledger and the supervisor.
"""

import asyncio
import functools
import logging
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractAsyncContextManager, contextmanager
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import structlog
from fastapi import FastAPI
from pydantic import SecretStr
from ray import serve
from ray.exceptions import RayError, TaskCancelledError
from ray.serve.exceptions import RayServeException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from claude_hitl_template import __version__, code_version
from claude_hitl_template.api import problems
from claude_hitl_template.api.app import Service, build_app
from claude_hitl_template.api.request_ids import with_request_ids
from claude_hitl_template.claude.sandbox import has_sandboxes
from claude_hitl_template.cluster.ledger import APP_NAME, LedgerService, handle, reach
from claude_hitl_template.cluster.supervisor import SupervisorService
from claude_hitl_template.config import build_info, logs
from claude_hitl_template.config.secret_files import (
    SecretFiles,
    hash_api_key,
    operator_key,
    prepare,
    public_prefix,
    read_api_key,
    read_model_key,
    read_panel_login,
    read_signing_key,
)
from claude_hitl_template.config.settings import Settings
from claude_hitl_template.domain.models import Agent, ImageFacts
from claude_hitl_template.errors import ConfigError, NotFound, Unauthorized
from claude_hitl_template.model import tokens
from claude_hitl_template.model.endpoint import (
    Answer,
    AnthropicUpstream,
    Call,
    OfflineUpstream,
    Upstream,
    build_router,
    upstream_client,
)
from claude_hitl_template.model.offline import Scenarios
from claude_hitl_template.store.access import Authority
from claude_hitl_template.store.connect import check_replicas
from claude_hitl_template.store.protocol import Clients, Windows

if TYPE_CHECKING:
    from claude_hitl_template.panel.services import PanelServices

ROUTE = "/claude-hitl"
KODOSUMI = "kodosumi"  # the namespace of its actors
RUNNER_S = 5.0
FACTS_S = 5.0
_LIGHT: dict[str, Any] = {
    "num_cpus": 0,  # Serve asks for a CPU a replica otherwise, and sessions then wait for ever
    # Where the data folder is, with database and secrets: on another host there would be another one.
    "resources": {"node:__internal_head__": 0.001},
}
# What deployments import when they start, and not before.
_LATE = ("store.sql",)
_OF_PANEL = ("panel.entries", "panel.flow", "panel.gateway", "panel.services")
_STREAMS = 10_000  # requests that may be under way in one replica: a stream is one


def _until_gone(app: ASGIApp) -> ASGIApp:
    """Serve tells of a client that went by an error; ASGI has a message for it."""

    async def patient(scope: Scope, receive: Receive, send: Send) -> None:
        async def until_gone() -> Message:
            try:
                return await receive()
            except TaskCancelledError:
                return {"type": "http.disconnect"}

        await app(scope, until_gone, send)

    return patient


@serve.deployment(
    name="Ledger",
    max_ongoing_requests=_STREAMS,
    ray_actor_options=_LIGHT,
    logging_config={"enable_access_log": False},  # a line for each call of the Store says nothing
)
class Ledger(LedgerService):
    """The only processes with a database connection: one on SQLite."""


@serve.deployment(name="Supervisor", num_replicas=1, max_ongoing_requests=100, ray_actor_options=_LIGHT)
class Supervisor(SupervisorService):
    """Starts, watches and recovers owners."""


@serve.deployment(
    name="Ingress",
    max_ongoing_requests=_STREAMS,
    ray_actor_options=_LIGHT,
    logging_config={
        "enable_access_log": False
    },  # with_request_ids has a line for each, with the id that it answered
)
@serve.ingress()  # pyright: ignore[reportUntypedClassDecorator]
class Ingress:
    """REST, event streams, the model endpoint, and the panel's entries. Stateless."""

    def __init__(self, ledger: Any, supervisor: Any) -> None:
        settings = Settings.load()
        logs.configure(settings.log_level)
        upstream = CurrentUpstream(settings)
        signing_key = read_signing_key(settings)
        authority = Authority(signing_key)
        self._store = reach(Clients, ledger, authority.ingress())

        async def verify(token: str) -> None:
            session_id, epoch = tokens.check(signing_key.secret, token)
            try:
                lease = (await self._store.get_session(session_id)).lease
            except NotFound:
                lease = None
            if lease is None or lease.epoch != epoch:
                raise Unauthorized("another process drives this session now")

        async def drain(grace_s: float) -> int:
            return await supervisor.drain.remote(grace_s)

        async def undrain() -> None:
            await supervisor.undrain.remote()

        async def drained_s() -> float:
            return await supervisor.drained_s.remote()

        built, floor = code_facts(), settings.floor()
        self._settings = settings
        service = Service(
            store=self._store,
            agent=default_agent(settings),
            floor=floor,
            environments=settings.all_environments(),
            image_facts=_image_facts,
            facts=lambda: {
                **built,
                "model": upstream.name(),
                "sandbox": sandbox_fact(settings),
                "floor": floor.described(),
            },
            drain=drain,
            undrain=undrain,
            drained_s=drained_s,
            operator_key=operator_key(settings),
            shelf=SecretFiles(settings.secrets_dir),
            max_request_bytes=settings.max_request_bytes,
            requests_per_minute=settings.requests_per_minute,
        )
        model_app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        model_app.include_router(build_router(upstream, verify))
        problems.install_bare(model_app)
        api, model_app = _until_gone(build_app(service)), _until_gone(model_app)
        self._app = with_request_ids(_beside(settings, self._store, authority, api, model_app))

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Asked by Serve once the replica is made, so that nothing of the application is pickled."""
        return self._app

    async def reconfigure(self, _user_config: Any) -> None:
        secret = read_api_key(self._settings)  # as it is now: it may have been replaced
        first = await self._store.set_first_key(hash_api_key(secret), public_prefix(secret))
        if first.revoked_at is not None:
            structlog.get_logger().error(
                "the first API key in the data folder was replaced or revoked: ./hitl keys rotate makes another"
            )


def default_agent(settings: Settings) -> Agent:
    return Agent(model=settings.model)


def _beside(
    settings: Settings, store: Clients, authority: Authority, api: ASGIApp, model: ASGIApp
) -> ASGIApp:
    """One application of the API, the model endpoint and, unless it is switched off, what the panel asks for."""
    if settings.panel:
        return _with_panel(settings, store, authority, api, model)
    outer = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    outer.mount("/model", model)
    outer.mount("/", api)
    return outer


def _with_panel(
    settings: Settings, store: Clients, authority: Authority, api: ASGIApp, model: ASGIApp
) -> ASGIApp:
    # Kodosumi takes long to import, and makes folders: only who serves it has it.
    from claude_hitl_template.panel import entries  # noqa: PLC0415
    from claude_hitl_template.panel.gateway import Front  # noqa: PLC0415
    from claude_hitl_template.panel.users import Guard, PanelAccess, default_login  # noqa: PLC0415

    access = PanelAccess(settings.panel_url, *(read_panel_login(settings) or default_login()))
    front = Front(
        api=api,
        model=model,
        guard=Guard(store, access, settings.approvers),
        own_url=settings.base_url,
        panel_url=settings.panel_url,
        answers=_answers,
    )
    services = _panel_services(settings, store, authority)
    entries.register(front, lambda: services)
    return front


def _panel_services(settings: Settings, store: Clients, authority: Authority) -> "PanelServices":
    from claude_hitl_template.panel.services import PanelServices  # noqa: PLC0415

    return PanelServices(
        store=store,
        agent=default_agent(settings),
        environments=settings.all_environments(),
        max_upload_bytes=settings.max_upload_bytes,
        panel_url=settings.panel_url,
        window=lambda session_id: _window(authority.window(session_id)),
        is_open=_is_open,
        sandbox=sandbox_fact(settings),
    )


def sandbox_fact(settings: Settings) -> str:
    """What this service's sessions run in, as far as it is known here: "on", "off" or, where there are none, "none"."""
    return settings.sandbox if has_sandboxes() else "none"


async def _image_facts(image: str) -> ImageFacts | None:
    """What the supervisor knows of an image; None while it does not know, or does not answer."""
    supervisor: Any = serve.get_deployment_handle(Supervisor.name, APP_NAME).options(_by_reference=False)
    try:
        return await asyncio.wait_for(supervisor.image_facts.remote(image), FACTS_S)
    except (RayError, RayServeException, TimeoutError):
        return None


async def _is_open(flow_id: str, role_id: str) -> bool:
    """Whether a flow lives, and is that role's: the panel shows a flow to whoever launched it only."""
    return await _ask_runner(flow_id, "get_username") == role_id and bool(
        await _ask_runner(flow_id, "is_active")
    )


async def _answers(flow_id: str) -> bool:
    return await _ask_runner(flow_id, "get_locks") is not None


async def _ask_runner(flow_id: str, method: str) -> Any:
    """What a flow's runner answers; None when it is gone, or does not answer within RUNNER_S."""
    try:
        runner: Any = await asyncio.to_thread(ray.get_actor, flow_id, namespace=KODOSUMI)
        return await asyncio.wait_for(getattr(runner, method).remote(), RUNNER_S)
    except (ValueError, RayError, TimeoutError):
        return None


def _window(capability: str) -> Callable[..., Any]:
    """The flow that the panel's entries launch. Its capability goes to the runner as an argument of a call: what stands in a
    flow's inputs, or in the name of what it runs, is shown in the panel."""
    flow = functools.partial(mirror_session, capability=capability)
    flow.__module__, flow.__name__ = __name__, mirror_session.__name__  # pyright: ignore[reportAttributeAccessIssue]
    return flow


async def mirror_session(inputs: dict[str, Any], tracer: Any, *, capability: str | None = None) -> Any:
    """What a Kodosumi runner runs, wherever on the cluster it is."""
    from claude_hitl_template.panel import flow  # noqa: PLC0415
    from claude_hitl_template.panel.services import WindowServices  # noqa: PLC0415

    settings = Settings.load()
    services = WindowServices(
        store=reach(Windows, handle(), capability),
        image_facts=_image_facts,
        wait_s=settings.panel_wait_s,
        max_upload_bytes=settings.max_upload_bytes,
    )
    return await flow.mirror(inputs, tracer, services, RunnerLocks(tracer.fid))


class RunnerLocks:
    """The locks of a Kodosumi runner, by the ids that whoever waits gave them; a `panel.services.Locks`."""

    def __init__(self, flow_id: str) -> None:
        self._runner: Any = ray.get_actor(flow_id, namespace=KODOSUMI)

    async def wait(self, name: str, lock_id: str, data: Mapping[str, Any], timeout_s: float) -> Any:
        return await self._runner.lock.remote(name, lock_id, time.time() + timeout_s, dict(data))


class CurrentUpstream:
    """Anthropic with the key there is, or else the offline model; an `Upstream`. A key that was sent counts at once."""

    def __init__(self, settings: Settings) -> None:
        self._settings, self._client = settings, upstream_client()
        self._offline = OfflineUpstream(Scenarios.load())
        self._known: tuple[SecretStr, AnthropicUpstream] | None = None
        self._choose()  # a key that is no use is told when the service starts

    def name(self) -> str:
        """What answers, for humans."""
        return "offline" if self._choose() is self._offline else self._settings.anthropic_base_url

    def call(self, call: Call) -> AbstractAsyncContextManager[Answer]:
        return self._choose().call(call)

    def _choose(self) -> Upstream:
        key = read_model_key(self._settings)
        if key is None:
            return self._offline
        if self._known is None or self._known[0] != key:
            self._known = key, AnthropicUpstream(self._settings.anthropic_base_url, key, self._client)
        return self._known[1]


def code_facts() -> dict[str, Any]:
    """Which code this is, and on what it runs; commit, dirty and package are null where it was not deployed."""
    origin = build_info.origin()
    return {
        "version": __version__,
        "code": code_version(),
        "ray": version("ray"),
        "python": build_info.python_minor(),
        "cli": version("claude-agent-sdk"),
        **(origin.facts() if origin else dict.fromkeys(("commit", "dirty", "package"))),
    }


def build(settings: Settings) -> Any:
    code = {"code": code_version()}
    check_replicas(settings)
    ledger = Ledger.options(num_replicas=settings.ledger_replicas).bind()
    supervisor = Supervisor.bind(ledger)
    ingress = Ingress.options(num_replicas=settings.ingress_replicas, user_config=code)
    return ingress.bind(ledger, supervisor)


def fast_app(_args: dict[str, Any]) -> Any:
    """What `import_path` in a Serve config names. Makes the data folder and its secrets where nothing did before.

    Serve calls it beside what serves, which goes on serving when this raises: so what can be wrong is found here.
    """
    origin = build_info.origin()
    if origin is not None:
        build_info.check_machine(origin)
    settings = Settings.load()
    for name in (*_LATE, *(_OF_PANEL if settings.panel else ())):
        import_module(f"{__package__}.{name}")
    settings.floor()
    prepare(settings)
    CurrentUpstream(settings)
    return build(settings)


@contextmanager
def _code_for_containers(settings: Settings) -> Generator[dict[str, Any] | None]:
    """The runtime environment of the application: owners in containers inherit this code with it, before the image's.

    None where sessions are local processes, which import the code from where it lies, as the service does.
    """
    if not settings.images:
        yield None
        return
    package = Path(__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(package, Path(folder) / package.name, ignore=shutil.ignore_patterns("__pycache__"))
        yield {"working_dir": folder}


def main() -> None:
    """Deploys, and returns when the application answers. Raises ConfigError."""
    settings = Settings.load()
    with _code_for_containers(settings) as runtime_env:
        ray.init(
            namespace="serve", log_to_driver=False, logging_level=logging.WARNING, runtime_env=runtime_env
        )
    serve.start(
        proxy_location="HeadOnly",  # the address is the head's own: on another host nothing could listen on it
        http_options={"host": settings.host, "port": settings.serve_port, "request_timeout_s": None},
    )
    try:
        serve.run(build(settings), name=APP_NAME, route_prefix=ROUTE)
    except RuntimeError as error:
        raise ConfigError(f"{error}\n{_why_not_deployed()}") from error


def _why_not_deployed() -> str:
    """Serve's own error names the deployments that failed, and not always why."""
    app = serve.status().applications.get(APP_NAME)
    return "\n".join(found.message for found in app.deployments.values() if found.message) if app else ""


if __name__ == "__main__":
    # Under its own name, so that replicas import it instead of copying it.
    from claude_hitl_template import query  # noqa: PLW0406

    logs.configure("INFO")
    try:
        query.main()
    except ConfigError as error:
        sys.exit(f"error: {error}")
