"""The ledger, the only process with a database connection, and its clients in other processes, which call it over Ray."""

import asyncio
import contextlib
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import grpc
import structlog
from ray import serve
from ray.exceptions import ObjectStoreFullError, OutOfDiskError, RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, wait_exponential_jitter

from claude_hitl_template.cluster.ledger_socket import LedgerSocket, Route, SocketLost
from claude_hitl_template.config import logs
from claude_hitl_template.config.secret_files import audit_signer, make_data_folder, read_signing_key
from claude_hitl_template.config.settings import Settings
from claude_hitl_template.errors import HitlError, InternalError, StoreUnreachable, Unavailable
from claude_hitl_template.store.access import Authority, Dispatcher, client, methods_of
from claude_hitl_template.store.protocol import Store, own_key

log = structlog.get_logger()

APP_NAME = "claude-hitl"
LEDGER, SUPERVISOR = "Ledger", "Supervisor"  # names of deployments
SWEEP_S = 3600.0
REPLIES_S = 300.0
RETRY_S = 30.0  # a restarted ledger answers well within this
AWAY_S = 75.0  # a restarted database server answers well within this
_RAY = (RayError, RayServeException, grpc.RpcError)
_TRANSPORT = (*_RAY, SocketLost)
# The message is too large; or Serve could not serialise the ledger's answer.
_COMES_AGAIN = (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNKNOWN)
# The methods that take an idempotency key.
_KEYED = frozenset(
    name for name, method in methods_of(Store).items() if "idempotency_key" in signature(method).parameters
)


class LedgerService:
    """Serves the Store. A caller's capability decides which methods it may call (store.access).

    A HitlError is returned, not raised, so that the caller receives it with its own type. Anyone with a Serve handle can
    call every public method and receive its result, so there are only these.
    """

    def __init__(self) -> None:
        # Every process of the service imports this module, but only the ledger's needs the store and its libraries.
        from claude_hitl_template.files.blob_store import FileArea  # noqa: PLC0415
        from claude_hitl_template.store.base import AskLimits  # noqa: PLC0415
        from claude_hitl_template.store.connect import open_backend  # noqa: PLC0415
        from claude_hitl_template.store.core import CoreStore  # noqa: PLC0415
        from claude_hitl_template.store.sealing import SEALING, Sealer  # noqa: PLC0415

        settings = Settings.load()
        logs.configure(settings.log_level)
        make_data_folder(settings)
        signing_key = read_signing_key(settings)
        store = CoreStore(
            open_backend(settings, patience_s=AWAY_S),
            files=FileArea(settings.files_at),
            ask_limits=AskLimits(settings.asks_per_minute, settings.asks_per_session),
            signer=audit_signer(settings),
            sealer=Sealer(signing_key.mac(SEALING, "channels")),
        )
        authority = Authority(signing_key)
        self._desk = Dispatcher(store, authority)
        self._socket, self._folder = LedgerSocket(self.call, authority.check), settings.data_dir / "ledger"
        self._opening: asyncio.Task[Path | None] | None = None
        self._tasks = asyncio.create_task(_sweep(store)), asyncio.create_task(_forget(store))

    async def call(
        self, capability: str | None, method: str, /, *args: Any, **kwargs: Any
    ) -> tuple[bool, Any]:
        try:
            return True, await self._desk.call(capability, method, args, kwargs)
        except HitlError as error:
            return False, error
        except Exception as error:  # a defect; the error itself may not survive pickling
            log.exception("the ledger failed", method=method)
            return False, InternalError(
                f"the ledger failed in {method} ({type(error).__name__}); its log says where"
            )

    async def socket(self) -> Path | None:
        """Where processes on this machine may call it without Ray Serve (ledger_socket.py); None: nowhere."""
        self._opening = self._opening or asyncio.create_task(self._socket.open(self._folder))
        return await asyncio.shield(self._opening)

    async def check_health(self) -> None:
        """Called by Serve, which restarts an unhealthy replica. Raises RuntimeError if a background task has stopped.

        Restarting does not fix an unreachable database, so that is not a health failure.
        """
        for task in self._tasks:
            if task.done():
                raise RuntimeError(f"a task of the ledger stopped: {task.exception()}")
        with contextlib.suppress(StoreUnreachable):
            await self._desk.call(None, "ping", (), {})


async def _sweep(store: Store) -> None:
    """Removes, at intervals, blobs that no workspace refers to any more from the file area."""
    while True:
        await asyncio.sleep(SWEEP_S)
        try:
            log.info("file area swept", blobs=await store.sweep_blobs())
        except HitlError as error:
            log.warning("file area not swept", why=str(error))


