"""The supervisor: compares what the store says with what runs, and acts. Level-triggered: a lost signal costs a tick."""

import asyncio
import contextlib
import socket
from datetime import timedelta
from typing import Any

import structlog
from ray.exceptions import ActorDiedError, GetTimeoutError, RayError

from claude_hitl_template.agent import ActorConfig, cleanup_actor, create_actor, get_actor
from claude_hitl_template.errors import HitlError, NotFound
from claude_hitl_template.ledger import remote_store
from claude_hitl_template.model.tokens import mint
from claude_hitl_template.models import Session, utcnow
from claude_hitl_template.secrets import read_signing_key
from claude_hitl_template.session import Limits
from claude_hitl_template.settings import Settings
from claude_hitl_template.store.owners import LEASE_S

log = structlog.get_logger()
TICK_S = 1.0
EXPIRY_TICK_S = 1.0


class SupervisorService:
    """One replica. Its only state is the set of actors it waits for; a new one finds the rest in the store."""

    def __init__(self, ledger: Any) -> None:
        self._settings = Settings.load()
        self._store = remote_store(ledger)
        self._signing_key = read_signing_key(self._settings)
        self._attending: dict[str, asyncio.Task[None]] = {}
        self._draining = False
        self._loops = [asyncio.create_task(self._supervise()), asyncio.create_task(self._expire())]

    async def drain(self, grace_s: float) -> int:
        """Starts nothing more, and waits until the sessions that run come to rest. Returns how many did not."""
        self._draining = True
        deadline = asyncio.get_running_loop().time() + grace_s
        while asyncio.get_running_loop().time() < deadline:
            busy = [
                s for s in await self._store.supervised() if s.lease is not None and s.status == "running"
            ]
            if not busy:
                break
            await asyncio.sleep(0.2)
        return sum(s.status == "running" for s in await self._store.supervised())

    def check_health(self) -> None:
        for loop in self._loops:
            if loop.done():
                raise RuntimeError(f"the supervisor stopped: {loop.exception()}")

    async def _supervise(self) -> None:
        version = -1
        while True:
            try:
                for session in await self._store.supervised():
                    self._attend(session)
                version = await self._store.wait_supervised(version, timeout_s=TICK_S)
            except HitlError as error:
                log.warning("supervisor cannot reach the store", why=str(error))
                await asyncio.sleep(TICK_S)

    async def _expire(self) -> None:
        while True:
            with contextlib.suppress(HitlError):  # logged by the other loop, which meets the same store
                await self._store.expire_due()
            await asyncio.sleep(EXPIRY_TICK_S)

    def _attend(self, session: Session) -> None:
        """One task a session: it starts an owner or finds the one there is, and stays until it ends."""
        if session.id in self._attending or (self._draining and session.lease is None):
            return
        task = asyncio.create_task(self._look_after(session))
        self._attending[session.id] = task
        task.add_done_callback(lambda _: self._attending.pop(session.id, None))

    async def _look_after(self, session: Session) -> None:
        try:
            if session.lease is not None and session.lease.expires_at > utcnow():
                actor = await asyncio.to_thread(get_actor, session.id)
                if actor is not None and await self._watch(session, actor):
                    return
            await self._take_over(session)
        except NotFound:
            await asyncio.to_thread(cleanup_actor, session.id)
        except (HitlError, RayError) as error:
            log.warning("session not looked after; trying again", session=session.id, why=str(error))
            await asyncio.sleep(TICK_S)

    async def _watch(self, session: Session, actor: Any) -> bool:
        """Stays until an owner that another supervisor started is gone. False: it is gone already."""
        epoch = session.epoch
        try:
            while True:
                await asyncio.wait_for(actor.ping.remote(), LEASE_S)
                await asyncio.sleep(TICK_S)
                current = await self._store.get_session(session.id)
                if current.lease is None or current.epoch != epoch:
                    return True
                if current.lease.expires_at < utcnow():
                    return False
        except (ActorDiedError, RayError, GetTimeoutError, TimeoutError):
            return False

    async def _take_over(self, session: Session) -> None:
        """Ends whatever owner there was, raises the epoch, starts the next, and waits for its end."""
        await asyncio.to_thread(cleanup_actor, session.id)
        if session.lease is not None:
            await self._store.drop_lease(session.id, session.lease.epoch)
        current = await self._store.get_session(session.id)
        if current.status not in ("running", "rescheduling") or self._draining:
            return
        if current.recoveries >= self._settings.max_recoveries:
            await self._store.give_up(
                session.id,
                f"the session's process died {current.recoveries} times in a row; send a message to try again. "
                "`./hitl logs` says why it died",
            )
            return
        acquired = await self._store.acquire(session.id, socket.gethostname(), lease_s=LEASE_S)
        await self._run(acquired)

    async def _run(self, session: Session) -> None:
        actor = await asyncio.to_thread(create_actor, self._config(session), cpus=self._settings.session_cpus)
        try:
            if not await self._started(session, actor):
                return
            ended = await self._ended(session, actor)
            log.info("owner ended", session=session.id, epoch=session.epoch, how=ended)
        finally:
            await asyncio.to_thread(_kill, actor)
            with contextlib.suppress(NotFound):
                await self._store.drop_lease(session.id, session.epoch)

    async def _ended(self, session: Session, actor: Any) -> str:
        """Waits for the owner's end. One that lives but lets its lease run out counts as ended."""
        running = asyncio.ensure_future(actor.run.remote())
        while not running.done():
            await asyncio.wait({running}, timeout=LEASE_S / 3)
            if not running.done():
                current = await self._store.get_session(session.id)
                lease = current.lease
                if lease is None or lease.epoch != session.epoch or lease.expires_at < utcnow():
                    running.cancel()
                    return "lease lost"
        try:
            return str(running.result())
        except RayError as error:
            return f"died: {type(error).__name__}"

    async def _started(self, session: Session, actor: Any) -> bool:
        """False, with a reason in the session's log, when the cluster has no room in time."""
        starting = asyncio.ensure_future(actor.ping.remote())
        deadline = utcnow() + timedelta(seconds=self._settings.start_timeout_s)
        while utcnow() < deadline:
            done, _ = await asyncio.wait({starting}, timeout=LEASE_S / 3)
            if done:
                try:
                    await starting
                except RayError as error:
                    log.warning("owner did not start", session=session.id, why=str(error))
                return starting.exception() is None
            await self._store.wait_session(
                session.id, session.epoch, session.wakes, timeout_s=0
            )  # keeps the lease
        starting.cancel()
        await self._store.give_up(
            session.id,
            f"no room for the session within {self._settings.start_timeout_s:g} s: the cluster's CPUs are taken by "
            "other sessions. Try again later, or lower HITL_SESSION_CPUS",
        )
        return False

    def _config(self, session: Session) -> ActorConfig:
        settings = self._settings
        return ActorConfig(
            session=session,
            workspace=str(settings.workspaces / session.id),
            run_dir=str(settings.data_dir / "run"),
            model_url=f"{settings.base_url}/model",
            token=mint(self._signing_key, session.id, session.epoch),
            cli_path=str(settings.cli_path) if settings.cli_path else None,
            limits=Limits(settings.hot_window_s, settings.idle_timeout_s, settings.approval_ttl_s),
        )


def _kill(actor: Any) -> None:
    import ray  # noqa: PLC0415

    with contextlib.suppress(RayError):
        ray.kill(actor, no_restart=True)
