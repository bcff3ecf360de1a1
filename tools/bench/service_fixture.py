"""The measured service, with its own data folder, ports and key, which are deleted at the end."""

import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from pydantic import SecretStr

from claude_hitl_template.cli.client import Client
from claude_hitl_template.cli.common import step
from claude_hitl_template.cli.host import postgres, service
from claude_hitl_template.cli.host.ports import free_ports
from claude_hitl_template.cli.host.processes import family, private_dir
from claude_hitl_template.config import network
from claude_hitl_template.config.secret_files import prepare, read_ray_token
from claude_hitl_template.config.settings import Settings
from claude_hitl_template.errors import Unavailable

PATIENCE_S = 120.0  # how long anything may take before the benchmark gives up
LONG_S = 3600.0
POLL_S = 0.05
CALM_S = (
    1.5  # a spare owner that is alive still says so to the supervisor, and its start's work still fades away
)
UNLIMITED = 10_000_000
IDLE_OWNER = "ray::ClaudeSessionActor"  # as Ray titles an actor's process between two calls


def bench_settings(folder: Path) -> Settings:
    """The user's settings, with everything replaced that must be the benchmark's own. Raises ConfigError."""
    ports = dict(zip(service.PORTS, free_ports(len(service.PORTS)), strict=True))
    return Settings.load().model_copy(
        update={
            "data_dir": folder,
            "ray_temp_dir": None,
            "host": "127.0.0.1",
            "api_key": SecretStr(f"hitl_bench_{secrets.token_urlsafe(24)}"),
            "database_url": None,
            "files_url": None,
            "anthropic_api_key": None,
            "requests_per_minute": UNLIMITED,
            "asks_per_minute": UNLIMITED,
            "asks_per_session": UNLIMITED,
            "idle_timeout_s": LONG_S,
            "approval_ttl_s": None,
            "panel": False,
            "ledger_replicas": 1,
            **ports,
        }
    )


@contextmanager
def temporary_settings() -> Generator[Settings]:
    """Settings of a data folder that is deleted at the end, together with Ray's."""
    folder = Path(tempfile.mkdtemp(prefix="hitl-bench-"))
    settings = bench_settings(folder)
    try:
        yield settings
    finally:
        postgres.local(settings).stop("immediate")
        for left in (folder, private_dir(settings)):
            shutil.rmtree(left, ignore_errors=True)


class BenchService:
    """The running service, and how to reach it."""

    def __init__(self, settings: Settings, client: Client) -> None:
        self.settings, self.client = settings, client

    def until_parked(self, session_id: str) -> None:
        wait_for(
            "a session to be parked", lambda: self.client.get(f"/v1/sessions/{session_id}")["parked"] or None
        )

    def until_spare(self) -> None:
        """Returns when the machine had time to calm down and, if the settings want one, a spare owner is ready."""
        if self.settings.spare_owners:
            wait_for("a spare owner", lambda: self._idle_for(CALM_S) or None)
        else:
            time.sleep(CALM_S)

    def _idle_for(self, seconds: float) -> set[str]:
        """The owners that drove nothing at both ends of that time: an owner that just parked is gone at the second."""
        before = self._idle()
        if before:
            time.sleep(seconds)
        return before & self._idle()

    def processes_of(self, transcript_id: str) -> list[psutil.Process]:
        """A session's processes: its CLI, those of its sandbox, and the owner that holds it. [] for a parked one."""
        clis = [p for p in self.processes() if transcript_id in command(p)]
        parents = [parent for p in clis if (parent := p.parent()) is not None]
        return list(
            dict.fromkeys([*clis, *parents])
        )  # bubblewrap's processes name the session, and are parents

    def replica(self, deployment: str) -> psutil.Process:
        """Raises Unavailable."""

        def find() -> psutil.Process | None:
            return next((p for p in self.processes() if fits(command(p).split(":"))), None)

        def fits(title: list[str]) -> bool:  # ray::ServeReplica:<application>:<deployment>...
            return "ServeReplica" in title and any(part.startswith(deployment) for part in title)

        return wait_for(f"the {deployment}", find)

    def processes(self) -> list[psutil.Process]:
        """Ray's head and all processes below it: the service, its owners and their CLIs."""
        head = service.ray_process(self.settings)
        return family(head) if head else []

    def _idle(self) -> set[str]:
        """Owners without a session. Their names do not tell, for an owner keeps the name it had as a spare."""
        url = f"{self.settings.own_dashboard}/api/v0/actors?limit=10000"
        headers = {"authorization": f"Bearer {read_ray_token(self.settings)}"}
        answer = network.request("GET", url, headers=headers, timeout=30).raise_for_status().json()
        alive = [a for a in answer["data"]["result"]["result"] if a["state"] == "ALIVE"]
        titles = {p.pid: command(p).strip() for p in self.processes()}
        return {a["actor_id"] for a in alive if titles.get(a["pid"]) == IDLE_OWNER}


@contextmanager
def running_service(
    settings: Settings, *, on_postgres: bool = False, **changes: Any
) -> Generator[BenchService]:
    """The service with these settings, for as long as the context lasts. Raises ConfigError."""
    changed = settings.model_copy(update=changes)
    prepare(changed)
    try:
        service.start(changed, step, make_postgres=on_postgres)
        client = Client.open(changed)
        try:
            yield BenchService(changed, client)
        finally:
            client.close()
    finally:
        service.stop(changed)


def private_bytes(process: psutil.Process) -> int:
    """Memory that is not shared: ending the process would free it."""
    return int(process.memory_full_info().uss)


def command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def wait_for[T](what: str, poll: Callable[[], T | None], *, patience_s: float = PATIENCE_S) -> T:
    """The first thing `poll` finds. Raises Unavailable after `patience_s`."""
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        found = poll()
        if found is not None:
            return found
        time.sleep(POLL_S)
    raise Unavailable(f"waited {patience_s:.0f} s for {what}")
