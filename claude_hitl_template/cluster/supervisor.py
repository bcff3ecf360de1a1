"""The supervisor compares the sessions in the store with the owners that run, and starts or ends owners.

It is level-triggered: a lost signal delays it by one tick. It does not use Ray; owners run on an `OwnerHost`.
"""

import asyncio
import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from itertools import batched
from pathlib import Path

import structlog

from claude_hitl_template import code_version, fault_points
from claude_hitl_template.claude.limits import HardLimits
from claude_hitl_template.claude.sandbox import SandboxConfig
from claude_hitl_template.cluster.clocks import STEADY_S, LeaseWatch, Pause, SteadyClock
from claude_hitl_template.cluster.leftovers import Leftovers
from claude_hitl_template.cluster.local_sockets import model_sockets
from claude_hitl_template.cluster.owner_host import PARKED, Assignment, CannotStart, OwnerHost, OwnerLost
from claude_hitl_template.cluster.owner_pool import Owner, OwnerPool
from claude_hitl_template.cluster.prepared import FIRST_EPOCH, PreparedSessions
from claude_hitl_template.config.credentials import Credential, read_credentials
from claude_hitl_template.config.secret_files import SigningKey
from claude_hitl_template.config.settings import Settings
from claude_hitl_template.domain.canonical_json import shown_host
from claude_hitl_template.domain.models import Environment, Session, Supervised, utcnow
from claude_hitl_template.domain.policy.floor import Floor
from claude_hitl_template.errors import ConfigError, HitlError, InternalError, NotFound
from claude_hitl_template.image import labels
from claude_hitl_template.model.tokens import mint
from claude_hitl_template.session.runner import Limits
from claude_hitl_template.store.access import Authority
from claude_hitl_template.store.owners import LEASE_S
from claude_hitl_template.store.protocol import Supervision
from claude_hitl_template.store.supervision import EXISTING
from claude_hitl_template.workspace.sync import WorkspaceLocation

log = structlog.get_logger()
TICK_S = 1.0
QUEUE_TICK_S = 0.25  # while sessions wait for their turn to start; the store does not report that one is idle
RETURN_S = 5.0  # in which an owner without a lease returns, on a busy machine, too
TIDY_S = 600.0
LEFT_S = 20.0  # everything of a deleted session is removed from this machine within twice this
RUN_DIR = Path("/tmp/claude-hitl")  # noqa: S108 - in a container, which is one session's alone
RETIRE_S = 3600.0
HOLD_S = 30.0
SILENT_S = 5.0  # an owner that parks frees its place within a second or two
SLOW_STORE_S = 10.0  # a store that takes longer could not take the renewal of a lease either


