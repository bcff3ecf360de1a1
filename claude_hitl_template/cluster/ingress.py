"""What an ingress replica serves: REST, event streams, the model endpoint, the pages, and the panel's entries."""

import asyncio
import os
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import httpx
import structlog
from fastapi import FastAPI
from pydantic import SecretStr
from ray.exceptions import TaskCancelledError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from claude_hitl_template import __version__, code_version
from claude_hitl_template.api.app import Service, build_app
from claude_hitl_template.api.followers import Followers
from claude_hitl_template.api.model_endpoint import build_model_app
from claude_hitl_template.api.request_ids import with_request_ids
from claude_hitl_template.claude.sandbox import has_sandboxes
from claude_hitl_template.cluster import HTTP_SOCKETS, ROUTE, kodosumi
from claude_hitl_template.cluster.ledger_line import Line, reach
from claude_hitl_template.cluster.local_sockets import BEHIND_PROXY, model_sockets, serve_http
from claude_hitl_template.cluster.windows import image_facts, window
from claude_hitl_template.config import build_info, logs, network
from claude_hitl_template.config.secret_files import (
    SecretFiles,
    hash_api_key,
    operator_key,
    public_prefix,
    push_key_pem,
    read_admin_password,
    read_api_key,
    read_model_key,
    read_panel_login,
    read_signing_key,
)
from claude_hitl_template.config.settings import Settings
from claude_hitl_template.domain.models import Agent
from claude_hitl_template.inbox.app import PARTS, build_inbox_app, with_pages
from claude_hitl_template.inbox.live import Live
from claude_hitl_template.inbox.services import Pages
from claude_hitl_template.model.endpoint import (
    Answer,
    AnthropicUpstream,
    Call,
    OfflineUpstream,
    Upstream,
    upstream_client,
)
from claude_hitl_template.model.offline import Scenarios
from claude_hitl_template.notify.addresses import Targets
from claude_hitl_template.notify.push_keys import PushKey
from claude_hitl_template.notify.slack_presses import SlackApp
from claude_hitl_template.signin.addresses import PARTS as SIGN_IN_PARTS
from claude_hitl_template.signin.browser import browser_user, check_csrf, install
from claude_hitl_template.signin.own_names import only_under, own_names
from claude_hitl_template.signin.pages import build_sign_in_app
from claude_hitl_template.signin.service import SignIn
from claude_hitl_template.signin.setup import build_sign_in, make_first_user
from claude_hitl_template.store.access import Authority
from claude_hitl_template.store.protocol import Clients

if TYPE_CHECKING:
    from claude_hitl_template.panel.services import PanelServices

log = structlog.get_logger()
DASHBOARD_S = 3.0


class IngressService:
    """The application of one replica, and its access to the store."""

    def __init__(self, ledger: Any, supervisor: Any) -> None:
        self._settings = settings = Settings.load()
        logs.configure(settings.log_level)
        upstream = CurrentUpstream(settings)
        signing_key = read_signing_key(settings)
        authority = Authority(signing_key)
        self._store = reach(Clients, Line(ledger), authority.ingress())
        service = _service(settings, self._store, supervisor, upstream)
        api = build_app(service)
        model = build_model_app(upstream, self._store, signing_key)
        # Owners of this machine reach the model here: each chunk of an answer would cost Serve a millisecond.
        self._serving = asyncio.create_task(
            serve_http(with_request_ids(model), model_sockets(settings, signing_key))
        )
        app = _mounted(settings, self._store, authority, _until_disconnect(api), _until_disconnect(model))
        self._sign_in = sign_in = build_sign_in(settings, self._store, signing_key, service.passwords)
        slack = SlackApp.of(signing_key, service.targets, settings.pages_url)
        inbox = build_inbox_app(_pages(settings, self._store, sign_in, api.state.followers, slack))
        is_own = own_names(settings)
        pages = {
            PARTS: _until_disconnect(only_under(is_own, inbox)),
            SIGN_IN_PARTS: _until_disconnect(only_under(is_own, build_sign_in_app(sign_in))),
        }
        self.app: ASGIApp = with_request_ids(with_pages(app, pages))
        self._listening: asyncio.Task[None] | None = None

    def open(self) -> None:
        """From now on requests are taken from Serve's proxy without Serve (proxy_relay.py)."""
        if self._listening is None:
            folder = self._settings.data_dir / HTTP_SOCKETS
            taken = serve_http(_under_route(self.app), folder, **BEHIND_PROXY)
            self._listening = asyncio.create_task(taken)

    async def close(self) -> None:
        """Takes no more requests on the sockets, and returns when those that it has are answered, or after a while."""
        tasks = [task for task in (self._listening, self._serving) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)

    async def take_first_key(self) -> None:
        """Takes the first API key as it is now, since it may have been replaced, and makes the first user once."""
        secret = read_api_key(self._settings)
        first = await self._store.set_first_key(hash_api_key(secret), public_prefix(secret))
        if first.revoked_at is not None:
            log.error(
                "the first API key in the data folder was replaced or revoked: ./hitl keys rotate makes another"
            )
        await make_first_user(self._store, self._sign_in.passwords, read_admin_password(self._settings))


