"""Starts owners for sessions when there is room, reuses them, and keeps spare ones ready. Does not use Ray."""

import asyncio
import math
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import structlog

from claude_hitl_template.cluster.clocks import Backoff
from claude_hitl_template.cluster.owner_host import Assignment, CannotStart, Capacity, OwnerHost, Share
from claude_hitl_template.config.settings import Settings
from claude_hitl_template.domain.models import Environment, Session, new_id
from claude_hitl_template.presentation.text import size

log = structlog.get_logger()
WARM_AGAIN_S, WARM_AGAIN_MOST_S = 5.0, 600.0  # between two failed tries to start a spare
ROOM_S = 0.5  # between two capacity checks; an owner that ends frees its share within a second or two
CALM_S = 2.0  # after a session got an owner: its first calls need the CPU more than the next CLI
QUEUE_S = 5.0  # a session that waits longer for its turn to start reports it
START_S = 1.5  # what an owner's start takes, until one is measured
CLI_SHARE = 0.5  # what the start of a session's CLI takes after that, of an owner's start
REST_S = 60.0  # an owner whose session parked is kept for so long, beyond the spare owners
MOST_SESSIONS = 50  # that one owner drives, one after another: bounds what its process may leak

type OnWait = Callable[[Session, str, float | None], Awaitable[bool]]


@dataclass(frozen=True)
class Owner:
    """A started owner that can drive a session. Its name is the holder of the session's lease.

    `workspace_id` is that of the sessions that it drove before; `driven` is their number. `prepared` is the id of a session
    to come whose CLI it has started.
    """

    name: str
    environment: Environment
    workspace_id: str | None = None
    driven: int = 0
    prepared: str | None = None

    def fits(self, workspace_id: str, environment: Environment) -> bool:
        """Whether it may drive a session of this key. A process never has sessions of two keys, not even in succession."""
        return self.workspace_id in (None, workspace_id) and self.environment.image == environment.image


@dataclass(frozen=True)
class _Waiter:
    """A session that waits for its turn to start an owner, and takes one that another session gives back.

    `decided`: a human decided on the call that it was parked with, and may be watching.
    """

    workspace_id: str
    environment: Environment
    decided: bool
    turn: asyncio.Task[Any]
    given: asyncio.Future[Owner]

    def takes(self, owner: Owner) -> bool:
        return not self.given.done() and owner.fits(self.workspace_id, self.environment)


