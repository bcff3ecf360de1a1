"""The ledger's Serve handle: how processes on other machines call it, and all others while its socket is not there."""

from pathlib import Path
from typing import Any

import grpc
import structlog
from ray import serve
from ray.exceptions import ObjectStoreFullError, OutOfDiskError, RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, wait_exponential_jitter

from claude_hitl_template.cluster.ledger_line import APP_NAME, AWAY_S, LEDGER
from claude_hitl_template.errors import HitlError, InternalError, StoreUnreachable, Unavailable

log = structlog.get_logger()

RETRY_S = 30.0  # a restarted ledger answers well within this
_TRANSPORT = (RayError, RayServeException, grpc.RpcError)
# The message is too large; or Serve could not serialise the ledger's answer.
_COMES_AGAIN = (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNKNOWN)


class HandleLine:
    """Sends calls, and again while the ledger does not answer; writes are idempotent, so they may be repeated.

    A request or an answer that is too large for a gRPC message is sent through Ray's object store, which has no such
    limit. This happens after gRPC refused it, because only gRPC knows the limits of both processes.
    """

    def __init__(self, handle: Any = None) -> None:
        handle = handle or serve.get_deployment_handle(LEDGER, APP_NAME)
        # Calls by reference were delayed by a second whenever a session started (docs/decisions/0002).
        self._direct, self._by_reference = (
            handle.options(_by_reference=False),
            handle.options(_by_reference=True),
        )

    async def send(
        self, capability: str | None, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[bool, Any]:
        """The ledger's answer: whether it succeeded, and its result or error. Raises HitlError if there is none."""
        try:
            return await _retrying()(self._once, capability, method, args, kwargs)
        except (*_TRANSPORT, StoreUnreachable) as error:
            raise _failure(method, error) from error

    async def socket(self) -> Path | None:
        """Where the ledger can be called on its machine; None if nowhere, or if it does not answer."""
        try:
            return await self._direct.socket.remote()
        except _TRANSPORT as error:
            log.debug("the ledger was not asked for its socket", why=str(error))
            return None

    async def _once(
        self, capability: str | None, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[bool, Any]:
        try:
            ok, result = await self._direct.call.remote(capability, method, *args, **kwargs)
        except grpc.RpcError as error:
            if _code(error) is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                raise
            ok, result = await self._by_reference.call.remote(capability, method, *args, **kwargs)
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
