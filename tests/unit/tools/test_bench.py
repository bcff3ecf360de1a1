"""The benchmark's arithmetic, table and JSON, from made-up samples; and its workplaces, parked load and errors."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from io import StringIO
from pathlib import Path

import psutil
import pytest
from rich.console import Console
from typer.testing import CliRunner

from claude_hitl_template.cli.app import app
from claude_hitl_template.cli.host.service import PORTS
from claude_hitl_template.config.settings import Settings
from claude_hitl_template.domain.events import UserToolConfirmation
from claude_hitl_template.domain.models import ApprovalState
from claude_hitl_template.domain.people import Actor
from claude_hitl_template.errors import EngineError, Unavailable
from claude_hitl_template.store.core import CoreStore
from tools.bench import contenders, figures, watchers
from tools.bench.__main__ import app as bench_command
from tools.bench.figures import Compare, Measure
from tools.bench.parked_load import CALLS, footprint, make_parked_load, opened
from tools.bench.run import Bench
from tools.bench.service_fixture import temporary_settings
from tools.bench.usage import CpuUse


def measure(
    ours: Sequence[float],
    bare: Sequence[float] = (),
    compare: Compare | None = None,
    target: float | None = None,
) -> Measure:
    return Measure("what", "ms", compare, target, list(ours), list(bare))


# -- arithmetic


@pytest.mark.parametrize(
    ("samples", "share", "expected"),
    [
        ([7], 95, 7),
        ([1, 3], 50, 2),
        ([3, 1, 2], 50, 2),
        (range(101), 95, 95),
        ([0, 10], 95, 9.5),
        ([5, 1], 0, 1),
        ([5, 1], 100, 5),
    ],
)
def test_a_percentile_lies_between_its_neighbours(
    samples: Sequence[float], share: float, expected: float
) -> None:
    assert figures.percentile(list(samples), share) == pytest.approx(expected)


def test_there_is_no_percentile_of_nothing() -> None:
    with pytest.raises(ValueError, match="no samples"):
        figures.percentile([], 50)


@pytest.mark.parametrize(
    ("made", "figure", "met"),
    [
        (measure([120, 130, 110], [100, 100, 90], "ratio of p50", 1.25), 1.2, True),
        (measure([126], [100], "ratio of p50", 1.25), 1.26, False),
        (measure([80], [30], "difference of p50", 50), 50, True),
        (measure([20], [30], "difference of p50", 50), -10, True),
        (measure([10, 60], (), "p95", 50), 57.5, False),
        (measure([10, 60], (), "p50", 50), 35, True),
        (measure([10, 60], (), "p50"), 35, None),
        (measure([160, 140], (), "p50, at least", 150), 150, True),
        (measure([140], (), "p50, at least", 150), 140, False),
        (measure([10], (), "ratio of p50", 1.25), None, None),
        (measure([], [10], "difference of p50", 1.25), None, None),
        (measure([], (), "p95", 50), None, None),
        (measure([10]), None, None),
    ],
)
def test_a_figure_is_held_against_its_target_where_there_are_both(
    made: Measure, figure: float | None, met: bool | None
) -> None:
    assert made.figure == (None if figure is None else pytest.approx(figure))
    assert made.met is met


# -- what is shown


@pytest.mark.parametrize(
    ("made", "cells"),
    [
        (
            measure([120, 120], [80, 80], "ratio of p50", 1.25),
            ("what", "ms", "2", "120 / 120", "80.0 / 80.0", "1.50 x", "<= 1.25 x", "NO"),
        ),
        (
            measure([20], [30], "difference of p50", 50),
            ("what", "ms", "1", "20.0", "30.0", "-10.0", "<= 50", "yes"),
        ),
        (measure([75], [30], "difference of p50", 50), ("what", "ms", "1", "75.0", "30.0", "+45.0", "<= 50", "yes")),
        (measure([20], (), "p95", 50), ("what", "ms", "1", "20.0", "-", "p95 20.0", "<= 50", "yes")),
        (measure([9], (), "p50, at least", 15), ("what", "ms", "1", "9.0", "-", "p50 9.0", ">= 15", "NO")),
        (measure([20]), ("what", "ms", "1", "20.0", "-", "-", "-", "-")),
        (measure([]), ("what", "ms", "0", "-", "-", "-", "-", "-")),
    ],
)  # fmt: skip
def test_a_row_shows_both_sides_and_whether_the_target_was_met(made: Measure, cells: tuple[str, ...]) -> None:
    assert figures.row(made) == cells


def test_the_table_has_a_line_for_each_measure() -> None:
    made = [Measure(f"measure {number}", "ms", ours=[float(number)]) for number in range(3)]
    console = Console(file=StringIO(), width=200)
    console.print(figures.table(made))
    assert isinstance(console.file, StringIO)
    shown = console.file.getvalue()
    assert [f"measure {number}" in shown for number in range(3)] == [True] * 3


def test_the_table_has_the_ratio_to_an_earlier_run_where_that_has_the_measure() -> None:
    run = {"measures": [measure([10, 20]).as_json(), measure([]).as_json()]}
    earlier = figures.p50_by_name(run)
    assert earlier == {"what": 15}
    made = [measure([30]), Measure("another", "ms", ours=[1.0])]
    ratios = list(figures.table(made, earlier).columns[-1].cells)
    assert ratios == ["2.00 x", "-"]
    with pytest.raises(ValueError, match="not the JSON of a run"):
        figures.p50_by_name({"measures": [{"name": "what"}]})


def test_the_json_holds_every_sample_and_can_be_read_back() -> None:
    made = measure([120, 110.12346], [100], "ratio of p50", 1.25).as_json()
    assert json.loads(json.dumps(made)) == {
        "name": "what",
        "unit": "ms",
        "ours": {"p50": 115.0617, "p95": 119.5062, "samples": [120, 110.1235]},
        "bare": {"p50": 100, "p95": 100, "samples": [100]},
        "compare": "ratio of p50",
        "figure": 1.1506,
        "target": 1.25,
        "met": True,
    }


# -- what it works with


def test_a_workplace_is_its_own_and_is_gone_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HITL_DATA_DIR", str(tmp_path / "the user's"))
    monkeypatch.setenv("ANTHROPIC_API_KEY", "a real key")
    monkeypatch.setenv("DATABASE_URL", "postgresql://the-users-own/database")
    monkeypatch.setenv("HITL_FILES_URL", f"file://{tmp_path}/the-users-files")
    with temporary_settings() as settings:
        assert settings.data_dir.is_dir()
        assert settings.data_dir != tmp_path / "the user's"
        assert settings.anthropic_api_key is None
        assert settings.database_url is None
        assert settings.files_at.startswith(settings.data_dir.as_uri())
        assert len({getattr(settings, name) for name in PORTS}) == len(PORTS)
    assert not settings.data_dir.exists()
    assert not (tmp_path / "the user's").exists()


def test_the_crowd_is_parked_and_waits_for_decisions_and_a_decision_wakes_nobody(tmp_path: Path) -> None:
    settings = Settings.load().model_copy(update={"data_dir": tmp_path})
    parked_sessions = asyncio.run(make_parked_load(settings, "hash", 3))

    async def look() -> None:
        async with opened(settings) as backend:
            store = CoreStore(backend)
            key = await store.add_key("again", "hash")
            pending = await store.list_approvals(key.id, limit=100, states=[ApprovalState.PENDING])
            assert [a.event_id for a in pending.data] == [e for one in parked_sessions for e in one.event_ids]
            said = UserToolConfirmation.model_validate(
                contenders.confirmation(parked_sessions[0].event_ids[0], "allow")
            )
            await store.send_events(parked_sessions[0].session_id, key.id, [said], by=Actor(name="ann"))
            sessions = (await store.list_sessions(key.id, limit=10)).data
            assert all(s.parked for s in sessions)
            assert await store.supervised() == []

    asyncio.run(look())
    found = asyncio.run(footprint(settings, "hash", parked_sessions[1].session_id))
    assert found.rows > CALLS
    assert found.record_bytes > 1000


def test_the_tools_own_note_says_when_it_started(tmp_path: Path) -> None:
    (tmp_path / contenders.BEGAN).write_text("1500000000\n")
    assert contenders.started_after(tmp_path, 1_000_000_000) == pytest.approx(0.5)
    assert not (tmp_path / contenders.BEGAN).exists()


@pytest.mark.parametrize(
    ("frames", "error"),
    [
        ([], Unavailable),
        ([{"type": "session.status_idle", "stop_reason": {"type": "end_turn"}}], EngineError),
    ],
)
def test_a_conversation_that_goes_wrong_is_an_error_and_not_a_wait(
    frames: list[dict[str, object]], error: type[Exception]
) -> None:
    made = contenders.Conversation(None, "sesn_1", iter(contenders.Frame(1, frame) for frame in frames))  # type: ignore[arg-type]
    with pytest.raises(error):
        made.until_asked()


def test_processor_time_is_counted_for_processes_that_begin_and_end() -> None:
    work = "import time\nwhile time.process_time() < 0.3: pass\ninput()"
    found: list[psutil.Process] = []
    used = CpuUse(lambda: found)
    with subprocess.Popen([sys.executable, "-c", work], stdin=subprocess.PIPE) as process:
        found.append(psutil.Process(process.pid))
        while used.seconds() < 0.1:
            pass
    before = used.seconds()
    found.clear()
    assert used.seconds() == before >= 0.1


async def test_watchers_say_how_late_an_event_arrived() -> None:
    at = datetime.now(UTC) - timedelta(seconds=2)
    sent = f'data: {{"type": "session.status_idle", "processed_at": "{at.isoformat()}"}}\n\n'.encode()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked = await reader.readuntil(b"\r\n\r\n")
        writer.write(
            b"HTTP/1.1 200 OK\r\n\r\n" + sent if b"x-api-key: k" in asked else b"HTTP/1.1 401 No\r\n\r\n"
        )
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    async with server:
        watcher = watchers.Watcher(b"GET / HTTP/1.1\r\nx-api-key: k\r\n\r\n")
        with pytest.raises(ConnectionError, match="ended"):
            await watcher.follow(host, port)
        assert watcher.late_ms is not None
        assert watcher.late_ms >= 2000
        with pytest.raises(ConnectionError, match="refused"):
            await watchers.Watcher(b"GET / HTTP/1.1\r\n\r\n").follow(host, port)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--rounds", "0"],
        ["--sessions", "1"],
        ["--only", "nonsense"],
        ["--json", "/no/such/folder/figures.json"],
        ["--compare", "/no/such/file.json"],
        ["--storm", "0"],
    ],
)
def test_wrong_arguments_start_nothing(arguments: list[str]) -> None:
    assert CliRunner().invoke(app, ["bench", *arguments]).exit_code != 0


def test_what_was_measured_before_a_failure_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(bench: Bench) -> None:
        bench.measures += [measure([1, 2]), measure([])]
        raise Unavailable("it died", "start it again")

    monkeypatch.setattr(Bench, "run", fail)
    file = tmp_path / "figures.json"
    result = CliRunner().invoke(bench_command, ["--json", str(file)])
    assert isinstance(result.exception, Unavailable)
    assert "1.5 / 1.9" in result.output
    assert figures.p50_by_name(json.loads(file.read_bytes())) == {"what": 1.5}
