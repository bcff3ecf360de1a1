"""A chaos run: starts a service, holds conversations in it, injects faults meanwhile, and judges the result."""

import asyncio
import os
import time
import traceback
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import httpx

from claude_hitl_template.cli.host.postgres import LocalPostgres
from claude_hitl_template.errors import ConfigError
from tests import mutants
from tests.chaos import flaky_model
from tests.chaos.databases import Postgres, Sqlite
from tests.chaos.disk import Disk
from tests.chaos.dump import make_journal, read_dump, read_journal
from tests.chaos.faults import Strike, Striker, Targets, bring_up
from tests.chaos.flaky_model import UnluckyModel
from tests.chaos.oracle import judge
from tests.chaos.plans import WORK, Planner
from tests.chaos.points import Points
from tests.chaos.report import Report
from tests.chaos.tcp_proxy import Line
from tests.chaos.tcp_proxy import serving as line_serving
from tests.chaos.victims import Victims
from tests.chaos.workload import Workload
from tests.integration.harness import KEY, Service
from tests.serving import model_app, serving

PEOPLE = 6
REST_S = 300.0  # sessions are parked well within this after the last strike
# Short times, so that there is much to strike: sessions park, resume and start all the time.
SETTINGS = {
    "HITL_HOT_WINDOW_S": "1.5",
    "HITL_IDLE_TIMEOUT_S": "1",
    "HITL_REQUESTS_PER_MINUTE": "1000000",
    "HITL_ASKS_PER_MINUTE": "1000000",
    "HITL_ASKS_PER_SESSION": "1000000",
    "HITL_RAY_NUM_CPUS": "4",
    "ANTHROPIC_API_KEY": flaky_model.KEY,
}


@dataclass(frozen=True)
class Choice:
    """The parameters of a run. It ends after `minutes` or after `kills` of `kill -9`, whichever comes first.

    The same seed gives the same conversations and the same rows of strikes.
    """

    minutes: float | None
    kills: int | None
    seed: int
    postgres: bool


def run(choice: Choice, folder: Path) -> Report:
    """Makes a run. Blocking. `folder` is empty before, and contains the judged backup and the journal afterwards. Raises
    ConfigError."""
    service, journal = Service(folder), make_journal(folder)
    service.environment["HITL_SANDBOX_WRITE"] = str(journal.parent)
    # A shell that is killed while it starts would otherwise leave a lock in the user's home folder.
    home = folder / "home"
    home.mkdir()
    service.environment |= {**SETTINGS, "HOME": str(home)}
    if mutants.VARIABLE in os.environ:
        service.environment[mutants.VARIABLE] = os.environ[mutants.VARIABLE]
    return asyncio.run(_run(choice, service, journal))


async def _run(choice: Choice, service: Service, journal: Path) -> Report:
    load = Workload(service.base, KEY, Planner(choice.seed, journal), choice.seed)
    async with _targets(choice, service, load) as targets:
        striker = Striker(targets, choice.seed)
        began = time.monotonic()

        def go_on() -> bool:
            time_left = choice.minutes is None or time.monotonic() - began < choice.minutes * 60
            return time_left and (choice.kills is None or kills(striker) < choice.kills)

        unanswered = await _struggle(load, striker, go_on)
        return await _judged(choice, targets, load, striker, unanswered, journal)


def kills(striker: Striker) -> int:
    return sum(strike.kills for strike in striker.done())


@asynccontextmanager
async def _targets(choice: Choice, service: Service, load: Workload) -> AsyncGenerator[Targets]:
    """Starts a service with its own model and its own database or disk."""
    met: list[Strike] = []

    def meet(kind: str) -> None:
        met.append(Strike(kind, datetime.now(UTC), "the next request"))

    model = UnluckyModel(lambda misfortune: meet(f"the model {misfortune}"))
    points = Points(service.root / "faults")
    service.environment |= points.environment
    victims = Victims(service, lambda: load.created[-10 * PEOPLE :])
    async with AsyncExitStack() as stack:
        service.environment["ANTHROPIC_BASE_URL"] = await stack.enter_async_context(
            serving(model_app(model, flaky_model.verify))
        )
        database, disk = await _database(choice, service, stack, meet)
        stack.push_async_callback(asyncio.to_thread, service.down)
        await asyncio.to_thread(bring_up, service)
        yield Targets(service, victims, model, points, database, disk, met)


