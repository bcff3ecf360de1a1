"""A user at a terminal of 60 and of 120 columns: every kind of decision, what is typed by mistake, stopping and leaving."""

import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from claude_hitl_template.testing.threaded import Threaded
from tests.contract.tmux import Tmux

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("tmux") is None, reason="needs tmux"),
    pytest.mark.parametrize("width", [60, 120]),
]

ASKED = "always [number] [a/d/e/w] >"
SLEEP = "```scenario\n" + json.dumps([
    {"text": "This takes long.", "tools": [{"name": "Bash", "input": {"command": "sleep 300"}}]},
    {"text": "Done: {tool_result}"},
]) + "\n```"  # fmt: skip

type Open = Callable[..., Tmux]


@pytest.fixture
def hitl(hot: Threaded, tmp_path: Path) -> Iterator[Open]:
    """Starts `./hitl ARGUMENTS` for the service in this process."""
    editor = tmp_path / "editor"
    editor.write_text('#!/bin/sh\n[ -e "$0.off" ] || sed -i \'s/Hello!/Good morning!/\' "$1"\n')
    editor.chmod(0o755)
    env = {
        "HITL_HOME": str(tmp_path),
        "HITL_DATA_DIR": str(tmp_path / "data"),
        "HITL_SERVE_URL": hot.service.url.removesuffix("/claude-hitl"),
        "HITL_API_KEY": next(iter(hot.service.keys.values())),
        "VISUAL": str(editor),
        "TERM": "screen-256color",
        "LANG": "C.UTF-8",
    }
    with ExitStack() as opened:

        def start(width: int, *arguments: str) -> Tmux:
            folder = tmp_path / f"terminal-{len(list(tmp_path.iterdir()))}"
            folder.mkdir()
            terminal = Tmux(
                folder, width, [sys.executable, "-m", "claude_hitl_template.cli", *arguments], env
            )
            opened.callback(terminal.close)
            return terminal

        yield start


def test_a_chat_allows_denies_edits_remembers_answers_and_plans(hitl: Open, tmp_path: Path, width: int):
    chat = hitl(width, "chat", "Write hello.txt with a greeting")
    chat.until(ASKED, name="call")
    chat.type("what")
    chat.until("edit: change the input, then decide", name="wrong-word")
    chat.type("always 9")
    chat.until("there is no rule '9'", name="wrong-number")
    (tmp_path / "editor.off").touch()
    chat.type("e")
    chat.until("the input is unchanged", name="unchanged-edit")
    (tmp_path / "editor.off").unlink()
    chat.clear()
    chat.type("edit")
    chat.until("Good morning!")
    chat.until(ASKED, name="edited")
    chat.type("a")
    chat.until("you >", name="allowed")
    chat.clear()
    chat.type("Run a command")
    chat.until(ASKED)
    chat.type("d not now")
    chat.until("Denied by a human: not now")
    chat.until("you >", name="denied")
    chat.clear()
    chat.type("Run a command")
    chat.until(ASKED, name="rules")
    chat.type("w")
    chat.until("remembered: Bash with exactly this input")
    chat.until("you >", name="always")
    chat.clear()
    chat.type("Ask me a question")
    chat.until("(/deny [why] to decline) >", name="question")
    chat.type("9")
    chat.until("there is no 9; the choices are 1 to", name="wrong-choice")
    chat.type("1")
    chat.until("numbers, or your own words")
    chat.type("1 as a slide")
    chat.until("you >", name="answered")
    chat.clear()
    chat.type("Make a plan first")
    chat.until("accept / back [comments] [a/b] >", name="plan")
    chat.type("b shorter, please")
    chat.until("you >", name="plan-sent-back")
    chat.type("/help")
    chat.until("Everything else goes to the agent", name="help")
    chat.type("/quit")
    chat.until("exit status 0", name="quit")


def test_ctrl_c_stops_the_turn_and_asks_again(hitl: Open, width: int):
    chat = hitl(width, "chat", SLEEP)
    chat.until(ASKED)
    chat.type("a")
    chat.until("allowed by")
    chat.press("C-c")
    chat.until("stopping the turn")
    chat.until("you >", name="interrupted")
    chat.press("C-c")
    chat.until("exit status 0", name="left")


def test_lists_fit_and_a_call_is_decided_by_the_beginning_of_its_id(hot: Threaded, hitl: Open, width: int):
    asking = hitl(width, "chat", "Write hello.txt with a greeting")
    asking.until(ASKED)
    asking.press("C-c")
    asking.until("calls still wait for a decision", name="left-waiting")
    for arguments in (["approvals"], ["sessions"], ["status"], ["keys", "list"], ["--help"]):
        shown = hitl(width, *arguments)
        shown.until("exit status", name="-".join(arguments).strip("-"))
    listed = hitl(width, "approvals")
    newest = re.findall(r"appr_\w+", listed.until("exit status 0"))[-1]
    denying = hitl(width, "approvals", "deny", newest[:-2], "not now")
    denying.until("state    denied")
    denying.until(": not now", name="denied-by-prefix")
    logs = hitl(width, "logs", "nonsense")
    logs.until("exit status 1", name="unknown-log")
