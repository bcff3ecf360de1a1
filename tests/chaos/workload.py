"""People at work during a chaos run: conversations over REST, and a record of all that the service acknowledged.

They do what good clients do: ask again, with the same Idempotency-Key, while no answer comes, and go on with a
stream from its last event.
"""

import asyncio
import contextlib
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import httpx

from tests.chaos.oracle import Acknowledged, Stream, tokens
from tests.chaos.plans import Plan, Planner

PATIENCE_S = (
    900.0  # what is not answered by then counts as lost; a cluster is started anew within it on any machine
)
PAUSE_S = 0.2
LOOK_S = 2.0  # how soon somebody looks who heard nothing
PARKED_S = 10.0  # a call that waits is parked by then, unless something is struck
DONE, AGAIN = (200,), (429, 500, 502, 503, 504)


@dataclass
class Heard:
    """What one client saw of a session, and a bell for whoever waits for news."""

    seen: list[tuple[int, str]] = field(default_factory=list[tuple[int, str]])
    news: asyncio.Event = field(default_factory=asyncio.Event)


class Workload:
    """`people` conversations at a time, from a planner; see `acknowledged`, `created`, `streams`, `cuts` afterwards."""

    def __init__(self, base: str, key: str, planner: Planner, seed: int) -> None:
        self._base, self._key, self._planner, self._seed = base, key, planner, seed
        self._next = 0
        self.acknowledged: list[Acknowledged] = []
        self.refused = 0
        self.created: list[str] = []
        self.streams: list[Stream] = []
        self.cuts = 0
        self.by_kind: dict[str, int] = {}

    async def work(self, people: int, go_on: Callable[[], bool]) -> None:
        """Starts conversations while `go_on` says so, and ends each. Raises TimeoutError when one is never answered."""
        async with (
            httpx.AsyncClient(
                base_url=self._base, headers={"x-api-key": self._key}, timeout=httpx.Timeout(30, read=100)
            ) as client,
            asyncio.TaskGroup() as group,
        ):
            for _ in range(people):
                group.create_task(self._person(client, go_on))

    async def _person(self, client: httpx.AsyncClient, go_on: Callable[[], bool]) -> None:
        while go_on():
            plan = self._planner.plan(self._next)
            self._next += 1
            await Conversation(self, client, plan, self._seed).hold()
            self.by_kind[plan.kind] = self.by_kind.get(plan.kind, 0) + 1


