"""`hitl chat` over the real service, CLI and offline model: its input, Ctrl-C, and its end."""

from collections.abc import Callable, Iterator, Mapping
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from claude_hitl_template.cli.client import Client
from claude_hitl_template.cli.run import INTERRUPTED
from claude_hitl_template.cli.terminal import chat
from claude_hitl_template.cli.terminal.conversation import Conversation, End, Terminal, UserLeft
from claude_hitl_template.cli.terminal.dialogue import Body, Decider, ask_about
from claude_hitl_template.config.settings import Settings
from claude_hitl_template.testing.threaded import Threaded, serve_in_thread
from tests.commands import hitl

KEY = "ann-secret"
WRITING = """```scenario
- text: about to write
  tools: [{{name: Write, input: {{file_path: notes/{name}, content: x}}}}]
- text: it was written
```"""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Threaded]:
    folder = tmp_path_factory.mktemp("served")
    with serve_in_thread(folder, keys={"ann": KEY}, hot_window_s=600.0, idle_timeout_s=0.0) as found:
        yield found


class Typing(Terminal):
    """A user who types these lines, one at each prompt, and then leaves; "^C" is Ctrl-C."""

    def __init__(self, *lines: str) -> None:
        self.screen = StringIO()
        super().__init__(Console(file=self.screen, width=200, highlight=False))
        self.lines = list(lines)

    def ask(self, prompt: str) -> str:
        del prompt
        line = self.lines.pop(0) if self.lines else "^D"
        if line == "^C":
            raise KeyboardInterrupt
        if line == "^D":
            raise EOFError
        return line


class Fixture:
    def __init__(self, served: Threaded, settings: Settings) -> None:
        self.client = Client(served.service.url, KEY, patience_s=30)
        self.settings, self.workspace = settings, served.service.workspace
        self.id = self.client.post("/v1/sessions", {"agent": "default", "environment_id": "default"})["id"]

    def chat(self, terminal: Typing, decide: Decider | None = None) -> int:
        """The exit status of a chat in which this is typed, without `decide` at the decisions, too."""

        def ask(approval: Mapping[str, Any]) -> Body:
            return ask_about(terminal, approval)

        conversation = Conversation(self.client, self.id, terminal, decide or ask, seen=0)
        return chat.converse(self.settings, self.client, conversation, terminal, asked=False)

    def said(self) -> list[str]:
        """The messages that the agent was sent."""
        events = self.client.pages(f"/v1/sessions/{self.id}/events", **{"types[]": "user.message"})
        return [event["content"][0]["text"] for event in events]


@pytest.fixture
def fixture(served: Threaded, make_settings: Callable[..., Settings]) -> Iterator[Fixture]:
    port = served.service.url.rpartition(":")[2].partition("/")[0]
    found = Fixture(served, make_settings(serve_port=port, api_key=KEY))
    yield found
    found.client.close()


def test_only_help_and_quit_are_ours_and_everything_else_goes_to_the_agent(fixture: Fixture) -> None:
    terminal = Typing("/help", "", "/compact", "/helpme", "say /quit", "/quit", "never read")
    assert fixture.chat(terminal) == End.DONE
    assert fixture.said() == ["/compact", "/helpme", "say /quit"]
    assert "ends the chat, not the session" in terminal.screen.getvalue()
    assert terminal.lines == ["never read"]


@pytest.mark.parametrize("leave", ["^C", "^D", "/quit"])
def test_at_the_prompt_ctrl_c_leaves_as_the_others_do(fixture: Fixture, leave: str) -> None:
    terminal = Typing(leave, "never read")
    assert fixture.chat(terminal) == End.DONE
    assert terminal.lines == ["never read"]


def test_ctrl_c_stops_the_running_turn_and_asks_again(fixture: Fixture) -> None:
    terminal = Typing("Run a command", "^C", "Say hello", "/quit")
    assert fixture.chat(terminal) == End.DONE
    assert "interrupted" in terminal.screen.getvalue()
    assert fixture.said() == ["Run a command", "Say hello"]
    assert not (fixture.workspace(fixture.id) / "date.txt").exists()


def test_a_second_ctrl_c_before_the_turn_has_stopped_leaves(
    fixture: Fixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def strike(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Conversation, "until_idle", strike)
    terminal = Typing("Say hello", "never read")
    assert fixture.chat(terminal) == INTERRUPTED
    assert terminal.lines == ["never read"]
    assert f"./hitl chat {fixture.id}" in terminal.screen.getvalue()


def test_leaving_at_a_decision_says_that_the_call_waits(fixture: Fixture) -> None:
    def leave(_: Mapping[str, Any]) -> Body:
        raise UserLeft

    terminal = Typing("Run a command")
    assert fixture.chat(terminal, leave) == End.LEFT
    assert f"Continue with: ./hitl chat {fixture.id}" in terminal.screen.getvalue()


def test_a_wider_rule_that_is_chosen_lets_the_next_call_run_unasked(fixture: Fixture) -> None:
    terminal = Typing(WRITING.format(name="a.txt"), "always 2", WRITING.format(name="b.txt"), "/quit")
    assert fixture.chat(terminal) == End.DONE
    screen = terminal.screen.getvalue()
    assert "1. Write(./notes/a.txt)  this file" in screen
    assert "2. Write(./notes/**)  every file in this folder" in screen
    assert "remembered: Write(./notes/**)" in screen
    assert screen.count("waits for a decision") == 1
    assert (fixture.workspace(fixture.id) / "notes" / "b.txt").exists()


def test_a_denied_call_reads_the_same_whatever_its_tool(fixture: Fixture) -> None:
    terminal = Typing(
        "Do three things at once", *["deny not today"] * 3, "Ask me a question", "/deny not today"
    )
    assert fixture.chat(terminal) == End.DONE
    screen = terminal.screen.getvalue()
    assert "hook error" not in screen
    assert screen.count("  Denied by a human: not today") == 4


def test_a_first_message_a_model_and_a_plan_begin_a_new_session(fixture: Fixture) -> None:
    before = {one["id"] for one in fixture.client.pages("/v1/sessions")}
    done = hitl("chat", "Say hello", "--plan", "--model", "claude-opus-4-5")
    assert done.returncode == 0, done.stderr
    (made,) = [one for one in fixture.client.pages("/v1/sessions") if one["id"] not in before]
    assert made["agent"]["model"]["id"] == "claude-opus-4-5"
    assert made["agent"]["permission_mode"] == "plan"
    assert "you  Say hello" in done.stdout


def test_a_session_is_continued_by_the_beginning_of_its_id(fixture: Fixture) -> None:
    done = hitl("chat", fixture.id[:-1])
    assert done.returncode == 0, done.stderr
    assert f"session    {fixture.id}" in done.stdout
    assert hitl("chat", fixture.id, "--plan").returncode == 2
    unknown = hitl("chat", "sesn_zz")
    assert unknown.returncode == 1
    assert "there are: sesn_" in unknown.stderr
