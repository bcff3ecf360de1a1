"""Forks Ray's workers off processes that have imported what they need.

A worker that imports Ray and the service for itself takes a second of a CPU, and has 70 to 150 MiB of its own; a forked
one has the modules already, and shares their memory. The server imports libraries only, and forks a process for each code
that is asked for (a deployed package, or the checkout), which imports that code and forks its workers (`forking.py`). Ray
starts `setup_worker.py` in a worker's place, which asks here.
"""

import gc
import importlib
import marshal
import os
import select
import socket
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from ray._raylet import setproctitle  # pyright: ignore[reportAttributeAccessIssue]

from claude_hitl_template.cluster import forking
from claude_hitl_template.cluster.setup_worker import READY, TITLE, become, read_to_end

# With all that they import: what MODULES import, and what libraries import only when they are first used.
LIBRARIES = (
    "ray.serve._private.controller", "ray.serve._private.proxy", "ray.serve._private.replica",
    "aiosmtplib", "anyio._backends._asyncio", "argon2", "authlib.oidc.core", "authlib.oidc.discovery",
    "claude_agent_sdk", "cryptography.fernet", "fsspec.core", "fsspec.implementations.local", "httpcore", "jinja2",
    "markdown_it", "packaging.utils", "py_vapid", "pydantic.v1", "pydantic_settings", "rfc8785", "socksio",
    "sqlalchemy.dialects.postgresql", "sqlalchemy.dialects.sqlite", "sqlalchemy.ext.asyncio", "sqlite3.dbapi2",
    "standardwebhooks", "structlog", "tree_sitter", "tree_sitter_bash",
)  # fmt: skip
LIBRARIES_OF_THE_PANEL = (
    "advanced_alchemy.extensions.litestar", "bson", "fastapi.templating", "jose.jwt", "litestar", "markdown",
    "ray.util.queue",
)  # fmt: skip
MODULES = (
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
OURS = PACKAGE.name
OWN_VARIABLES = ("PYTHONPATH", "HITL_", "KODO_")  # how names begin that no library reads when it is imported


@dataclass(frozen=True)
class Code:
    """`folder`: of a deployed package, "" for the checkout; `variables`: those of its runtime environment."""

    folder: str = ""
    variables: tuple[tuple[str, str], ...] = ()

    @property
    def package(self) -> Path:
        return Path(self.folder, OURS) if self.folder else PACKAGE

    def on_disk(self) -> dict[Path, int]:
        """When each of its files was changed; nanoseconds since the epoch.

        Each worker waits for it: `code_version`, which reads the files, takes nine times as long.
        """
        return {path: path.stat().st_mtime_ns for path in self.package.rglob("*.py")}


@dataclass(frozen=True)
class CodeServer:
    """A process that forks workers. `path`: of its socket; `ended`: a file that can be read when it has ended."""

    path: Path
    pid: int
    ended: int
    on_disk: dict[Path, int]


def start(path: Path, program: str, *, panel: bool) -> None:
    """Forks the server off this process, which must have a single thread. It ends with this process.

    Args:
        path: Of the socket that is made.
        program: What the workers run.
        panel: Whether they need what the panel imports.
    """
    for old in path.parent.glob(f"{path.name}*"):
        old.unlink()
    with listening_at(path) as listening:
        gc.freeze()  # the collector writes to objects, which takes their memory out of what is shared
        parent = os.getpid()
        if os.fork() > 0:
            return
        forking.end_with(parent)
        setproctitle(TITLE)
        forking.preload([*LIBRARIES, *(LIBRARIES_OF_THE_PANEL if panel else ())])
        code, workers = Servers(path).serve(listening)
    with workers:
        load(code, panel=panel)
        request = forking.fork_workers(workers)
    if request is None:
        os._exit(0)
    forking.take_on(request)
    become(program, request.arguments)
    sys.exit()


def listening_at(path: Path) -> socket.socket:
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(path))
    path.chmod(0o600)
    listening.listen(128)
    return listening


