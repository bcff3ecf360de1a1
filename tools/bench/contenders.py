"""The two sides of the comparison, each with one session that is awake: ours over REST, and the SDK alone."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from claude_hitl_template.cli.client import Client
from claude_hitl_template.cli.terminal.follow import Frame, WireEvent, frames
from claude_hitl_template.config.secret_files import read_signing_key
from claude_hitl_template.domain.models import transcript_id
from claude_hitl_template.errors import EngineError, Unavailable
from claude_hitl_template.model.tokens import mint
from tools.bench.service_fixture import PATIENCE_S, BenchService, wait_for

SETTLE_S = 0.3  # between a question and its answer, so that what the question caused is over
BEGAN = "began"
FIRST_EPOCH = 1  # of a session that never lost its owner
TEXT = """```scenario
- text: "[offline model] A short answer, as a script has it."
```"""


def _paced(delay_s: float) -> str:
    """An answer in some sixty pieces."""
    words = "A sentence that comes word by word. " * 20
    return f"""```scenario
- text: "[offline model] {words}"
  delay_s: {delay_s}
```"""


PACED = _paced(0.02)  # about a second: what a quick answer of a real model takes
SLOW = _paced(0.15)  # long enough to be killed in the middle of it


def _command(command: str) -> str:
    return f"""```scenario
- text: "[offline model] A command."
  tools:
    - name: Bash
      input:
        command: "{command}"
        description: Say when
- text: "Done."
```"""


CALL = _command(f"date +%s%N > {BEGAN}")  # it says when it began
READ = _command("date +%s%N")  # the CLI takes longer to look at a command that writes a file


class Conversation:
    """A session of the service and its open event stream."""

    def __init__(self, client: Client, session_id: str, stream: Iterator[Frame]) -> None:
        self._client, self.id, self._stream = client, session_id, stream

    @property
    def transcript_id(self) -> str:
        return transcript_id(self.id)

    def until(self, fits: Callable[[WireEvent], bool]) -> WireEvent:
        """The next event that fits. Raises Unavailable when none comes."""
        deadline = time.monotonic() + PATIENCE_S
        for frame in self._stream:
            if frame.seq is not None and fits(frame.event):
                return frame.event
            if time.monotonic() > deadline:
                raise Unavailable(f"session {self.id} did not get on within {PATIENCE_S:.0f} s")
        raise Unavailable(f"the event stream of session {self.id} ended")

    def until_rest(self) -> dict[str, Any]:
        """The stop reason."""
        return self.until(lambda event: event["type"] == "session.status_idle")["stop_reason"]

    def until_asked(self) -> str:
        """The event id of the one call that waits."""
        stop = self.until_rest()
        if stop["type"] != "requires_action":
            raise EngineError(f"the scenario's call was not asked about: {stop}")
        return stop["event_ids"][0]

    def say(self, prompt: str) -> None:
        self._send(message(prompt))

    def decide(self, event_id: str) -> None:
        self._send(confirmation(event_id, "allow"))

    def _send(self, event: dict[str, Any]) -> None:
        self._client.post(f"/v1/sessions/{self.id}/events", {"events": [event]})

    def turn(self, prompt: str) -> float:
        """Seconds from a message to the turn's end."""
        began = time.perf_counter()
        self.say(prompt)
        self.until_rest()
        return time.perf_counter() - began

    def result(self, event_id: str) -> float:
        """Seconds from a decision to the result of its call."""
        began = time.perf_counter()
        self.decide(event_id)
        self.until(lambda event: event["type"] == "agent.tool_result")
        return time.perf_counter() - began

    def call(self, workspace: Path, event_id: str) -> tuple[float, float]:
        """Seconds from a decision to its acknowledgement, and to the start of its tool."""
        began_ns, began = time.time_ns(), time.perf_counter()
        self.decide(event_id)
        acknowledged = time.perf_counter() - began
        self.until_rest()
        return acknowledged, started_after(workspace, began_ns)