class OwnerPool:
    """Provides each session with an owner.

    `on_wait(session, reason, lacking_s)` is called while a session waits; it returns False to stop waiting. `lacking_s`: for
    how long there has been no room for it; None if it waits for something else.
    """

    def __init__(
        self,
        settings: Settings,
        host: OwnerHost,
        on_wait: OnWait,
        *,
        queue_s: float = QUEUE_S,
        rest_s: float = REST_S,
        calm_s: float = CALM_S,
        start_s: float = START_S,
    ) -> None:
        self._settings, self._host, self._on_wait = settings, host, on_wait
        self._queue_s, self._rest_s, self._calm_s = queue_s, rest_s, calm_s
        self.share = Share(
            settings.session_cpus,
            settings.session_memory_bytes,
            settings.session_processes,
            settings.session_disk_bytes,
        )
        self._spare_environment = next(iter(settings.all_environments().values()))
        self._spares: deque[Owner] = deque()
        # Owners that were given back while there were spares, and until when they are kept. Without them each session that
        # parks would cost the start of an owner: that of the next spare, while its own owner ends.
        self._resting: deque[tuple[float, Owner]] = deque()
        self._warming: asyncio.Task[None] | None = None
        self._warm_up = Backoff(WARM_AGAIN_S, WARM_AGAIN_MOST_S)
        self._taking = 0
        self._calm_at = 0.0
        # Owners that were requested and do not answer yet; the host's capacity may not include them.
        self._coming = 0
        self._waiters: deque[_Waiter] = deque()
        self._returned: tuple[float, Owner] | None = None  # the last owner that a waiter was given, and when
        self._start_s = start_s  # of the last start outside a container
        self._hoping: list[_Waiter] = []  # those that do not start an owner while others are given back
        # By the session's id: until a prepared CLI has ended, its folders are not another owner's.
        self._clearing: dict[str, asyncio.Task[None]] = {}
        self._queue = asyncio.Lock()  # sessions that wait for room get it in the order in which they asked
        self._starts: asyncio.Semaphore | None = None

    async def take(
        self, session: Session, environment: Environment, early: Assignment | None = None
    ) -> Owner | None:
        """Returns an owner that answers, after waiting for room if necessary.

        Args:
            session: The session.
            environment: Where it runs.
            early: What an owner that must be started may start the session's CLI with.

        Returns:
            The owner; None when the session no longer needs one.

        Raises:
            CannotStart: No owner can be started.
        """
        self._taking += 1
        try:
            if clearing := self._clearing.get(session.id):
                await asyncio.wait({clearing})
            turns = await self._turns()
            spare = await self._spare(session, environment)
            if spare is None:
                return await self._next(turns, session, environment, early)
            if spare.prepared != session.id and not turns.locked():
                await turns.acquire()
                self._end_turn(turns, starts_cli=True)
            return spare
        finally:
            self._taking -= 1
            self._calm_at = self._now() + self._calm_s

    async def give_back(self, owner: Owner, workspace_id: str) -> None:
        """Takes back an owner whose session parked: the workspace's next session gets it, or it becomes a spare or ends."""
        await self._keep(replace(owner, workspace_id=workspace_id, driven=owner.driven + 1, prepared=None))

    async def _keep(self, owner: Owner) -> None:
        if self._is_reusable(owner):
            for waiter in sorted(self._waiters, key=lambda waiter: not waiter.decided):
                if waiter.takes(owner):
                    waiter.given.set_result(owner)
                    self._returned = self._now(), owner
                    return
            if len(self._spares) < self._settings.spare_owners:
                self._spares.append(owner)
                return
            if len(self._resting) < self._settings.spare_owners:
                self._resting.append((self._now() + self._rest_s, owner))
                return
        await self._host.end(owner.name)

    def _is_reusable(self, owner: Owner) -> bool:
        return owner.driven < MOST_SESSIONS and not self._host.contains(owner.environment)

    @property
    def queued(self) -> list[_Waiter]:
        """The sessions that wait for their turn to start, or for an owner although it has come."""
        locked = self._starts is not None and self._starts.locked()
        return [
            waiter
            for waiter in self._waiters
            if waiter in self._hoping or (locked and not waiter.turn.done())
        ]

    def wanted(self, idle: Iterable[Owner]) -> list[Owner]:
        """Returns which of these owners should park their sessions for those that wait for their turn to start: the end of
        a CLI costs a tenth of an owner's start."""
        queued, wanted = self.queued, list[Owner]()
        for owner in filter(self._is_reusable, idle):
            waiter = next((waiter for waiter in queued if waiter.takes(owner)), None)
            if waiter is not None:
                queued.remove(waiter)
                wanted.append(owner)
        return wanted

    async def tend_spares(self) -> None:
        """Starts a missing spare; one at a time, and none while a session starts, which needs the CPU, or while others give
        back their owners. Ends owners that have rested for long."""
        while self._resting and self._resting[0][0] <= self._now():
            await self._host.end(self._resting.popleft()[1].name)
        wanted = len(self._spares) < self._settings.spare_owners and not self._warm_up.left_s
        if wanted and not self._busy and self._return_due_in_s <= 0:
            self._warming = asyncio.create_task(self._warm())
            self._warming.add_done_callback(self._warmed)

    def prepare(self, session: Session) -> Owner | None:
        """Returns a spare owner that may start this session's CLI before the session exists; None if there is none now, or
        one has done so, or sessions start. It stays a spare owner for the sessions of the same workspace."""
        if self._busy or self._now() < self._calm_at or any(spare.prepared for spare in self._spares):
            return None
        for at, spare in enumerate(self._spares):
            if spare.fits(session.workspace_id, session.environment):
                chosen = replace(spare, workspace_id=session.workspace_id, prepared=session.id)
                self._spares[at] = chosen
                return chosen
        return None

    def prepared(self) -> list[str]:
        """The ids of sessions that have a CLI, and may never exist."""
        return [spare.prepared for spare in self._spares if spare.prepared is not None]

    async def end_prepared(self) -> None:
        """Ends owners that have started a CLI for a session that did not come."""
        for spare in [spare for spare in self._spares if spare.prepared is not None]:
            self._spares.remove(spare)
            await self._clear(spare)
            await self._host.end(spare.name)

    async def close(self) -> None:
        """Cancels the start of a spare; spares that are ready stay."""
        if self._warming is not None:
            self._warming.cancel()
            await asyncio.wait({self._warming})

    # -- spares

    @property
    def _busy(self) -> bool:
        warming = self._warming is not None and not self._warming.done()
        return warming or self._taking > 0

    async def _spare(self, session: Session, environment: Environment) -> Owner | None:
        if environment.image != self._spare_environment.image:
            return None
        warming, self._warming = self._warming, None
        spare = self._fitting(session, environment)
        if spare is None and warming is not None and not self._spares:
            await asyncio.wait({warming})  # it is closer to ready than a new one; the next session starts one
            spare = self._fitting(session, environment)
        while spare is not None and not await self._is_ready(spare, session):
            await self._host.end(spare.name)
            spare = self._fitting(session, environment)
        return spare

    async def _is_ready(self, spare: Owner, session: Session) -> bool:
        if spare.prepared not in (None, session.id):
            await self._clear(spare)
        return await self._host.answers(spare.name)

    def _fitting(self, session: Session, environment: Environment) -> Owner | None:
        """Takes an owner out of those that are ready: the one that has the session's CLI, else if possible one that no other
        workspace could use, and last one that has another session's CLI."""
        fitting = [spare for spare in self._spares if spare.fits(session.workspace_id, environment)]
        own = next((spare for spare in fitting if spare.prepared == session.id), None)
        for resting in self._resting:
            if own is None and resting[1].fits(session.workspace_id, environment):
                self._resting.remove(resting)
                return resting[1]
        spare = own or min(fitting, key=lambda spare: spare.prepared is not None, default=None)
        if spare is not None:
            self._spares.remove(spare)
        return spare

    async def _clear(self, spare: Owner) -> None:
        """Has the owner end the CLI of a session that gets another owner, or does not come. Call it before anything else is
        awaited after the owner was taken out of the spares."""
        session_id = str(spare.prepared)
        clearing = self._clearing[session_id] = asyncio.create_task(self._end_cli(spare.name))
        clearing.add_done_callback(lambda _: self._clearing.pop(session_id, None))
        await asyncio.wait({clearing})

    async def _end_cli(self, name: str) -> None:
        if await self._host.answers(name):
            await self._host.prepare(name, None)

    async def _warm(self) -> None:
        name = _new_name()
        environment = self._spare_environment
        try:
            await self._host.check(environment)
            if await self._has_room():
                owner = await self._create(name, environment)
                if len(self._spares) < self._settings.spare_owners:
                    self._spares.append(owner)
                else:  # one that was given back meanwhile is the spare
                    await self._keep(owner)
                return
        except (CannotStart, TimeoutError) as error:
            self._warm_up.failed()
            why = str(error) or type(error).__name__
            log.info("no spare owner", why=why, again_in_s=self._warm_up.left_s)
        await self._host.end(name)

    def _warmed(self, warming: asyncio.Task[None]) -> None:
        error = None if warming.cancelled() else warming.exception()
        if error is not None:  # a defect; it may occur again
            self._warm_up.failed()
            log.error("no spare owner", exc_info=error)

    async def _end_spares(self) -> None:
        while self._resting:
            await self._host.end(self._resting.popleft()[1].name)
        while self._spares:
            await self._host.end(self._spares.popleft().name)

    # -- starting

    async def _next(
        self,
        turns: asyncio.Semaphore,
        session: Session,
        environment: Environment,
        early: Assignment | None,
    ) -> Owner | None:
        """Starts an owner when it is the session's turn and there is room, or takes one that is given back before that."""
        decided = session.deferred is not None
        turn = asyncio.create_task(turns.acquire())
        waiter = _Waiter(session.workspace_id, environment, decided, turn, asyncio.Future())
        starts_cli = False
        try:
            while await self._may_start(session, waiter):
                if waiter.given.done():
                    return waiter.given.result()
                try:
                    owner = await self._create(_new_name(), environment, early)
                except TimeoutError as error:
                    if await self._has_room():
                        limit = f"{self._settings.start_timeout_s:g} s (HITL_START_TIMEOUT_S)"
                        raise CannotStart(await self._host.why_late(environment, limit)) from error
                else:
                    starts_cli = early is None
                    return owner
            if waiter.given.done():
                await self._keep(waiter.given.result())
            return None
        finally:
            turn.cancel()
            await asyncio.wait({turn})
            if not turn.cancelled():
                self._end_turn(turns, starts_cli=starts_cli)

    async def _may_start(self, session: Session, waiter: _Waiter) -> bool:
        """Waits for a turn and for room, or for an owner. Returns False if the session no longer needs one."""
        self._waiters.append(waiter)
        try:
            if not await self._turn_comes(session, waiter):
                return False
            self._hoping.append(waiter)
            try:
                await self._while_owners_return(waiter)
            finally:
                self._hoping.remove(waiter)
            if waiter.given.done():
                return True
            await self._host.check(waiter.environment)
            return await self._room_for(session, waiter)
        finally:
            self._waiters.remove(waiter)  # from here on it is given none

    async def _turn_comes(self, session: Session, waiter: _Waiter) -> bool:
        """Waits for either, and reports that after QUEUE_S. Returns False if the session no longer needs an owner."""
        while True:
            done, _ = await asyncio.wait(
                {waiter.turn, waiter.given}, timeout=self._queue_s, return_when=asyncio.FIRST_COMPLETED
            )
            if done:
                return True
            if not await self._on_wait(session, f"{self._taking} sessions start at once", None):
                return False

    async def _while_owners_return(self, waiter: _Waiter) -> None:
        """Waits for an owner while one is given back in less time than a start takes, which would delay the others by as
        much. One without a decision does so for QUEUE_S at most: others are served first."""
        deadline = math.inf if waiter.decided else self._now() + self._queue_s
        while self._returned is not None and not waiter.given.done():
            left_s = min(self._return_due_in_s, deadline - self._now())
            if left_s <= 0 or not self._returned[1].fits(waiter.workspace_id, waiter.environment):
                return
            await asyncio.wait({waiter.given}, timeout=left_s)

    @property
    def _return_due_in_s(self) -> float:
        """Seconds within which the next owner should be given back, if they are in less time than a start takes; none are
        left if they are not."""
        last = -math.inf if self._returned is None else self._returned[0]
        return last + self._start_s - self._now()

    async def _turns(self) -> asyncio.Semaphore:
        """Limits concurrent starts to the number of CPUs; more would slow each other down until they time out."""
        if self._starts is None:
            at_once = max(2, int((await self._host.capacity()).cpus))
            self._starts = self._starts or asyncio.Semaphore(at_once)  # another session may have been faster
        return self._starts

    def _end_turn(self, turns: asyncio.Semaphore, *, starts_cli: bool) -> None:
        """Lets another session start, at once or after about the time that the start of a CLI takes: that keeps a CPU busy,
        too, and a session that waits until then may be given an owner instead."""
        delay_s = self._start_s * CLI_SHARE if starts_cli else 0.0
        asyncio.get_running_loop().call_later(delay_s, turns.release)

    async def _create(self, name: str, environment: Environment, early: Assignment | None = None) -> Owner:
        """Starts an owner. Raises CannotStart, or TimeoutError if it does not answer in time."""
        self._coming += 1
        began = self._now()
        try:
            await self._host.start(name, environment, self.share, early)
        finally:
            self._coming -= 1
        if not self._host.contains(environment):
            self._start_s = self._now() - began
        if environment.image == self._spare_environment.image:
            self._warm_up.succeeded()
        return Owner(name, environment)

    # -- room

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()

    async def _room_for(self, session: Session, waiter: _Waiter) -> bool:
        """Waits for room, or an owner; returns False if the session no longer needs one. Raises CannotStart."""
        async with self._queue:
            began = self._now()
            while not waiter.given.done():
                found = await self._host.capacity()
                lack = self._lack(found)
                if lack is None:
                    break
                self._check_possible(found)
                await self._end_spares()
                if not await self._on_wait(session, lack, self._now() - began):
                    return False
                await asyncio.wait({waiter.given}, timeout=ROOM_S)
        return True

    async def _has_room(self) -> bool:
        return self._lack(await self._host.capacity()) is None

    def _lack(self, found: Capacity) -> str | None:
        """Describes which resource is short; None if there is room for one more owner."""
        more = self._coming + 1
        if found.free_cpus < more * self.share.cpus:
            return f"{found.free_cpus:g} CPUs are free, and it needs {self.share.cpus:g}"
        if found.free_memory_bytes < more * self.share.memory_bytes:
            return f"{size(found.free_memory_bytes)} of memory are free, and it needs {size(self.share.memory_bytes)}"
        return None

    def _check_possible(self, found: Capacity) -> None:
        if found.cpus < self.share.cpus or found.memory_bytes < self.share.memory_bytes:
            raise CannotStart(
                f"the cluster has {found.cpus:g} CPUs and {size(found.memory_bytes)} of memory in all, and a session needs "
                f"{self.share.cpus:g} and {size(self.share.memory_bytes)}: lower HITL_SESSION_CPUS and "
                "HITL_SESSION_MEMORY_BYTES, or add a node; then send your message again"
            )


def _new_name() -> str:
    """A random name, not derived from a session: an owner may drive several, one after another."""
    return f"claude-session-{new_id('own').removeprefix('own_')}"
