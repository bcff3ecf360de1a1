"""`hitl approvals` and `hitl sessions` on a service: ids by their beginning, decisions, tables in a narrow terminal."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from claude_hitl_template.cli.client import Client
from claude_hitl_template.cli.terminal import approvals, ids, sessions
from claude_hitl_template.cli.terminal.tables import table_lines
from claude_hitl_template.errors import InvalidInput, NotFound
from claude_hitl_template.testing.threaded import Threaded, serve_in_thread
from tests.commands import hitl

KEY = "ann-secret"
NARROW = 60


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Threaded]:
    folder = tmp_path_factory.mktemp("served")
    with serve_in_thread(folder, keys={"ann": KEY}, hot_window_s=600.0, idle_timeout_s=0.0) as found:
        yield found


@pytest.fixture
def client(served: Threaded, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Client]:
    """A client of the service; commands of this process find the same one."""
    monkeypatch.chdir(tmp_path)
    for name, value in {
        "HITL_SERVE_PORT": served.service.url.rpartition(":")[2].partition("/")[0],
        "HITL_API_KEY": KEY,
        "HITL_DATA_DIR": str(tmp_path / "data"),
    }.items():
        monkeypatch.setenv(name, value)
    found = Client(served.service.url, KEY, patience_s=30)
    yield found
    found.close()


def session(client: Client, prompt: str = "") -> str:
    message = {"type": "user.message", "content": [{"type": "text", "text": prompt}]}
    body: dict[str, Any] = {"agent": "default", "environment_id": "default"}
    return client.post("/v1/sessions", {**body, **({"initial_events": [message]} if prompt else {})})["id"]


def waiting(client: Client, prompt: str, count: int = 1) -> list[dict[str, Any]]:
    """The calls of a session that was asked to do this, once they wait."""
    made = session(client, prompt)
    with client.stream(f"/v1/sessions/{made}/events/stream", 0) as lines:
        next(line for line in lines if "requires_action" in line)
    found = list(client.pages("/v1/approvals", **{"session_id": made, "states[]": "pending"}))
    assert len(found) == count
    return found


def shortest(one: str, others: list[str]) -> str:
    """The shortest beginning of an id that no other one has."""
    return next(one[:n] for n in range(6, len(one) + 1) if not any(o.startswith(one[:n]) for o in others))


def test_a_session_is_named_by_the_beginning_of_its_id(client: Client) -> None:
    made = [session(client) for _ in range(3)]
    known = [found["id"] for found in client.pages("/v1/sessions")]
    begin = shortest(made[0], [one for one in known if one != made[0]])
    assert f"archived {made[0]}\n" in hitl("sessions", "archive", begin).stdout
    assert hitl("sessions", "show", begin.removeprefix("sesn_")).stdout.endswith("terminated\n")
    assert f"deleted {made[0]}\n" in hitl("sessions", "delete", begin).stdout


def test_a_beginning_that_is_none_or_several_says_which_there_are(client: Client) -> None:
    made = session(client), session(client)
    with pytest.raises(InvalidInput, match=rf"the beginning of \d+ sessions: {made[1]}"):
        ids.session_id(client, "sesn_")
    with pytest.raises(NotFound, match=f"'zz'; there are: {made[1]}"):
        ids.session_id(client, "zz")
    with pytest.raises(InvalidInput, match=r"\./hitl sessions shows"):
        ids.session_id(client, " ")
    unknown = hitl("approvals", "allow", "appr_zz")
    assert unknown.returncode == 1
    assert "Fix: ./hitl approvals --all lists them" in unknown.stderr


def test_a_call_is_denied_by_the_beginning_of_its_id_with_a_reason(client: Client) -> None:
    three = waiting(client, "Do three things at once", 3)
    first, others = three[0]["id"], [one["id"] for one in three[1:]]
    begin = shortest(first, others)
    assert "deny by ann" in hitl("approvals", "deny", begin, "not today").stdout
    decided = client.get(f"/v1/approvals/{first}")["decision"]
    assert (decided["result"], decided["deny_message"]) == ("deny", "not today")
    shown = hitl("approvals", "show", begin).stdout
    assert "not today" in shown
    assert "/claude-hitl/inbox/a/appr_" in shown
    assert hitl("approvals", "deny", others[0], "one", "--message", "two").returncode == 2
    for other in others:
        assert hitl("approvals", "deny", other).returncode == 0


def test_tables_fit_a_narrow_terminal_and_ids_stay_whole(client: Client) -> None:
    made = waiting(client, "Run a command")[0]
    body = {"agent": "default", "environment_id": "default", "title": "A title that is long " * 4}
    titled = client.post("/v1/sessions", body)
    lines = table_lines([approvals.row(made)], approvals.HEADS, NARROW, optional=("SESSION",), folded=2)
    assert max(map(len, lines)) <= NARROW
    assert made["id"] in "\n".join(lines)
    assert "Bash  date -u > date.txt" in "\n".join(lines)
    rows = [sessions.row(titled, titled["title"]), sessions.row(titled, "")]
    for width in (NARROW, 80, 120):
        lines = table_lines(rows, sessions.HEADS, width, optional=("WAITS FOR",))
        assert max(map(len, lines)) <= width
        assert titled["id"] in lines[1 if width > NARROW else 2]
        assert "A title that is" in "\n".join(lines)
    assert table_lines(rows, sessions.HEADS)[1].endswith("…")  # whole for a pipe, but for what the row cut
    hitl("approvals", "deny", made["id"])