class Supervisor:
    """Gives each session that should run an owner. Only one supervisor works at a time.

    It finds the owners of an earlier supervisor by their leases, and ends the others.

    Args:
        settings: Limits, folders and addresses for sessions.
        store: The ledger's methods for the supervisor.
        host: Where owners run.
        signing_key: Signs the owners' tokens and capabilities.
        environments: By id, as they are configured now.
        floor: The operator's rules, which an agent's policy cannot loosen.
        steady_s: Seconds without a jump of the wall clock after which sessions may expire or be deleted.
        lease_s: Seconds after which a lease that is not renewed ends.
        left_s: Seconds between two removals of what deleted sessions left on this machine.
        silent_s: Seconds for which a session does not say that it lacks room if an idle one gives up its place.
    """

    def __init__(
        self,
        settings: Settings,
        store: Supervision,
        host: OwnerHost,
        signing_key: SigningKey,
        *,
        environments: Mapping[str, Environment],
        floor: Floor,
        steady_s: float = STEADY_S,
        lease_s: float = LEASE_S,
        left_s: float = LEFT_S,
        silent_s: float = SILENT_S,
    ) -> None:
        self._settings, self._store, self._host = settings, store, host
        self._signing_key, self._authority = signing_key, Authority(signing_key)
        self._environments, self._floor = environments, floor
        self._steady_s = steady_s
        self._lease_s, self._look_s = lease_s, lease_s / 5  # between two checks of a lease
        self._silent_s = silent_s
        self._code = code_version()
        self._attending: dict[str, asyncio.Task[None]] = {}
        self._owners: dict[str, Owner] = {}  # by name: those that drive a session, with its workspace
        self._leftovers, self._left_s = Leftovers(settings), left_s
        self._seen: set[str] = set()  # sessions that may have a folder here, and were in the store
        self._pool = OwnerPool(settings, host, self._on_wait)
        self._prepared = PreparedSessions(store, host, self._pool, self._unassigned)
        self._pause = Pause()
        self._loops: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Starts its loops, which run until `close`."""
        loops = (self._supervise(), self._expire(), self._retire(), self._tidy(), self._remove_leftovers())
        self._loops = [asyncio.create_task(loop) for loop in loops]

    async def close(self) -> None:
        """Ends its loops and its tasks for sessions.

        Raises:
            BaseExceptionGroup: The errors of those that failed, which are defects.
        """
        tasks = [*self._loops, *self._attending.values()]
        for task in tasks:
            task.cancel()
        ended = [*await asyncio.gather(*tasks, return_exceptions=True)]
        await self._prepared.close()
        await self._pool.close()
        defects = [error for error in ended if isinstance(error, Exception)]
        if defects:
            raise BaseExceptionGroup("the supervisor failed", defects)

    def check_health(self) -> None:
        """Raises RuntimeError if a loop has stopped, which is a defect."""
        for loop in self._loops:
            if loop.done():
                raise RuntimeError(f"the supervisor stopped: {loop.exception()}")

    # -- draining

    async def drain(self, grace_s: float) -> int:
        """Stops starting owners, and waits until no session runs or `grace_s` has passed.

        The supervisor resumes by itself HOLD_S after that, because the process that requested the drain may have died.

        Args:
            grace_s: Seconds to wait at most.

        Returns:
            The number of sessions that still run.
        """
        self._pause.begin(grace_s + HOLD_S)
        deadline = time.monotonic() + grace_s
        while self._draining and time.monotonic() < deadline:
            if not any(s.lease is not None and s.status == "running" for s in await self._store.supervised()):
                break
            await asyncio.sleep(0.2)
        return sum(s.status == "running" for s in await self._store.supervised())

    async def undrain(self) -> None:
        """Ends the effect of `drain`."""
        self._pause.end()

    async def drained_s(self) -> float:
        """Returns the seconds until the effect of `drain` ends by itself; 0 if the supervisor is not draining."""
        return self._pause.left_s

    @property
    def _draining(self) -> bool:
        return self._pause.left_s > 0

    # -- what should be running

    async def _supervise(self) -> None:
        version, swept = -1, False
        while True:
            try:
                sessions = await self._store.supervised()
                if not swept:
                    await self._sweep({s.lease.holder for s in sessions if s.lease})
                    swept = True
                for session in sessions:
                    self._attend(session)
                if not self._draining:
                    await self._pool.tend_spares()
                    await self._prepared.tend()
                    await self._make_way(sessions)
                tick_s = QUEUE_TICK_S if self._pool.queued else TICK_S
                version = await self._store.wait_supervised(version, timeout_s=tick_s)
            except HitlError as error:
                log.warning("supervisor cannot reach the store", why=str(error))
                await asyncio.sleep(TICK_S)

    async def _sweep(self, holders: set[str]) -> None:
        """Ends idle owners: the spares of an earlier supervisor."""
        for name in await self._host.names() - holders:
            await self._host.end(name)

    async def _expire(self) -> None:
        """Expires approvals, except after a jump of the clock: expiry is final, and the clock may be wrong."""
        clock = SteadyClock(steady_s=self._steady_s)
        while True:
            with contextlib.suppress(HitlError):  # logged by the other loop, which uses the same store
                if clock.steady():
                    await self._store.expire_due()
            await asyncio.sleep(TICK_S)

    async def _remove_leftovers(self) -> None:
        while True:
            await asyncio.sleep(self._left_s)
            with contextlib.suppress(HitlError):
                await self._remove_left()

    async def _remove_left(self) -> None:
        """Removes the folders of deleted sessions from this machine.

        The folder of a session that this supervisor never saw in the store stays: it may belong to another store, which
        was configured before.
        """
        leased = {f"{s.id}-{s.lease.epoch}" for s in await self._store.supervised() if s.lease}
        found = await asyncio.to_thread(self._leftovers.sessions)
        seen, self._seen = self._seen, set()  # `_attend` fills it meanwhile
        existing: set[str] = set()
        for some in batched(sorted(found | seen), EXISTING):
            existing.update(await self._store.existing(some))
        self._seen |= existing
        await asyncio.to_thread(self._leftovers.remove, (seen & found) - existing)
        prepared = {f"{session_id}-{FIRST_EPOCH}" for session_id in self._pool.prepared()}
        left = await asyncio.to_thread(self._leftovers.remove_owners, leased | prepared)
        for some in batched(sorted(left), EXISTING):
            unused = set(some).difference(await self._store.existing(some))
            await asyncio.to_thread(self._leftovers.remove_empty, unused)

    async def _tidy(self) -> None:
        while True:
            await asyncio.sleep(TIDY_S)
            await self._host.tidy()

    async def _retire(self) -> None:
        """Deletes sessions older than HITL_RETENTION_DAYS, if it is set, and only while the clock can be trusted."""
        clock, days, next_at = SteadyClock(steady_s=self._steady_s), self._settings.retention_days, 0.0
        while days is not None:
            if clock.steady() and time.monotonic() >= next_at:
                retired = list[str]()
                with contextlib.suppress(HitlError):
                    retired = await self._store.retire(utcnow() - timedelta(days=days))
                if retired:  # there may be more
                    log.info("deleted sessions older than HITL_RETENTION_DAYS", count=len(retired))
                next_at = time.monotonic() + (TICK_S if retired else RETIRE_S)
            await asyncio.sleep(TICK_S)
        await asyncio.Event().wait()

    def _attend(self, session: Supervised) -> None:
        """Starts the session's task, which starts or finds its owner and runs until the owner ends."""
        self._seen.add(session.id)
        if session.id in self._attending or (self._draining and session.lease is None):
            return
        task = asyncio.create_task(self._look_after(session))
        self._attending[session.id] = task
        task.add_done_callback(lambda ended: self._attended(session.id, ended))

    def _attended(self, session_id: str, ended: asyncio.Task[None]) -> None:
        self._attending.pop(session_id, None)
        error = None if ended.cancelled() else ended.exception()
        if error is not None:  # the next tick starts a new task for the session
            log.error("session not looked after", session=session_id, exc_info=error)

    async def _look_after(self, found: Supervised) -> None:
        session: Session | Supervised = found
        try:
            session = await self._store.get_session(found.id)
            while session.lease is not None or session.status == "running":
                await self._look_once(session)
                if self._draining:
                    return
                session = await self._store.get_session(session.id)
        except NotFound:
            if session.lease is not None:
                await self._host.end(session.lease.holder)
        except InternalError as error:
            await self._report(session.id, error)
        except HitlError as error:
            log.warning("session not looked after; trying again", session=session.id, why=str(error))
            await asyncio.sleep(TICK_S)
        except Exception as error:  # a defect: without a report it would repeat each second, unseen
            log.exception("session not looked after", session=session.id)
            await self._report(session.id, error)

    async def _report(self, session_id: str, error: Exception) -> None:
        why = f"the service failed to start the session ({type(error).__name__}); ./hitl logs says where"
        await self._store.give_up(session_id, f"{why}. Send your message again to try again")

    async def _look_once(self, session: Session) -> None:
        lease = session.lease
        if lease is not None:
            await self._watch(session, lease.holder)
            await self._host.end(lease.holder)
            await self._store.drop_lease(session.id, lease.epoch)
            session = await self._store.get_session(session.id)
        if self._draining or session.status != "running":
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
        """Waits until an owner that another supervisor started ends, drives another session, or loses its lease."""
        watch = LeaseWatch(self._lease_s)
        driving = await self._host.driving(holder)
        if driving is not None:
            await self._replace_code(holder)
        while driving == (session.id, session.epoch):
            lease = (await self._store.get_session(session.id)).lease
            if lease is None or lease.epoch != session.epoch or watch.lapsed(lease):
                return
            await asyncio.sleep(min(TICK_S, self._look_s))
            driving = await self._host.driving(holder)

    async def _replace_code(self, holder: str) -> None:
        """Asks an owner from before a deploy to park once no call runs, so that later decisions run with the new code."""
        if await self._host.code(holder) != self._code:
            await self._host.make_room(holder)

    # -- owners

    async def _drive(self, session: Session, owner: Owner) -> None:
        """Assigns the session to the owner, and waits until it ends. An owner whose session parked can drive others."""
        acquired, parked = None, False
        try:
            await fault_points.reach("own.before")
            acquired = await self._store.acquire(session.id, owner.name, lease_s=self._lease_s)
            await fault_points.reach("own.after")
            if acquired.epoch == FIRST_EPOCH:
                self._prepared.note(acquired)
            self._owners[owner.name] = replace(owner, workspace_id=session.workspace_id)
            ended = await self._ended(acquired, owner)
            parked = ended == PARKED
            log.info("owner ended", session=session.id, epoch=acquired.epoch, how=ended)
        finally:
            self._owners.pop(owner.name, None)
            await self._let_go(owner, acquired, parked=parked)

    async def _let_go(self, owner: Owner, session: Session | None, *, parked: bool) -> None:
        """Gives a parked owner back to the pool once it has no lease, and ends any other: an owner must never drive a
        session whose lease it does not hold."""
        if not parked:
            await self._host.end(owner.name)
        if session is None:
            return
        try:
            with contextlib.suppress(NotFound):
                await self._store.drop_lease(session.id, session.epoch)
        except BaseException:
            await self._host.end(owner.name)
            raise
        if parked:
            await self._pool.give_back(owner, session.workspace_id)

    async def _ended(self, session: Session, owner: Owner) -> str:
        """Waits for the owner's end. An owner that lives but whose lease expired counts as ended."""
        driving = asyncio.create_task(
            self._host.drive(owner.name, self._assignment(session, owner.environment))
        )
        try:
            watch = LeaseWatch(self._lease_s)
            while not driving.done():
                await asyncio.wait({driving}, timeout=self._look_s)
                if not driving.done() and await self._lease_lost(session, watch, driving):
                    return "lease lost"
            return driving.result()
        except OwnerLost as error:
            return f"died: {error}"
        finally:
            driving.cancel()
            await asyncio.wait({driving})

    async def _lease_lost(self, session: Session, watch: LeaseWatch, driving: asyncio.Task[str]) -> bool:
        asked_at = time.monotonic()
        lease = (await self._store.get_session(session.id)).lease
        took_s = time.monotonic() - asked_at
        away_s = took_s if took_s > SLOW_STORE_S else 0.0  # the owner could not renew the lease either
        if lease is None:  # the owner has just given it up, and is about to return
            await asyncio.wait({driving}, timeout=RETURN_S)
            return not driving.done()
        return lease.epoch != session.epoch or watch.lapsed(lease, away_s=away_s)

    async def _owner(self, session: Session) -> Owner | None:
        """Returns a started owner; None if none could be started, which the session's log explains."""
        try:
            return await self._pool.take(session, self._environment(session), self._prepared.early(session))
        except CannotStart as error:
            await self._store.give_up(session.id, str(error))
            return None

    def _environment(self, session: Session) -> Environment:
        """The session's environment as configured now, because a session may have been parked for weeks; if it was
        removed from the configuration, as it was then."""
        return self._environments.get(session.environment.id, session.environment)

    async def _on_wait(self, session: Session, reason: str, lacking_s: float | None) -> bool:
        """Without room, parks the session that has been idle longest. Records once in the session's log that it waits; not
        at once where such a session gives up its place.

        Returns:
            False when the session no longer needs an owner.
        """
        current = await self._store.get_session(session.id)
        if self._draining or current.status != "running":
            return False
        if lacking_s is not None and await self._make_room() and lacking_s < self._silent_s:
            return True
        if not current.waits_for_room:
            said = f"the session waits for its turn to start: {reason}"
            if lacking_s is not None:
                said = f"no room for the session yet: {reason}. It starts as soon as there is some"
            await self._store.tell_waiting(session.id, current.epoch, said)
        return True

    async def _make_way(self, sessions: Sequence[Supervised]) -> None:
        """Asks idle sessions to park, those that have been idle longest first, for sessions that would take their owners."""
        owners = [self._owners[holder] for holder in _idle_holders(sessions) if holder in self._owners]
        for owner in self._pool.wanted(owners):
            await self._host.make_room(owner.name)

    async def _make_room(self) -> bool:
        """Asks the session that has been idle longest to park. Returns False if none is idle."""
        resting = _idle_holders(await self._store.supervised())
        if resting:
            await self._host.make_room(resting[0])
        return bool(resting)

    # -- what an owner is given

    def _assignment(self, session: Session, environment: Environment) -> Assignment:
        return replace(
            self._unassigned(session, environment),
            token=mint(self._signing_key.secret, session.id, session.epoch),
            capability=self._authority.owner(session.id, session.epoch),
        )

    def _unassigned(self, session: Session, environment: Environment) -> Assignment:
        """Everything except what opens the session's data to its owner."""
        settings, contained = self._settings, self._host.contains(environment)
        return Assignment(
            session=session,
            workspace=self._workspace(session, contained=contained),
            run_dir=RUN_DIR if contained else settings.data_dir / "run",
            model_url=f"{settings.base_url}/model",
            token="",
            capability="",
            cli_path=None if contained else settings.cli_path,
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
            model_sockets=None if contained else model_sockets(settings, self._signing_key),
            credentials=self._credentials(),
            closed=_own_addresses(settings),
            limits=HardLimits(
                settings.session_processes,
                settings.session_memory_bytes,
                settings.session_open_files,
                settings.session_disk_bytes,
            ),
        )

    def _credentials(self) -> tuple[Credential, ...]:
        """The credentials in the file; none if the file became invalid after `./hitl up` checked it."""
        try:
            return read_credentials(self._settings.credentials)
        except ConfigError as error:
            log.warning("sessions start without credentials", why=str(error))
            return ()

    def _workspace(self, session: Session, *, contained: bool) -> WorkspaceLocation:
        settings = self._settings
        folder, marker = settings.workspaces / session.id, settings.markers / session.id
        if contained:
            folder, marker = Path(labels.WORKSPACE), RUN_DIR / "saved"
        return WorkspaceLocation(
            folder,
            marker,
            lasts=not contained,
            baked=frozenset(labels.PROJECT_LAYER) if contained else frozenset(),
            exclude=settings.excluded,
            max_bytes=settings.max_workspace_bytes,
        )


def _idle_holders(sessions: Sequence[Supervised]) -> list[str]:
    """The owners of idle sessions; that of the one that has been idle longest is first."""
    idle = [(s.updated_at, s.lease.holder) for s in sessions if s.lease is not None and s.status == "idle"]
    return [holder for _, holder in sorted(idle)]


def _own_addresses(settings: Settings) -> tuple[str, ...]:
    """URLs of the service, which no session reaches."""
    ports = (
        settings.ray_port,
        settings.ray_client_port,
        settings.dashboard_port,
        settings.serve_port,
        settings.panel_port,
    )
    public = (settings.public_url,) if settings.public_url else ()
    return (*public, *(f"http://{shown_host(settings.host, port)}" for port in ports))