async def _forget(store: Store) -> None:
    """Removes, at intervals, old notifications, and old answers to requests with an idempotency key."""
    while True:
        await asyncio.sleep(REPLIES_S)
        try:
            await store.sweep_replies()
            await store.sweep_deliveries()
        except HitlError as error:
            log.warning("old replies and notifications not forgotten", why=str(error))


class Line:
    """This process's line to the ledger, for all its callers of one event loop. It sends calls, and again while the ledger
    does not answer; writes are idempotent, so they may be repeated.

    On the ledger's machine calls go over its socket. Elsewhere, until there is a connection, and when it was lost, they go
    through the Serve handle. Then a request or an answer that is too large for a gRPC message is sent through Ray's object
    store, which has no such limit. This happens after gRPC refused it, because only gRPC knows the limits of both
    processes.
    """

    def __init__(self, handle: Any) -> None:
        # Calls by reference were delayed by a second whenever a session started (docs/decisions/0002).
        self._direct, self._by_reference = (
            handle.options(_by_reference=False),
            handle.options(_by_reference=True),
        )
        self._route = Route(self._find, _RAY)

    async def send(
        self, capability: str | None, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if method in _KEYED and kwargs.get("idempotency_key") is None:
            kwargs["idempotency_key"] = own_key()  # the call may be repeated with this key
        try:
            ok, result = await _retrying()(self._once, capability, method, args, kwargs)
        except (*_TRANSPORT, StoreUnreachable) as error:
            raise _failure(method, error) from error
        if not ok:
            raise result
        return result

    async def _find(self) -> Path | None:
        return await self._direct.socket.remote()

    async def _once(
        self, capability: str | None, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[bool, Any]:
        connection, answer = self._route.connection(), None
        if connection is not None and capability is not None:
            answer = await connection.call(capability, method, args, kwargs)
        ok, result = answer or await self._by_handle(capability, method, args, kwargs)
        if isinstance(result, StoreUnreachable) and not ok:
            raise result
        return ok, result

    async def _by_handle(
        self, capability: str | None, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[bool, Any]:
        try:
            return await self._direct.call.remote(capability, method, *args, **kwargs)
        except grpc.RpcError as error:
            if _code(error) is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                raise
            return await self._by_reference.call.remote(capability, method, *args, **kwargs)


def _retrying() -> AsyncRetrying:
    return AsyncRetrying(
        retry=retry_if_exception(_may_pass),
        stop=_enough,
        wait=wait_exponential_jitter(multiplier=0.1, max=2.0),
        reraise=True,
    )


def _may_pass(error: BaseException) -> bool:
    """Whether a repeated call may succeed: a connection failure is temporary, most other errors are not."""
    if isinstance(error, (RayTaskError, ObjectStoreFullError, OutOfDiskError)):
        return False
    if isinstance(error, grpc.RpcError) and _code(error) in _COMES_AGAIN:
        return False
    return isinstance(error, (*_TRANSPORT, StoreUnreachable))


def _code(error: grpc.RpcError) -> grpc.StatusCode | None:
    return error.code() if isinstance(error, grpc.aio.AioRpcError) else None


def _failure(method: str, error: Exception) -> HitlError:
    """The error that the caller receives for a call that failed in transport, or with an error that Ray reports."""
    if isinstance(error, StoreUnreachable):
        return error
    if isinstance(error, (ObjectStoreFullError, OutOfDiskError)):
        return InternalError(
            f"the ledger's {method} is too large for Ray's object store, which has no room left: {error}"
        )
    if not _may_pass(error):
        log.error("the ledger failed", method=method, why=str(error))
        return InternalError(f"the ledger failed in {method}; its log says where")
    return Unavailable(f"the ledger does not answer: {type(error).__name__}")


def _enough(tries: RetryCallState) -> bool:
    away = tries.outcome is not None and isinstance(tries.outcome.exception(), StoreUnreachable)
    return (tries.seconds_since_start or 0) >= (AWAY_S if away else RETRY_S)


def reach[P](protocol: type[P], line: Line, capability: str | None = None) -> P:
    """Returns a client of the ledger.

    Args:
        protocol: The methods that the client has.
        line: Where its calls are sent.
        capability: Permits the methods of `protocol`; without one, only `ping` is permitted.
    """
    return client(protocol, partial(line.send, capability))


def line() -> Line:
    """Returns a line to the ledger, in any process of the cluster."""
    return Line(serve.get_deployment_handle(LEDGER, APP_NAME))
