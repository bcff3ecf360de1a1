"""Workers that are forked: they are as if they had been started, and nothing else is forked, or left behind."""

import json
import marshal
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from claude_hitl_template.cluster import setup_worker
from claude_hitl_template.cluster.fork_server import LIBRARIES, LIBRARIES_OF_THE_PANEL, MODULES, OF_THE_PANEL

# What a worker runs here, in place of Ray's program. It says what it was started with, and does what its arguments say.
PROGRAM = """
    import json, os, subprocess, sys
    print(json.dumps({
        "name": __name__, "arguments": sys.argv, "imports from": sys.path[0], "environment": dict(os.environ),
        "folder": os.getcwd(), "parent": os.getppid(), "group": os.getpgrp(), "pid": os.getpid(),
        "code": getattr(sys.modules.get("service.code"), "VERSION", None), "path": sys.path[1:],
        "ended first": open("/proc/self/oom_score_adj").read(), "files": sorted(os.listdir("/proc/self/fd"))[:-1],
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
    from claude_hitl_template.cluster import fork_server, forking
    folder = Path(sys.argv[1])
    sys.path[0] = str(folder / "checkout")
    sys.path.append(str(folder / "libraries"))
    forking.REQUEST_S, forking.IDLE_S = 0.2, float(sys.argv[2])
    fork_server.PACKAGE, fork_server.OURS, fork_server.LIBRARIES = folder / "checkout/service", "service", ("library",)
    fork_server.installed = lambda: (folder / "libraries").stat().st_mtime_ns
    fork_server.start(folder / "socket", str(folder / "ray/_private/workers/default_worker.py"), panel=False)
    print("started", flush=True)
    sys.stdin.read()
"""
PATIENCE_S = 30.0
ALL_LIBRARIES = (*LIBRARIES, *LIBRARIES_OF_THE_PANEL)
FORKED = (setup_worker.NO_RUNTIME_ENV, "--an=argument")
IN_ENVIRONMENT = ("--an=argument", "--runtime-env-hash=17")


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

    def run_deployed(self, *arguments: str, **context: Any) -> dict[str, Any]:
        """The same in a runtime environment, that of the deployed package where `context` says nothing else."""
        return self.run(*self.deployed(*arguments, **context))[0]

    def deployed(self, *arguments: str, **context: Any) -> list[str]:
        folder = str(self.folder / "deployed")
        environment = {
            "command_prefix": ["cd", folder, "&&"],
            "env_vars": {"PYTHONPATH": f"{folder}:{self.folder}", "HITL_SOME": "setting"},
            "py_executable": sys.executable,
            "override_worker_entrypoint": None,
            "java_jars": [],
            **context,
        }
        language = context.pop("language", "PYTHON")
        return [
            setup_worker.__file__, *IN_ENVIRONMENT, *arguments,
            f"--language={language}", f"--serialized-runtime-env-context={json.dumps(environment)}",
        ]  # fmt: skip

    @contextmanager
    def started(self, *arguments: str, **environment: str) -> Generator[subprocess.Popen[str]]:
        given = {
            "LC_CTYPE": "C.UTF-8",  # else Python sets it
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(self.folder),
            setup_worker.SOCKET: str(self.folder / "socket"),
            **environment,
        }
        with subprocess.Popen(
            [sys.executable, setup_worker.__file__, *arguments],
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
def serving(folder: Path, library: str = "", *, code: str = "", idle_s: float = 600.0) -> Generator[Server]:
    """A server with two codes: a checkout, and a deployed package. `library`, `code`: of a module that is imported."""
    files = {
        "ray/__init__.py": "",
        "ray/_private/workers/default_worker.py": textwrap.dedent(PROGRAM),
        "ray/_private/workers/setup_worker.py": textwrap.dedent(PROGRAM),
        "libraries/library.py": library,
    }
    for version in ("checkout", "deployed"):
        files |= {
            f"{version}/service/__init__.py": "",
            f"{version}/service/code.py": f"VERSION = {version!r}\n{code}",
            f"{version}/service/cluster/__init__.py": "",
            f"{version}/service/cluster/fork_server.py": "MODULES = ('service.code',)",
        }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    command = [sys.executable, "-c", textwrap.dedent(SERVER), str(folder), str(idle_s)]
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


def forked_off_what_imported(server: Server, found: dict[str, Any]) -> bool:
    return psutil.Process(found["parent"]).ppid() == server.itself.pid


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
        setup_worker.SOCKET: str(server.folder / "socket"),
        "SOME": "é\udcff",
    }
    assert (forked["group"], forked["ended first"].strip()) == (forked["started"], "1000")
    assert forked["files"] == ["0", "1", "2"]
    assert printed == ["from standard input"]
    assert forked_off_what_imported(server, forked)
    assert forked["code"] == "checkout"


