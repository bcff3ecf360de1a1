"""The ledger: the only process with a database connection, and the Store as everyone else sees it through Ray."""

from typing import Any, cast

import grpc
import structlog
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from tenacity import AsyncRetrying, retry_if_exception, stop_after_delay, wait_exponential_jitter

from claude_hitl_template import logs
from claude_hitl_template.errors import HitlError, Unavailable
from claude_hitl_template.settings import Settings
from claude_hitl_template.store.core import CoreStore
from claude_hitl_template.store.protocol import Store

log = structlog.get_logger()

APP_NAME = "claude-hitl"
LEDGER = "Ledger"
RETRY_S = 30.0  # a ledger that is started anew answers well within this
_TRANSPORT = (RayError, RayServeException, grpc.RpcError)


class LedgerService:
    """Serves the Store. An error of ours is a result, so that it reaches the caller as what it is."""

    def __init__(self) -> None:
        # Every owner imports this module, and only the ledger's own process needs a database: half a second.
        from claude_hitl_template.store.sql import SqlBackend, migrate, sqlite_url  # noqa: PLC0415

        settings = Settings.load()
        logs.configure(settings.log_level)
        settings.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        url = sqlite_url(settings.database_path)
        migrate(url)
        self._store = CoreStore(SqlBackend(url))

    async def call(self, method: str, *args: Any, **kwargs: Any) -> tuple[bool, Any]:
        try:
            return True, await getattr(self._store, method)(*args, **kwargs)
        except HitlError as error:
            return False, error

    async def check_health(self) -> None:
        await self._store.ping()


class _Remote:
    """Sends each Store method to the ledger; tries again while the ledger is away, for every write may be repeated."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def __getattr__(self, method: str) -> Any:
        if method.startswith("_"):
            raise AttributeError(method)

        async def call(*args: Any, **kwargs: Any) -> Any:
            async def once() -> tuple[bool, Any]:
                return await self._handle.call.remote(method, *args, **kwargs)

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
        stop=stop_after_delay(RETRY_S),
        wait=wait_exponential_jitter(initial=0.1, max=2.0),
        reraise=True,
    )


def _may_pass(error: BaseException) -> bool:
    """An error inside the ledger (a defect) comes again; one on the way there may not."""
    return isinstance(error, _TRANSPORT) and not isinstance(error, RayTaskError)


def remote_store(handle: Any) -> Store:
    """The Store behind a Serve handle of the ledger.

    Over Serve's gRPC: calls by reference stood still for a second whenever a session started (docs/decisions/0002).
    """
    return cast(Store, _Remote(handle.options(_by_reference=False)))


def connect() -> Store:
    """The Store, from any process of the cluster."""
    return remote_store(serve.get_deployment_handle(LEDGER, APP_NAME))
