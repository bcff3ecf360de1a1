"""Owners, started and ready: where there is room for one, in the environment that its session asks for."""

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import structlog
from ray.exceptions import RayError

from claude_hitl_template.cluster import actor
from claude_hitl_template.cluster.actor import Share
from claude_hitl_template.cluster.clocks import Backoff
from claude_hitl_template.cluster.containers import Preflight, why_not_started
from claude_hitl_template.config.settings import Settings
from claude_hitl_template.domain.models import Environment, Session, new_id
from claude_hitl_template.errors import ConfigError, HitlError
from claude_hitl_template.presentation.text import size

log = structlog.get_logger()
ANSWER_S = 10.0  # an actor that is alive answers a question within this
WARM_AGAIN_S, WARM_AGAIN_MOST_S = 5.0, 600.0  # between two tries to keep an owner ready, when they fail
ROOM_S = 0.5  # between two looks for room; an owner that ends frees it within a second or two

type Waiting = Callable[[Session, str], Awaitable[bool]]


@dataclass(frozen=True)
class Owner:
    """A started actor that can drive a session. The lease's holder is its name."""

    name: str
    actor: Any
    environment: Environment


class CannotStart(HitlError):
    """No owner can be started for the session; the message says why, and what to mend."""


class OwnerPool:
    """`waiting` is told, at each look in vain, of a session that waits for room, and why; it says whether it still does."""

    def __init__(self, settings: Settings, preflight: Preflight, waiting: Waiting) -> None:
        self._settings, self._preflight, self._waiting = settings, preflight, waiting
        self.share = Share(settings.session_cpus, settings.session_memory_bytes, settings.session_processes)
        self._spare_environment = next(iter(settings.all_environments().values()))
        self._spares: deque[Owner] = deque()
        self._warming: asyncio.Task[None] | None = None
        self._warm_up = Backoff(WARM_AGAIN_S, WARM_AGAIN_MOST_S)
        self._taking = 0
        self._coming = (
            0  # owners that Ray was asked for and that do not answer yet: it may not count them yet
        )
        self._queue = asyncio.Lock()  # who waits for room waits in the order of asking
        # More at once than there are CPUs would only make each start slower, and in the end too slow.
        self._starts = asyncio.Semaphore(max(2, int(actor.largest_room()[0])))

    async def take(self, session: Session, environment: Environment) -> Owner | None:
        """An owner that answers; None when the session does not want one any more. Raises CannotStart."""
        self._taking += 1
        try:
            spare = await self._spare(environment)
            if spare is not None:
                return spare
            async with self._starts:
                return await self._start(session, environment)
        finally:
            self._taking -= 1

    def tend_spares(self) -> None:
        """One at a time, and never while a session starts: it would take the CPU that the session needs."""
        wanted = len(self._spares) < self._settings.spare_owners and not self._warm_up.left_s
        busy = self._taking > 0 or (self._warming is not None and not self._warming.done())
        if wanted and not busy:
            self._warming = asyncio.create_task(self._warm())
            self._warming.add_done_callback(self._warmed)

    # -- spares

    async def _spare(self, environment: Environment) -> Owner | None:
        if environment.image != self._spare_environment.image:
            return None
        warming, self._warming = self._warming, None
        if warming is not None and not self._spares:
            await asyncio.wait({warming})  # it is further on than a new one; who comes next starts one
        while self._spares:
            spare = self._spares.popleft()
            with contextlib.suppress(TimeoutError, RayError):
                await asyncio.wait_for(spare.actor.ready.remote(), ANSWER_S)
                return spare
            await asyncio.to_thread(actor.cleanup_actor, spare.name)
        return None

    async def _warm(self) -> None:
        name = f"claude-session-spare-{new_id('own').removeprefix('own_')}"
        environment = self._spare_environment
        try:
            await self._check(environment)
            if await self._lacks_room() is None:
                self._spares.append(await self._create(name, environment))
                return
        except (CannotStart, RayError, TimeoutError) as error:
            self._warm_up.failed()
            log.info(
                "no spare owner", why=str(error) or type(error).__name__, again_in_s=self._warm_up.left_s
            )
        await asyncio.to_thread(actor.cleanup_actor, name)

    def _warmed(self, warming: asyncio.Task[None]) -> None:
        error = None if warming.cancelled() else warming.exception()
        if error is not None:  # a defect; it may come again
            self._warm_up.failed()
            log.error("no spare owner", exc_info=error)

    async def _let_spares_go(self) -> None:
        while self._spares:
            await asyncio.to_thread(actor.cleanup_actor, self._spares.popleft().name)

    # -- starting

    async def _start(self, session: Session, environment: Environment) -> Owner | None:
        name = f"claude-session-{session.id}"
        await asyncio.to_thread(actor.cleanup_actor, name)
        await self._check(environment)
        tried = False
        while await self._room_for(session):
            try:
                return await self._create(name, environment)
            except RayError as error:
                if tried or environment.image is None:
                    raise CannotStart(await self._why(environment, str(error))) from error
                # For a moment Ray tells the failure of an earlier start again, whatever was mended since.
                tried = True
                self._preflight.forget(environment.image)
                await self._check(environment)
                await asyncio.to_thread(actor.cleanup_actor, name)
            except TimeoutError as error:
                await asyncio.to_thread(actor.cleanup_actor, name)
                if await self._lacks_room() is None:
                    late = f"nothing after {self._settings.start_timeout_s:g} s (HITL_START_TIMEOUT_S)"
                    raise CannotStart(await self._why(environment, f"Error: {late}")) from error
        return None

    async def _create(self, name: str, environment: Environment) -> Owner:
        """Raises RayError, or TimeoutError when it does not answer in time."""
        self._coming += 1
        try:
            started = await asyncio.to_thread(
                actor.create_actor, name, environment, self.share, log_level=self._settings.log_level
            )
            await asyncio.wait_for(started.ready.remote(), self._settings.start_timeout_s)
        finally:
            self._coming -= 1
        if environment.image == self._spare_environment.image:
            self._warm_up.succeeded()
        return Owner(name, started, environment)

    async def _check(self, environment: Environment) -> None:
        if environment.image is not None:
            try:
                await asyncio.to_thread(self._preflight.check, environment.image)
            except ConfigError as error:
                raise CannotStart(str(error)) from error

    async def _why(self, environment: Environment, said: str) -> str:
        log.warning("owner did not start", environment=environment.id, why=said)
        if environment.image is None:
            return "the session's process could not be started; `./hitl logs` says why. Send your message again to try again"
        self._preflight.forget(environment.image)
        return await asyncio.to_thread(why_not_started, environment.image, said, self._preflight.check)

    # -- room

    async def _room_for(self, session: Session) -> bool:
        """Waits until there is room. False when the session does not want any more. Raises CannotStart."""
        async with self._queue:
            while (lack := await self._lacks_room()) is not None:
                await self._check_possible()
                await self._let_spares_go()
                if not await self._waiting(session, lack):
                    return False
                await asyncio.sleep(ROOM_S)
        return True

    async def _lacks_room(self) -> str | None:
        """What there is too little of; None when there is room for one more owner."""
        cpus, memory_bytes = await asyncio.to_thread(actor.room)
        more = self._coming + 1
        if cpus < more * self.share.cpus:
            return f"{cpus:g} CPUs are free, and it needs {self.share.cpus:g}"
        if memory_bytes < more * self.share.memory_bytes:
            return f"{size(memory_bytes)} of memory are free, and it needs {size(self.share.memory_bytes)}"
        return None

    async def _check_possible(self) -> None:
        cpus, memory_bytes = await asyncio.to_thread(actor.largest_room)
        if cpus < self.share.cpus or memory_bytes < self.share.memory_bytes:
            raise CannotStart(
                f"the cluster has {cpus:g} CPUs and {size(memory_bytes)} of memory in all, and a session needs "
                f"{self.share.cpus:g} and {size(self.share.memory_bytes)}: lower HITL_SESSION_CPUS and "
                "HITL_SESSION_MEMORY_BYTES, or add a node; then send your message again"
            )
