"""The OwnerHost of production: owners are Ray actors, in a container if their environment has an image."""

import asyncio
import contextlib
from collections.abc import Mapping
from typing import Any

import ray
import structlog
from ray.exceptions import RayError

from claude_hitl_template.cluster import actor
from claude_hitl_template.cluster.containers import Preflight, why_not_started
from claude_hitl_template.cluster.ledger_line import Line
from claude_hitl_template.cluster.owner_host import Assignment, CannotStart, Capacity, OwnerLost, Share
from claude_hitl_template.config.settings import Settings
from claude_hitl_template.domain.models import Environment
from claude_hitl_template.errors import ConfigError
from claude_hitl_template.image import tools

log = structlog.get_logger()
ANSWER_S = 10.0  # an actor that is alive answers within this
PREPARE_S = 60.0  # a CLI starts within a few seconds, or not at all


class RayOwnerHost:
    """Finds actors by their names, so it also finds those that another process started. `line`: to the ledger."""

    def __init__(self, settings: Settings, preflight: Preflight, line: Line) -> None:
        self._settings, self._preflight, self._line = settings, preflight, line
        self._handles: dict[str, Any] = {}  # of the actors that were started here, which need no lookup

    def contains(self, environment: Environment) -> bool:
        return environment.image is not None

    async def check(self, environment: Environment) -> None:
        if environment.image is not None:
            try:
                await asyncio.to_thread(self._preflight.check, environment.image)
            except ConfigError as error:
                raise CannotStart(str(error)) from error

    async def start(
        self, name: str, environment: Environment, share: Share, early: Assignment | None = None
    ) -> None:
        try:
            await self._create(name, environment, share, early)
        except RayError as error:
            if environment.image is None:
                raise CannotStart(await self._why(environment, str(error))) from error
            await self._start_again(name, environment, share)

    async def _start_again(self, name: str, environment: Environment, share: Share) -> None:
        """For a moment Ray reports the failure of an earlier start again, even if its cause was fixed."""
        self._preflight.forget(str(environment.image))
        await self.check(environment)
        await self.end(name)
        try:
            await self._create(name, environment, share)
        except RayError as error:
            raise CannotStart(await self._why(environment, str(error))) from error

    async def _create(
        self, name: str, environment: Environment, share: Share, early: Assignment | None = None
    ) -> None:
        try:
            started = await asyncio.to_thread(
                actor.create_actor,
                name,
                environment,
                share,
                log_level=self._settings.log_level,
                ledger=self._line.socket,
            )
            if early is not None:
                started.prepare.remote(early)  # the owner waits for it when it gets the session
            await asyncio.wait_for(started.ready.remote(), self._settings.start_timeout_s)
            self._handles[name] = started
        except TimeoutError:
            await self.end(name)
            raise

    async def why_late(self, environment: Environment, limit: str) -> str:
        return await self._why(environment, f"Error: nothing after {limit}")

    async def _why(self, environment: Environment, said: str) -> str:
        log.warning("owner did not start", environment=environment.id, why=said)
        if environment.image is None:
            return "the session's process could not be started; `./hitl logs` says why. Send your message again to try again"
        self._preflight.forget(environment.image)
        return await asyncio.to_thread(why_not_started, environment.image, said, self._preflight.check)

    async def answers(self, name: str) -> bool:
        return await self._ask(name, "ready") is not None

    async def prepare(self, name: str, assignment: Assignment | None) -> bool:
        return bool(await self._ask(name, "prepare", assignment, within_s=PREPARE_S))

    async def drive(self, name: str, assignment: Assignment) -> str:
        found = await self._find(name)
        if found is None:
            raise OwnerLost(f"there is no actor {name}")
        try:
            return str(await found.run.remote(assignment))
        except RayError as error:
            raise OwnerLost(str(error)) from error

    async def driving(self, name: str) -> tuple[str, int] | None:
        return await self._ask(name, "driving")

    async def code(self, name: str) -> str | None:
        return await self._ask(name, "code")

    async def make_room(self, name: str) -> None:
        found = await self._find(name)
        if found is not None:
            found.make_room.remote()

    async def end(self, name: str) -> None:
        self._handles.pop(name, None)
        await asyncio.to_thread(actor.cleanup_actor, name)

    async def names(self) -> set[str]:
        return set(await asyncio.to_thread(actor.list_actors))

    async def capacity(self) -> Capacity:
        """The cluster's capacity, which may be a second old."""
        free, whole = await asyncio.to_thread(_resources)
        return Capacity(
            free.get("CPU", 0.0),
            int(free.get("memory", 0)),
            whole.get("CPU", 0.0),
            int(whole.get("memory", 0)),
        )

    async def tidy(self) -> None:
        """Removes containers that Ray left behind, which use up podman's locks. A cluster of `./hitl up` leaves none."""
        if self._settings.images:
            with contextlib.suppress(ConfigError):  # without podman, each start reports the problem
                await asyncio.to_thread(tools.prune)

    async def _find(self, name: str) -> Any | None:
        return self._handles.get(name) or await asyncio.to_thread(actor.get_actor, name)

    async def _ask(self, name: str, method: str, *args: Any, within_s: float = ANSWER_S) -> Any:
        """Calls a method of the actor; None if it ended, does not answer in time, or has no such method."""
        found = await self._find(name)
        if found is None:
            return None
        try:
            return await asyncio.wait_for(getattr(found, method).remote(*args), within_s)
        except (AttributeError, RayError, TimeoutError):
            return None


def _resources() -> tuple[Mapping[str, float], Mapping[str, float]]:
    return ray.available_resources(), ray.cluster_resources()
