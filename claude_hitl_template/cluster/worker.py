"""What Ray starts in place of its worker program: the fork server forks the worker, or this process becomes it.

It imports the standard library only, because Ray runs it with the Python of a runtime environment, too.
"""

import marshal
import os
import runpy
import socket
import sys
from importlib.util import find_spec

SOCKET = "HITL_FORK_SERVER"  # the variable that names the fork server's socket
NO_RUNTIME_ENV = "--runtime-env-hash=0"  # an argument of Ray's; other workers may have code of their own
READY = b"ready"
TITLE = "claude-hitl: fork server"  # of its process
PATIENCE_S = 30.0  # the first workers are asked for while the fork server still imports


def default_worker() -> str:
    """The path of the worker program of the Ray that this Python imports."""
    found = find_spec("ray")
    if found is None or not found.submodule_search_locations:
        sys.exit("there is no Ray here to start a worker of")
    return os.path.join(found.submodule_search_locations[0], "_private", "workers", "default_worker.py")


def is_forked(path: str, arguments: list[str]) -> bool:
    """Whether the fork server at `path` has forked a worker with these arguments, and this process's environment, folder,
    open files and group. False: it was not asked.

    Raises OSError if the server is lost in between: a worker that it may have forked has this one's id.
    """
    with socket.socket(socket.AF_UNIX) as server:
        server.settimeout(PATIENCE_S)
        try:
            server.connect(path)
            if server.recv(len(READY), socket.MSG_WAITALL) != READY:
                return False
        except OSError:
            return False
        socket.send_fds(server, [b"."], [0, 1, 2])
        server.sendall(marshal.dumps((arguments, dict(os.environ), os.getcwd(), os.getpgrp())))
        server.shutdown(socket.SHUT_WR)
        if not server.recv(1):
            raise ConnectionResetError("the fork server did not say that it forked a worker")
        return True


def main() -> None:
    path, arguments = os.environ.get(SOCKET), sys.argv[1:]
    if path and NO_RUNTIME_ENV in arguments and is_forked(path, arguments):
        return
    become(default_worker(), arguments)


def become(program: str, arguments: list[str]) -> None:
    """Runs `program` as if this process had been started with it."""
    sys.argv = [program, *arguments]
    sys.path[0] = os.path.dirname(program)
    runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    main()
