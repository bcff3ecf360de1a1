"""The ledger, the only process with a database connection."""

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import structlog

from claude_hitl_template.cluster.ledger_line import AWAY_S
from claude_hitl_template.cluster.ledger_socket import LedgerSocket
from claude_hitl_template.config import logs
from claude_hitl_template.config.secret_files import audit_signer, make_data_folder, read_signing_key
from claude_hitl_template.config.settings import Settings
from claude_hitl_template.errors import HitlError, InternalError, StoreUnreachable
from claude_hitl_template.store.access import Authority, Dispatcher
from claude_hitl_template.store.protocol import Store

log = structlog.get_logger()

SWEEP_S = 3600.0
REPLIES_S = 300.0


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
