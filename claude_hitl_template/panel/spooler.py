"""Kodosumi's spooler, as `hitl up` starts it: a program that runs in the panel's folder, and keeps what flows write.

Kodosumi's looks at each flow a hundred times a second, and each time two other processes answer; and it asks Ray's dashboard
for the flows, which is the work of three processes. This one pauses, and asks Ray itself.
"""

import asyncio
import re
import sqlite3
from dataclasses import dataclass
from typing import Any, cast

from kodosumi import spooler
from kodosumi.const import NAMESPACE
from ray.exceptions import RayActorError
from ray.util import list_named_actors

PAUSE_S = 0.25  # so much later a browser has what a flow writes
AT_ONCE = 100
_FLOW = re.compile("[0-9a-f]{24}")  # the name of a flow's actor is its id


@dataclass(frozen=True)
class Flow:
    """What the spooler reads of an actor's state."""

    name: str


class Spooler(spooler.Spooler):
    """Follows each flow with pauses."""

    async def retrieve(self, runner: Any, state: Any) -> None:
        """Saves what a flow writes until it has ended; the end is Kodosumi's own."""
        connection = self.setup_database(await runner.get_username.remote(), state.name)
        try:
            queue = (await runner.get_queue.remote()).actor
            while not self.shutdown_event.is_set() and await runner.is_active.remote():
                await self._save_new(queue, connection, state.name)
                await asyncio.sleep(PAUSE_S)
        except RayActorError as error:
            spooler.logger.warning(f"flow {state.name} was ended: {error}")
            return
        finally:
            connection.close()
        await super().retrieve(runner, state)

    async def _save_new(self, queue: Any, connection: sqlite3.Connection, name: str) -> None:
        try:
            while size := await queue.qsize.remote():
                self.save(connection, name, await queue.get_nowait_batch.remote(min(size, AT_ONCE)))
        except RayActorError:
            return  # a flow ends its queue when it is empty, and then itself


def flows(**_: Any) -> list[Flow]:
    """The flows that run, in place of Ray's `list_actors`."""
    actors = cast("list[dict[str, str]]", list_named_actors(all_namespaces=True))
    return [
        Flow(actor["name"])
        for actor in actors
        if actor["namespace"] == NAMESPACE and _FLOW.fullmatch(actor["name"])
    ]


def main() -> None:
    spooler.Spooler, spooler.list_actors = Spooler, flows  # pyright: ignore[reportAttributeAccessIssue]
    spooler.run()


if __name__ == "__main__":
    main()
