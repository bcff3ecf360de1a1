"""A turn followed in a terminal, over the real service, CLI and offline model: decisions, races, and its end."""

from collections.abc import Callable, Iterator, Mapping
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from claude_hitl_template.cli.client import Client
from claude_hitl_template.cli.terminal.conversation import (
    Conversation,
    End,
    Terminal,
    UserLeft,
    ask_user,
    session_summary,
)
from claude_hitl_template.cli.terminal.dialogue import Body, Decider, denial, scripted
from claude_hitl_template.config.settings import Settings
from claude_hitl_template.testing.threaded import Threaded, serve_in_thread

FAILING = """```scenario
- text: about to fail
  tools: [{name: Glob, input: {pattern: "*"}}]
- text: never said
  error: {status: 400}
```"""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Threaded]:
    folder = tmp_path_factory.mktemp("served")
    with serve_in_thread(folder, keys={"ann": "ann-secret"}, hot_window_s=600.0, idle_timeout_s=0.0) as found:
        yield found


class Fixture:
    def __init__(self, served: Threaded) -> None:
        self.client = Client(served.service.url, "ann-secret", patience_s=30)
        self.screen = StringIO()
        self.terminal = Terminal(Console(file=self.screen, width=200, highlight=False))
        self.workspace = served.service.workspace

    def chat(self, prompt: str, decide: Decider) -> Conversation:
        message = {"type": "user.message", "content": [{"type": "text", "text": prompt}]}
        body = {"agent": "default", "environment_id": "default", "initial_events": [message]}
        session_id = self.client.post("/v1/sessions", body)["id"]
        return Conversation(self.client, session_id, self.terminal, decide, seen=0)

    def read(self) -> str:
        return self.screen.getvalue()


@pytest.fixture
def fixture(served: Threaded) -> Iterator[Fixture]:
    found = Fixture(served)
    yield found
    found.client.close()


def answer(result: str, deny_message: str | None = None) -> Decider:
    return lambda approval: scripted(approval, result, deny_message)


def test_a_session_that_is_over_is_followed_to_its_end_and_no_further(fixture: Fixture) -> None:
    session_id = fixture.client.post("/v1/sessions", {"agent": "default", "environment_id": "default"})["id"]
    fixture.client.post(f"/v1/sessions/{session_id}/archive")
    newest = len(list(fixture.client.pages(f"/v1/sessions/{session_id}/events")))
    for seen in (0, newest):
        chat = Conversation(fixture.client, session_id, fixture.terminal, answer("allow"), seen=seen)
        assert chat.until_idle() is End.DONE


def test_what_is_allowed_runs_and_the_turn_ends(
    fixture: Fixture, make_settings: Callable[..., Settings]
) -> None:
    chat = fixture.chat("Write hello.txt with a greeting", answer("allow"))
    assert chat.until_idle() is End.DONE
    assert (fixture.workspace(chat.id) / "hello.txt").exists()
    for part in (
        "you  Write hello.txt",
        "● Write hello.txt (asks first)",
        "allowed by ann",
        "Done: `hello.txt`",
    ):
        assert part in fixture.read()
    settings = make_settings(data_dir=fixture.workspace(chat.id).parents[1])
    lines = [
        line.plain
        for line in session_summary(
            settings, fixture.client.get(f"/v1/sessions/{chat.id}"), ["hello.txt"], offline=True
        )
    ]
    assert "free of charge" in lines[0]
    assert f"{fixture.workspace(chat.id)}  (hello.txt)" in lines[1]


def test_a_session_that_has_no_folder_here_names_what_is_saved(
    fixture: Fixture, make_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    session = fixture.client.get(f"/v1/sessions/{fixture.chat('Say hello', answer('allow')).id}")
    settings = make_settings(data_dir=tmp_path / "elsewhere")
    names = [f"{number}\x1b.txt" for number in range(20)]
    line = session_summary(settings, session, names, offline=True)[1].plain
    assert f"/v1/sessions/{session['id']}/workspace" in line
    assert "..." in line
    assert "\x1b" not in line
    assert "empty" in session_summary(settings, session, [], offline=True)[1].plain


def test_what_is_denied_does_not_run_and_the_agent_is_told_why(fixture: Fixture) -> None:
    chat = fixture.chat("Do three things at once", answer("deny", "not today"))
    assert chat.until_idle() is End.DONE
    assert not list(fixture.workspace(chat.id).glob("*"))
    assert fixture.read().count("denied by ann: not today") == 3
    assert "call 3 of 3 waits" in fixture.read()


def test_a_turn_that_fails_ends_with_3(fixture: Fixture) -> None:
    assert fixture.chat(FAILING, answer("allow")).until_idle() is End.FAILED
    assert "error: " in fixture.read()
    assert End.FAILED == 3


def test_without_a_terminal_the_call_is_shown_and_keeps_waiting(
    fixture: Fixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", StringIO(""))
    chat = fixture.chat("Run a command", ask_user(fixture.terminal))
    with pytest.raises(UserLeft):
        chat.until_idle()
    assert "date -u > date.txt" in fixture.read()
    waiting = list(fixture.client.pages("/v1/approvals", **{"session_id": chat.id, "states[]": "pending"}))
    assert len(waiting) == 1
    fixture.client.post(f"/v1/approvals/{waiting[0]['id']}/decide", denial(None))


def test_a_decision_that_lost_a_race_says_who_won_and_goes_on(fixture: Fixture) -> None:
    def too_late(approval: Mapping[str, Any]) -> Body:
        fixture.client.post(f"/v1/approvals/{approval['id']}/decide", denial("I was first"))
        return {"result": "allow"}

    chat = fixture.chat("Run a command", too_late)
    assert chat.until_idle() is End.DONE
    assert "already decided (deny) by ann" in fixture.read()
    assert not (fixture.workspace(chat.id) / "date.txt").exists()


def test_questions_are_answered(fixture: Fixture) -> None:
    assert fixture.chat("Ask me a question", answer("allow")).until_idle() is End.DONE
    assert '"Which colour should the report have?"="Blue"' in fixture.read()


def test_a_second_message_is_sent_without_showing_it_twice(fixture: Fixture) -> None:
    chat = fixture.chat("Write hello.txt with a greeting", answer("deny"))
    assert chat.until_idle() is End.DONE
    chat.send("Read hello.txt")
    assert chat.until_idle() is End.DONE
    assert "you  Read" not in fixture.read()
    assert "● Read hello.txt" in fixture.read()


def test_an_interrupt_ends_the_turn(fixture: Fixture) -> None:
    def leave(_: Mapping[str, Any]) -> Body:
        raise UserLeft

    chat = fixture.chat("Run a command", leave)
    with pytest.raises(UserLeft):
        chat.until_idle()
    chat.interrupt()
    assert chat.until_idle() is End.DONE
    assert "interrupted" in fixture.read()
