"""Follows one session in a terminal, from wherever it stands until it comes to rest, and gets its calls decided."""

import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from enum import IntEnum
from typing import Any

import click
from rich.console import Console, RenderableType
from rich.text import Text

from claude_hitl_template.cli.client import Client
from claude_hitl_template.cli.terminal.dialogue import Body, Decider, ask_about
from claude_hitl_template.cli.terminal.follow import WireEvent, follow
from claude_hitl_template.cli.terminal.render import approval_view, event_lines
from claude_hitl_template.config.settings import Settings
from claude_hitl_template.errors import Conflict, InvalidInput
from claude_hitl_template.presentation.terminal import shown

OFFLINE_NOTE = (
    "offline model: a script answers, no AI; set ANTHROPIC_API_KEY (in the environment or in .env) and run "
    "./hitl up for a real one"
)
NAMED = 8  # files of a workspace that are named
_NOTHING_SAID = frozenset({"agent.thinking"})


class End(IntEnum):
    """How a turn ended; also the exit status of `demo` and `chat`."""

    DONE = 0
    FAILED = 3
    LEFT = 4


class Left(Exception):
    """The human left, or cannot be asked, while calls wait for a decision."""


class Terminal:
    """The desk of someone at a terminal."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def show(self, what: RenderableType) -> None:
        self.console.print(what, soft_wrap=False, markup=False, highlight=False)

    def ask(self, prompt: str) -> str:
        return self.console.input(Text(prompt, style="bold yellow"))

    def edit(self, text: str) -> str | None:
        return click.edit(text, extension=".json")

    def waiting(self) -> AbstractContextManager[Any]:
        """A sign of life while nothing comes."""
        return self.console.status("[dim]working[/dim]") if self.console.is_terminal else nullcontext()


def ask_human(terminal: Terminal) -> Decider:
    """Decides by asking. Raises Left when there is nobody to ask, or the human leaves."""

    def decide(approval: Mapping[str, Any]) -> Body:
        if not sys.stdin.isatty():
            terminal.show(approval_view(approval))
            raise Left
        try:
            return ask_about(terminal, approval)
        except (EOFError, KeyboardInterrupt):
            terminal.show("")  # the cursor stands behind the prompt
            raise Left from None

    return decide


class Conversation:
    """One session at one terminal. `seen` is the number of the last event that was shown."""

    def __init__(
        self, client: Client, session_id: str, terminal: Terminal, decide: Decider, *, seen: int
    ) -> None:
        self._client, self.id, self._terminal, self._decide = client, session_id, terminal, decide
        self._seen = seen
        self._own: set[str] = set()
        self._said_type = ""

    def send(self, text: str) -> None:
        """A message of the human, who has it on the screen already."""
        message = {"type": "user.message", "content": [{"type": "text", "text": text}]}
        answer = self._client.post(f"/v1/sessions/{self.id}/events", {"events": [message]})
        self._own |= {event["id"] for event in answer["data"]}

    def interrupt(self) -> None:
        self._client.post(f"/v1/sessions/{self.id}/events", {"events": [{"type": "user.interrupt"}]})

    def until_rest(self) -> End:
        """Shows what happens and has waiting calls decided until the session rests. Raises Left."""
        while True:
            stop = self._until_stop()
            if stop == "requires_action":
                self._decide_all()
            elif stop == "ended":
                return End.DONE
            elif not self._is_busy():
                return End.FAILED if stop == "retries_exhausted" else End.DONE

    def decide_and_follow(self) -> End:
        """`until_rest` of a session whose calls wait already. Raises Left."""
        self._decide_all()
        return self.until_rest()

    def _until_stop(self) -> str:
        """Shows events up to the next stop. Returns the type of its reason, "ended" for a session that is over."""
        with (
            self._terminal.waiting(),
            closing(follow(self._client, self.id, self._seen, self._tell)) as frames,
        ):
            for frame in frames:
                self._seen = frame.seq or self._seen
                self._show(frame.event)
                if frame.event["type"] == "session.status_idle":
                    return str(frame.event["stop_reason"]["type"])
        return "ended"

    def _is_busy(self) -> bool:
        """Whether more happened since the stop that was shown: a message was queued, someone else went on."""
        session = self._client.get(f"/v1/sessions/{self.id}")
        waits = (session.get("stop_reason") or {}).get("type") == "requires_action"
        return session["status"] in ("running", "rescheduling") or (session["status"] == "idle" and waits)

    def _decide_all(self) -> None:
        found = self._client.pages("/v1/approvals", **{"session_id": self.id, "states[]": "pending"})
        waiting = sorted(found, key=lambda approval: approval["id"])
        for number, approval in enumerate(waiting, start=1):
            count = f" {number} of {len(waiting)}" if len(waiting) > 1 else ""
            self._terminal.show(Text(f"── call{count} waits for a decision ──", style="bold yellow"))
            self._decide_one(approval)

    def _decide_one(self, approval: dict[str, Any]) -> None:
        while True:
            body = self._decide(approval)
            try:
                self._client.post(f"/v1/approvals/{approval['id']}/decide", body)
            except Conflict as error:
                self._tell(str(error))
            except InvalidInput as error:
                if not sys.stdin.isatty() or not body.keys() - {"result", "deny_message"}:
                    raise
                self._tell(f"the service did not take this decision: {error}")
                continue
            return

    def _show(self, event: WireEvent) -> None:
        view = None if event["id"] in self._own else event_lines(event)
        again = event["type"] == self._said_type and event["type"] in _NOTHING_SAID
        if view is not None and not again:
            self._said_type = event["type"]
            self._terminal.show(view)

    def _tell(self, message: str) -> None:
        self._terminal.show(shown(message, "yellow"))


def account(
    settings: Settings, session: Mapping[str, Any], saved: Sequence[str], *, offline: bool
) -> list[Text]:
    """What a session has used so far, and where its files are. `saved` names those that the service has."""
    used = session["usage"]
    cached = used["cache_read_input_tokens"] + used["cache_creation"]["ephemeral_5m_input_tokens"]
    price = (
        "estimated by the offline model, free of charge" if offline else f"list price ${used['cost_usd']:.4f}"
    )
    tokens = f"{used['input_tokens']} in ({cached} more cached), {used['output_tokens']} out; {price}"
    return [
        Text(f"tokens     {tokens}"),
        Text.assemble("workspace  ", shown(_place(settings, session, saved))),
    ]


def _place(settings: Settings, session: Mapping[str, Any], saved: Sequence[str]) -> str:
    """A session in a container, or on another machine, has no folder here."""
    folder = settings.workspaces / session["id"]
    names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else list(saved)
    files = f"  ({', '.join(names[:NAMED])}{', ...' if len(names) > NAMED else ''})" if names else ""
    if folder.is_dir():
        return f"{folder}{files}"
    return f"saved by the service, GET /v1/sessions/{session['id']}/workspace{files}" if names else "empty"