class Conversation:
    def __init__(self, load: Workload, client: httpx.AsyncClient, plan: Plan, seed: int) -> None:
        self._crowd, self._client, self._plan = load, client, plan
        self._chance = random.Random(f"{seed} cuts {plan.number}")
        self._id, self._heard, self._said = "", Heard(), 0

    async def hold(self) -> None:
        body = {
            "agent": "default",
            "environment_id": "default",
            "metadata": {"conversation": str(self._plan.number)},
            "initial_events": [_message(self._plan.prompt)],
        }
        _, made = await self._ask("POST", "/v1/sessions", body, f"create {self._plan.number}")
        self._id = made["id"]
        self._crowd.created.append(self._id)
        following = asyncio.create_task(self._follow())
        try:
            await self._until_over()
        finally:
            following.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await following
            self._crowd.streams.append(Stream(f"reader of {self._plan.number}", self._id, self._heard.seen))

    async def _until_over(self) -> None:
        while True:
            stop = await self._until_idle()
            if stop == "end_turn":
                return
            if stop == "retries_exhausted":
                await self._say(f"Go on, please ({self._said}).")
            else:
                await self._answer()

    async def _until_idle(self) -> str:
        while True:
            self._heard.news.clear()
            found = await self._get()
            if found["status"] == "idle" and found["stop_reason"]:
                return found["stop_reason"]["type"]
            await self._news()

    async def _news(self) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._heard.news.wait(), LOOK_S)

    async def _answer(self) -> None:
        """What the plan says to all that waits now."""
        kind = self._plan.kind
        if kind == "interrupt":
            await self._send({"type": "user.interrupt"}, "ann", f"interrupt {self._said}")
            self._said += 1
            return
        if kind == "message while it waits" and not self._said:
            await self._say("Yes, run it.")
        if kind in ("decided while parked", "message while it waits"):
            await self._until_parked()
        _, found = await self._ask("GET", f"/v1/approvals?session_id={self._id}&states[]=pending&limit=100")
        for approval in found["data"]:
            await self._decide(approval)

    async def _decide(self, approval: Mapping[str, Any]) -> None:
        [token] = tokens(approval["input"])
        call = approval["event_id"]
        bodies = [
            {"type": "user.tool_confirmation", "tool_use_id": call, **said}
            for said in self._plan.decisions[token]
        ]
        await asyncio.gather(
            *(self._send(body, f"number {n}", f"decide {call} {n}") for n, body in enumerate(bodies))
        )

    async def _until_parked(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PARKED_S):
                while not (await self._get())["parked"]:
                    await asyncio.sleep(PAUSE_S)

    async def _say(self, text: str) -> None:
        await self._send(_message(text), "ann", f"say {self._said}")
        self._said += 1

    async def _get(self) -> Any:
        return (await self._ask("GET", f"/v1/sessions/{self._id}"))[1]

    async def _send(self, body: dict[str, Any], client: str, key: str) -> None:
        path = f"/v1/sessions/{self._id}/events"
        status, answer = await self._ask("POST", path, {"events": [body]}, f"{self._id} {key}", (200, 409))
        if status == 409:
            self._crowd.refused += 1
            return
        [event] = answer["data"]
        said = Acknowledged(datetime.now(UTC), client, self._id, body, event)
        self._crowd.acknowledged.append(said)

    async def _ask(
        self, method: str, path: str, body: Any = None, key: str = "", wanted: tuple[int, ...] = DONE
    ) -> tuple[int, Any]:
        """Status and JSON. Raises TimeoutError when the service does not answer for PATIENCE_S."""
        headers = {"idempotency-key": key} if key else {}
        async with asyncio.timeout(PATIENCE_S):
            while True:
                with contextlib.suppress(httpx.TransportError, json.JSONDecodeError):
                    answer = await self._client.request(method, path, json=body, headers=headers)
                    if answer.status_code in wanted:
                        return answer.status_code, answer.json()
                    if answer.status_code not in AGAIN and answer.json().get("type") == "error":
                        raise AssertionError(f"{method} {path}: {answer.status_code} {answer.text}")
                await asyncio.sleep(PAUSE_S)

    # -- the stream

    async def _follow(self) -> None:
        """Reads the log as it grows; breaks the connection off now and then, and goes on behind the last event."""
        while True:
            with contextlib.suppress(httpx.TransportError):
                await self._read(self._chance.randint(1, 40))
            await asyncio.sleep(PAUSE_S)

    async def _read(self, lines: int) -> None:
        """So many lines: an event has several, so that it breaks off in the middle of one as well."""
        headers = {"last-event-id": str(self._heard.seen[-1][0] if self._heard.seen else 0)}
        path, cursor = f"/v1/sessions/{self._id}/events/stream", 0
        async with self._client.stream("GET", path, headers=headers) as answer:
            if answer.status_code != 200:
                return
            async for line in answer.aiter_lines():
                if line.startswith("id: "):
                    cursor = int(line[4:])
                elif line.startswith("data: ") and cursor:
                    self._heard.seen.append((cursor, json.loads(line[6:])["id"]))
                    self._heard.news.set()
                    cursor = 0
                lines -= 1
                if lines == 0:
                    self._crowd.cuts += 1
                    return


def _message(text: str) -> dict[str, Any]:
    return {"type": "user.message", "content": [{"type": "text", "text": text}]}