def test_a_worker_of_a_deployed_package_is_forked_with_its_code(server: Server) -> None:
    forked = server.run_deployed("--more")
    folder, program = (
        str(server.folder / "deployed"),
        str(server.folder / "ray/_private/workers/default_worker.py"),
    )
    assert forked["arguments"] == [program, *IN_ENVIRONMENT, "--more"]
    assert (forked["folder"], forked["imports from"]) == (folder, str(Path(program).parent))
    assert forked["path"][:2] == [folder, str(server.folder)]
    assert str(server.folder / "checkout") not in forked["path"]
    assert forked["environment"] == {
        "LC_CTYPE": "C.UTF-8",
        "PATH": os.environ["PATH"],
        "PYTHONPATH": f"{folder}:{server.folder}",
        "PWD": folder,
        setup_worker.SOCKET: str(server.folder / "socket"),
        "HITL_SOME": "setting",
    }
    assert (forked["group"], forked["files"]) == (forked["started"], ["0", "1", "2"])
    assert forked_off_what_imported(server, forked)
    assert forked["code"] == "deployed"


def test_each_code_is_imported_once(server: Server) -> None:
    parents = {
        name: {server.run(*given)[0]["parent"] for _ in range(3)}
        for name, given in {
            "checkout": FORKED,
            "deployed": server.deployed(),
            "with another setting": server.deployed(env_vars={"PYTHONPATH": str(server.folder / "deployed")}),
        }.items()
    }
    assert [len(found) for found in parents.values()] == [1, 1, 1]
    assert len(set.union(*parents.values())) == 3