@contextmanager
def conversation(client: Client, prompt: str, *, keep: bool = False) -> Generator[Conversation]:
    """A new session with its event stream from the beginning. Unless it is kept, it is deleted when all went well,
    and its processes end."""
    body = {"agent": "default", "environment_id": "default", "initial_events": [message(prompt)]}
    session_id = str(client.post("/v1/sessions", body)["id"])
    with client.stream(f"/v1/sessions/{session_id}/events/stream", 0) as lines:
        yield Conversation(client, session_id, frames(lines))
    if not keep:
        client.delete(f"/v1/sessions/{session_id}")


def message(prompt: str) -> dict[str, Any]:
    return {"type": "user.message", "content": [{"type": "text", "text": prompt}]}


def confirmation(event_id: str, result: str) -> dict[str, Any]:
    return {"type": "user.tool_confirmation", "tool_use_id": event_id, "result": result}


def started_after(workspace: Path, since_ns: int, *, patience_s: float = PATIENCE_S) -> float:
    """Seconds from `since_ns` until the scenario's tool started, as the tool itself wrote down. Takes its note away."""
    note = workspace / BEGAN

    def look() -> int | None:
        text = note.read_text() if note.exists() else ""
        return int(text) if text.endswith("\n") else None

    began_ns = wait_for("the scenario's command", look, patience_s=patience_s)
    note.unlink()
    return (began_ns - since_ns) / 1e9


class SdkConversation:
    """The SDK alone, in a process of its own."""

    def __init__(self, process: "subprocess.Popen[str]", workspace: Path) -> None:
        self._process, self._workspace, self.cli_version = process, workspace, ""

    def connect(self, place: dict[str, str]) -> None:
        self.cli_version = self.ask(place)["cli"]

    def turn(self, prompt: str) -> float:
        return self.ask({"do": "turn", "prompt": prompt})["seconds"]

    def fresh(self) -> float:
        return self.ask({"do": "fresh", "prompt": TEXT})["seconds"]

    def asks(self, prompts: Sequence[str]) -> tuple[float, list[float]]:
        """In another CLI: seconds from before its start until the first call waits, and from each permission to the
        call's result."""
        found = self.ask({"do": "asks", "prompts": prompts, "settle_s": SETTLE_S})
        return found["waiting_s"], found["results_s"]

    def storm(self, count: int) -> float:
        """With as many other CLIs, a CPU each at once: seconds until the last one's call is allowed."""
        asked = {"do": "storm", "prompt": CALL, "count": count, "at_once": os.cpu_count() or 1}
        return self.ask(asked)["seconds"]

    def call(self) -> float:
        """Seconds from the callback's answer to the start of the tool."""
        answered_ns = self.ask({"do": "call", "prompt": CALL, "settle_s": SETTLE_S})["answered_ns"]
        return started_after(self._workspace, answered_ns)

    def processes(self) -> list[psutil.Process]:
        """Its CLI, and itself."""
        itself = psutil.Process(self._process.pid)
        return [*itself.children(recursive=True), itself]

    def ask(self, what: dict[str, Any]) -> dict[str, Any]:
        """Raises EngineError when it is gone; it says why on standard error."""
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise AssertionError("bare() opens both")
        try:
            stdin.write(json.dumps(what) + "\n")
            stdin.flush()
        except BrokenPipeError as error:
            raise EngineError("the bare SDK's process is gone") from error
        line = stdout.readline()
        if not line:
            raise EngineError("the bare SDK's process ended; what it said is above")
        return json.loads(line)


@contextmanager
def bare(one: BenchService, session_id: str, folder: Path) -> Generator[SdkConversation]:
    """The SDK alone, connected. The token of the session, which must be awake, opens the model endpoint."""
    place = {
        "workspace": str(folder / "workspace"),
        "config_dir": str(folder / "config"),
        "model_url": f"{one.settings.base_url}/model",
        "token": mint(read_signing_key(one.settings).secret, session_id, FIRST_EPOCH),
    }
    command = [sys.executable, "-m", "claude_hitl_template.claude.sdk_baseline"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:  # noqa: S603
        try:
            made = SdkConversation(process, folder / "workspace" / "session")
            made.connect(place)
            yield made
        finally:
            if process.stdin is not None:
                process.stdin.close()  # it ends its CLI, then itself
