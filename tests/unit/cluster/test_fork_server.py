"""Workers that are forked: they are as if they had been started, and nothing else is forked, or left behind."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from claude_hitl_template.cluster import worker
from claude_hitl_template.cluster.fork_server import MODULES, OF_THE_PANEL

# What a worker runs here, in place of Ray's program. It says what it was started with, and does what its arguments say.
PROGRAM = """
    import json, os, subprocess, sys
    print(json.dumps({
        "name": __name__, "arguments": sys.argv, "imports from": sys.path[0], "environment": dict(os.environ),
        "folder": os.getcwd(), "parent": os.getppid(), "group": os.getpgrp(), "pid": os.getpid(),
        "preloaded": "preloaded" in sys.modules, "ended first": open("/proc/self/oom_score_adj").read(),
        "files": sorted(os.listdir("/proc/self/fd"))[:-1],
    }), flush=True)
    if "leave" in sys.argv:
        print(subprocess.Popen(["sleep", "600"], stdout=subprocess.DEVNULL, start_new_session=True).pid, flush=True)
    if "fail" in sys.argv:
        raise OSError("a worker's own error")
    print(sys.stdin.read())
"""
SERVER = """
    import sys
    from pathlib import Path
    from claude_hitl_template.cluster import fork_server
    folder = Path(sys.argv[1])
    sys.path.insert(0, str(folder / "modules"))
    fork_server.PACKAGE, fork_server.REQUEST_S = folder / "package", 0.2
    fork_server.start(folder / "socket", ("preloaded",), str(folder / "ray/_private/workers/default_worker.py"))
    print("started", flush=True)
    sys.stdin.read()
