"""Decisions while Postgres is stopped, its connections are cut, and answers to commits are lost.

`--scale N` is the number of calls, at least 50. People who decide differently use two ledgers, each in its own process.
"""

import json
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import batched, cycle
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from claude_hitl_template.store.backup import back_up
from claude_hitl_template.store.core import CoreStore
from claude_hitl_template.store.postgres import PostgresBackend
from tests.chaos.crash_runs import Home
from tests.chaos.decisions import Waiting, decide_all
from tests.chaos.dump import read_dump
from tests.chaos.oracle import decisions_are_kept, logs_are_whole
from tests.contract.asking import asking
from tests.postgres import Server, serving

pytestmark = pytest.mark.slow

LEDGERS = 2
CALLS = 20  # of a session
EVERY = 25  # answers, from one strike to the next
STRIKES = ("cut", "immediate", "cut", "fast")
AWAY_S = 1.5  # at most
FAULTS = {"send_events.after_commit": "lose", "send_events.before_commit": "fail"}
SHARE = 0.05  # of the writes that meet each of them


@pytest.fixture
def server() -> Iterator[Server]:
    """A Postgres with its default settings, so that acknowledged writes survive a crash."""
    with serving({}) as one:
        yield one


async def waiting_calls(url: str, count: int) -> Waiting:
    backend = PostgresBackend(url)
    store, made = CoreStore(backend), list[tuple[str, str]]()
    for calls in batched((f"t{n}" for n in range(count)), CALLS):
        session_id = await asking(store, *calls)
        made += [(session_id, call) for call in calls]
    await backend.close()
    return made


def plan(folder: Path, writes: int, chance: random.Random) -> None:
    """Plans which of the writes meet a fault, including as many again for repeats."""
    hits = {
        point: {str(n): what for n in range(1, 2 * writes) if chance.random() < SHARE}
        for point, what in FAULTS.items()
    }
    folder.mkdir()
    (folder / "plan.json").write_text(json.dumps(hits))


def strike(server: Server, how: str, seconds: float) -> None:
    if how == "cut":
        server.run(
            "select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'claude-hitl'"
        )
        return
    port = server.local.url.rpartition(":")[2].partition("/")[0]
    server.local.stop(how)
    time.sleep(seconds)
    server.local.start({"port": port})


def strike_at(
    server: Server, answers: Any, working: Sequence[BaseProcess], chance: random.Random
) -> Counter[str]:
    """Strikes after every EVERY answers, until all people have finished."""
    done = Counter[str]()
    for how in cycle(STRIKES):
        while answers.value < EVERY * done.total():
            if not any(process.is_alive() for process in working):
                return done
            time.sleep(0.005)
        strike(server, how, chance.uniform(0, AWAY_S))
        done[how] += 1
    return done


async def test_no_decision_is_lost_doubled_or_contradicted_while_the_database_comes_and_goes(
    processes: ForkServerContext, server: Server, tmp_path: Path, scale: int
):
    chance = random.Random("database chaos")
    with server.database() as url:
        home, waiting = Home(url, tmp_path), await waiting_calls(url, scale)
        plan(tmp_path / "faults", LEDGERS * scale, chance)
        answers = processes.Value("i", 0)
        working = [
            processes.Process(target=decide_all, args=(home, ledger, waiting, answers))
            for ledger in range(LEDGERS)
        ]
        for process in working:
            process.start()
        strikes = strike_at(server, answers, working, chance)
        assert [process.exitcode for process in working] == [0] * LEDGERS
        back_up(url, tmp_path / "backup.zip")
    hits = [json.loads(line) for line in (tmp_path / "faults" / "hits.jsonl").read_text().splitlines()]
    met = Counter(hit["did"] for hit in hits if hit["did"])
    acknowledged = home.acknowledged()
    print(f"\n{len(acknowledged)} acknowledged, {len(home.noted('refused'))} refused; {strikes}, {met}")
    assert set(strikes) == set(STRIKES)
    assert set(met) == set(FAULTS.values())

    record = read_dump(tmp_path / "backup.zip", acknowledged=acknowledged)
    assert [str(violation) for violation in (*decisions_are_kept(record), *logs_are_whole(record))] == []
    assert len(acknowledged) + len(home.noted("refused")) == LEDGERS * scale
    told = {(said.session_id, said.asked["tool_use_id"], said.event["id"]) for said in acknowledged}
    assert Counter((session_id, call) for session_id, call, _ in told) == Counter(waiting)
    confirmations = [
        e.id for log in record.events.values() for e in log if e.type == "user.tool_confirmation"
    ]
    assert Counter(confirmations) == Counter(event_id for _, _, event_id in told)
