"""The supervisor: compares what the store says with what runs, and acts. Level-triggered: a lost signal costs a tick."""

import asyncio
import contextlib
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import structlog
from ray.exceptions import RayError

from claude_hitl_template import code_version, fault_points
from claude_hitl_template.claude.limits import HardLimits
from claude_hitl_template.claude.sandbox import SandboxConfig
from claude_hitl_template.cluster.actor import Assignment, cleanup_actor, get_actor, list_actors
from claude_hitl_template.cluster.clocks import LeaseWatch, Pause, SteadyClock
from claude_hitl_template.cluster.containers import Preflight
from claude_hitl_template.cluster.ledger import reach
from claude_hitl_template.cluster.owner_pool import ANSWER_S, CannotStart, Owner, OwnerPool
from claude_hitl_template.config import logs
from claude_hitl_template.config.credentials import Credential, read_credentials
from claude_hitl_template.config.secret_files import read_signing_key
from claude_hitl_template.config.settings import Settings
from claude_hitl_template.domain.models import Environment, ImageFacts, Session, Supervised, utcnow
from claude_hitl_template.errors import ConfigError, HitlError, InternalError, NotFound
from claude_hitl_template.image import labels, tools
from claude_hitl_template.model.tokens import mint
from claude_hitl_template.session.runner import Limits
from claude_hitl_template.store.access import Authority
from claude_hitl_template.store.owners import LEASE_S
from claude_hitl_template.store.protocol import Supervision
from claude_hitl_template.workspace.sync import Place

log = structlog.get_logger()
TICK_S = 1.0
FACTS_S = 3.0
TIDY_S = 600.0
RUN_DIR = "/tmp/claude-hitl"  # noqa: S108 - in a container, which is one session's alone
RETIRE_S = 3600.0
HOLD_S = 30.0
LOOK_S = LEASE_S / 5  # how often a lease is looked at