def _service(settings: Settings, store: Clients, supervisor: Any, upstream: "CurrentUpstream") -> Service:
    async def drain(grace_s: float) -> int:
        return await supervisor.drain.remote(grace_s)

    async def undrain() -> None:
        await supervisor.undrain.remote()

    async def drained_s() -> float:
        return await supervisor.drained_s.remote()

    built, floor = code_facts(), settings.floor()
    return Service(
        store=store,
        agent=default_agent(settings),
        floor=floor,
        environments=settings.all_environments(),
        image_facts=image_facts,
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
        secret_files=SecretFiles(settings.secrets_dir),
        targets=Targets(settings.webhook_hosts),
        max_request_bytes=settings.max_request_bytes,
        requests_per_minute=settings.requests_per_minute,
    )


def _pages(
    settings: Settings, store: Clients, sign_in: SignIn, followers: Followers, slack: SlackApp
) -> Pages:
    return Pages(
        store=store,
        agent=default_agent(settings),
        environments=settings.all_environments(),
        followers=followers,
        live=Live(store),
        user=browser_user,
        check_csrf=check_csrf,
        targets=Targets(settings.webhook_hosts),
        has_mail=settings.smtp_url is not None,
        slack=slack,
        push_key=PushKey.of_pem(push_key_pem(settings)).public,
        install=lambda app: install(app, sign_in),
        sandboxed=sandbox_fact(settings) == "on",
        is_free=lambda: read_model_key(settings) is None,
    )


def _until_disconnect(app: ASGIApp) -> ASGIApp:
    """Serve reports a client disconnect as TaskCancelledError; ASGI expects `http.disconnect`."""

    async def patient(scope: Scope, receive: Receive, send: Send) -> None:
        async def receive_or_disconnect() -> Message:
            try:
                return await receive()
            except TaskCancelledError:
                return {"type": "http.disconnect"}

        await app(scope, receive_or_disconnect, send)

    return patient


def _under_route(app: ASGIApp) -> ASGIApp:
    """Says where the application is mounted, as Serve does."""

    async def mounted(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, "root_path": ROUTE}, receive, send)

    return mounted


def _mounted(
    settings: Settings, store: Clients, authority: Authority, api: ASGIApp, model: ASGIApp
) -> ASGIApp:
    """Combines the API, the model endpoint and, unless it is switched off, the panel's entries into one application."""
    if settings.panel:
        return _with_panel(settings, store, authority, api, model)
    outer = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    outer.mount("/model", model)
    outer.mount("/", api)
    return outer


def _with_panel(
    settings: Settings, store: Clients, authority: Authority, api: ASGIApp, model: ASGIApp
) -> ASGIApp:
    # Importing Kodosumi is slow and creates folders, so only a service with a panel imports it.
    from claude_hitl_template.panel import entries  # noqa: PLC0415
    from claude_hitl_template.panel.gateway import Gateway  # noqa: PLC0415
    from claude_hitl_template.panel.users import Guard, PanelAccess, default_login  # noqa: PLC0415

    access = PanelAccess(settings.panel_url, *(read_panel_login(settings) or default_login()))
    gateway = Gateway(
        api=api,
        model=model,
        guard=Guard(store, access, settings.approvers),
        own_url=settings.base_url,
        panel_url=settings.panel_url,
        runner_responds=kodosumi.runner_responds,
    )
    services = _panel_services(settings, store, authority)
    entries.register(gateway, lambda: services)
    return gateway


def _panel_services(settings: Settings, store: Clients, authority: Authority) -> "PanelServices":
    from claude_hitl_template.panel.services import PanelServices  # noqa: PLC0415

    return PanelServices(
        store=store,
        agent=default_agent(settings),
        environments=settings.all_environments(),
        max_upload_bytes=settings.max_upload_bytes,
        panel_url=settings.panel_url,
        pages_url=settings.pages_url,
        window=lambda session_id: window(authority.window(session_id), free=read_model_key(settings) is None),
        is_open=kodosumi.is_open,
        sandbox=sandbox_fact(settings),
        ray_is_open=_ray_is_open(settings),
    )


def _ray_is_open(settings: Settings) -> bool:
    """Whether this machine's Ray, which may have been started by hand, requires no token; False where that is unknown."""
    if os.environ.get("RAY_AUTH_MODE") == "token":  # as `hitl up` starts it, before its dashboard
        return False
    try:
        answer = network.request(
            "GET", f"{settings.own_dashboard}/api/authentication_mode", timeout=DASHBOARD_S
        )
        mode = answer.json()["authentication_mode"]
    except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
        log.info("whether Ray requires a token is not known", why=type(error).__name__)
        return False
    return mode != "token"


class CurrentUpstream:
    """An `Upstream`: Anthropic if there is a key, else the offline model. A newly stored key is used from the next call."""

    def __init__(self, settings: Settings) -> None:
        self._settings, self._client = settings, upstream_client()
        self._offline = OfflineUpstream(Scenarios.load())
        self._known: tuple[SecretStr, AnthropicUpstream] | None = None
        self._choose()  # reports an unusable key when the service starts

    def name(self) -> str:
        """The name of the upstream in use, for people."""
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


def default_agent(settings: Settings) -> Agent:
    return Agent(model=settings.model)


def sandbox_fact(settings: Settings) -> str:
    """Whether sessions run in a sandbox, according to the settings: "on" or "off"; "none" on a system without sandboxes."""
    return settings.sandbox if has_sandboxes() else "none"


def code_facts() -> Mapping[str, Any]:
    """Identifies the running code and its versions; commit, dirty and package are null if it was not deployed."""
    origin = build_info.origin()
    return {
        "version": __version__,
        "code": code_version(),
        "ray": version("ray"),
        "python": build_info.python_minor(),
        "cli": version("claude-agent-sdk"),
        **(origin.facts() if origin else dict.fromkeys(("commit", "dirty", "package"))),
    }
