"""The report of a chaos run, as a table for people and as a file."""

import json
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from rich.table import Table

from claude_hitl_template.domain.models import Event
from tests.chaos.faults import MACHINE, QUIET, Strike
from tests.chaos.oracle import Record, Violation

PROMISES = {
    1: "acknowledged decisions lost",
    2: "runs twice, of another input, or untold",
    3: "runs of what was not allowed",
    4: "events lost, repeated or out of order",
    5: "sessions that do not rest",
    6: "runs of a stale owner",
    7: "files lost",
}
SESSION_KILLS = {f"kill the {what}{how}" for what in ("CLI", "owner") for how in ("", QUIET)}


@dataclass(frozen=True)
class Report:
    """The result of a run. `facts` are its choices and counts; `unanswered`, errors that kept conversations from ending."""

    facts: Mapping[str, Any]
    strikes: Sequence[Strike]
    cuts: int
    record: Record
    violations: Sequence[Violation]
    unanswered: Sequence[str]

    @property
    def kept(self) -> bool:
        return not self.violations and not self.unanswered

    def counts(self) -> dict[str, Any]:
        decisions = [a for a in self.record.acknowledged if a.event["type"] == "user.tool_confirmation"]
        return {
            "sessions": len(self.record.sessions),
            "events": sum(map(len, self.record.events.values())),
            "calls that ran": len(self.record.runs),
            "decisions acknowledged": len(decisions),
            "calls of unknown outcome": sum(a.state == "unknown" for a in self.record.approvals),
        }

    def faults(self) -> dict[str, int]:
        found = Counter(strike.kind for strike in self.strikes)
        return {**dict(sorted(found.items())), "cut an event stream": self.cuts}

    def recovery(self) -> dict[str, dict[str, float]]:
        """p50, p95 and count, in seconds. Calm: nothing else was struck between the kill and the session's going on."""
        calm, among_others = list[float](), list[float]()
        for strike in self.strikes:
            took_s = _goes_on_s(strike, self.record.events)
            if took_s is not None:
                (calm if self._calm(strike, took_s) else among_others).append(took_s)
        kills = [s for s in self.strikes if s.kind.startswith("kill") and s.kind not in SESSION_KILLS]
        whole = [s for s in self.strikes if _takes_all(s.kind)]
        told = {
            "CLI or owner killed: the session goes on": calm,
            "... while other things were struck": among_others,
            "a part killed: the service answers": [s.lasted_s for s in kills if not _takes_all(s.kind)],
            "the cluster killed: the service answers": [s.lasted_s for s in whole],
            "the cluster killed: the first call runs": [
                took_s for s in whole if (took_s := self._first_call_s(s)) is not None
            ],
        }
        return {name: _quantiles(samples) for name, samples in told.items() if samples}

    def _first_call_s(self, strike: Strike) -> float | None:
        """Seconds until a call, of whichever session, was allowed and had its result."""
        ran = (
            _seconds(strike.at, event)
            for log in self.record.events.values()
            for event in log
            if event.type == "agent.tool_result" and not event.payload.get("is_error")
        )
        return min((took_s for took_s in ran if took_s > 0), default=None)

    def _calm(self, strike: Strike, took_s: float) -> bool:
        until = strike.at + timedelta(seconds=took_s)
        return not any(
            other.at <= until and other.at + timedelta(seconds=other.lasted_s) >= strike.at
            for other in self.strikes
            if other is not strike
        )

    def broken(self) -> dict[str, int]:
        found = Counter(v.promise for v in self.violations)
        return {what: found[number] for number, what in PROMISES.items()}

    def as_json(self) -> str:
        strikes = [{**vars(s), "at": s.at.isoformat()} for s in self.strikes]
        told = {
            **self.facts,
            "kept": self.kept,
            "counts": self.counts(),
            "broken": self.broken(),
            "faults": self.faults(),
            "faults without cut streams": len(self.strikes),
            "kills": sum(strike.kills for strike in self.strikes),
            "recovery_s": self.recovery(),
            "violations": [{**vars(v), "history": list(v.history)} for v in self.violations],
            "unanswered": list(self.unanswered),
            "strikes": strikes,
        }
        return json.dumps(told, indent=2)

    def table(self) -> Table:
        table = Table("what", "figure", box=None)
        for name, count in {**self.counts(), **self.broken()}.items():
            table.add_row(name, str(count))
        table.add_row("faults without cut streams", str(len(self.strikes)))
        for name, count in self.faults().items():
            table.add_row(f"fault: {name}", str(count))
        for name, found in self.recovery().items():
            figures = f"p50 {found['p50']:.1f} s, p95 {found['p95']:.1f} s, {found['count']:.0f} times"
            table.add_row(name, figures)
        return table


def _takes_all(kind: str) -> bool:
    return kind in ("kill the raylet", "kill the GCS", "kill the whole cluster", MACHINE)


def _goes_on_s(strike: Strike, logs: Mapping[str, Sequence[Event]]) -> float | None:
    """Seconds from the kill until the next owner of a session, which ran then, wrote what its CLI said."""
    if strike.kind not in SESSION_KILLS or strike.session_id is None:
        return None
    log = logs.get(strike.session_id, ())
    before = [e for e in log if e.created_at <= strike.at and e.type.startswith("session.status")]
    if not before or before[-1].type != "session.status_running":
        return None
    after = [e for e in log if e.created_at > strike.at and not e.type.startswith("user.")]
    taken = next((i for i, e in enumerate(after) if e.type == "session.status_rescheduled"), None)
    if taken is None:
        return None
    written = (e for e in after[taken + 1 :] if e.type != "session.status_running")
    return next((_seconds(strike.at, event) for event in written), None)


def _seconds(at: datetime, event: Event) -> float:
    return (event.created_at - at).total_seconds()


def _quantiles(samples: Sequence[float]) -> dict[str, float]:
    cuts = statistics.quantiles(samples, n=20) if len(samples) > 1 else [samples[0]] * 19
    return {"p50": round(cuts[9], 2), "p95": round(min(cuts[18], max(samples)), 2), "count": len(samples)}
