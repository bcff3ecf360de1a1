"""Forks Ray's workers off a process that has imported what they need.

A worker that imports Ray and the service for itself takes a second of a CPU, and has 70 to 150 MiB of its own; a forked
one has the modules already, and shares their memory. Ray starts `worker.py` in a worker's place, which asks here. It
becomes the worker itself where nothing answers, in a runtime environment, and when the code on disk has changed.
"""

import ctypes
import gc
import marshal
import os
import select
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil
import ray.actor
from ray._raylet import ActorClassID, UniqueID, setproctitle  # pyright: ignore[reportAttributeAccessIssue]

from claude_hitl_template.cluster.worker import READY, TITLE, become

# With all that they import; and what libraries import only when they are first used.
MODULES = (
    "anyio._backends._asyncio",
    "httpcore",
    "ray.serve._private.controller",
    "ray.serve._private.proxy",
    "ray.serve._private.replica",
    "claude_hitl_template.cluster.actor",
    "claude_hitl_template.cluster.ingress",
    "claude_hitl_template.cluster.ledger",
    "claude_hitl_template.cluster.owner",
    "claude_hitl_template.cluster.ray_host",
    "claude_hitl_template.cluster.supervisor",
    "claude_hitl_template.notify.courier",
    "claude_hitl_template.store.core",
    "claude_hitl_template.store.sqlite",
)
OF_THE_PANEL = ("claude_hitl_template.panel.entries", "claude_hitl_template.panel.flow")
PACKAGE = Path(__file__).parent.parent
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
REQUEST_S = 5.0  # a request is complete within this
PIECE_BYTES = 64 * 1024
ENDED_FIRST = "1000"  # when memory is short, as Ray has it for its workers


@dataclass(frozen=True)
class Request:
    """What a worker starts with. `files`: standard input, output and error. `group`: of processes, its sender's."""

    files: list[int]
    arguments: list[str]
    environment: dict[str, str]
    folder: str
    group: int


def start(path: Path, modules: Sequence[str], program: str) -> None:
    """Forks the server off this process, which must have a single thread. It ends with this process.

    Args:
        path: Of the socket that is made.
        modules: What the server imports.
        program: What the workers run.
    """
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        path.chmod(0o600)
        listening.listen(128)
        gc.freeze()  # the collector writes to objects, which takes their memory out of what is shared
        parent = os.getpid()
        if os.fork() > 0:
            return
        _end_with(parent)
        setproctitle(TITLE)
        code = code_on_disk()
        preload(modules)
        request = serve(listening, code)
    _take_on(request)
    become(program, request.arguments)
    sys.exit()


def preload(modules: Sequence[str]) -> None:
    """Imports modules without using Ray's generator of random numbers: forked processes would all go on with its state."""
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # else NumPy starts a thread, which no forked process has
    gc.disable()  # imports leave no garbage
    ray.actor.ActorClassID = _ActorClassIds  # pyright: ignore[reportPrivateImportUsage]
    try:
        for name in modules:
            import_module(name)
    finally:
        ray.actor.ActorClassID = ActorClassID  # pyright: ignore[reportPrivateImportUsage]
    gc.freeze()
    if _forked_id() == _forked_id():
        sys.exit("no worker is forked: all would give the same ids")


class _ActorClassIds:
    """Gives the ids of classes that are decorated as they are imported."""

    @staticmethod
    def from_random() -> ActorClassID:
        return ActorClassID(os.urandom(ActorClassID.size()))


def _forked_id() -> bytes:
    """The first id that a process gives that is forked now."""
    reading, writing = os.pipe()
    if (pid := os.fork()) == 0:
        os.write(writing, UniqueID.from_random().binary())
        os._exit(0)
    os.close(writing)
    os.waitpid(pid, 0)
    with open(reading, "rb") as pipe:
        return pipe.read()


def code_on_disk() -> dict[Path, int]:
    """When each file of this package was changed, and when others were installed; nanoseconds.

    Each worker waits for it: `code_version`, which reads the files, takes nine times as long.
    """
    installed = Path(psutil.__file__).parent.parent
    return {path: path.stat().st_mtime_ns for path in (installed, *PACKAGE.rglob("*.py"))}


def serve(listening: socket.socket, code: dict[Path, int]) -> Request:
    """Forks a process for each request, as long as the code on disk is `code`. Returns in those processes alone.

    A connection that is closed at once means that its process becomes the worker.
    """
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    workers = set[int]()
    ended, wake = socket.socketpair()  # can be read when a child has ended
    for one in (ended, wake):
        one.setblocking(False)
    signal.set_wakeup_fd(wake.fileno())
    signal.signal(signal.SIGCHLD, _do_nothing)
    while True:
        ready, _, _ = select.select([listening, ended], [], [])
        if ended in ready:
            ended.recv(PIECE_BYTES)
            _reap(workers)
        if listening in ready:
            connection, _ = listening.accept()
            with connection:
                request = _read(connection) if _can_fork(code) else None
                if request is None:
                    continue
                pid = _fork(connection, request)
                if pid == 0:
                    signal.set_wakeup_fd(-1)
                    ended.close()
                    wake.close()
                    return request
                _close(request.files)
                if pid is not None:
                    workers.add(pid)


def _can_fork(code: dict[Path, int]) -> bool:
    with suppress(FileNotFoundError):  # a file that has just been removed
        return code_on_disk() == code and len(os.listdir("/proc/self/task")) == 1
    return False


def _read(connection: socket.socket) -> Request | None:
    """None if its sender has ended."""
    files: list[int] = []
    try:
        connection.settimeout(REQUEST_S)
        connection.sendall(READY)
        _, files, _, _ = socket.recv_fds(connection, 1, 3)
        message = b"".join(iter(lambda: connection.recv(PIECE_BYTES), b""))
        return Request(files, *marshal.loads(message))  # noqa: S302 - from worker.py, on a socket for this user
    except (OSError, EOFError, ValueError, TypeError) as error:
        print(f"no worker was forked: {error}", flush=True)
        _close(files)
        return None


def _fork(connection: socket.socket, request: Request) -> int | None:
    """As `os.fork`; None if there is no room for another process."""
    try:
        pid = os.fork()
    except OSError as error:
        print(f"no worker was forked: {error}", flush=True)
        return None
    if pid:
        with suppress(OSError):  # the sender has ended
            # Ray ends this group when the worker has ended: while that lives, no other group has its id.
            os.setpgid(pid, request.group)
        with suppress(OSError):
            connection.sendall(b".")
    return pid


def _take_on(request: Request) -> None:
    """Makes this process, a forked one, as if it had been started by the sender of the request."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number, file in enumerate(request.files):
        os.dup2(file, number)
    _close(request.files)
    os.environ.clear()
    os.environ.update(request.environment)
    os.chdir(request.folder)
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(ENDED_FIRST)
    gc.enable()


def _close(files: Sequence[int]) -> None:
    for file in files:
        os.close(file)


def _end_with(parent: int) -> None:
    """Has the kernel end this process when its parent ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _do_nothing(*_: Any) -> None:
    """A signal that is not handled wakes nothing."""


def _reap(workers: set[int]) -> None:
    """Forgets the workers that have ended, and ends what they left: their children are this process's now."""
    with suppress(ChildProcessError):
        while pid := os.waitpid(-1, os.WNOHANG)[0]:
            workers.discard(pid)
    for child in psutil.Process().children():
        if child.pid not in workers:
            with suppress(psutil.Error):
                child.kill()
