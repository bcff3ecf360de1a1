"""The ledger: the only process with a database connection, and the Store as everyone else sees it through Ray."""

import asyncio
import contextlib
from inspect import signature
from typing import Any

import grpc
import structlog
from ray import serve
from ray.exceptions import ObjectStoreFullError, OutOfDiskError, RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, wait_exponential_jitter

from claude_hitl_template.config import logs
from claude_hitl_template.config.secret_files import read_signing_key
from claude_hitl_template.config.settings import Settings
from claude_hitl_template.errors import HitlError, InternalError, StoreUnreachable, Unavailable
from claude_hitl_template.files.blob_store import FileArea
from claude_hitl_template.store.access import Authority, Dispatcher, client, methods_of
from claude_hitl_template.store.core import CoreStore
from claude_hitl_template.store.protocol import Store, own_key

log = structlog.get_logger()

APP_NAME = "claude-hitl"
LEDGER = "Ledger"
SWEEP_S = 3600.0
REPLIES_S = 300.0
RETRY_S = 30.0  # a ledger that is started anew answers well within this
AWAY_S = 75.0  # a database server that is restarted is back well within this
_TRANSPORT = (RayError, RayServeException, grpc.RpcError)
# Too large; and what Serve says when it cannot write down what the ledger answered.
_COMES_AGAIN = (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNKNOWN)
# The methods that take an idempotency key.
_KEYED = frozenset(
    name for name, method in methods_of(Store).items() if "idempotency_key" in signature(method).parameters
)


class LedgerService:
    """Serves the Store, to each caller what its capability opens (store.access). An error of ours is a result, so that it
    reaches the caller as what it is.

    Serve calls any method by its name, for whoever has a handle: so there are none but these, and nothing in an attribute
    could be sent to anyone.
    """

    def __init__(self) -> None:
        # Every owner imports this module, and only the ledger's own process needs a database: half a second.
        from claude_hitl_template.store.connect import open_backend  # noqa: PLC0415

        settings = Settings.load()
        logs.configure(settings.log_level)
        settings.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        store = CoreStore(open_backend(settings, patience_s=AWAY_S), files=FileArea(settings.files_at))
        self._desk = Dispatcher(store, Authority(read_signing_key(settings)))
        self._tasks = asyncio.create_task(_sweep(store)), asyncio.create_task(_forget(store))

    async def call(
        self, capability: str | None, method: str, /, *args: Any, **kwargs: Any
    ) -> tuple[bool, Any]:
        try:
            return True, await self._desk.call(capability, method, args, kwargs)
        except HitlError as error:
            return False, error
        except Exception as error:  # a defect: as it is, it may not survive the way to the caller
            log.exception("the ledger failed", method=method)
            return False, InternalError(
                f"the ledger failed in {method} ({type(error).__name__}); its log says where"
            )

    async def check_health(self) -> None:
        """A database that is away is not mended by starting this process anew; a sweep that stopped is."""
        for task in self._tasks:
            if task.done():
                raise RuntimeError(f"a task of the ledger stopped: {task.exception()}")
        with contextlib.suppress(StoreUnreachable):
            await self._desk.call(None, "ping", (), {})


async def _sweep(store: Store) -> None:
    """Removes, now and then, what deleted sessions and changed workspaces left in the file area."""
    while True:
        await asyncio.sleep(SWEEP_S)
        try:
            log.info("file area swept", blobs=await store.sweep_blobs())
        except HitlError as error:
            log.warning("file area not swept", why=str(error))


async def _forget(store: Store) -> None:
    """Old answers to requests with an idempotency key, of which there may be one for every request."""
    while True:
        await asyncio.sleep(REPLIES_S)
        try:
            await store.sweep_replies()
        except HitlError as error:
            log.warning("old replies not forgotten", why=str(error))


class _Line:
    """Sends calls to the ledger; tries again while the ledger is away, for every write may be repeated.

    What is too large for one gRPC message, as a request or as an answer, goes by way of Ray's object store, which has no
    such limit. That is decided when gRPC refuses it: it knows its limit in this process and in the ledger's.
    """

    def __init__(self, handle: Any, capability: str | None) -> None:
        self._capability = capability
        # By reference, calls stood still for a second whenever a session started (docs/decisions/0002).
        self._direct, self._by_reference = (
            handle.options(_by_reference=False),
            handle.options(_by_reference=True),
        )

    async def send(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if method in _KEYED and kwargs.get("idempotency_key") is None:
            kwargs["idempotency_key"] = own_key()  # so that it may be repeated
        try:
            ok, result = await _retrying()(self._once, method, args, kwargs)
        except (*_TRANSPORT, StoreUnreachable) as error:
            raise _failure(method, error) from error
        if not ok:
            raise result
        return result

    async def _once(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[bool, Any]:
        try:
            ok, result = await self._direct.call.remote(self._capability, method, *args, **kwargs)
        except grpc.RpcError as error:
            if _code(error) is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                raise
            ok, result = await self._by_reference.call.remote(self._capability, method, *args, **kwargs)
        if isinstance(result, StoreUnreachable) and not ok:
            raise result
        return ok, result


def _retrying() -> AsyncRetrying:
    return AsyncRetrying(
        retry=retry_if_exception(_may_pass),
        stop=_enough,
        wait=wait_exponential_jitter(multiplier=0.1, max=2.0),
        reraise=True,
    )


def _may_pass(error: BaseException) -> bool:
    """A failure on the way to the ledger, or to the database, may not come again; one of these would."""
    if isinstance(error, (RayTaskError, ObjectStoreFullError, OutOfDiskError)):
        return False
    if isinstance(error, grpc.RpcError) and _code(error) in _COMES_AGAIN:
        return False
    return isinstance(error, (*_TRANSPORT, StoreUnreachable))


def _code(error: grpc.RpcError) -> grpc.StatusCode | None:
    return error.code() if isinstance(error, grpc.aio.AioRpcError) else None


def _failure(method: str, error: Exception) -> HitlError:
    """What the caller is told of a call that failed on the way, or in a way that Ray reports."""
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


def reach[P](protocol: type[P], handle: Any, capability: str | None = None) -> P:
    """The ledger behind a Serve handle, as the protocol has it that the capability opens; without one, there is `ping`."""
    return client(protocol, _Line(handle, capability).send)


def handle() -> Any:
    """The ledger's Serve handle, from any process of the cluster."""
    return serve.get_deployment_handle(LEDGER, APP_NAME)
