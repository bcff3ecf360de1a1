"""The service in one process, without Ray: the real API, store, CLI and offline model, for tests and the benchmark.

    async with serve_in_process(folder, keys={"alice": "a secret"}) as service:
        anthropic.AsyncAnthropic(base_url=service.url, api_key="a secret")

What is missing is what Ray gives: owners are tasks of this process instead of actors on a cluster.
"""

import asyncio
import contextlib
import secrets
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import structlog
import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp

from claude_hitl_template.api import problems
from claude_hitl_template.api.app import Service, build_app
from claude_hitl_template.api.request_ids import with_request_ids
from claude_hitl_template.claude.cli_engine import CliConfig, CliEngine, is_plan_folder
from claude_hitl_template.claude.sandbox import default_sandbox
from claude_hitl_template.claude.transcripts import TranscriptStore
from claude_hitl_template.config.secret_files import SecretFiles, SigningKey, hash_api_key
from claude_hitl_template.domain.models import Agent, Environment, ImageFacts, Session, Supervised
from claude_hitl_template.domain.policy.floor import BUILT_IN, Floor
from claude_hitl_template.errors import EngineError, NotFound, StaleOwner, Unauthorized
from claude_hitl_template.files.blob_store import FileArea
from claude_hitl_template.model import tokens
from claude_hitl_template.model.endpoint import OfflineUpstream, build_router
from claude_hitl_template.model.offline import Scenarios
from claude_hitl_template.session.gate import Gate
from claude_hitl_template.session.runner import Limits, SessionRunner
from claude_hitl_template.store.access import Authority, Dispatcher, client
from claude_hitl_template.store.connect import migrate
from claude_hitl_template.store.core import CoreStore
from claude_hitl_template.store.owners import LEASE_S
from claude_hitl_template.store.postgres import PostgresBackend
from claude_hitl_template.store.protocol import Clients, Owners, Supervision
from claude_hitl_template.store.sql import SqlBackend, sqlite_url
from claude_hitl_template.testing.memory_backend import MemoryBackend
from claude_hitl_template.workspace.sync import WorkspaceLocation

log = structlog.get_logger()

ROUTE = "/claude-hitl"
TICK_S = 1.0
MAX_RECOVERIES = 5
OPERATOR_KEY = "operator-key-for-tests"
STREAMS_END_S = 1  # how long uvicorn waits for open event streams, which do not end by themselves
Backing = Literal["sqlite", "memory"]


