"""`hitl status` reports problems with their fixes, and the sessions' states."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from claude_hitl_template.cli.commands.status import count_states, describe, find_problems, folder_bytes
from claude_hitl_template.cli.terminal.approvals import parse_answers
from claude_hitl_template.cli.terminal.sessions import row, state
from claude_hitl_template.errors import InvalidInput
from claude_hitl_template.presentation.text import age, size

WAITS = {"type": "requires_action", "event_ids": ["a", "b"]}
APP = {"code": "c", "model": "offline", "version": "0", "ray": "2"}


def session(status: str = "idle", stop: dict[str, Any] | None = None, parked: bool = True) -> dict[str, Any]:
    return {
        "id": "s",
        "status": status,
        "stop_reason": stop,
        "parked": parked,
        "created_at": "2030-01-01T00:00:00Z",
    }


@pytest.mark.parametrize(
    ("found", "name"),
    [
        (session("running"), "running"),
        (session("rescheduling"), "rescheduling"),
        (session(stop=WAITS, parked=False), "waiting hot"),
        (session(stop=WAITS), "waiting parked"),
        (session(stop={"type": "end_turn"}), "idle"),
        (session(), "idle"),
    ],
)
def test_what_a_session_does(found: dict[str, Any], name: str) -> None:
    assert state(found) == name
    assert count_states([found, found])[name] == 2


def test_a_row_says_how_many_decisions_a_session_waits_for() -> None:
    assert row(session(stop=WAITS), "a\nb\x1b")[3:] == ("2 decisions", "a b\\x1b")
    assert row(session(), "x")[3] == "-"


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({"head": False, "app": None}, "nothing runs; start it with ./hitl up"),
        ({"head": True, "app": None}, "the service does not answer"),
        ({"app": {"code": "old"}}, "older than the working tree: ./hitl up"),
        ({"changed": ["HITL_HOT_WINDOW_S"]}, "HITL_HOT_WINDOW_S changed"),
        ({"drained_s": 12.3}, "starts no session for 12 s more; ./hitl up"),
        ({"refused": "this key is not known"}, "this key is not known"),
        ({"channels": ["webhook x (wbhk_1): HTTP 500"]}, "not delivered over webhook x (wbhk_1): HTTP 500"),
        ({"head": False}, "not started from this data folder"),
    ],
)
def test_each_problem_is_said_with_what_mends_it(given: dict[str, Any], part: str) -> None:
    well: dict[str, Any] = {"head": True, "app": APP, "code": "c", "changed": [], "refused": None}
    assert find_problems(**well) == []
    problems = find_problems(**{**well, **given})
    assert len(problems) == 1
    assert part in problems[0]


def test_the_facts_are_told_in_lines() -> None:
    facts = {
        "healthy": False,
        "problems": ["bad"],
        "ray": {"pid": 7, "running_s": 5, "ports": {"HITL_RAY_PORT": 1}, "temp_dir": "/t", "elsewhere": None},
        "panel": {"url": "http://y", "panel": 8, "spooler": None, "flows": 2},
        "app": {"url": "http://x/v1", **APP},
        "work": {"sessions": {"running": 1, "idle": 0}, "pending": 3},
        "database": {"place": "Postgres at h:1/d, version 15.1", "pid": 9},
        "data": {"folder": "/d", "bytes": 2048, "database_bytes": 0},
    }
    found = "\n".join(describe(facts))
    for part in (
        "NOT HEALTHY", "process 7", "no AI", "1 running", "3 waiting", "2.0 KiB", "problem    bad",
        "panel process 8, spooler does not run; 2 conversations",
    ):  # fmt: skip
        assert part in found


@pytest.mark.parametrize(
    ("sandbox", "said"), [("on", None), ("off", "HITL_SANDBOX=off"), ("none", "sandbox")]
)
def test_a_service_without_sandboxes_says_so(sandbox: str, said: str | None) -> None:
    facts = {
        "healthy": True,
        "problems": [],
        "ray": {"pid": 7, "running_s": 5, "ports": {}, "temp_dir": "/t", "elsewhere": None},
        "panel": None,
        "app": {"url": "http://x/v1", **APP, "sandbox": sandbox, "floor": "built in"},
        "work": None,
        "database": {"place": "SQLite", "pid": None},
        "data": {"folder": "/d", "bytes": 0, "database_bytes": 0},
    }
    lines = [line for line in describe(facts) if line.startswith("sandbox")]
    assert "floor      built in" in describe(facts)
    assert len(lines) == (0 if said is None else 1)
    assert said is None or said in lines[0]


def test_of_a_cluster_elsewhere_its_addresses_are_told_and_nothing_of_this_machine() -> None:
    facts = {
        "healthy": True,
        "problems": [],
        "ray": {"pid": None, "running_s": None, "ports": {}, "temp_dir": "/t", "elsewhere": "http://vm:8265"},
        "panel": {"url": "http://vm:3370"},
        "app": {"url": "http://vm:8001/claude-hitl/v1", **APP},
        "work": None,
        "database": {"place": "SQLite", "pid": None},
        "data": {"folder": "/here", "bytes": 0, "database_bytes": 0},
    }
    found = "\n".join(describe(facts))
    for part in ("dashboard http://vm:8265", "panel      http://vm:3370"):
        assert part in found
    for part in ("does not run", "/here", "SQLite"):
        assert part not in found


def test_folder_bytes_counts_files_and_not_what_links_lead_to(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_bytes(b"12345")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert folder_bytes(tmp_path / "a") == 5
    assert folder_bytes(tmp_path / "none") == 0


@pytest.mark.parametrize(
    ("seconds", "shown"), [(-3, "0s"), (5, "5s"), (180, "3m"), (7200, "2h"), (200_000, "2d")]
)
def test_ages_are_short(seconds: int, shown: str) -> None:
    now = datetime(2030, 1, 1, tzinfo=UTC)
    assert age((now - timedelta(seconds=seconds)).isoformat(), now) == shown


@pytest.mark.parametrize(
    ("count", "shown"), [(0, "0 B"), (1536, "1.5 KiB"), (5 * 1024**4, "5.0 TiB"), (1024**6, "1048576.0 TiB")]
)
def test_sizes_are_short(count: int, shown: str) -> None:
    assert size(count) == shown


def test_answers_are_matched_with_what_was_asked() -> None:
    asked = {"questions": [{"question": "a=b?", "options": ["x"]}, {"question": "c?", "options": ["x"]}]}
    assert parse_answers(["a=b?=x=y", "c?=1", "c?=2", "c?=3"], asked) == {
        "a=b?": "x=y",
        "c?": ["1", "2", "3"],
    }
    with pytest.raises(InvalidInput, match="answers none"):
        parse_answers(["d?=x"], asked)
    with pytest.raises(InvalidInput):
        parse_answers(["c?=x"], {"command": "ls"})
