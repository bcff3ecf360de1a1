"""The spooler keeps what a flow writes, in its order, and asks a flow that waits no more than it must."""

import json
import sqlite3
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kodosumi.spooler
import pytest
from ray.exceptions import RayActorError

from claude_hitl_template.panel import spooler

FLOW = "65a1b2c3d4e5f60718293a4b"


class Method:
    """A method of an actor."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    async def remote(self, *args: Any) -> Any:
        return self._call(*args)


class Runner:
    """A flow that writes `written`, one list between two looks, and has ended then. `asked` counts the calls by name."""

    def __init__(self, *written: list[str]) -> None:
        self._coming, self._queue, self.asked = list(written), list[str](), Counter[str]()
        self.queue_ended = False
        self.actor = self

    def __getattr__(self, name: str) -> Method:
        def call(*args: Any) -> Any:
            self.asked[name] += 1
            return getattr(self, f"_{name}")(*args)

        return Method(call)

    def _get_username(self) -> str:
        return "a-role"

    def _get_queue(self) -> "Runner":
        return self

    def _is_active(self) -> bool:
        if not self._coming:
            return False
        self._queue += self._coming.pop(0)
        return True

    def _qsize(self) -> int:
        if self.queue_ended:
            raise RayActorError
        return len(self._queue)

    def _get_nowait_batch(self, count: int) -> list[dict[str, Any]]:
        taken, self._queue = self._queue[:count], self._queue[count:]
        return [{"timestamp": 1.0, "kind": "result", "payload": json.dumps(text)} for text in taken]


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The flows whose end was left to Kodosumi, which ends their runners."""
    names: list[str] = []

    async def retrieve(_self: Any, _runner: Any, state: Any) -> None:
        names.append(state.name)

    monkeypatch.setattr(spooler, "PAUSE_S", 0.0)
    monkeypatch.setattr(kodosumi.spooler.Spooler, "retrieve", retrieve)
    return names


def saved(folder: Path) -> list[str]:
    (path,) = folder.glob(f"a-role/{FLOW}/*.db")
    with sqlite3.connect(path) as connection:
        return [json.loads(text) for (text,) in connection.execute("select message from monitor order by id")]


async def test_everything_is_kept_in_its_order(tmp_path: Path, ended: list[str]) -> None:
    many = [f"line {number}" for number in range(3 * spooler.AT_ONCE)]
    runner = Runner(["first"], [], many, ["last"])
    await spooler.Spooler(tmp_path).retrieve(runner, spooler.Flow(FLOW))
    assert saved(tmp_path) == ["first", *many, "last"]
    assert ended == [FLOW]


async def test_a_flow_that_waits_is_asked_two_things_at_each_look(tmp_path: Path, ended: list[str]) -> None:
    runner = Runner(*[[] for _ in range(10)])
    await spooler.Spooler(tmp_path).retrieve(runner, spooler.Flow(FLOW))
    assert runner.asked == {"get_username": 1, "get_queue": 1, "is_active": 11, "qsize": 10}


async def test_a_queue_that_ended_before_its_flow_loses_nothing(tmp_path: Path, ended: list[str]) -> None:
    runner = Runner(["all"], [])
    keeping = spooler.Spooler(tmp_path)
    kept = keeping.save

    def save(conn: sqlite3.Connection, fid: str, payload: list[dict[Any, Any]]) -> None:
        kept(conn, fid, payload)
        runner.queue_ended = True

    keeping.save = save
    await keeping.retrieve(runner, spooler.Flow(FLOW))
    assert (saved(tmp_path), ended) == (["all"], [FLOW])


def test_flows_are_found_without_the_dashboard(monkeypatch: pytest.MonkeyPatch) -> None:
    actors = [
        {"namespace": "kodosumi", "name": FLOW},
        {"namespace": "kodosumi", "name": "Spooler"},
        {"namespace": "kodosumi", "name": "register"},
        {"namespace": "claude-hitl", "name": "claude-session-1"},
    ]

    def list_named_actors(**_: Any) -> list[dict[str, str]]:
        return actors

    monkeypatch.setattr(spooler, "list_named_actors", list_named_actors)
    assert spooler.flows(filters=[("class_name", "=", "Runner")]) == [spooler.Flow(FLOW)]


def test_kodosumis_program_runs_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Any] = []
    monkeypatch.setattr(kodosumi.spooler, "Spooler", kodosumi.spooler.Spooler)
    monkeypatch.setattr(kodosumi.spooler, "list_actors", kodosumi.spooler.list_actors)
    monkeypatch.setattr(
        kodosumi.spooler, "run", lambda: ran.extend([kodosumi.spooler.Spooler, kodosumi.spooler.list_actors])
    )
    spooler.main()
    assert ran == [spooler.Spooler, spooler.flows]