@dataclass(frozen=True)
class InProcess:
    """A service that runs. `url` is what the SDK takes as its base_url; `folder` holds the database and workspaces.

    `keys` has the secret of each API key by its name; `app` is the API that is mounted at `url`.
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
) -> AsyncGenerator[InProcess]:
    """Serves on a free port of 127.0.0.1 until the context is left; no task and no CLI is left behind then.

    `folder` exists; nothing is written outside of it, but in the Postgres of `database_url`. `keys` maps names to the
    secrets of API keys, `images` references
    to what is known of them; sessions are local processes all the same. Unless it is `driving`, no session gets an
    owner: what is asked to run waits. Raises, on leaving, what an owner failed with unexpectedly.
    """
    async with _store(folder, backing, database_url) as store:
        for name, secret in keys.items():
            await store.add_key(name, hash_api_key(secret))
        await store.set_first_key(hash_api_key(next(iter(keys.values()))))
        with _listener() as listener:
            root = f"http://127.0.0.1:{listener.getsockname()[1]}{ROUTE}"
            limits = Limits(hot_window_s, idle_timeout_s, approval_ttl_s)
            ledger = InProcessLedger(store)
            owners = OwnerTasks(ledger, folder, f"{root}/model", limits, floor)
            clients = ledger.reach(Clients, ledger.authority.ingress())
            service = Service(
                store=clients,
                agent=Agent(),
                floor=floor,
                environments=environments or {"default": Environment()},
                image_facts=_facts_of(images),
                facts=lambda: {
                    "version": "testing",
                    "model": "offline",
                    "sandbox": "on" if default_sandbox() else "none",
                    "floor": floor.described(),
                },
                drain=owners.running,
                undrain=owners.go_on,
                drained_s=owners.held_s,
                operator_key=OPERATOR_KEY,
                shelf=SecretFiles(folder),
                max_request_bytes=max_request_bytes,
                requests_per_minute=requests_per_minute,
                wrong_keys_per_minute=wrong_keys_per_minute,
            )
            api = build_app(service)
            driven = owners if driving else contextlib.nullcontext()
            async with _serving(_mounted(api, clients, ledger.signing_key), listener), driven:
                yield InProcess(root, keys, store, folder, api)


def _facts_of(images: Mapping[str, ImageFacts] | None) -> Callable[[str], Awaitable[ImageFacts | None]]:
    async def facts(image: str) -> ImageFacts | None:
        return (images or {}).get(image)

    return facts


class InProcessLedger:
    """The ledger's check before a store of this process: what is called goes through it, and nothing else of Ray's way."""

    def __init__(self, store: CoreStore) -> None:
        self.signing_key = SigningKey(secrets.token_bytes(32))
        self.authority = Authority(self.signing_key)
        self._desk = Dispatcher(store, self.authority)

    def reach[P](self, protocol: type[P], capability: str | None = None) -> P:
        async def send(method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return await self._desk.call(capability, method, args, kwargs)

        return client(protocol, send)


class OwnerTasks:
    """Gives every session that needs one an owner, as the supervisor does on a cluster; a lost signal costs a tick."""

    def __init__(
        self, ledger: InProcessLedger, folder: Path, model_url: str, limits: Limits, floor: Floor
    ) -> None:
        self._floor = floor
        self._ledger, self._folder, self._model_url, self._limits = ledger, folder, model_url, limits
        self._store = ledger.reach(Supervision, ledger.authority.supervisor())
        self._attending: dict[str, asyncio.Task[None]] = {}
        self._failures: list[BaseException] = []
        self._loop: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "OwnerTasks":
        self._loop = asyncio.create_task(self._supervise())
        return self

    async def __aexit__(self, *_: object) -> None:
        tasks = [t for t in (self._loop, *self._attending.values()) if t is not None]
        for task in tasks:
            task.cancel()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        ended_badly = [e for e in ends if isinstance(e, Exception)]
        failures = list(dict.fromkeys([*self._failures, *ended_badly]))
        if failures:
            raise BaseExceptionGroup("owners failed", failures)

    async def running(self, _grace_s: float) -> int:
        """How many sessions run now."""
        return sum(s.status == "running" for s in await self._store.supervised())

    async def go_on(self) -> None:
        """They never stopped."""

    async def held_s(self) -> float:
        return 0.0

    async def _supervise(self) -> None:
        version = -1
        while True:
            await self._store.expire_due()
            for session in await self._store.supervised():
                self._attend(session)
            version = await self._store.wait_supervised(version, timeout_s=TICK_S)

    def _attend(self, session: Supervised) -> None:
        if session.id not in self._attending:
            task = asyncio.create_task(self._look_after(session.id))
            self._attending[session.id] = task
            task.add_done_callback(lambda ended: self._attended(session.id, ended))

    def _attended(self, session_id: str, ended: "asyncio.Task[None]") -> None:
        self._attending.pop(session_id, None)
        error = None if ended.cancelled() else ended.exception()
        if error is not None:
            self._failures.append(error)

    async def _look_after(self, session_id: str) -> None:
        with contextlib.suppress(NotFound):  # deleted meanwhile
            while await self._take_over(await self._store.get_session(session_id)):
                pass

    async def _take_over(self, session: Session) -> bool:
        """Ends the lease of an owner that is gone, and drives the session to its parking. False: nothing to do."""
        if session.lease is not None:
            await self._store.drop_lease(session.id, session.lease.epoch)
        if session.status not in ("running", "rescheduling"):
            return False
        if session.recoveries >= MAX_RECOVERIES:
            await self._store.give_up(
                session.id, f"the session's owner died {session.recoveries} times in a row"
            )
            return False
        await self._drive(await self._store.acquire(session.id, "in process", lease_s=LEASE_S))
        return True

    async def _drive(self, session: Session) -> None:
        try:
            await self._runner(session).run()
        except (StaleOwner, EngineError) as error:
            log.info("owner ended", session=session.id, epoch=session.epoch, why=str(error))
        finally:
            await self._store.drop_lease(session.id, session.epoch)

    def _runner(self, session: Session) -> SessionRunner:
        cli = CliConfig(
            workspace=self._folder / "workspaces" / session.id,
            config_dir=self._folder / "run" / f"{session.id}-{session.epoch}",
            model_url=self._model_url,
            token=tokens.mint(self._ledger.signing_key.secret, session.id, session.epoch),
        )
        store = self._ledger.reach(Owners, self._ledger.authority.owner(session.id, session.epoch))
        transcripts = TranscriptStore(store, session.id, epoch=session.epoch, any_folder=True)

        def make_engine(session: Session, gate: Gate) -> CliEngine:
            return CliEngine(session, gate, transcripts, cli)

        return SessionRunner(
            store,
            session,
            make_engine=make_engine,
            workspace=WorkspaceLocation(cli.workspace, self._folder / "saved" / session.id),
            is_plan_folder=is_plan_folder(cli.config_dir),
            limits=self._limits,
            floor=self._floor,
        )


@asynccontextmanager
async def _store(folder: Path, backing: Backing, database_url: str | None) -> AsyncGenerator[CoreStore]:
    if backing == "memory":
        yield CoreStore(MemoryBackend())
        return
    url = database_url or sqlite_url(folder / "hitl.sqlite3")
    await asyncio.to_thread(migrate, url)
    backend = PostgresBackend(url) if database_url else SqlBackend(url)
    try:
        yield CoreStore(backend, files=FileArea((folder / "files").absolute().as_uri()))
    finally:
        await backend.close()


def _listener() -> socket.socket:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()  # who connects before the server runs waits for it
    return listener


def _mounted(api: FastAPI, store: Clients, signing_key: SigningKey) -> ASGIApp:
    """The applications where query.py has them: the model endpoint and the API under ROUTE."""

    async def verify(token: str) -> None:
        session_id, epoch = tokens.check(signing_key.secret, token)
        try:
            lease = (await store.get_session(session_id)).lease
        except NotFound:
            lease = None
        if lease is None or lease.epoch != epoch:
            raise Unauthorized("another process drives this session now")

    model = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    model.include_router(build_router(OfflineUpstream(Scenarios.load()), verify))
    problems.install_bare(model)
    outer = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    problems.install(outer)
    outer.mount(f"{ROUTE}/model", model)
    outer.mount(ROUTE, api)
    return with_request_ids(outer)


@asynccontextmanager
async def _serving(app: ASGIApp, listener: socket.socket) -> AsyncGenerator[None]:
    config = uvicorn.Config(
        app, log_level="critical", timeout_graceful_shutdown=STREAMS_END_S, lifespan="off"
    )
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield
    finally:
        server.should_exit = True
        await serving
