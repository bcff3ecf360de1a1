"""Forks Ray's workers off this process, which has imported their code."""

import ctypes
import gc
import marshal
import os
import select
import signal
import socket
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil
import ray.actor
from ray._raylet import ActorClassID, UniqueID  # pyright: ignore[reportAttributeAccessIssue]

from claude_hitl_template.cluster.setup_worker import PIECE_BYTES, READY, read_to_end

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
REQUEST_S = 5.0  # a request is complete within this
IDLE_S = 60.0  # after which a process without workers ends; another one is made when it is needed
ENDED_FIRST = "1000"  # when memory is short, as Ray has it for its workers


@dataclass(frozen=True)
class Request:
    """What a worker starts with. `files`: standard input, output and error. `group`: of processes, its sender's."""

    files: list[int]
    arguments: list[str]
    environment: dict[str, str]
    folder: str
    group: int


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


def has_one_thread() -> bool:
    """Whether this process can be forked: other threads would be missing, and the locks they hold would not."""
    return len(os.listdir("/proc/self/task")) == 1


def fork_workers(listening: socket.socket) -> Request | None:
    """Forks a process for each request, and returns what it starts with in those processes alone.

    A connection that is closed at once means that its process becomes the worker. Returns None when there has been no worker
    for IDLE_S.
    """
    if _forked_id() == _forked_id():
        sys.exit("no worker is forked: all would give the same ids")
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    workers = set[int]()
    ended, wake = socket.socketpair()  # can be read when a child has ended
    for one in (ended, wake):
        one.setblocking(False)
    signal.set_wakeup_fd(wake.fileno())
    signal.signal(signal.SIGCHLD, _do_nothing)
    while True:
        ready, _, _ = select.select([listening, ended], [], [], None if workers else IDLE_S)
        if not ready:
            return None
        if ended in ready:
            ended.recv(PIECE_BYTES)
            _reap(workers)
        if listening in ready:
            connection, _ = listening.accept()
            with connection:
                request = _read(connection) if has_one_thread() else None
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


def _read(connection: socket.socket) -> Request | None:
    """None if its sender has ended."""
    files: list[int] = []
    with noted():
        connection.settimeout(REQUEST_S)
        connection.sendall(READY)
        _, files, _, _ = socket.recv_fds(connection, 1, 3)
        message = read_to_end(connection)
        return Request(files, *marshal.loads(message))  # noqa: S302 - from setup_worker.py, on a socket for this user
    _close(files)
    return None


def _fork(connection: socket.socket, request: Request) -> int | None:
    """As `os.fork`; None if there is no room for another process."""
    pid = None
    with noted():
        pid = os.fork()
    if pid:
        with suppress(OSError):  # the sender has ended
            # Ray ends this group when the worker has ended: while that lives, no other group has its id.
            os.setpgid(pid, request.group)
        with suppress(OSError):
            connection.sendall(b".")
    return pid


def take_on(request: Request) -> None:
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


@contextmanager
def noted() -> Generator[None]:
    """Logs an error on the way to a worker that is not forked: it starts as Ray has it."""
    try:
        yield
    except (OSError, EOFError, ValueError, TypeError) as error:
        print(f"no worker is forked: {error}", flush=True)


def _close(files: Sequence[int]) -> None:
    for file in files:
        os.close(file)


def end_with(parent: int) -> None:
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
