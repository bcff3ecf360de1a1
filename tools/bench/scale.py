"""What clients notice of thousands of parked sessions, and what the service itself spends on them."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from claude_hitl_template.cli.client import Client
from claude_hitl_template.domain.models import ApprovalState
from claude_hitl_template.errors import EngineError
from tools.bench.contenders import confirmation
from tools.bench.figures import Measure
from tools.bench.parked_load import CALLS, Waiting
from tools.bench.service_fixture import BenchService

LISTINGS = 60
DECISIONS = 120
CLIENTS = 8
DECISIONS_A_CLIENT = 40
FEW = 60  # sessions that the many are compared with
IDLE_S = 30.0
IDLE_PARTS = ("Supervisor", "Ledger")
INBOX_P95_MS = 50.0
LEAST_A_SECOND, TOGETHER_P95_MS = 150, 60.0
IDLE_MOST = 2.0  # % of a core
MS = 1000.0
PAGE = 100

type Query = tuple[str, dict[str, Any]]


class ScaleMeasurement:
    """The same measures of a few parked sessions and of many. The few stand where the bare SDK stands elsewhere."""

    def __init__(self, count: int) -> None:
        self._count = count
        self.measures: list[Measure] = []

    def measure(self, one: BenchService, parked_sessions: Sequence[Waiting], *, few: bool) -> None:
        """Leaves each session that it decides on with a call that waits."""
        self._idle(one, few=few)
        for name, query in _queries(one.client, parked_sessions):
            _seconds(lambda query=query: _listed(one.client, query))  # the first one warms up
            samples = [_seconds(lambda query=query: _listed(one.client, query)) for _ in range(LISTINGS)]
            self._add(name, "ms", [s * MS for s in samples], few=few, target=INBOX_P95_MS)
        alone = min(DECISIONS, len(parked_sessions) // 2)
        acknowledged = decide_all(one.client, parked_sessions[:alone])
        self._add("decision acknowledged", "ms", acknowledged, few=few, target=INBOX_P95_MS)
        self._together(one, parked_sessions[alone : alone + CLIENTS * DECISIONS_A_CLIENT], few=few)

    def _add(
        self, name: str, unit: str, samples: list[float], *, few: bool, target: float | None = None
    ) -> None:
        found = self._row(name, unit)
        found.compare, found.target = "p95" if target else None, target
        (found.bare if few else found.ours).extend(samples)

    def _row(self, name: str, unit: str) -> Measure:
        full = f"{name}, {self._count} parked sessions (bare: {FEW})"
        found = next((m for m in self.measures if m.name == full), None)
        if found is None:
            found = Measure(full, unit)
            self.measures.append(found)
        return found

    def _idle(self, one: BenchService, *, few: bool) -> None:
        """Cost of the idle service: its CPU time in a minute."""
        processes = {part: one.replica(part) for part in IDLE_PARTS}
        before = {part: sum(p.cpu_times()[:2]) for part, p in processes.items()}
        time.sleep(IDLE_S)
        for part, process in processes.items():
            share = (sum(process.cpu_times()[:2]) - before[part]) / IDLE_S * 100
            self._add(f"{part} while nothing happens", "% of a core", [share], few=few, target=IDLE_MOST)

    def _together(self, one: BenchService, parked_sessions: Sequence[Waiting], *, few: bool) -> None:
        clients = [Client.open(one.settings) for _ in range(CLIENTS)]
        for client in clients:
            client.get("/v1/version")
        with ThreadPoolExecutor(CLIENTS) as pool:
            began = time.perf_counter()
            found = list(pool.map(decide_all, clients, [parked_sessions[n::CLIENTS] for n in range(CLIENTS)]))
            elapsed = time.perf_counter() - began
        for client in clients:
            client.close()
        a_second = self._row(f"decisions acknowledged a second, {CLIENTS} clients", "1/s")
        a_second.compare, a_second.target = "p50, at least", LEAST_A_SECOND
        (a_second.bare if few else a_second.ours).append(len(parked_sessions) / elapsed)
        together = [sample for share in found for sample in share]
        self._add(
            f"decision acknowledged, {CLIENTS} clients at once",
            "ms",
            together,
            few=few,
            target=TOGETHER_P95_MS,
        )


def _queries(client: Client, parked_sessions: Sequence[Waiting]) -> Iterator[tuple[str, Query]]:
    """The listings to measure. Finding the last page first reads every page once and checks that no entry is missing."""
    pending = {"states[]": "pending"}
    last = _last_page(client, "/v1/approvals", CALLS * len(parked_sessions), **pending)
    yield "20 pending approvals", ("/v1/approvals", {"limit": 20, **pending})
    yield "100 pending approvals", ("/v1/approvals", {"limit": PAGE, **pending})
    yield "100 pending approvals, last page", ("/v1/approvals", {"limit": PAGE, **last, **pending})
    anything = {"states[]": [state.value for state in ApprovalState]}
    yield (
        "approvals of one session",
        ("/v1/approvals", {"session_id": parked_sessions[-1].session_id, **anything}),
    )
    yield "100 approvals in any state", ("/v1/approvals", {"limit": PAGE, **anything})
    yield "approvals that ran, none", ("/v1/approvals", {"states[]": "succeeded"})
    yield "100 sessions", ("/v1/sessions", {"limit": PAGE})
    last = _last_page(client, "/v1/sessions", len(parked_sessions))
    yield "100 sessions, last page", ("/v1/sessions", {"limit": PAGE, **last})
    yield "running sessions, none", ("/v1/sessions", {"statuses[]": "running"})
    yield "sessions of another agent, none", ("/v1/sessions", {"agent_id": "another"})
    yield "100 sessions of a time, none", ("/v1/sessions", {"created_at[lt]": "2020-01-01T00:00:00Z"})


def _last_page(client: Client, path: str, expected: int, **filters: Any) -> dict[str, str]:
    """The parameter with its cursor; {} if it is the first. Raises EngineError when the pages have not what they should."""
    seen: set[str] = set()
    page, count = dict[str, str](), 0
    while True:
        answer = client.get(path, limit=PAGE, **filters, **page)
        seen |= {item["id"] for item in answer["data"]}
        count += len(answer["data"])
        if answer["next_page"] is None:
            break
        page = {"page": answer["next_page"]}
    if not len(seen) == count >= expected:
        raise EngineError(f"{path} has {count} entries, {len(seen)} different ones, instead of {expected}")
    return page


def _listed(client: Client, query: Query) -> None:
    path, filters = query
    client.get(path, **filters)


def decide_all(client: Client, parked_sessions: Sequence[Waiting]) -> list[float]:
    """Milliseconds of each acknowledgement. Every other call is denied."""
    found: list[float] = []
    for number, waiting in enumerate(parked_sessions):
        said = confirmation(waiting.event_ids[0], "deny" if number % 2 else "allow")
        path = f"/v1/sessions/{waiting.session_id}/events"
        found.append(_seconds(lambda path=path, said=said: client.post(path, {"events": [said]})) * MS)
    return found


def _seconds(action: Callable[[], Any]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began
