"""What Ray starts in place of its worker program, and of the program that first sets the worker's runtime environment up.

A fork server forks the worker, or this process goes on with Ray's own program. It imports the standard library only, because
Ray runs it with the Python of a runtime environment, too. Ray looks for `setup_worker.py` in the name of this file.
"""

import marshal
import os
import runpy
import socket
import sys
from importlib.util import find_spec

SOCKET = "HITL_FORK_SERVER"  # the variable that names the fork server's socket
NO_RUNTIME_ENV = "--runtime-env-hash=0"  # an argument of Ray's
CONTEXT, LANGUAGE = (
    "--serialized-runtime-env-context",
    "--language",
)  # options that say what a runtime environment is
READY = b"ready"
TITLE = "claude-hitl: fork server"  # how the titles of its processes begin
PIECE_BYTES = 64 * 1024
PATIENCE_S = 30.0  # the first workers are asked for while the fork server still imports

# The folder of a package, "" for the checkout that Ray was started from, and the variables of its runtime environment.
type Code = tuple[str, dict[str, str]]


def rays_own(program: str) -> str:
    """The path of one of the worker programs of the Ray that this Python imports."""
    found = find_spec("ray")
    if found is None or not found.submodule_search_locations:
        sys.exit("there is no Ray here to start a worker of")
    return os.path.join(found.submodule_search_locations[0], "_private", "workers", program)


def code_of(arguments: list[str]) -> tuple[Code, list[str]] | None:
    """The code of the worker that Ray starts with these arguments, and the arguments of its own program.

    None if its runtime environment is more than a folder and variables: another Python, a container, a command before it.
    """
    if arguments[:1] != [__file__]:
        return (("", {}), arguments) if NO_RUNTIME_ENV in arguments else None
    import json  # noqa: PLC0415 - slow

    given = dict(word.split("=", 1) for word in arguments if "=" in word)
    context = json.loads(given.get(CONTEXT, "{}"))
    variables = context.get("env_vars") or {}
    match context.get("command_prefix"):
        case ["cd", folder, "&&"]:
            simple = (
                given.get(LANGUAGE) == "PYTHON"
                and context.get("py_executable") == sys.executable
                and not context.get("override_worker_entrypoint")
                and os.path.isdir(folder)
                and not any("$" in value for value in variables.values())
            )
            its_own = [word for word in arguments[1:] if word.partition("=")[0] not in (CONTEXT, LANGUAGE)]
            return ((folder, variables), its_own) if simple else None
        case _:
            return None


def is_forked(server: str, code: Code, arguments: list[str]) -> bool:
    """Whether a worker has been forked with this code, these arguments, and this process's open files and group. False: no
    worker was asked for.

    Raises OSError if the server is lost in between: a worker that it may have forked has this one's id.
    """
    folder, variables = code
    environment = {**os.environ, **variables, **({"PWD": folder} if folder else {})}
    with socket.socket(socket.AF_UNIX) as asked, socket.socket(socket.AF_UNIX) as forking:
        try:
            _connect(asked, server)
            asked.sendall(marshal.dumps(code))
            asked.shutdown(socket.SHUT_WR)
            path = read_to_end(asked)
            if not path:
                return False
            _connect(forking, os.fsdecode(path))
        except OSError:
            return False
        socket.send_fds(forking, [b"."], [0, 1, 2])
        forking.sendall(marshal.dumps((arguments, environment, folder or os.getcwd(), os.getpgrp())))
        forking.shutdown(socket.SHUT_WR)
        if not forking.recv(1):
            raise ConnectionResetError("the fork server did not say that it forked a worker")
        return True


def read_to_end(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(PIECE_BYTES), b""))


def _connect(connection: socket.socket, path: str) -> None:
    """Raises OSError unless a server answers that is ready."""
    connection.settimeout(PATIENCE_S)
    connection.connect(path)
    if connection.recv(len(READY), socket.MSG_WAITALL) != READY:
        raise ConnectionResetError(f"nothing is ready at {path}")


def main() -> None:
    server, arguments = os.environ.get(SOCKET), sys.argv[1:]
    if server and (found := code_of(arguments)) and is_forked(server, *found):
        return
    program = "setup_worker.py" if arguments[:1] == [__file__] else "default_worker.py"
    become(rays_own(program), arguments)


def become(program: str, arguments: list[str]) -> None:
    """Runs `program` as if this process had been started with it."""
    sys.argv = [program, *arguments]
    sys.path[0] = os.path.dirname(program)
    runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    main()
