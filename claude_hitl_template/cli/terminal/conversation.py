"""Follows one session in a terminal until it is idle, and has its calls decided."""

import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from enum import IntEnum
from typing import Any

import click
from rich.console import Console, RenderableType
from rich.text import Text

from claude_hitl_template.cli.client import Client
from claude_hitl_template.cli.program import NAME
from claude_hitl_template.cli.terminal.dialogue import Body, Decider, ask_about
from claude_hitl_template.cli.terminal.follow import WireEvent, follow
from claude_hitl_template.cli.terminal.render import approval_view, event_lines
from claude_hitl_template.config.settings import Settings
from claude_hitl_template.errors import Conflict, Forbidden, InvalidInput
from claude_hitl_template.presentation.sessions import card_url
from claude_hitl_template.presentation.terminal import shown

OFFLINE_NOTE = (
    "offline model: a script answers, no AI; set ANTHROPIC_API_KEY (in the environment or in .env) and run "
    f"{NAME} up for a real one"
)
MAX_LISTED_FILES = 8  # of a workspace
_SHOWN_ONCE = frozenset({"agent.thinking"})  # of several in a row, only the first


class End(IntEnum):
    """How a turn ended; also the exit status of `demo` and `chat`."""

    DONE = 0
    FAILED = 3
    LEFT = 4


class UserLeft(Exception):
    """The user left, or cannot be asked, while calls wait for a decision."""


