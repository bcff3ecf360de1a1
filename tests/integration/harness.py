"""Starts a service for tests, with real Ray, the real CLI and SQLite, on its own ports and in its own data folder."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from claude_hitl_template.cli.host.ports import free_ports
from claude_hitl_template.cli.host.processes import family
from claude_hitl_template.config.secret_files import operator_key
from claude_hitl_template.config.settings import Settings
from claude_hitl_template.domain.models import ApprovalState, transcript_id

PATIENCE_S = (
    120  # how long anything may take before a test calls it lost; nothing is decided by it but failure
)
COMMAND_S = 900  # more than any command waits itself before it says what is wrong
KEY = "key-of-the-integration-tests"


def wait_for[T](what: str, look: Callable[[], T | None]) -> T:
    """Waits until `look` finds something, and returns it."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        found = look()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError(f"{what} did not happen within {PATIENCE_S} s")


@dataclass
class Service:
    """Runs `hitl` with its own environment."""

    root: Path
    environment: dict[str, str] = field(default_factory=dict[str, str])
    command: tuple[str, ...] = (sys.executable, "-m", "claude_hitl_template.cli")

    def __post_init__(self) -> None:
        names = ("RAY_PORT", "RAY_CLIENT_PORT", "DASHBOARD_PORT", "SERVE_PORT", "PANEL_PORT")
        ports = zip(names, free_ports(len(names)), strict=True)
        self.environment |= {f"HITL_{name}": str(port) for name, port in ports}
        # The panel costs two processes; the tests that are about it switch it on.
        own = {"HITL_DATA_DIR": str(self.root / "data"), "HITL_API_KEY": KEY, "HITL_PANEL": "false"}
        self.environment = {**own, **self.environment}

    def hitl(self, *args: str) -> subprocess.CompletedProcess[str]:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("HITL_", "ANTHROPIC_"))}
        return subprocess.run(
            [*self.command, *args],
            env={**inherited, **self.environment},
            cwd=self.root,
            capture_output=True,
            text=True,
            timeout=COMMAND_S,
            check=False,
        )

    def python(self, code: str) -> Any:
        """Returns what `code` prints as JSON; its argument is the address of this service's Ray."""
        address = f"127.0.0.2:{self.environment['HITL_RAY_PORT']}"
        command = [sys.executable, "-c", code, address]
        env = {**os.environ, **self.ray_login}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    # -- Ray, which asks for a token

    @property
    def ray_token(self) -> str:
        return (self.root / "data" / "secrets" / "ray-token").read_text().strip()

    @property
    def ray_login(self) -> dict[str, str]:
        """The environment variables with which a process can connect to Ray."""
        path = self.root / "data" / "secrets" / "ray-token"
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)}

    def dashboard(self, path: str, method: str = "GET") -> httpx.Response:
        url = f"http://127.0.0.1:{self.environment['HITL_DASHBOARD_PORT']}"
        headers = {"authorization": f"Bearer {self.ray_token}"}
        answer = httpx.request(method, url + path, headers=headers, timeout=60)
        assert answer.status_code not in (401, 403), answer.text
        return answer

    def newest_workspace(self) -> Path:
        """The folder of its newest session. Another one may be there for a session to come, whose CLI is ready."""
        newest = self.call("GET", "/v1/sessions")["data"][0]["id"]
        return self.root / "data" / "workspaces" / newest

    def up(self, **environment: str) -> None:
        self.environment |= environment
        done = self.hitl("up")
        assert done.returncode == 0, done.stdout + done.stderr

    def down(self) -> None:
        done = self.hitl("down")
        assert done.returncode == 0, done.stdout + done.stderr

    # -- processes

    def head(self) -> psutil.Process:
        known = json.loads((self.root / "data" / "run.json").read_text())
        return psutil.Process(known["pid"])

    def processes(self, name: str) -> list[psutil.Process]:
        """Returns the processes of this service's cluster whose command line contains `name`."""
        return [p for p in family(self.head()) if name in command_line(p)]

    def cli_of(self, session: "Conversation") -> psutil.Process:
        found = wait_for("the session's CLI", lambda: self.processes(session.transcript_id))
        return found[0]

    def owner_of(self, session: "Conversation") -> psutil.Process:
        owner = self.cli_of(session).parent()
        assert owner is not None
        return owner

    def replica(self, deployment: str) -> psutil.Process:
        return wait_for(deployment, lambda: self.processes(f"ServeReplica:claude-hitl:{deployment}"))[0]

    def kill_everything(self) -> None:
        running = family(self.head())
        for process in running:
            kill(process)
        psutil.wait_procs(running, timeout=30)

    # -- REST

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.environment['HITL_SERVE_PORT']}/claude-hitl"

    def call(self, method: str, path: str, body: Any = None, key: str = "") -> Any:
        """Sends a request and returns the answer's JSON. Repeats it while the service is unreachable, as its clients do."""

        def once() -> httpx.Response | None:
            try:
                headers = {"x-api-key": KEY, **({"idempotency-key": key} if key else {})}
                answer = httpx.request(method, self.base + path, json=body, headers=headers, timeout=30)
            except httpx.TransportError:
                return None
            return answer if answer.status_code < 500 else None

        answer = wait_for(f"an answer to {method} {path}", once)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def drain(self) -> None:
        """Does the first half of `down`: no session is started any more."""
        settings = Settings.model_construct(data_dir=self.root / "data")
        headers = {"x-api-key": operator_key(settings)}
        answer = httpx.post(
            f"{self.base}/v1/internal/drain", json={"grace_s": 5}, headers=headers, timeout=30
        )
        assert answer.status_code == 200, answer.text

    def start_session(self, prompt: str, environment: str = "default") -> "Conversation":
        content = [{"type": "text", "text": prompt}]
        body = {
            "agent": "default",
            "environment_id": environment,
            "initial_events": [{"type": "user.message", "content": content}],
        }
        return Conversation(self, self.call("POST", "/v1/sessions", body)["id"])