async def _database(
    choice: Choice, service: Service, stack: AsyncExitStack, meet: Callable[[str], None]
) -> tuple[Sqlite | tuple[Postgres, Line], Disk | None]:
    data = service.root / "data"
    if not choice.postgres:
        disk = Disk(data)
        mounted = disk.mount()
        if mounted:
            stack.callback(disk.unmount)
        return Sqlite(data / "hitl.sqlite3"), disk if mounted else None
    local = LocalPostgres(service.root / "postgres", service.root / "postgres.password")
    await asyncio.to_thread(local.start)
    stack.push_async_callback(asyncio.to_thread, local.stop)
    made = urlsplit(local.url)
    line, port = await stack.enter_async_context(line_serving(made.port or 0, meet))
    service.environment["DATABASE_URL"] = local.url.replace(f":{made.port}/", f":{port}/")
    return (Postgres(local, {"port": str(made.port)}), line), None


async def _struggle(load: Workload, striker: Striker, go_on: Callable[[], bool]) -> list[str]:
    """Holds conversations and strikes concurrently. At the end of the time the strikes stop first, and then conversations
    are brought to their ends."""
    striking = [asyncio.create_task(asyncio.to_thread(row)) for row in striker.rows]
    working = asyncio.create_task(load.work(PEOPLE, go_on))
    while go_on() and not any(task.done() for task in (*striking, working)):
        await asyncio.sleep(0.2)
    striker.end()
    ends = await asyncio.gather(*striking, return_exceptions=True)
    await asyncio.to_thread(striker.come_to_an_end)
    ends += await asyncio.gather(working, return_exceptions=True)
    return [line for end in ends if isinstance(end, BaseException) for line in _told(end)]


def _told(error: BaseException) -> list[str]:
    if isinstance(error, BaseExceptionGroup):
        return [line for one in error.exceptions for line in _told(one)]
    where = traceback.extract_tb(error.__traceback__)[-1]
    return [f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}: {error}"]


async def _come_to_rest(client: httpx.AsyncClient) -> list[str]:
    """Waits until every session is parked, and returns a message for each that still runs after REST_S."""
    deadline = time.monotonic() + REST_S
    awake: list[str] = []
    while time.monotonic() < deadline:
        awake = [
            s["id"] for s in await _all(client, "/v1/sessions") if not s["parked"] or s["status"] == "running"
        ]
        if not awake:
            return []
        await asyncio.sleep(0.5)
    return [f"session {session_id} does not come to rest" for session_id in awake]


async def _all(client: httpx.AsyncClient, path: str) -> list[Any]:
    found: list[Any] = []
    page = ""
    while page is not None:
        answer = (
            (await client.get(f"{path}?limit=100{page and f'&page={quote(page)}'}")).raise_for_status().json()
        )
        found, page = [*found, *answer["data"]], answer["next_page"]
    return found


async def _saved(client: httpx.AsyncClient, session_id: str) -> str:
    answer = await client.get(f"/v1/sessions/{session_id}/workspace/files", params={"path": WORK})
    return answer.text if answer.status_code == 200 else ""


def _left(victims: Victims) -> dict[str, list[int]]:
    """Returns, by session, the ids of its running processes."""
    found: dict[str, list[int]] = {}
    for process, session_id in victims.clis():
        found.setdefault(str(session_id), []).append(process.pid)
    return found


async def _judged(
    choice: Choice, targets: Targets, load: Workload, striker: Striker, unanswered: list[str], journal: Path
) -> Report:
    service = targets.service
    async with httpx.AsyncClient(base_url=service.base, headers={"x-api-key": KEY}, timeout=60) as client:
        unanswered = [*unanswered, *await _come_to_rest(client)]
        files = {session_id: await _saved(client, session_id) for session_id in load.created}
    left = await asyncio.to_thread(_left, targets.victims)
    backup = service.root / "backup.zip"
    done = await asyncio.to_thread(service.hitl, "backup", str(backup))
    if done.returncode != 0:
        raise ConfigError(f"no backup could be made:\n{done.stderr}", "correct that")
    record = read_dump(
        backup,
        acknowledged=load.acknowledged,
        created=load.created,
        streams=load.streams,
        runs=read_journal(journal),
        files=files,
        processes=left,
        lost=striker.lost,
    )
    facts = {
        **vars(choice),
        "minutes struck": round(striker.struck_s / 60, 1),
        "left out": [] if targets.disk or choice.postgres else ["fill the disk: only root may mount one"],
        "conversations": load.by_kind,
        "decisions refused": load.refused,
    }
    return Report(facts, striker.done(), load.cuts, record, judge(record), unanswered)
