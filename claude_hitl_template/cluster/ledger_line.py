"""A process's line to the ledger. It imports neither Ray Serve nor gRPC: over the ledger's socket it needs neither."""

import asyncio
from functools import partial
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

from claude_hitl_template.cluster.ledger_socket import Route, SocketLost
from claude_hitl_template.errors import StoreUnreachable
from claude_hitl_template.store.access import client, methods_of
from claude_hitl_template.store.protocol import Reachable, Store, own_key

APP_NAME = "claude-hitl"
LEDGER, SUPERVISOR = "Ledger", "Supervisor"  # names of deployments
AWAY_S = 75.0  # a restarted database server answers well within this
# The methods that take an idempotency key.
_KEYED = frozenset(
    name for name, method in methods_of(Store).items() if "idempotency_key" in signature(method).parameters
)
_BY_HANDLE = "claude_hitl_template.cluster.ledger_handle"  # its import takes half a second and 40 MB


class Line:
    """This process's line to the ledger, for all its callers of one event loop.

    On the ledger's machine calls go over its socket. Elsewhere, until there is a connection, and when it was lost, they go
    through the Serve handle, and again while the ledger does not answer; writes are idempotent, so they may be repeated.

    Args:
        handle: The ledger's Serve handle; without one it is made when it is needed.
        socket: Where the ledger may be called on this machine, if that is known; else it is asked.
    """

    def __init__(self, handle: Any = None, *, socket: Path | None = None) -> None:
        self._handle = handle
        self._by_handle: Any = None
        self._importing = asyncio.Lock()
        self._route = Route(self._find, socket)

    @property
    def socket(self) -> Path | None:
        """Where the ledger is called on this machine; None if it is called through the handle."""
        return self._route.at

    async def reached(self) -> None:
        """Returns once the ledger can be called. Raises HitlError."""
        if not await self._route.is_open():
            await reach(Reachable, self).ping()

    async def send(
        self, capability: str | None, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if method in _KEYED and kwargs.get("idempotency_key") is None:
            kwargs["idempotency_key"] = own_key()  # the call may be repeated with this key
        answer = None
        connection = self._route.connection()
        if connection is not None and capability is not None:
            try:
                answer = await connection.call(capability, method, args, kwargs)
            except SocketLost:
                answer = None
        if answer is None or (not answer[0] and isinstance(answer[1], StoreUnreachable)):
            answer = await (await self._through_handle()).send(capability, method, args, kwargs)
        ok, result = answer
        if not ok:
            raise result
        return result

    async def _find(self) -> Path | None:
        return await (await self._through_handle()).socket()

    async def _through_handle(self) -> Any:
        async with self._importing:
            if self._by_handle is None:
                module = await asyncio.to_thread(import_module, _BY_HANDLE)
                self._by_handle = module.HandleLine(self._handle)
        return self._by_handle


def reach[P](protocol: type[P], line: Line, capability: str | None = None) -> P:
    """Returns a client of the ledger.

    Args:
        protocol: The methods that the client has.
        line: Where its calls are sent.
        capability: Permits the methods of `protocol`; without one, only `ping` is permitted.
    """
    return client(protocol, partial(line.send, capability))
