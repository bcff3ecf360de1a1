"""The OwnerHost of tests and the benchmark: owners are tasks of one process, in any number and without containers."""

import asyncio
import sys
from dataclasses import dataclass, field

from claude_hitl_template import code_version
from claude_hitl_template.cluster.owner import OpenStore, SessionOwner
from claude_hitl_template.cluster.owner_host import Assignment, Capacity, OwnerLost, Share
from claude_hitl_template.domain.models import Environment


@dataclass
class _Hosted:
    owner: SessionOwner
    work: asyncio.Task[str] | None = None
    early: asyncio.Task[bool] | None = None


@dataclass
class LocalOwnerHost:
    """Runs owners as tasks. `failures` collects their unexpected exceptions, which are defects."""

    open_store: OpenStore
    failures: list[Exception] = field(default_factory=list[Exception])
    _hosted: dict[str, _Hosted] = field(default_factory=dict[str, _Hosted])

    def contains(self, environment: Environment) -> bool:
        return False

    async def check(self, environment: Environment) -> None:
        """Does nothing: there is no image that could be missing."""

    async def start(
        self, name: str, environment: Environment, share: Share, early: Assignment | None = None
    ) -> None:
        hosted = self._hosted[name] = _Hosted(SessionOwner(self.open_store))
        if early is not None:
            hosted.early = asyncio.create_task(hosted.owner.prepare(early))

    async def why_late(self, environment: Environment, limit: str) -> str:
        return f"nothing after {limit}"

    async def answers(self, name: str) -> bool:
        return name in self._hosted

    async def prepare(self, name: str, assignment: Assignment | None) -> bool:
        hosted = self._hosted.get(name)
        return hosted is not None and await hosted.owner.prepare(assignment)

    async def drive(self, name: str, assignment: Assignment) -> str:
        hosted = self._hosted[name]
        hosted.work = asyncio.create_task(hosted.owner.run(assignment))
        try:
            return await hosted.work
        except asyncio.CancelledError:
            await self.end(name)
            raise
        except Exception as error:
            self.failures.append(error)
            raise OwnerLost(f"{type(error).__name__}: {error}") from error

    async def driving(self, name: str) -> tuple[str, int] | None:
        hosted = self._hosted.get(name)
        return hosted.owner.driving if hosted else None

    async def code(self, name: str) -> str | None:
        return code_version()

    async def make_room(self, name: str) -> None:
        if name in self._hosted:
            self._hosted[name].owner.make_room()

    async def end(self, name: str) -> None:
        hosted = self._hosted.pop(name, None)
        if hosted is None:
            return
        if hosted.work is not None:
            hosted.work.cancel()
            await asyncio.wait({hosted.work})
        await hosted.owner.prepare(None)
        if hosted.early is not None:
            await asyncio.wait({hosted.early})

    async def names(self) -> set[str]:
        return set(self._hosted)

    async def capacity(self) -> Capacity:
        return Capacity(sys.maxsize, sys.maxsize, sys.maxsize, sys.maxsize)

    async def tidy(self) -> None:
        """Owners leave nothing behind."""
