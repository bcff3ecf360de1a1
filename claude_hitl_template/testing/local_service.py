"""Runs the service in one process without Ray, with the real API, store, CLI and offline model.

    async with serve_in_process(folder, keys={"alice": "a secret"}) as service:
        anthropic.AsyncAnthropic(base_url=service.url, api_key="a secret")

The supervisor is that of the cluster; owners are tasks of this process instead of Ray actors.
"""

import asyncio
import contextlib
import secrets
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp

from claude_hitl_template.api import problems
from claude_hitl_template.api.app import Service, build_app
from claude_hitl_template.api.model_endpoint import build_model_app
from claude_hitl_template.api.request_ids import with_request_ids
from claude_hitl_template.claude.sandbox import default_sandbox
from claude_hitl_template.cluster import ROUTE
from claude_hitl_template.cluster.local_sockets import KEEP_ALIVE_S
from claude_hitl_template.cluster.supervisor import Supervisor
from claude_hitl_template.config.secret_files import SecretFiles, SigningKey, hash_api_key, push_key_pem
from claude_hitl_template.config.settings import Settings
from claude_hitl_template.domain.group_roles import GroupRole
from claude_hitl_template.domain.models import Agent, Environment, ImageFacts
from claude_hitl_template.domain.policy.floor import BUILT_IN, Floor
from claude_hitl_template.files.blob_store import FileArea
from claude_hitl_template.inbox.app import PARTS, build_inbox_app, with_pages
from claude_hitl_template.inbox.live import Live
from claude_hitl_template.inbox.services import Pages
from claude_hitl_template.model.endpoint import OfflineUpstream
from claude_hitl_template.model.offline import Scenarios
from claude_hitl_template.notify.addresses import Targets
from claude_hitl_template.notify.courier import Courier
from claude_hitl_template.notify.push_keys import PushKey
from claude_hitl_template.notify.senders import build_senders
from claude_hitl_template.notify.slack_presses import SlackApp
from claude_hitl_template.signin.addresses import PARTS as SIGN_IN_PARTS
from claude_hitl_template.signin.browser import browser_user, check_csrf, install
from claude_hitl_template.signin.cookies import Signer
from claude_hitl_template.signin.oidc import Provider
from claude_hitl_template.signin.pages import build_sign_in_app
from claude_hitl_template.signin.service import SignIn
from claude_hitl_template.store.access import Authority, Dispatcher, client
from claude_hitl_template.store.connect import migrate
from claude_hitl_template.store.core import CoreStore
from claude_hitl_template.store.notifying import Couriers
from claude_hitl_template.store.postgres import PostgresBackend
from claude_hitl_template.store.protocol import Clients, Owners, Supervision
from claude_hitl_template.store.sqlite import SqliteBackend, sqlite_url
from claude_hitl_template.testing.local_host import LocalOwnerHost
from claude_hitl_template.testing.memory_backend import MemoryBackend
from claude_hitl_template.testing.signed_in import SignedIn

OPERATOR_KEY = "operator-key-for-tests"
STREAMS_END_S = 1  # how long uvicorn waits for open event streams, which do not end by themselves
Backing = Literal["sqlite", "memory"]


@dataclass(frozen=True)
class LocalService:
    """A running service.

    Attributes:
        url: The SDK's `base_url`.
        folder: Contains the database and workspaces.
        keys: The secret of each API key, by name.
        app: The API that is mounted at `url`.
    """

    url: str
    keys: Mapping[str, str]
    store: CoreStore
    folder: Path
    app: FastAPI

    def workspace(self, session_id: str) -> Path:
        return self.folder / "workspaces" / session_id