class Terminal:
    """A `Prompter` on a console."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def show(self, what: RenderableType) -> None:
        self.console.print(what, soft_wrap=False, markup=False, highlight=False)

    def ask(self, prompt: str) -> str:
        return self.console.input(Text(prompt, style="bold yellow"))

    def edit(self, text: str) -> str | None:
        return click.edit(text, extension=".json")

    def waiting(self) -> AbstractContextManager[Any]:
        """Shows that something is going on while no event arrives."""
        return self.console.status("[dim]working[/dim]") if self.console.is_terminal else nullcontext()


def ask_user(terminal: Terminal) -> Decider:
    """Decides by asking at the terminal. The decider raises UserLeft if input is not a terminal, or the user leaves."""

    def decide(approval: Mapping[str, Any]) -> Body:
        if not sys.stdin.isatty():
            terminal.show(approval_view(approval))
            raise UserLeft
        try:
            return ask_about(terminal, approval)
        except (EOFError, KeyboardInterrupt):
            terminal.show("")  # ends the line of the prompt
            raise UserLeft from None

    return decide


class Conversation:
    """One session at one terminal.

    Args:
        client: For the service that has the session.
        session_id: The session.
        terminal: Where events are shown.
        decide: Decides the calls that wait.
        seen: The number of the last event that was shown already.
    """

    def __init__(
        self, client: Client, session_id: str, terminal: Terminal, decide: Decider, *, seen: int
    ) -> None:
        self._client, self.id, self._terminal, self._decide = client, session_id, terminal, decide
        self._seen = seen
        self._own: set[str] = set()
        self._said_type = ""

    def send(self, text: str) -> None:
        """Sends a message of the user, which is on the screen already."""
        message = {"type": "user.message", "content": [{"type": "text", "text": text}]}
        answer = self._client.post(f"/v1/sessions/{self.id}/events", {"events": [message]})
        self._own |= {event["id"] for event in answer["data"]}

    def interrupt(self) -> None:
        self._client.post(f"/v1/sessions/{self.id}/events", {"events": [{"type": "user.interrupt"}]})

    def until_idle(self) -> End:
        """Shows events and has waiting calls decided until the session is idle. Raises UserLeft."""
        while True:
            stop = self._until_stop()
            if stop == "requires_action":
                self._decide_waiting()
            elif stop == "ended":
                return End.DONE
            elif not self._is_busy():
                return End.FAILED if stop == "retries_exhausted" else End.DONE

    def decide_and_follow(self) -> End:
        """`until_idle` for a session whose calls wait already. Raises UserLeft."""
        self._decide_waiting()
        return self.until_idle()

    def _until_stop(self) -> str:
        """Shows events up to the next stop. Returns the type of its reason; "ended" for a session that has ended."""
        with (
            self._terminal.waiting(),
            closing(follow(self._client, self.id, self._seen, self._warn)) as frames,
        ):
            for frame in frames:
                self._seen = frame.seq or self._seen
                self._show(frame.event)
                if frame.event["type"] == "session.status_idle":
                    return str(frame.event["stop_reason"]["type"])
        return "ended"

    def _is_busy(self) -> bool:
        """Whether the session went on after the stop that was shown, because of a queued message for instance."""
        session = self._client.get(f"/v1/sessions/{self.id}")
        waits = (session.get("stop_reason") or {}).get("type") == "requires_action"
        return session["status"] in ("running", "rescheduling") or (session["status"] == "idle" and waits)

    def _decide_waiting(self) -> None:
        found = self._client.pages("/v1/approvals", **{"session_id": self.id, "states[]": "pending"})
        waiting = sorted(found, key=lambda approval: approval["id"])
        for number, approval in enumerate(waiting, start=1):
            count = f" {number} of {len(waiting)}" if len(waiting) > 1 else ""
            self._terminal.show(Text(f"── call{count} waits for a decision ──", style="bold yellow"))
            self._terminal.show(
                Text(f"also at {card_url(self._client.base_url, approval['id'])}", style="dim")
            )
            self._decide_one(approval)

    def _decide_one(self, approval: dict[str, Any]) -> None:
        while True:
            body = self._decide(approval)
            try:
                self._client.post(f"/v1/approvals/{approval['id']}/decide", body)
            except (Conflict, Forbidden) as error:  # others decide, or have decided
                self._warn(str(error))
            except InvalidInput as error:
                if not sys.stdin.isatty() or not body.keys() - {"result", "deny_message"}:
                    raise
                self._warn(f"the service refused this decision: {error}")
                continue
            return

    def _show(self, event: WireEvent) -> None:
        view = None if event["id"] in self._own else event_lines(event)
        again = event["type"] == self._said_type and event["type"] in _SHOWN_ONCE
        if view is not None and not again:
            self._said_type = event["type"]
            self._terminal.show(view)

    def _warn(self, message: str) -> None:
        self._terminal.show(shown(message, "yellow"))


def session_summary(
    settings: Settings, session: Mapping[str, Any], saved: Sequence[str], *, offline: bool
) -> list[Text]:
    """What a session has used so far, and where its files are.

    Args:
        settings: Of this machine.
        session: In wire format.
        saved: The names of the files that the service has saved.
        offline: Whether the offline model answers.
    """
    used = session["usage"]
    cached = used["cache_read_input_tokens"] + used["cache_creation"]["ephemeral_5m_input_tokens"]
    price = (
        "estimated by the offline model, free of charge" if offline else f"list price ${used['cost_usd']:.4f}"
    )
    tokens = f"{used['input_tokens']} in ({cached} more cached), {used['output_tokens']} out; {price}"
    return [
        Text(f"tokens     {tokens}"),
        Text.assemble("workspace  ", shown(_files_location(settings, session, saved))),
    ]


def _files_location(settings: Settings, session: Mapping[str, Any], saved: Sequence[str]) -> str:
    """Where a session's files are. A session in a container, or on another machine, has no folder here."""
    folder = settings.workspaces / session["id"]
    names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else list(saved)
    files = (
        f"  ({', '.join(names[:MAX_LISTED_FILES])}{', ...' if len(names) > MAX_LISTED_FILES else ''})"
        if names
        else ""
    )
    if folder.is_dir():
        return f"{folder}{files}"
    return f"saved by the service, GET /v1/sessions/{session['id']}/workspace{files}" if names else "empty"