"""
PATIENCE_S = 30.0
ALL_MODULES = (*MODULES, *OF_THE_PANEL)
FORKED = (worker.NO_RUNTIME_ENV, "--an=argument")


@dataclass
class Server:
    """A running fork server, forked off `parent`."""

    folder: Path
    parent: psutil.Process

    @property
    def itself(self) -> psutil.Process:
        (found,) = self.parent.children()
        return found

    def run(self, *arguments: str, said: str = "", **environment: str) -> tuple[dict[str, Any], list[str]]:
        """Starts a worker as Ray does; returns what it was started with, and what else it printed."""
        with self.started(*arguments, **environment) as process:
            printed, _ = process.communicate(said)
        first, *others = printed.splitlines()
        return {**json.loads(first), "started": process.pid}, others

    @contextmanager
    def started(self, *arguments: str, **environment: str) -> Generator[subprocess.Popen[str]]:
        given = {
            "LC_CTYPE": "C.UTF-8",  # else Python sets it
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(self.folder),
            worker.SOCKET: str(self.folder / "socket"),
            **environment,
        }
        with subprocess.Popen(
            [sys.executable, worker.__file__, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=given,
            cwd=self.folder,
            process_group=0,
        ) as process:
            yield process


@contextmanager
def serving(folder: Path, preloaded: str = "") -> Generator[Server]:
    files = {
        "ray/__init__.py": "",
        "ray/_private/workers/default_worker.py": textwrap.dedent(PROGRAM),
        "modules/preloaded.py": preloaded,
        "package/module.py": "",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    command = [sys.executable, "-c", textwrap.dedent(SERVER), str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        parent.stdout.readline()
        try:
            yield Server(folder, psutil.Process(parent.pid))
        finally:
            parent.kill()


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Generator[Server]:
    with serving(tmp_path_factory.mktemp("server")) as running:
        yield running


def test_a_forked_worker_is_as_if_it_had_been_started(server: Server) -> None:
    forked, printed = server.run(*FORKED, said="from standard input", SOME="é\udcff")
    program = str(server.folder / "ray/_private/workers/default_worker.py")
    assert forked["name"] == "__main__"
    assert forked["arguments"] == [program, *FORKED]
    assert forked["imports from"] == str(Path(program).parent)
    assert forked["folder"] == str(server.folder)
    assert forked["environment"] == {
        "LC_CTYPE": "C.UTF-8",
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(server.folder),
        worker.SOCKET: str(server.folder / "socket"),
        "SOME": "é\udcff",
    }
    assert (forked["group"], forked["ended first"].strip()) == (forked["started"], "1000")
    assert forked["files"] == ["0", "1", "2"]
    assert printed == ["from standard input"]
    assert (forked["parent"], forked["preloaded"]) == (server.itself.pid, True)


@pytest.mark.parametrize(
    ("arguments", "environment"),
    [
        pytest.param((worker.NO_RUNTIME_ENV,), {worker.SOCKET: ""}, id="no server is named"),
        pytest.param((worker.NO_RUNTIME_ENV,), {worker.SOCKET: "/nowhere"}, id="nothing answers"),
        pytest.param(("--runtime-env-hash=17",), {}, id="a runtime environment"),
        pytest.param((), {}, id="no word of a runtime environment"),
    ],
)
def test_a_worker_that_is_not_forked_runs_the_same(
    server: Server, arguments: tuple[str, ...], environment: dict[str, str]
) -> None:
    found, printed = server.run(*arguments, said="from standard input", **environment)
    program = str(server.folder / "ray/_private/workers/default_worker.py")
    assert (found["name"], found["arguments"]) == ("__main__", [program, *arguments])
    assert found["imports from"] == str(Path(program).parent)
    assert printed == ["from standard input"]
    assert (found["parent"], found["preloaded"]) == (os.getpid(), False)


def rewritten(folder: Path) -> None:
    os.utime(folder / "package/module.py", ns=(1, 1))


def added(folder: Path) -> None:
    (folder / "package/new").mkdir()
    (folder / "package/new/module.py").touch()


def removed(folder: Path) -> None:
    (folder / "package/module.py").unlink()


@pytest.mark.parametrize("change", [rewritten, added, removed])
def test_no_worker_has_other_code_than_that_on_disk(tmp_path: Path, change: Callable[[Path], None]) -> None:
    with serving(tmp_path) as server:
        assert server.run(*FORKED)[0]["preloaded"]
        change(tmp_path)
        assert not server.run(*FORKED)[0]["preloaded"]


def test_no_worker_is_forked_off_a_process_with_threads(tmp_path: Path) -> None:
    starts = "import threading, time; threading.Thread(target=time.sleep, args=(600,), daemon=True).start()"
    with serving(tmp_path, starts) as server:
        assert not server.run(*FORKED)[0]["preloaded"]


def test_no_worker_is_forked_that_would_give_the_ids_of_another(tmp_path: Path) -> None:
    with serving(tmp_path, "from ray._raylet import UniqueID; UniqueID.from_random()") as server:
        assert not server.run(*FORKED)[0]["preloaded"]


def test_what_is_imported_for_workers_lets_them_be_forked(tmp_path: Path) -> None:
    imports = f"from claude_hitl_template.cluster.fork_server import preload; preload({ALL_MODULES!r})"
    with serving(tmp_path, imports) as server:
        assert server.run(*FORKED)[0]["preloaded"]


def test_a_worker_waits_for_the_imports(tmp_path: Path) -> None:
    go = tmp_path / "go"
    os.mkfifo(go)
    with serving(tmp_path, f"open({str(go)!r}).read()") as server, server.started(*FORKED) as process:
        with go.open("w"):  # returns when the module is being imported
            assert process.poll() is None
        printed, _ = process.communicate("")
    assert json.loads(printed.splitlines()[0])["preloaded"]


def test_requests_that_are_none_do_not_stop_it(server: Server) -> None:
    server.run(*FORKED)
    files = server.itself.num_fds()
    for message in (b"", b".", b".garbage", b"." + b"\0" * 200_000):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(server.folder / "socket"))
            assert client.recv(5) == worker.READY
            client.sendall(message)
            if message:
                client.shutdown(socket.SHUT_WR)
            assert client.recv(1) == b""  # not forked
    assert server.run(*FORKED)[0]["preloaded"]
    until(lambda: server.itself.num_fds() <= files)  # it closes those of a worker after that has begun


def test_what_a_worker_leaves_is_ended(server: Server) -> None:
    _, (left, *_) = server.run(*FORKED, "leave")
    until(lambda: not psutil.pid_exists(int(left)))


def test_a_worker_that_is_killed_leaves_nothing_and_is_no_concern_of_others(server: Server) -> None:
    with server.started(*FORKED, "leave") as killed, server.started(*FORKED) as other:
        assert killed.stdout is not None
        assert other.stdout is not None
        pid = json.loads(killed.stdout.readline())["pid"]
        left = int(killed.stdout.readline())
        other.stdout.readline()
        os.kill(pid, signal.SIGKILL)
        until(lambda: not psutil.pid_exists(left))
        assert other.communicate("still here")[0].strip() == "still here"
    until(lambda: not psutil.pid_exists(pid))  # no zombie


def test_a_worker_that_fails_ends(server: Server) -> None:
    failed, _ = server.run(*FORKED, "fail")
    until(lambda: not psutil.pid_exists(failed["pid"]))
    assert [child.pid for child in server.itself.children()] == []


def test_many_workers_at_once_are_forked_once_each(server: Server) -> None:
    with ExitStack() as running:
        processes = [running.enter_context(server.started(*FORKED, str(number))) for number in range(20)]
        found = [json.loads(process.communicate()[0].splitlines()[0]) for process in processes]
    assert [one["arguments"][-1] for one in found] == [str(number) for number in range(20)]
    assert len({one["pid"] for one in found}) == 20
    assert all(one["preloaded"] for one in found)


def test_it_ends_with_the_process_it_was_forked_off_and_its_workers_do_not(tmp_path: Path) -> None:
    with serving(tmp_path) as server, server.started(*FORKED) as process:
        assert process.stdout is not None
        process.stdout.readline()
        itself = server.itself
        server.parent.kill()
        until(lambda: not itself.is_running())
        assert process.communicate("still here")[0].strip() == "still here"


def test_a_server_that_is_lost_while_it_is_asked_ends_the_worker(tmp_path: Path) -> None:
    """It may have forked a worker of this one's id."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        listening.listen()
        asking = subprocess.Popen(
            [sys.executable, worker.__file__, worker.NO_RUNTIME_ENV],
            env={**os.environ, worker.SOCKET: str(tmp_path / "socket")},
            stderr=subprocess.PIPE,
            text=True,
        )
        connection, _ = listening.accept()
        with connection:
            connection.sendall(worker.READY)
            while connection.recv(65536):
                pass
        assert "did not say that it forked a worker" in asking.communicate()[1]
        assert asking.returncode == 1


def test_its_socket_is_for_this_user_alone(server: Server) -> None:
    assert (server.folder / "socket").stat().st_mode & 0o777 == 0o600