@asynccontextmanager
async def serve_in_process(
    folder: Path,
    *,
    keys: Mapping[str, str],
    hot_window_s: float = 60.0,
    idle_timeout_s: float = 600.0,
    approval_ttl_s: float | None = None,
    backing: Backing = "sqlite",
    database_url: str | None = None,
    max_request_bytes: int = 4 * 1024 * 1024,
    requests_per_minute: int = 1_000_000,
    wrong_keys_per_minute: int = 1_000_000,
    environments: Mapping[str, Environment] | None = None,
    images: Mapping[str, ImageFacts] | None = None,
    driving: bool = True,
    floor: Floor = BUILT_IN,
    spare_owners: int = 0,
    signed_in: SignedIn | None = None,
    provider: Provider | None = None,
    webhook_private_hosts: str = "",
    group_roles: Sequence[GroupRole] = (),
) -> AsyncGenerator[LocalService]:
    """Serves on a free port of 127.0.0.1 until the context is left; no task and no CLI is left behind then.

    Arguments that are not listed here are those of `Settings`.

    Args:
        folder: An existing folder. Nothing is written outside of it, except to the Postgres of `database_url`.
        keys: The secret of each API key, by name.
        backing: The store's backend.
        database_url: A Postgres to use instead of SQLite.
        environments: By id; one without an image if None.
        images: Facts by image reference; sessions are local processes even in an environment with an image.
        driving: If False, no session gets an owner, so sessions wait.
        floor: The operator's policy.
        signed_in: Who may open the inbox; without it, users who have signed in.
        provider: Signs users in, in addition to passwords; `group_roles`: which roles its groups give.

    Raises:
        BaseExceptionGroup: On exit: the unexpected exceptions of owners.
    """
    async with _store(folder, backing, database_url) as store:
        for name, secret in keys.items():
            await store.add_key(name, hash_api_key(secret))
        await store.set_first_key(hash_api_key(next(iter(keys.values()))))
        with _listener() as listener:
            port = listener.getsockname()[1]
            settings = Settings(  # pyright: ignore[reportCallIssue] - the other fields have defaults
                data_dir=folder,
                host="127.0.0.1",
                serve_port=port,
                hot_window_s=hot_window_s,
                idle_timeout_s=idle_timeout_s,
                approval_ttl_s=approval_ttl_s,
                spare_owners=spare_owners,
                webhook_private_hosts=webhook_private_hosts,
            )
            ledger = LocalLedger(store)
            known = environments or {"default": Environment()}
            clients = ledger.reach(Clients, ledger.authority.ingress())
            service = Service(
                store=clients,
                agent=Agent(),
                floor=floor,
                environments=known,
                image_facts=_facts_of(images),
                facts=lambda: {
                    "version": "testing",
                    "model": "offline",
                    "sandbox": "on" if default_sandbox() else "none",
                    "floor": floor.described(),
                },
                drain=ledger.running,
                undrain=_nothing,
                drained_s=_never,
                operator_key=OPERATOR_KEY,
                secret_files=SecretFiles(folder),
                max_request_bytes=max_request_bytes,
                requests_per_minute=requests_per_minute,
                wrong_keys_per_minute=wrong_keys_per_minute,
                targets=Targets(settings.webhook_hosts),
            )
            api = build_app(service)
            sign_in = SignIn(
                clients,
                Signer(ledger.signing_key),
                passwords=service.passwords,
                provider=provider,
                roles=group_roles,
            )
            slack = SlackApp.of(ledger.signing_key, service.targets, settings.pages_url)
            pages = {
                PARTS: build_inbox_app(_pages(settings, service, api, signed_in, sign_in, slack=slack)),
                SIGN_IN_PARTS: build_sign_in_app(sign_in),
            }
            served = with_pages(api, pages)
            driven = _supervising(ledger, settings, known, floor) if driving else contextlib.nullcontext()
            async with (
                _serving(_mounted(served, clients, ledger.signing_key), listener),
                _sending(ledger, settings),
                driven,
            ):
                yield LocalService(settings.base_url, keys, store, folder, api)


def _pages(
    settings: Settings,
    service: Service,
    api: FastAPI,
    signed_in: SignedIn | None,
    sign_in: SignIn,
    *,
    slack: SlackApp,
) -> Pages:
    return Pages(
        store=service.store,
        agent=service.agent,
        environments=service.environments,
        followers=api.state.followers,
        live=Live(service.store),
        user=signed_in.user if signed_in else browser_user,
        check_csrf=signed_in.check_csrf if signed_in else check_csrf,
        targets=service.targets,
        has_mail=settings.smtp_url is not None,
        slack=slack,
        push_key=PushKey.of_pem(push_key_pem(settings)).public,
        install=signed_in.install if signed_in else lambda app: install(app, sign_in),
    )