class Servers:
    """The processes that fork workers, one for each code that is in use. `path`: of the server's own socket."""

    def __init__(self, path: Path) -> None:
        self._path, self._installed, self._made = path, installed(), 0
        self._current = dict[Code, CodeServer]()
        self._former = list[CodeServer]()  # they have workers, and their code has changed since

    def serve(self, listening: socket.socket) -> tuple[Code, socket.socket]:
        """Answers each request for a code with the path of the socket at which its workers are forked, or with nothing.

        Returns in new processes alone, with the code that each is to import, and its socket.
        """
        first = self._find_or_fork(Code())  # the first workers need it, and it takes a while
        if isinstance(first, socket.socket):
            return Code(), first
        while True:
            running = [*self._current.values(), *self._former]
            ready, _, _ = select.select([listening, *(one.ended for one in running)], [], [])
            for one in running:
                if one.ended in ready:
                    self._forget(one)
            if listening in ready:
                connection, _ = listening.accept()
                with connection:
                    code = _read(connection)
                    if code is None:
                        continue
                    found = self._find_or_fork(code)
                    if isinstance(found, socket.socket):
                        return code, found
                    with suppress(OSError):  # the one who asked has ended
                        connection.sendall(os.fsencode(found or ""))

    def _find_or_fork(self, code: Code) -> Path | socket.socket | None:
        """The path of the socket of the process that has this code as it is on disk; in a new one, its socket. None: workers
        are to import the code themselves."""
        with forking.noted():
            on_disk = code.on_disk()
            self._check(code)
            found = self._current.get(code)
            if found is None or found.on_disk != on_disk:
                return self._fork(code, on_disk)
            return found.path
        return None

    def _check(self, code: Code) -> None:
        """Raises ValueError if a worker that is forked would not be as if it had been started."""
        if installed() != self._installed:
            raise ValueError("packages were installed after this started")
        if not forking.has_one_thread():
            raise ValueError("a library has started a thread")
        for name, value in code.variables:
            if not name.startswith(OWN_VARIABLES) and os.environ.get(name) != value:
                raise ValueError(f"a library may read {name} when it is imported")
        if code.folder:
            if not code.package.is_dir():
                raise ValueError(f"{code.folder} has no {OURS}")
            loaded = {name.partition(".")[0] for name in sys.modules}
            if hidden := sorted(_modules_in(Path(code.folder)) & loaded - {OURS, "sitecustomize"}):
                raise ValueError(f"{code.folder} has a module {hidden[0]}, as a library has")

    def _fork(self, code: Code, on_disk: dict[Path, int]) -> Path | socket.socket:
        self._made += 1
        path = self._path.with_name(f"{self._path.name}.{self._made}")
        workers, parent = listening_at(path), os.getpid()
        if (pid := os.fork()) == 0:
            forking.end_with(parent)
            for one in (*self._current.values(), *self._former):
                os.close(one.ended)
            return workers
        workers.close()
        if before := self._current.get(code):
            before.path.unlink(missing_ok=True)
            self._former.append(before)
        self._current[code] = CodeServer(path, pid, os.pidfd_open(pid), on_disk)
        return path

    def _forget(self, ended: CodeServer) -> None:
        os.waitpid(ended.pid, 0)
        os.close(ended.ended)
        if ended in self._former:
            self._former.remove(ended)
        else:
            ended.path.unlink(missing_ok=True)
            self._current = {code: one for code, one in self._current.items() if one != ended}


def load(code: Code, *, panel: bool) -> None:
    """Imports the code, in the place of that which this process began with."""
    setproctitle(f"{TITLE}, {Path(code.folder).name or 'the checkout'}")
    for name in [name for name in sys.modules if name.partition(".")[0] == OURS]:
        del sys.modules[name]
    if code.folder:
        before = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        os.environ.update(code.variables)
        os.chdir(code.folder)
        own = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
        sys.path[:] = [code.folder, *own, *(path for path in sys.path[1:] if path not in before)]
        importlib.invalidate_caches()
    its = importlib.import_module(f"{OURS}.cluster.fork_server")
    if not Path(its.__file__ or "").is_relative_to(code.package):
        sys.exit(f"no worker is forked: {code.package} is not what is imported from {code.folder}")
    forking.preload([*its.MODULES, *(its.OF_THE_PANEL if panel else ())])


def installed() -> int:
    """When packages were last installed or removed; nanoseconds since the epoch."""
    return Path(psutil.__file__).parent.parent.stat().st_mtime_ns


def _modules_in(folder: Path) -> set[str]:
    packages = {path.parent.name for path in folder.glob("*/__init__.py")}
    return packages | {path.stem for path in folder.glob("*.py")}


def _read(connection: socket.socket) -> Code | None:
    """None if it is not a request."""
    with forking.noted():
        connection.settimeout(forking.REQUEST_S)
        connection.sendall(READY)
        folder, variables = marshal.loads(read_to_end(connection))  # noqa: S302 - from setup_worker.py, on a socket for this user
        return Code(os.fspath(folder), tuple(sorted(dict[str, str](variables).items())))
    return None
