"""Starts the Claude Code CLI of one session, with only those parts of the service's environment that a plan names.

It is part of every session's start, so it imports almost nothing: `json` and `socket` took a fifth of that time.
$HITL_LAUNCH holds the plan that `sandbox.launch_plan` makes, marshalled by the same Python, in hexadecimal digits:

- `cli`: the program; its arguments are this program's own
- `before`: what starts it where there is no sandbox, as the first words of a command
- `keep`: names of the variables that reach it, of those that there are
- `user_layer`: a folder of an image, whose entries are linked into the CLI's config folder; or null
- `sandbox`: null, or
  - `program`, `libraries`: bubblewrap, and the folder of libraries that came with it, or null
  - `arguments`: its arguments
  - `user`, `group`: who it runs as on this machine, when this runs as root; `inside`: the same as the sandbox sees it
  - `groups`: files of control groups that are joined, as far as they can be
  - `limits`: resource limits, as `setrlimit` takes them; soft and hard ones are the same
  - `filter`: the program of a seccomp filter, or null
  - `hand_over`: a unix socket to which a listening socket on the sandbox's loopback interface is sent, `port` is its port
"""

import _socket  # `socket` imports more modules, which takes longer
import fcntl
import marshal
import os
import resource
import sys

TYPE_CHECKING = False  # as typing has it, which takes long to import
if TYPE_CHECKING:
    from typing import Any

CONFIG_DIR = "CLAUDE_CONFIG_DIR"
BINDS = ("--bind", "--ro-bind")
SIOCSIFFLAGS, IFF_UP = 0x8914, 1
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 0x2, 0x4, 0x1000, 0x4000, 0x40000
STAGE = "/tmp"  # noqa: S108 - it exists on every machine; mounts on it are private to this namespace
OPEN_TO_ALL = ("/usr", "/etc/", "/bin", "/lib", "/sbin", "/dev/")
NO_SANDBOX = "claude-hitl: no sandbox: {}"


def main() -> None:
    plan = marshal.loads(bytes.fromhex(os.environ["HITL_LAUNCH"]))  # noqa: S302 - made by the process that starts this
    environment = {name: os.environ[name] for name in plan["keep"] if name in os.environ}
    # Without it bash takes the CLI's sockets for a remote shell's and reads ~/.bashrc before each command.
    environment.setdefault("SHLVL", "1")
    if plan["user_layer"]:
        lay_over(plan["user_layer"], environment[CONFIG_DIR])
    command = [plan["cli"], *sys.argv[1:]]
    if plan["sandbox"]:
        enclose(plan["sandbox"], command, environment)
    command = [*plan["before"], *command]
    os.execve(command[0], command, environment)  # noqa: S606


def lay_over(layer: str, config_dir: str) -> None:
    """Links the layer's entries: the agent can write in its config folder, not in the layer. Existing entries stay."""
    for name in os.listdir(layer):
        link = os.path.join(config_dir, name)
        if not name.startswith(".") and not os.path.lexists(link):
            os.symlink(os.path.join(layer, name), link)


def enclose(sandbox: "dict[str, Any]", command: list[str], environment: dict[str, str]) -> None:
    """Executes the CLI in its sandbox in place of this process. A failure ends the process with an error line."""
    try:
        config_dir = environment[CONFIG_DIR]
        os.makedirs(config_dir, mode=0o700, exist_ok=True)
        owner = os.open(sandbox["hand_over"], os.O_PATH)
        program, libraries = sandbox["program"], sandbox["libraries"]
        # Folders that are not bound are in memory and read-only, because the CLI looks for settings in /etc.
        arguments = [*sandbox["arguments"], "--bind", config_dir, config_dir, "--remount-ro", "/"]
        if os.getuid() == 0:
            give(config_dir, sandbox["user"], sandbox["group"])
            staged = stage([program, libraries or "/usr", *sources(arguments)])
            program, libraries = staged[program], libraries and staged[libraries]
            arguments = [*staged_sources(arguments, staged)]
        if sandbox["filter"]:
            arguments += ["--seccomp", str(in_memory(sandbox["filter"]))]
        if libraries:
            environment["LD_LIBRARY_PATH"] = libraries
            arguments += ["--unsetenv", "LD_LIBRARY_PATH"]
        join(sandbox["groups"])
        become_nobody(sandbox["user"], sandbox["group"])
        limit(sandbox["limits"])
        hand_over(loopback(sandbox["port"]), f"/proc/self/fd/{owner}")
        os.execve(program, ["bwrap", *arguments, "--", *command], environment)  # noqa: S606
    except OSError as error:
        sys.exit(NO_SANDBOX.format(error))


