"""Unix sockets in the data folder, on which processes of this machine and user reach a replica without Ray Serve."""

import os
import secrets
import socket
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import structlog
import uvicorn
from starlette.types import ASGIApp

from claude_hitl_template.config.secret_files import SigningKey
from claude_hitl_template.config.settings import Settings

log = structlog.get_logger()

SUFFIX = ".sock"
GRACE_S = 15  # in which requests are answered when their replica ends; Serve allows 20
# Options of uvicorn where only Serve's proxy can open the socket (proxy_relay.py): it says whose request it is, and when.
BEHIND_PROXY: dict[str, Any] = {"forwarded_allow_ips": "*", "server_header": False, "date_header": False}
KEEP_ALIVE_S = 90  # longer than clients keep an idle connection, so that none is closed as it is used


def listening(folder: Path) -> socket.socket:
    """A bound socket with a name of its own in `folder`, both closed to other users. Raises OSError, as where the path is
    too long or the file system has no sockets."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    _remove_old(folder)
    # The random part: the path of a socket that is gone never leads to another process's.
    path = folder / f"{os.getpid()}-{secrets.token_hex(4)}{SUFFIX}"
    made = socket.socket(socket.AF_UNIX)
    try:
        made.bind(str(path))
        path.chmod(0o600)
    except OSError:
        made.close()
        raise
    return made


def _remove_old(folder: Path) -> None:
    """Removes the sockets of processes that have ended."""
    for left in folder.glob(f"*{SUFFIX}"):
        pid = left.stem.partition("-")[0]
        if not (pid.isdecimal() and psutil.pid_exists(int(pid))):
            left.unlink(missing_ok=True)


def model_sockets(settings: Settings, signing_key: SigningKey) -> Path:
    """The folder of the ingresses' sockets for the model. Its name is this service's own: on another machine the same data
    folder may be another service's."""
    return settings.data_dir / "model" / signing_key.mac(b"sockets", "model")[:8]


async def serve_http(app: ASGIApp, folder: Path, **options: Any) -> None:
    """Serves `app` on a socket in `folder` until it is cancelled, with options of uvicorn. Returns at once if that is not
    possible."""
    try:
        bound = listening(folder)
    except OSError as error:
        log.warning("no socket; requests come through Ray Serve only", folder=str(folder), why=str(error))
        return
    config = uvicorn.Config(
        app,
        lifespan="off",
        ws="none",
        log_config=None,
        access_log=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=GRACE_S,
        **options,
    )
    server, path = _Server(config), bound.getsockname()
    try:
        await server.serve(sockets=[bound])
    finally:
        with suppress(FileNotFoundError):
            os.unlink(path)
        await server.shutdown(sockets=[bound])


class _Server(uvicorn.Server):
    """Leaves the process's signals to Ray."""

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        yield