def _facts_of(images: Mapping[str, ImageFacts] | None) -> Callable[[str], Awaitable[ImageFacts | None]]:
    async def facts(image: str) -> ImageFacts | None:
        return (images or {}).get(image)

    return facts


class LocalLedger:
    """A store of this process behind the ledger's capability check, without Ray's transport."""

    def __init__(self, store: CoreStore) -> None:
        self.signing_key = SigningKey(secrets.token_bytes(32))
        self.authority = Authority(self.signing_key)
        self._store, self._desk = store, Dispatcher(store, self.authority)

    def reach[P](self, protocol: type[P], capability: str | None = None) -> P:
        """The store as `protocol`, with the methods that `capability` opens."""

        async def send(method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return await self._desk.call(capability, method, args, kwargs)

        return client(protocol, send)

    async def running(self, _grace_s: float) -> int:
        """The number of running sessions, for `drain`, which does not stop the service from starting turns here."""
        return sum(s.status == "running" for s in await self._store.supervised())


async def _nothing() -> None:
    pass


async def _never() -> float:
    return 0.0


@asynccontextmanager
async def _supervising(
    ledger: LocalLedger, settings: Settings, environments: Mapping[str, Environment], floor: Floor
) -> AsyncGenerator[None]:
    """Runs the cluster's supervisor with owners as tasks. On exit, raises the unexpected exceptions of owners."""
    host = LocalOwnerHost(lambda capability: ledger.reach(Owners, capability))
    supervisor = Supervisor(
        settings,
        ledger.reach(Supervision, ledger.authority.supervisor()),
        host,
        ledger.signing_key,
        environments=environments,
        floor=floor,
        steady_s=0.0,
    )
    supervisor.start()
    try:
        yield
    finally:
        await supervisor.close()
        for name in await host.names():
            await host.end(name)
    if host.failures:
        raise BaseExceptionGroup("owners failed", host.failures)


@asynccontextmanager
async def _sending(ledger: LocalLedger, settings: Settings) -> AsyncGenerator[None]:
    """Runs the courier of the cluster's supervisor."""
    store = ledger.reach(Couriers, ledger.authority.courier())
    courier = Courier(store, build_senders(settings), pages_url=settings.pages_url)
    courier.start()
    try:
        yield
        courier.check_health()
    finally:
        await courier.close()


@asynccontextmanager
async def _store(folder: Path, backing: Backing, database_url: str | None) -> AsyncGenerator[CoreStore]:
    if backing == "memory":
        yield CoreStore(MemoryBackend())
        return
    url = database_url or sqlite_url(folder / "hitl.sqlite3")
    await asyncio.to_thread(migrate, url)
    backend = PostgresBackend(url) if database_url else SqliteBackend(url)
    try:
        yield CoreStore(backend, files=FileArea((folder / "files").absolute().as_uri()))
    finally:
        await backend.close()


def _listener() -> socket.socket:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()  # a client that connects before the server runs waits for it
    return listener


def _mounted(api: ASGIApp, store: Clients, signing_key: SigningKey) -> ASGIApp:
    """Mounts the model endpoint and the API under ROUTE, as in the cluster."""
    outer = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    problems.install(outer)
    outer.mount(f"{ROUTE}/model", build_model_app(OfflineUpstream(Scenarios.load()), store, signing_key))
    outer.mount(ROUTE, api)
    return with_request_ids(outer)


@asynccontextmanager
async def _serving(app: ASGIApp, listener: socket.socket) -> AsyncGenerator[None]:
    config = uvicorn.Config(
        app,
        log_level="critical",
        timeout_graceful_shutdown=STREAMS_END_S,
        timeout_keep_alive=KEEP_ALIVE_S,  # as Serve's proxy has it
        lifespan="off",
    )
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield
    finally:
        server.should_exit = True
        await serving