def give(folder: str, user: int, group: int) -> None:
    """Makes the sandbox's user the owner of the folder and everything below it."""
    for base, _, names in os.walk(folder):
        for name in (".", *names):
            os.chown(os.path.join(base, name), user, group, follow_symlinks=False)


def sources(arguments: list[str]) -> list[str]:
    return [arguments[at + 1] for at, argument in enumerate(arguments) if argument in BINDS]


def staged_sources(arguments: list[str], staged: dict[str, str]) -> list[str]:
    return [
        staged[argument] if at and arguments[at - 1] in BINDS else argument
        for at, argument in enumerate(arguments)
    ]


def stage(paths: list[str]) -> dict[str, str]:
    """Mounts these paths below STAGE, for this process and its children only, and returns where. The sandbox's user
    cannot pass through root's folders. Needs the right to mount."""
    import ctypes  # noqa: PLC0415 - slow

    libc = ctypes.CDLL(None, use_errno=True)

    def mount(source: str, target: str, kind: str, flags: int) -> None:
        if libc.mount(source.encode(), target.encode(), kind.encode(), flags, None) != 0:
            raise OSError(
                ctypes.get_errno(), f"root may not mount {source} here; run the service as another user"
            )

    os.unshare(os.CLONE_NEWNS)
    mount("none", "/", "none", MS_REC | MS_PRIVATE)
    opened = {path: os.open(path, os.O_PATH) for path in paths if not path.startswith(OPEN_TO_ALL)}
    mount("none", STAGE, "tmpfs", MS_NOSUID | MS_NODEV)
    os.chmod(STAGE, 0o755)  # noqa: S103 - a folder of names, for another user
    found = {path: path for path in paths}
    for path, descriptor in opened.items():
        place = found[path] = f"{STAGE}/{descriptor}"
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            os.mkdir(place)
        else:
            os.close(os.open(place, os.O_CREAT))
        mount(f"/proc/self/fd/{descriptor}", place, "none", MS_BIND | MS_REC)
        os.close(descriptor)
    return found


def become_nobody(user: int, group: int) -> None:
    """A user namespace, in which this is root, and a network namespace; on this machine it is `user`, who is not root."""
    me, is_root = os.getpid(), os.getuid() == 0
    unshared, unshared_done = os.pipe()
    helper = 0
    if is_root:
        os.setgroups([])
        helper = os.fork()
        if helper == 0:  # only a process outside may map another user than its own
            os.read(unshared, 1)
            map_to(f"/proc/{me}", user, group)
            os._exit(0)
    os.unshare(os.CLONE_NEWUSER | os.CLONE_NEWNET)
    if is_root:
        os.write(unshared_done, b".")
        if os.waitpid(helper, 0)[1] != 0:
            raise OSError("its user could not be mapped")
        os.setresgid(0, 0, 0)
        os.setresuid(0, 0, 0)
    else:
        write("/proc/self/setgroups", "deny")
        map_to("/proc/self", user, group)


def in_memory(content: bytes) -> int:
    """An open file for the program that this process becomes."""
    descriptor = os.memfd_create("filter", 0)
    os.write(descriptor, content)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def join(groups: list[str]) -> None:
    """Moves this process to the groups, except those it may not join: the resource limits hold anyway."""
    for path in groups:
        try:
            write(path, "0")
        except OSError:
            continue


def limit(limits: list[tuple[int, int]]) -> None:
    """After `become_nobody`: the kernel counts tasks for each user namespace, and for those that are made in it."""
    for kind, value in limits:
        most = resource.getrlimit(kind)[1]
        value = value if most == resource.RLIM_INFINITY else min(value, most)  # noqa: PLW2901
        resource.setrlimit(kind, (value, value))


def map_to(process: str, user: int, group: int) -> None:
    write(f"{process}/uid_map", f"0 {user} 1")
    write(f"{process}/gid_map", f"0 {group} 1")


def write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def loopback(port: int) -> int:
    """Listens on the loopback interface of this network namespace, which is down at first."""
    listening = _socket.socket()
    request = b"lo".ljust(16, b"\0") + IFF_UP.to_bytes(2, sys.byteorder) + bytes(14)
    fcntl.ioctl(listening.fileno(), SIOCSIFFLAGS, request)
    listening.bind(("127.0.0.1", port))
    listening.listen(128)
    return listening.detach()


def hand_over(descriptor: int, path: str) -> None:
    """Sends an open file to the listener on that socket, and closes it."""
    owner = _socket.socket(_socket.AF_UNIX)
    owner.connect(path)
    rights = descriptor.to_bytes(4, sys.byteorder)
    owner.sendmsg([b"."], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, rights)])
    owner.close()
    os.close(descriptor)


if __name__ == "__main__":
    main()
