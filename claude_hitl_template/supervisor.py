"""The supervisor: compares what the store says with what runs, and acts. Level-triggered: a lost signal costs a tick."""

import asyncio
import contextlib
from collections import deque
from dataclasses import dataclass
from typing import Any

import ray
import structlog
from ray.exceptions import RayError

from claude_hitl_template import logs
from claude_hitl_template.agent import Assignment, cleanup_actor, create_actor, get_actor, list_actors
from claude_hitl_template.errors import HitlError, NotFound
from claude_hitl_template.ledger import remote_store
from claude_hitl_template.model.tokens import mint
from claude_hitl_template.models import Session, new_id, utcnow
from claude_hitl_template.secrets import read_signing_key
from claude_hitl_template.session import Limits
from claude_hitl_template.settings import Settings
from claude_hitl_template.store.owners import LEASE_S

log = structlog.get_logger()
TICK_S = 1.0
ANSWER_S = 10.0  # an actor that is alive answers a question within this


@dataclass(frozen=True)
class Owner:
    """A started actor that can drive a session. The lease's holder is its name."""

    name: str
    actor: Any


class SupervisorService:
    """One replica. It knows the actors it started; a new one finds the rest in the store, or ends them."""

    def __init__(self, ledger: Any) -> None:
        self._settings = Settings.load()
        logs.configure(self._settings.log_level)
        self._store = remote_store(ledger)
        self._signing_key = read_signing_key(self._settings)
        self._attending: dict[str, asyncio.Task[None]] = {}
        self._spares: deque[Owner] = deque()
        self._warming: asyncio.Task[None] | None = None
        self._starting = 0
        # More at once than there are CPUs would only make each start slower, and in the end too slow.
        self._starts = asyncio.Semaphore(max(2, int(ray.cluster_resources().get("CPU", 1))))
        self._draining = False
        self._loops = [asyncio.create_task(self._supervise()), asyncio.create_task(self._expire())]

    async def drain(self, grace_s: float) -> int:
        """Starts nothing more, and waits until the sessions that run come to rest. Returns how many did not."""
        self._draining = True
        deadline = asyncio.get_running_loop().time() + grace_s
        while asyncio.get_running_loop().time() < deadline:
            if not any(s.lease is not None and s.status == "running" for s in await self._store.supervised()):
                break
            await asyncio.sleep(0.2)
        return sum(s.status == "running" for s in await self._store.supervised())

    def check_health(self) -> None:
        for loop in self._loops:
            if loop.done():
                raise RuntimeError(f"the supervisor stopped: {loop.exception()}")

    # -- what should be running

    async def _supervise(self) -> None:
        version, swept = -1, False
        while True:
            try:
                sessions = await self._store.supervised()
                if not swept:
                    await asyncio.to_thread(_sweep, {s.lease.holder for s in sessions if s.lease})
                    swept = True
                for session in sessions:
                    self._attend(session)
                self._tend_spares()
                version = await self._store.wait_supervised(version, timeout_s=TICK_S)
            except (HitlError, RayError) as error:
                log.warning("supervisor cannot reach the store", why=str(error))
                await asyncio.sleep(TICK_S)

    async def _expire(self) -> None:
        while True:
            with contextlib.suppress(HitlError):  # logged by the other loop, which meets the same store
                await self._store.expire_due()
            await asyncio.sleep(TICK_S)

    def _attend(self, session: Session) -> None:
        """One task a session: it starts an owner or finds the one there is, and stays until it ends."""
        if session.id in self._attending or (self._draining and session.lease is None):
            return
        task = asyncio.create_task(self._look_after(session))
        self._attending[session.id] = task
        task.add_done_callback(lambda _: self._attending.pop(session.id, None))

    async def _look_after(self, session: Session) -> None:
        try:
            while session.lease is not None or session.status in ("running", "rescheduling"):
                await self._look_once(session)
                if self._draining:
                    return
                session = await self._store.get_session(session.id)
        except NotFound:
            if session.lease is not None:
                await asyncio.to_thread(cleanup_actor, session.lease.holder)
        except (HitlError, RayError) as error:
            log.warning("session not looked after; trying again", session=session.id, why=str(error))
            await asyncio.sleep(TICK_S)

    async def _look_once(self, session: Session) -> None:
        lease = session.lease
        if lease is not None:
            if lease.expires_at > utcnow():
                await self._watch(session, lease.holder)
            await asyncio.to_thread(cleanup_actor, lease.holder)
            await self._store.drop_lease(session.id, lease.epoch)
            session = await self._store.get_session(session.id)
        if self._draining or session.status not in ("running", "rescheduling"):
            return
        if session.recoveries >= self._settings.max_recoveries:
            await self._store.give_up(
                session.id,
                f"the session's process died {session.recoveries} times in a row; send a message to try again. "
                "`./hitl logs` says why it died",
            )
            return
        owner = await self._owner(session)
        if owner is not None:
            await self._drive(session, owner)

    async def _watch(self, session: Session, holder: str) -> None:
        """Stays until an owner that another supervisor started is gone, or has lost its lease."""
        actor = await asyncio.to_thread(get_actor, holder)
        while actor is not None:
            try:
                driving = await asyncio.wait_for(actor.driving.remote(), ANSWER_S)
            except (RayError, TimeoutError):
                return
            current = await self._store.get_session(session.id)
            lease = current.lease
            if driving != (session.id, session.epoch) or lease is None or lease.epoch != session.epoch:
                return
            if lease.expires_at < utcnow():
                return
            await asyncio.sleep(TICK_S)

    # -- owners

    async def _drive(self, session: Session, owner: Owner) -> None:
        """Gives the session to the owner, and waits for its end."""
        acquired = None
        try:
            acquired = await self._store.acquire(session.id, owner.name, lease_s=LEASE_S)
            ended = await self._ended(acquired, owner.actor)
            log.info("owner ended", session=session.id, epoch=acquired.epoch, how=ended)
        finally:
            await asyncio.to_thread(cleanup_actor, owner.name)
            if acquired is not None:
                with contextlib.suppress(NotFound):
                    await self._store.drop_lease(session.id, acquired.epoch)

    async def _ended(self, session: Session, actor: Any) -> str:
        """Waits for the owner's end. One that lives but lets its lease run out counts as ended."""
        running = asyncio.ensure_future(actor.run.remote(self._assignment(session)))
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
            return f"died: {error}"

    async def _owner(self, session: Session) -> Owner | None:
        """A started owner: a spare one, or a new one. None when it could not be started; the session's log says why."""
        self._starting += 1
        try:
            warming, self._warming = self._warming, None
            if warming is not None and not self._spares:
                await asyncio.wait({warming})  # it is further on than a new one; who comes next starts one
            while self._spares:
                spare = self._spares.popleft()
                with contextlib.suppress(TimeoutError):
                    if await _answers(spare, ANSWER_S):
                        return spare
                await asyncio.to_thread(cleanup_actor, spare.name)
            async with self._starts:
                return await self._start(session)
        finally:
            self._starting -= 1

    async def _start(self, session: Session) -> Owner | None:
        name = f"claude-session-{session.id}"
        await asyncio.to_thread(cleanup_actor, name)
        actor = await asyncio.to_thread(create_actor, name, cpus=self._settings.session_cpus)
        owner = Owner(name, actor)
        try:
            if await _answers(owner, self._settings.start_timeout_s):
                return owner
            why = "the session's process could not be started; `./hitl logs` says why"
        except TimeoutError:
            why = (
                f"no room for the session within {self._settings.start_timeout_s:g} s: the cluster's CPUs are taken "
                "by other sessions. Try again later, or lower HITL_SESSION_CPUS"
            )
        await asyncio.to_thread(cleanup_actor, name)
        await self._store.give_up(session.id, why)
        return None

    def _tend_spares(self) -> None:
        """One at a time, and never while a session starts: it would take the CPU that the session needs."""
        wanted = not self._draining and len(self._spares) < self._settings.spare_owners
        busy = self._starting > 0 or (self._warming is not None and not self._warming.done())
        if wanted and not busy:
            self._warming = asyncio.create_task(self._warm())

    async def _warm(self) -> None:
        name = f"claude-session-spare-{new_id('own').removeprefix('own_')}"
        try:
            actor = await asyncio.to_thread(create_actor, name, cpus=self._settings.session_cpus)
            spare = Owner(name, actor)
            if await _answers(spare, self._settings.start_timeout_s):
                self._spares.append(spare)
                return
        except (RayError, TimeoutError) as error:  # a cluster that is full has no room for spares
            log.info("no spare owner", why=type(error).__name__)
        await asyncio.to_thread(cleanup_actor, name)

    def _assignment(self, session: Session) -> Assignment:
        settings = self._settings
        return Assignment(
            session=session,
            workspace=str(settings.workspaces / session.id),
            run_dir=str(settings.data_dir / "run"),
            model_url=f"{settings.base_url}/model",
            token=mint(self._signing_key, session.id, session.epoch),
            cli_path=str(settings.cli_path) if settings.cli_path else None,
            limits=Limits(settings.hot_window_s, settings.idle_timeout_s, settings.approval_ttl_s),
        )


async def _answers(owner: Owner, timeout_s: float) -> bool:
    """False when it is dead. Raises TimeoutError when it does not answer."""
    try:
        await asyncio.wait_for(owner.actor.ready.remote(), timeout_s)
    except RayError as error:
        log.warning("owner is gone", owner=owner.name, why=str(error))
        return False
    return True


def _sweep(holders: set[str]) -> None:
    """Ends the owners that drive nothing: the spares of a supervisor that is gone."""
    for name in set(list_actors()) - holders:
        cleanup_actor(name)