class SupervisorService:
    """One replica. It knows the actors it started; a new one finds the rest in the store, or ends them."""

    def __init__(self, ledger: Any) -> None:
        self._settings = Settings.load()
        logs.configure(self._settings.log_level)
        self._signing_key = read_signing_key(self._settings)
        self._authority = Authority(self._signing_key)
        self._store = reach(Supervision, ledger, self._authority.supervisor())
        self._code = code_version()
        self._floor = self._settings.floor()
        self._attending: dict[str, asyncio.Task[None]] = {}
        self._environments = self._settings.all_environments()
        self._preflight = Preflight()
        self._pool = OwnerPool(self._settings, self._preflight, self._waits_for_room)
        self._pause = Pause()
        loops = (self._supervise(), self._expire(), self._retire(), self._tidy())
        self._loops = [asyncio.create_task(loop) for loop in loops]

    async def drain(self, grace_s: float) -> int:
        """Starts nothing more, and waits until the sessions that run come to rest. Returns how many did not.

        Unless the service ends within HOLD_S after that, it goes on: whoever wanted to stop it did not.
        """
        self._pause.begin(grace_s + HOLD_S)
        deadline = asyncio.get_running_loop().time() + grace_s
        while self._draining and asyncio.get_running_loop().time() < deadline:
            if not any(s.lease is not None and s.status == "running" for s in await self._store.supervised()):
                break
            await asyncio.sleep(0.2)
        return sum(s.status == "running" for s in await self._store.supervised())

    async def undrain(self) -> None:
        """Goes on as before `drain`."""
        self._pause.end()

    async def drained_s(self) -> float:
        """Seconds for which nothing is started yet, unless `undrain` is called; 0 when the service works as ever."""
        return self._pause.left_s

    @property
    def _draining(self) -> bool:
        return self._pause.left_s > 0

    async def image_facts(self, image: str) -> ImageFacts | None:
        """The image as it is on this machine, or as it was when podman last answered in time. None when it is not there,
        is unfit, or not known yet."""
        if image not in self._settings.images:
            return None
        looking = asyncio.create_task(asyncio.to_thread(self._preflight.check, image))
        looking.add_done_callback(_heard)  # it may end after whoever asked has gone
        try:
            return await asyncio.wait_for(asyncio.shield(looking), FACTS_S)
        except TimeoutError:
            return self._preflight.last(image)
        except ConfigError:
            return None

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
                if not self._draining:
                    self._pool.tend_spares()
                version = await self._store.wait_supervised(version, timeout_s=TICK_S)
            except (HitlError, RayError) as error:
                log.warning("supervisor cannot reach the store", why=str(error))
                await asyncio.sleep(TICK_S)

    async def _expire(self) -> None:
        """Expiry cannot be taken back, and a clock can: after a jump, nothing expires for a while."""
        clock = SteadyClock()
        while True:
            with contextlib.suppress(HitlError):  # logged by the other loop, which meets the same store
                if clock.steady():
                    await self._store.expire_due()
            await asyncio.sleep(TICK_S)

    async def _tidy(self) -> None:
        """Containers that Ray left behind count against podman's locks; those that `./hitl up` started leave nothing."""
        while self._settings.images:
            await asyncio.sleep(TIDY_S)
            with contextlib.suppress(ConfigError):  # without podman, sessions say what is wrong
                await asyncio.to_thread(tools.prune)
        await asyncio.Event().wait()

    async def _retire(self) -> None:
        """Deletes what is older than the settings keep; for ever, when they say nothing. As careful as `_expire`."""
        clock, days, look_at = SteadyClock(), self._settings.retention_days, 0.0
        while days is not None:
            if clock.steady() and time.monotonic() >= look_at:
                retired = list[str]()
                with contextlib.suppress(HitlError):
                    retired = await self._store.retire(utcnow() - timedelta(days=days))
                if retired:  # there may be more
                    log.info(
                        "sessions deleted, for they are older than HITL_RETENTION_DAYS", count=len(retired)
                    )
                look_at = time.monotonic() + (TICK_S if retired else RETIRE_S)
            await asyncio.sleep(TICK_S)
        await asyncio.Event().wait()

    def _attend(self, session: Supervised) -> None:
        """One task a session: it starts an owner or finds the one there is, and stays until it ends."""
        if session.id in self._attending or (self._draining and session.lease is None):
            return
        task = asyncio.create_task(self._look_after(session))
        self._attending[session.id] = task
        task.add_done_callback(lambda ended: self._attended(session.id, ended))

    def _attended(self, session_id: str, ended: asyncio.Task[None]) -> None:
        self._attending.pop(session_id, None)
        error = None if ended.cancelled() else ended.exception()
        if error is not None:  # the next tick looks after the session again
            log.error("session not looked after", session=session_id, exc_info=error)

    async def _look_after(self, found: Supervised) -> None:
        session: Session | Supervised = found
        try:
            session = await self._store.get_session(found.id)
            while session.lease is not None or session.status in ("running", "rescheduling"):
                await self._look_once(session)
                if self._draining:
                    return
                session = await self._store.get_session(session.id)
        except NotFound:
            if session.lease is not None:
                await asyncio.to_thread(cleanup_actor, session.lease.holder)
        except InternalError as error:
            await self._report(session.id, error)
        except (HitlError, RayError) as error:
            log.warning("session not looked after; trying again", session=session.id, why=str(error))
            await asyncio.sleep(TICK_S)
        except Exception as error:  # a defect: it would come again each second, and nobody would know
            log.exception("session not looked after", session=session.id)
            await self._report(session.id, error)

    async def _report(self, session_id: str, error: Exception) -> None:
        why = f"the service failed to start the session ({type(error).__name__}); ./hitl logs says where"
        await self._store.give_up(session_id, f"{why}. Send your message again to try again")

    async def _look_once(self, session: Session) -> None:
        lease = session.lease
        if lease is not None:
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
        actor, watch = await asyncio.to_thread(get_actor, holder), LeaseWatch(LEASE_S)
        if actor is not None:
            await self._replace_code(actor)
        while actor is not None:
            try:
                driving = await asyncio.wait_for(actor.driving.remote(), ANSWER_S)
            except (RayError, TimeoutError):
                return
            current = await self._store.get_session(session.id)
            lease = current.lease
            if driving != (session.id, session.epoch) or lease is None or lease.epoch != session.epoch:
                return
            if watch.lapsed(lease):
                return
            await asyncio.sleep(TICK_S)

    async def _replace_code(self, actor: Any) -> None:
        """An owner from before a deploy finishes what runs, and parks: what is decided then runs with the new code."""
        try:
            code = await asyncio.wait_for(actor.code.remote(), ANSWER_S)
        except (AttributeError, RayError, TimeoutError):  # one of a code that could not say
            code = None
        if code != self._code:
            actor.make_room.remote()

    # -- owners

    async def _drive(self, session: Session, owner: Owner) -> None:
        """Gives the session to the owner, and waits for its end."""
        acquired = None
        try:
            await fault_points.reach("own.before")
            acquired = await self._store.acquire(session.id, owner.name, lease_s=LEASE_S)
            await fault_points.reach("own.after")
            ended = await self._ended(acquired, owner)
            log.info("owner ended", session=session.id, epoch=acquired.epoch, how=ended)
        finally:
            await asyncio.to_thread(cleanup_actor, owner.name)
            if acquired is not None:
                with contextlib.suppress(NotFound):
                    await self._store.drop_lease(session.id, acquired.epoch)

    async def _ended(self, session: Session, owner: Owner) -> str:
        """Waits for the owner's end. One that lives but lets its lease run out counts as ended."""
        running = asyncio.ensure_future(owner.actor.run.remote(self._assignment(session, owner.environment)))
        watch = LeaseWatch(LEASE_S)
        while not running.done():
            await asyncio.wait({running}, timeout=LOOK_S)
            if not running.done():
                asked_at = time.monotonic()
                lease = (await self._store.get_session(session.id)).lease
                took_s = time.monotonic() - asked_at
                away_s = took_s if took_s > ANSWER_S else 0.0  # then the owner could not renew it either
                if lease is None or lease.epoch != session.epoch or watch.lapsed(lease, away_s=away_s):
                    running.cancel()
                    return "lease lost"
        try:
            return str(running.result())
        except RayError as error:
            return f"died: {error}"

    async def _owner(self, session: Session) -> Owner | None:
        """A started owner. None when none could be started; the session's log says why."""
        try:
            return await self._pool.take(session, self._environment(session))
        except CannotStart as error:
            await self._store.give_up(session.id, str(error))
            return None

    def _environment(self, session: Session) -> Environment:
        """As it is configured now, for a session may have been parked for weeks; one that is gone, as it was."""
        return self._environments.get(session.environment.id, session.environment)

    async def _waits_for_room(self, session: Session, why: str) -> bool:
        """Says so in the session's log, once, and has one that only keeps its process warm make room."""
        current = await self._store.get_session(session.id)
        if self._draining or current.status not in ("running", "rescheduling"):
            return False
        if not current.waits_for_room:
            said = f"no room for the session yet: {why}. It starts as soon as there is some"
            await self._store.tell_waiting(session.id, current.epoch, said)
        resting = [
            (s.updated_at, s.lease.holder)
            for s in await self._store.supervised()
            if s.lease is not None and s.status == "idle"
        ]
        actor = await asyncio.to_thread(get_actor, min(resting)[1]) if resting else None
        if actor is not None:
            actor.make_room.remote()
        return True

    def _assignment(self, session: Session, environment: Environment) -> Assignment:
        settings, contained = self._settings, environment.image is not None
        return Assignment(
            session=session,
            workspace=self._place(session, contained=contained),
            run_dir=RUN_DIR if contained else str(settings.data_dir / "run"),
            model_url=f"{settings.base_url}/model",
            token=mint(self._signing_key.secret, session.id, session.epoch),
            capability=self._authority.owner(session.id, session.epoch),
            cli_path=str(settings.cli_path) if settings.cli_path and not contained else None,
            limits=Limits(settings.hot_window_s, settings.idle_timeout_s, settings.approval_ttl_s),
            share=self._pool.share,
            sandbox=self._sandbox(contained=contained),
            floor=self._floor,
        )

    def _sandbox(self, *, contained: bool) -> SandboxConfig | None:
        settings = self._settings
        if settings.sandbox == "off":
            return None
        return SandboxConfig(
            contained=contained,
            readable=settings.sandbox_readable,
            writable=settings.sandbox_writable,
            requests=settings.turn_requests,
            model_bytes=settings.turn_model_bytes,
            credentials=self._credentials(),
            limits=HardLimits(
                settings.session_processes,
                settings.session_memory_bytes,
                settings.session_open_files,
                settings.session_file_bytes,
            ),
        )

    def _credentials(self) -> tuple[Credential, ...]:
        """As the file says now. One that was spoilt since `./hitl up` looked at it gives none."""
        try:
            return read_credentials(self._settings.credentials)
        except ConfigError as error:
            log.warning("sessions start without credentials", why=str(error))
            return ()

    def _place(self, session: Session, *, contained: bool) -> Place:
        settings = self._settings
        folder, marker = settings.workspaces / session.id, settings.markers / session.id
        if contained:
            folder, marker = Path(labels.WORKSPACE), Path(RUN_DIR) / "saved"
        return Place(
            folder,
            marker,
            lasts=not contained,
            baked=frozenset(labels.PROJECT_LAYER) if contained else frozenset(),
            exclude=settings.excluded,
            max_bytes=settings.max_workspace_bytes,
        )


def _heard(task: asyncio.Task[Any]) -> None:
    """Takes note of how a task ended, whose failure was told already or concerns nobody any more."""
    if not task.cancelled():
        task.exception()


def _sweep(holders: set[str]) -> None:
    """Ends the owners that drive nothing: the spares of a supervisor that is gone."""
    for name in set(list_actors()) - holders:
        cleanup_actor(name)