@dataclass
class Conversation:
    service: Service
    id: str

    @property
    def workspace(self) -> Path:
        return self.service.root / "data" / "workspaces" / self.id

    @property
    def transcript_id(self) -> str:
        return transcript_id(self.id)

    def get(self) -> Any:
        return self.service.call("GET", f"/v1/sessions/{self.id}")

    def events(self, *types: str) -> list[Any]:
        """Returns the whole log, oldest first; asserts that it has no gap."""
        wanted = "".join(f"&types[]={t}" for t in types)
        return self.service.call("GET", f"/v1/sessions/{self.id}/events?limit=1000{wanted}")["data"]

    def approvals(self) -> list[Any]:
        """Returns the session's approvals in all states."""
        states = "".join(f"&states[]={state.value}" for state in ApprovalState)
        return self.service.call("GET", f"/v1/approvals?session_id={self.id}&limit=100{states}")["data"]

    def until_idle(self) -> Any:
        """Waits until the session is idle, and returns its stop reason."""

        def look() -> Any:
            found = self.get()
            return found["stop_reason"] if found["status"] == "idle" else None

        return wait_for(f"session {self.id} to come to rest", look)

    def until_asked(self) -> str:
        """Waits for a call that waits, and returns its event id."""
        stop = self.until_idle()
        assert stop["type"] == "requires_action", stop
        (event_id,) = stop["event_ids"]
        return event_id

    def until_parked(self) -> None:
        wait_for(f"session {self.id} to be parked", lambda: self.get()["parked"] or None)

    def decide(self, event_id: str, result: str = "allow", **more: Any) -> None:
        said = {"type": "user.tool_confirmation", "tool_use_id": event_id, "result": result, **more}
        self.service.call(
            "POST", f"/v1/sessions/{self.id}/events", {"events": [said]}, key=f"decide {event_id}"
        )

    def say(self, text: str) -> None:
        message = {"type": "user.message", "content": [{"type": "text", "text": text}]}
        self.service.call("POST", f"/v1/sessions/{self.id}/events", {"events": [message]})

    def interrupt(self) -> None:
        self.service.call("POST", f"/v1/sessions/{self.id}/events", {"events": [{"type": "user.interrupt"}]})

    def stream(self, after: int = 0) -> list[tuple[int, Any]]:
        """Returns (cursor, event) of the log after `after`, read from the event stream."""
        newest = self.events()[-1]["id"]
        headers = {"x-api-key": KEY, "last-event-id": str(after)}
        url = f"{self.service.base}/v1/sessions/{self.id}/events/stream"
        found: list[tuple[int, Any]] = []
        with httpx.stream("GET", url, headers=headers, timeout=30) as answer:
            cursor = 0
            for line in answer.iter_lines():
                if line.startswith("id: "):
                    cursor = int(line[4:])
                elif line.startswith("data: ") and cursor:
                    found.append((cursor, json.loads(line[6:])))
                    cursor = 0
                if found and found[-1][1]["id"] == newest:
                    return found
        raise AssertionError("the stream ended before the log's end")


def script(*commands: str, last: str = "Done: {tool_result}") -> str:
    """Returns a prompt with which the offline model issues these commands, one by one."""
    steps = [
        {"text": f"Step {number}.", "tools": [{"name": "Bash", "input": {"command": command}}]}
        for number, command in enumerate(commands)
    ]
    return f"```scenario\n{json.dumps([*steps, {'text': last}])}\n```"


def kill(process: psutil.Process) -> None:
    try:
        process.send_signal(signal.SIGKILL)
    except psutil.NoSuchProcess:
        return


def command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
