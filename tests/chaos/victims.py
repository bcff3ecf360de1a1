"""Finds the processes of a service by their role, and kills or stops them."""

import signal
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress

import psutil

from claude_hitl_template.cli.host.processes import family
from claude_hitl_template.cluster import setup_worker
from claude_hitl_template.domain.models import transcript_id
from tests.integration.harness import Service, command_line

PROCESSES = {
    "owner": "ray::ClaudeSessionActor",
    "ledger": "ServeReplica:claude-hitl:Ledger",
    "ingress": "ServeReplica:claude-hitl:Ingress",
    "supervisor": "ServeReplica:claude-hitl:Supervisor",
    "Serve controller": "ray::ServeController",
    "proxy": "ray::ProxyActor",
    "fork server": setup_worker.TITLE,
    "raylet": "raylet/raylet",
    "GCS": "gcs/gcs_server",
}
REST_S = 45.0  # between two strikes on a session, so that it makes progress on a busy machine, too


class Victims:
    """The processes of `service`. `sessions` returns the ids of the sessions in use."""

    def __init__(self, service: Service, sessions: Callable[[], Sequence[str]]) -> None:
        self._service, self._sessions = service, sessions
        self._struck_at: dict[str, float] = {}
        self._stopped: list[tuple[float, psutil.Process]] = []

    def find(self, what: str) -> list[tuple[psutil.Process, str | None]]:
        """Returns the processes with this role, each with the session that it works for."""
        if what not in ("CLI", "owner"):
            return [(process, None) for process in self._named(what)]
        fit = [(cli, session_id) for cli, session_id in self.clis() if self._may_be_struck(session_id)]
        if what == "CLI":
            above = {
                pid for cli, _ in fit for pid in _above(cli)
            }  # its sandbox, which runs on while the CLI is stopped
            return [(cli, session_id) for cli, session_id in fit if cli.pid not in above]
        whose = {above: session_id for cli, session_id in fit for above in _above(cli)}
        return [(p, whose[p.pid]) for p in self._named(what) if p.pid in whose]

    def _named(self, what: str) -> list[psutil.Process]:
        return [p for p in self._family() if PROCESSES[what] in command_line(p)]

    def _may_be_struck(self, session_id: str | None) -> bool:
        """Whether the last strike on this session is REST_S ago, so that it could make progress."""
        return time.monotonic() - self._struck_at.get(str(session_id), -REST_S) >= REST_S

    def clis(self) -> list[tuple[psutil.Process, str | None]]:
        names = {transcript_id(s): s for s in self._sessions()}
        found: list[tuple[psutil.Process, str | None]] = []
        for process in self._family():
            line = command_line(process)
            session_id = next((s for name, s in names.items() if name in line), None)
            if session_id is not None:
                found.append((process, session_id))
        return found

    def hit(self, process: psutil.Process, session_id: str | None, stop_s: float | None) -> bool:
        """Kills the process, or stops it for `stop_s`. Returns False if it had ended."""
        try:
            process.send_signal(signal.SIGKILL if stop_s is None else signal.SIGSTOP)
        except psutil.Error:
            return False
        if session_id is not None:
            self._struck_at[session_id] = time.monotonic()
        if stop_s is not None:
            self._stopped.append((time.monotonic() + stop_s, process))
        return True

    def go_on(self, *, all_of_them: bool = False) -> None:
        """Continues stopped processes whose time is over."""
        for due, process in list(self._stopped):
            if all_of_them or due <= time.monotonic():
                self._stopped.remove((due, process))
                with suppress(psutil.Error):
                    process.send_signal(signal.SIGCONT)

    @property
    def stopped(self) -> int:
        return len(self._stopped)

    def _family(self) -> Iterable[psutil.Process]:
        with suppress(psutil.Error, OSError):
            return family(self._service.head())
        return ()


def _above(process: psutil.Process) -> list[int]:
    with suppress(psutil.Error):
        return [parent.pid for parent in process.parents()]
    return []
