"""The ledger: the only process with a database connection, and the Store as everyone else sees it through Ray."""

import asyncio
import contextlib
from typing import Any, cast

import grpc
import structlog
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, wait_exponential_jitter

from claude_hitl_template import logs
from claude_hitl_template.errors import Away, HitlError, Unavailable
from claude_hitl_template.settings import Settings
from claude_hitl_template.store.core import CoreStore
from claude_hitl_template.store.files import FileArea
from claude_hitl_template.store.protocol import Store

log = structlog.get_logger()

APP_NAME = "claude-hitl"
LEDGER = "Ledger"
SWEEP_S = 3600.0
RETRY_S = 30.0  # a ledger that is started anew answers well within this
AWAY_S = 75.0  # a database server that is restarted is back well within this
_TRANSPORT = (RayError, RayServeException, grpc.RpcError)


class LedgerService:
    """Serves the Store. An error of ours is a result, so that it reaches the caller as what it is."""

    def __init__(self) -> None:
        # Every owner imports this module, and only the ledger's own process needs a database: half a second.
        from claude_hitl_template.store.opening import open_backend  # noqa: PLC0415

        settings = Settings.load()
        logs.configure(settings.log_level)
        settings.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._store = CoreStore(open_backend(settings, patience_s=AWAY_S), files=FileArea(settings.files_at))
        self._sweeping = asyncio.create_task(self._sweep())

    async def call(self, method: str, *args: Any, **kwargs: Any) -> tuple[bool, Any]:
        try:
            return True, await getattr(self._store, method)(*args, **kwargs)
        except HitlError as error:
            return False, error

    async def check_health(self) -> None:
        """A database that is away is not mended by starting this process anew."""
        with contextlib.suppress(Away):
            await self._store.ping()

    async def _sweep(self) -> None:
        """Removes, now and then, what deleted sessions and changed workspaces left in the file area."""
        while True:
            await asyncio.sleep(SWEEP_S)
            try:
                log.info("file area swept", blobs=await self._store.sweep_blobs())
            except HitlError as error:
                log.warning("file area not swept", why=str(error))


class _Remote:
    """Sends each Store method to the ledger; tries again while the ledger is away, for every write may be repeated."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def __getattr__(self, method: str) -> Any:
        if method.startswith("_"):
            raise AttributeError(method)

        async def call(*args: Any, **kwargs: Any) -> Any:
            async def once() -> tuple[bool, Any]:
                ok, result = await self._handle.call.remote(method, *args, **kwargs)
                if isinstance(result, Away) and not ok:
                    raise result
                return ok, result

            try:
                ok, result = await _retrying()(once)
            except _TRANSPORT as error:
                raise Unavailable(f"the ledger does not answer: {type(error).__name__}") from error
            if isinstance(result, HitlError) and not ok:
                raise result
            return result

        return call


def _retrying() -> AsyncRetrying:
    return AsyncRetrying(
        retry=retry_if_exception(_may_pass),
        stop=_enough,
        wait=wait_exponential_jitter(multiplier=0.1, max=2.0),
        reraise=True,
    )


def _may_pass(error: BaseException) -> bool:
    """An error inside the ledger (a defect) comes again; one on the way there, or to the database, may not."""
    return isinstance(error, (*_TRANSPORT, Away)) and not isinstance(error, RayTaskError)


def _enough(tries: RetryCallState) -> bool:
    away = tries.outcome is not None and isinstance(tries.outcome.exception(), Away)
    return (tries.seconds_since_start or 0) >= (AWAY_S if away else RETRY_S)


def remote_store(handle: Any) -> Store:
    """The Store behind a Serve handle of the ledger.

    Over Serve's gRPC: calls by reference stood still for a second whenever a session started (docs/decisions/0002).
    """
    return cast(Store, _Remote(handle.options(_by_reference=False)))


def connect() -> Store:
    """The Store, from any process of the cluster."""
    return remote_store(serve.get_deployment_handle(LEDGER, APP_NAME))