@pytest.mark.parametrize(
    ("arguments", "environment"),
    [
        pytest.param((setup_worker.NO_RUNTIME_ENV,), {setup_worker.SOCKET: ""}, id="no server is named"),
        pytest.param((setup_worker.NO_RUNTIME_ENV,), {setup_worker.SOCKET: "/nowhere"}, id="nothing answers"),
        pytest.param(("--runtime-env-hash=17",), {}, id="a runtime environment that is set up"),
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
    assert (found["parent"], found["code"]) == (os.getpid(), None)


@pytest.mark.parametrize(
    "context",
    [
        {"command_prefix": ["podman", "run"]},
        {"command_prefix": ["cd", "/nowhere", "&&"]},
        {"command_prefix": ["cd", "/", "&&", "source", "activate", "&&"]},
        {"command_prefix": []},
        {"command_prefix": None},
        {"py_executable": "/usr/bin/python3"},
        {"py_executable": None},
        {"override_worker_entrypoint": "/default_worker.py"},
        {"language": "JAVA"},
        {"env_vars": {"PYTHONPATH": "${HOME}/code"}},
        {"env_vars": {"RAY_SOME": "setting"}},
        {"env_vars": {"LD_PRELOAD": "/library.so"}},
        {"command_prefix": ["cd", "/", "&&"]},
    ],
    ids=str,
)
def test_ray_sets_up_what_is_more_than_a_package_and_variables(
    server: Server, context: dict[str, Any]
) -> None:
    arguments = server.deployed(**context)
    found, _ = server.run(*arguments)
    program = str(server.folder / "ray/_private/workers/setup_worker.py")
    assert (found["name"], found["arguments"]) == ("__main__", [program, *arguments])
    assert (found["parent"], found["code"]) == (os.getpid(), None)


@pytest.mark.parametrize("name", ["library.py", "library/__init__.py"])
def test_no_worker_has_a_library_in_place_of_a_module_of_its_package(tmp_path: Path, name: str) -> None:
    with serving(tmp_path) as server:
        (tmp_path / "deployed" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "deployed" / name).touch()
        assert server.run_deployed()["code"] is None
        assert server.run(*FORKED)[0]["code"] == "checkout"


def rewritten(package: Path) -> None:
    (package / "code.py").write_text("VERSION = 'changed'")


def added(package: Path) -> None:
    (package / "new").mkdir()
    (package / "new/module.py").touch()
    rewritten(package)


def removed(package: Path) -> None:
    (package / "code.py").unlink()
    (package / "cluster/fork_server.py").write_text("MODULES = ()")


@pytest.mark.parametrize("change", [rewritten, added, removed])
@pytest.mark.parametrize("version", ["checkout", "deployed"])
def test_no_worker_has_other_code_than_that_on_disk(
    tmp_path: Path, version: str, change: Callable[[Path], None]
) -> None:
    with serving(tmp_path) as server:
        given = FORKED if version == "checkout" else server.deployed()
        with server.started(*given, "leave") as before:
            assert before.stdout is not None
            assert json.loads(before.stdout.readline())["code"] == version
            left = int(before.stdout.readline())
            change(tmp_path / version / "service")
            after, _ = server.run(*given)
            assert after["code"] == (None if change is removed else "changed")
            assert forked_off_what_imported(server, after)
            assert psutil.pid_exists(left)
            before.communicate()
        until(lambda: not psutil.pid_exists(left))  # the one that forked its worker is still there


def test_no_worker_has_other_libraries_than_those_on_disk(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        assert server.run(*FORKED)[0]["code"] == "checkout"
        (tmp_path / "libraries/another.py").touch()
        assert server.run(*FORKED)[0]["code"] is None


def test_code_that_cannot_be_imported_is_left_to_its_workers(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        (tmp_path / "deployed/service/code.py").write_text("import nothing_of_this_name")
        assert server.run_deployed()["parent"] == os.getpid()
        assert server.run(*FORKED)[0]["code"] == "checkout"
        rewritten(tmp_path / "deployed/service")
        assert server.run_deployed()["code"] == "changed"


def test_what_has_no_worker_ends_and_is_made_again(tmp_path: Path) -> None:
    with serving(tmp_path, idle_s=0.1) as server:
        with server.started(*FORKED) as stays:
            first = server.run_deployed()
            until(lambda: not psutil.pid_exists(first["parent"]))
            assert len(server.itself.children()) == 1
            second = server.run_deployed()
            assert second["code"] == "deployed"
            assert second["parent"] != first["parent"]
            stays.communicate()
        until(lambda: server.itself.children() == [])
        assert server.run(*FORKED)[0]["code"] == "checkout"


def test_one_that_was_killed_is_made_again(server: Server) -> None:
    psutil.Process(server.run(*FORKED)[0]["parent"]).kill()
    assert server.run(*FORKED)[0]["code"] == "checkout"


STARTS_A_THREAD = (
    "import threading, time; threading.Thread(target=time.sleep, args=(600,), daemon=True).start()"
)
USES_RANDOM_IDS = "from ray._raylet import UniqueID; UniqueID.from_random()"


@pytest.mark.parametrize("source", ["library", "code"])
@pytest.mark.parametrize("text", [STARTS_A_THREAD, USES_RANDOM_IDS], ids=["a thread", "the ids of another"])
def test_no_worker_is_forked_that_would_have_what_its_server_has(
    tmp_path: Path, source: str, text: str
) -> None:
    with serving(tmp_path, **{source: text}) as server:
        assert server.run(*FORKED)[0]["parent"] == os.getpid()


def test_what_is_imported_for_workers_lets_them_be_forked(tmp_path: Path) -> None:
    imports = "from claude_hitl_template.cluster.forking import preload; preload({!r})"
    code = imports.format((*MODULES, *OF_THE_PANEL))
    with serving(tmp_path, imports.format(ALL_LIBRARIES), code=code) as server:
        assert server.run(*FORKED)[0]["code"] == "checkout"


def test_only_kodosumi_is_imported_for_each_code(tmp_path: Path) -> None:
    """It reads variables when it is imported. All other libraries are imported once."""
    program = f"""
    import sys
    from claude_hitl_template.cluster.forking import preload
    preload({ALL_LIBRARIES!r})
    before = set(sys.modules)
    preload({(*MODULES, *OF_THE_PANEL)!r})
    print(*{{name.partition(".")[0] for name in set(sys.modules) - before}})
    """
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        check=True, capture_output=True, text=True, cwd=Path(__file__).parents[3],
    )  # fmt: skip
    assert set(found.stdout.split()) == {"claude_hitl_template", "kodosumi"}


def test_a_worker_waits_for_the_imports(tmp_path: Path) -> None:
    go = tmp_path / "go"
    os.mkfifo(go)
    with serving(tmp_path, f"open({str(go)!r}).read()") as server, server.started(*FORKED) as process:
        with go.open("w"):  # returns when the module is being imported
            assert process.poll() is None
        printed, _ = process.communicate("")
    assert json.loads(printed.splitlines()[0])["code"] == "checkout"


def answer(path: str, message: bytes) -> bytes:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        assert client.recv(5) == setup_worker.READY
        with suppress(BrokenPipeError):  # it need not read what is none to its end
            client.sendall(message)
            if message:
                client.shutdown(socket.SHUT_WR)
        with suppress(ConnectionResetError):
            return client.recv(1000)
    return b""


NO_REQUESTS = (
    b"",
    b".",
    b".garbage",
    b"." + b"\0" * 200_000,
    *map(marshal.dumps, (1, ("", 2), (3, {}), ("", {}, 4))),
)


def test_requests_that_are_none_do_not_stop_it(server: Server) -> None:
    own = str(server.folder / "socket")
    forking = answer(own, marshal.dumps(("", {}))).decode()
    forks = psutil.Process(server.run(*FORKED)[0]["parent"])
    for path, process in ((own, server.itself), (forking, forks)):
        files = process.num_fds()
        for message in NO_REQUESTS:
            assert answer(path, message) == b""
        assert server.run(*FORKED)[0]["code"] == "checkout"
        # It closes those of a worker later.
        until(lambda process=process, files=files: process.num_fds() <= files)


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
    assert psutil.Process(failed["parent"]).children() == []


def test_many_workers_at_once_are_forked_once_each(server: Server) -> None:
    with ExitStack() as running:
        processes = [running.enter_context(server.started(*FORKED, str(number))) for number in range(20)]
        found = [json.loads(process.communicate()[0].splitlines()[0]) for process in processes]
    assert [one["arguments"][-1] for one in found] == [str(number) for number in range(20)]
    assert len({one["pid"] for one in found}) == 20
    assert {one["code"] for one in found} == {"checkout"}


def test_it_ends_with_the_process_it_was_forked_off_and_its_workers_do_not(tmp_path: Path) -> None:
    with serving(tmp_path) as server, server.started(*FORKED) as process:
        assert process.stdout is not None
        process.stdout.readline()
        servers = [server.itself, *server.itself.children()]
        server.parent.kill()
        until(lambda: not any(one.is_running() for one in servers))
        assert process.communicate("still here")[0].strip() == "still here"


def test_a_server_that_is_lost_while_it_is_asked_ends_the_worker(tmp_path: Path) -> None:
    """It may have forked a worker of this one's id."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        listening.listen()
        asking = subprocess.Popen(
            [sys.executable, setup_worker.__file__, setup_worker.NO_RUNTIME_ENV],
            env={**os.environ, setup_worker.SOCKET: str(tmp_path / "socket")},
            stderr=subprocess.PIPE,
            text=True,
        )
        for said in (str(tmp_path / "socket").encode(), b""):
            connection, _ = listening.accept()
            with connection:
                connection.sendall(setup_worker.READY)
                while connection.recv(65536):
                    pass
                connection.sendall(said)
        assert "did not say that it forked a worker" in asking.communicate()[1]
        assert asking.returncode == 1


def test_its_sockets_are_for_this_user_alone(server: Server) -> None:
    server.run_deployed()
    sockets = list(server.folder.glob("socket*"))
    assert len(sockets) >= 3
    assert {path.stat().st_mode & 0o777 for path in sockets} == {0o600}
