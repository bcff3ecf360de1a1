"""Tries to leave a sandbox: run as an approved command inside of it, it reports which of its attempts would succeed.

    python3 probe.py TARGETS.json

It tries only the test's own targets, and those that every machine has. An attempt checks whether a way is open and never
uses it: nothing is written, killed or changed, even without a sandbox. Needs the standard library only.

TARGETS: {"addresses": [..], "ports": {name: port}, "unix": {name: path}, "abstract": {name: name}, "files": {name: path},
"secrets": [..], "pids": {name: pid}}
"""

import ctypes
import errno
import json
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator

CONNECT_S = 2.0
PROXY = ("127.0.0.1", 3128)
Attempt = Callable[[], bool]


def attempts(targets: dict) -> Iterator[tuple[str, Attempt]]:
    for name, port in targets["ports"].items():
        for address in targets["addresses"]:
            yield f"connect to {name} at {address}", lambda a=address, p=port: connected(a, p)
            yield f"{name} at {address} through the proxy", lambda a=address, p=port: proxied(f"{a}:{p}")
        for path in PATHS:
            yield (
                f"http to {name}{path} through the proxy",
                lambda p=port, at=path: answered(
                    f"GET http://127.0.0.1:{p}{at} HTTP/1.1\r\nHost: 127.0.0.1:{p}\r\n\r\n"
                ),
            )
        for spelling in (*LOOPBACKS, str(targets.get("hostname"))):
            yield f"{name} at {spelling} through the proxy", lambda t=spelling, p=port: proxied(f"{t}:{p}")
        for trick, request in TRICKS.items():
            yield f"{name} by {trick}", lambda r=request, p=port: answered(r.replace("PORT", str(p)))
    for name, path in targets["unix"].items():
        yield f"socket of {name}", lambda p=path: unix(p)
    for name, abstract in targets["abstract"].items():
        yield f"abstract socket of {name}", lambda a=abstract: unix("\0" + a)
    for name, path in targets["files"].items():
        yield f"read {name}", lambda p=path: readable(p)
        yield f"write {name}", lambda p=path: os.path.exists(p) and writable(p)
        yield f"{name} through the root of any process", lambda p=path: through_any_root(p)
    for name, pid in targets["pids"].items():
        yield f"signal {name}", lambda p=pid: signalled(p, targets["secrets"])
        yield f"environment of {name}", lambda p=pid: holds(f"/proc/{p}/environ", targets["secrets"])
        yield f"files of {name}", lambda p=pid: holds_fds(p, targets["secrets"])
    yield "a secret in the environment of any process", lambda: any_environ(targets["secrets"])
    yield "a secret in the memory of any process", lambda: any_memory(targets["secrets"])
    yield "the Claude Code process", lambda: sees_process("claude")
    yield "the owner's process", lambda: sees_process("ray::")
    yield "the model's socket", lambda: unix("/run/hitl/sockets/model")
    yield "any socket in /tmp or /run", any_socket
    yield (
        "the CLI's transcript written",
        lambda: any_writable(os.environ.get("CLAUDE_CONFIG_DIR", "/nowhere")),
    )
    yield "a token in the environment", lambda: any("TOKEN" in k or "API_KEY" in k for k in os.environ)
    for address in ("169.254.169.254", "100.100.100.200", "fd00:ec2::254"):
        yield f"metadata at {address}", lambda a=address: connected(a, 80)
        yield f"metadata at {address} through the proxy", lambda a=address: proxied(f"{a}:80")
    for address in ("1.1.1.1", "8.8.8.8"):
        yield f"routed egress to {address}", lambda a=address: connected(a, 443)
        yield f"egress to {address} through the proxy", lambda a=address: proxied(f"{a}:443")
    yield "egress by name through the proxy", lambda: proxied("example.org:443")
    yield "a name server asked", asked_dns
    yield "a name resolved", lambda: bool(socket.getaddrinfo("example.org", 443))
    yield "a route out", lambda: "\n" in text_of("/proc/net/route").strip()
    yield "another network interface", lambda: len(socket.if_nameindex()) > 1
    yield "a raw socket", lambda: bool(socket.socket(socket.AF_PACKET, socket.SOCK_RAW))
    yield "raw IP", lambda: bool(socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP))
    yield "a socket of any other family", any_family
    yield "events of all processes by netlink", lambda: hears(NETLINK_CONNECTOR)
    yield "audit events by netlink", lambda: hears(NETLINK_AUDIT)
    yield "a port of the CLI", lambda: bool(listening() - {PROXY[1]})
    yield "an abstract socket of the CLI", any_abstract
    yield "a name server through the proxy", lambda: proxied("8.8.8.8:53")
    for path in SYSTEM_FILES:
        yield f"write {path}", lambda p=path: writable(p)
    for path in PRIVATE_FILES:
        yield f"read {path}", lambda p=path: readable(p)
    for name, command in COMMANDS.items():
        yield name, lambda c=command: ran(c)
    yield "become root", lambda: os.setuid(0) is None
    yield "a capability", lambda: has_capability("self")
    yield "a process with a capability", lambda: any(has_capability(pid) for pid in others())
    yield "a real-time priority", lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1)) is None
    yield "a device made", lambda: made_device("/tmp/hitl-probe-device")
    yield "an open file that was inherited", any_inherited
    yield "a terminal", lambda: os.isatty(0) or os.open("/dev/tty", os.O_RDWR) >= 0
    yield "terminals of others", lambda: bool(set(os.listdir("/dev/pts")) - {"ptmx"})
    yield "a setting of the kernel that is not its own", any_sysctl
    yield "the kernel's own folders", lambda: os.path.isdir("/sys/kernel") and bool(os.listdir("/sys/kernel"))
    yield "more capabilities from a program", lambda: "NoNewPrivs:\t1" not in text_of("/proc/self/status")
    yield "a device of the machine", any_device
    yield "shared memory of others", lambda: bool(os.listdir("/dev/shm"))
    yield "message queues of others", lambda: bool(os.listdir("/dev/mqueue"))
    yield "System V memory of others", lambda: len(text_of("/proc/sysvipc/shm").splitlines()) > 1
    yield (
        "the kernel's log",
        lambda: readable("/dev/kmsg") or ctypes.CDLL(None).klogctl(3, bytes(64), 64) >= 0,
    )
    yield (
        "a foreign control group",
        lambda: os.path.isdir("/sys/fs/cgroup") and bool(os.listdir("/sys/fs/cgroup")),
    )
    yield "user namespaces of its own", lambda: ran("unshare --user --map-root-user true")
    yield "a socket to the host of the machine", lambda: bool(socket.socket(socket.AF_VSOCK))
    for name in CALLS:
        yield f"the call {name}", lambda n=name: called(n)
    for name in PRIVILEGED:
        yield f"the privileged call {name}", lambda n=name: permitted(n)
    yield (
        "variables of the CLI in process 1",
        lambda: any(one in text_of("/proc/1/environ") for one in ("ANTHROPIC_", "MESSAGING")),
    )
    yield "the name of the machine", lambda: socket.gethostname() == targets.get("hostname")


SYSTEM_FILES = (
    "/proc/sys/kernel/core_pattern", "/proc/sys/kernel/modprobe", "/proc/sys/kernel/hostname", "/proc/sysrq-trigger",
    "/proc/sys/vm/overcommit_memory", "/etc/passwd", "/etc/ld.so.preload", "/etc/claude-code/managed-settings.json",
    "/usr/bin/env", "/bin/sh",
)  # fmt: skip
PRIVATE_FILES = (
    "/etc/shadow", "/root/.ssh", "/root/.claude", "/root/.aws/credentials", "/root/.ray/auth_token", "/proc/kcore",
    "/dev/mem", "/dev/sda", "/dev/vda", "/var/run/docker.sock", "/run/podman/podman.sock", "/etc/resolv.conf",
    "/proc/1/root/root",
)  # fmt: skip
COMMANDS = {
    "the namespaces of its parent": "nsenter -t $PPID -m true",
    "the namespaces of process 1": "nsenter -t 1 -n true",
    "a change of root": "chroot / true",
    "ray on the machine": "ray status",
    "another user": "su -c true",
    "sudo": "sudo -n true",
    "a network namespace": "unshare --net true",
    "a mount namespace": "unshare --mount true",
    "a process namespace": "unshare --pid --fork true",
    "an interface of the network": "ip link add hitl-probe type dummy",
    "a mount": "mount -t tmpfs none /mnt",
}
# Pages of the service that need no key, or that lead to one.
PATHS = (
    "/", "/claude-hitl/v1/version", "/claude-hitl/inbox", "/claude-hitl/sign-in", "/claude-hitl/v1/admin/principals",
    "/claude-hitl/model/v1/messages",
)  # fmt: skip
# Other spellings of this machine's addresses and names.
LOOPBACKS = (
    "localhost", "localhost.", "LOCALHOST", "ip6-localhost", "ip6-loopback", "localhost.localdomain", "0", "0.0.0.0",
    "127.1", "127.0.0.1.", "2130706433", "0x7f000001", "0x7f.1", "0177.0.0.1", "[::1]", "[::]", "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]", "[::127.0.0.1]", "[64:ff9b::7f00:1]", "[2002:7f00:1::]", "[fe80::1%25lo]", "a@127.0.0.1",
    "\u2460\u2461\u2466.\u24ea.\u24ea.\u2460", "127.0.0.1%00.example.org", "127.0.0.1#.example.org",
)  # fmt: skip
# Requests that a proxy and a server behind it might understand in different ways.
TRICKS = {
    "a host header": "GET http://127.0.0.1:PORT/ HTTP/1.1\r\nHost: example.org\r\n\r\n",
    "a path alone": "GET / HTTP/1.1\r\nHost: 127.0.0.1:PORT\r\n\r\n",
    "a user in the URL": "GET http://example.org@127.0.0.1:PORT/ HTTP/1.1\r\nHost: example.org\r\n\r\n",
    "a backslash": "GET http://127.0.0.1:PORT\\@example.org/ HTTP/1.1\r\nHost: example.org\r\n\r\n",
    "a fragment": "GET http://127.0.0.1:PORT#@example.org/ HTTP/1.1\r\nHost: example.org\r\n\r\n",
    "two hosts": "CONNECT 127.0.0.1:PORT HTTP/1.1\r\nHost: example.org\r\nHost: 127.0.0.1:PORT\r\n\r\n",
    "HTTP/1.0": "CONNECT 127.0.0.1:PORT HTTP/1.0\r\n\r\n",
    "a line break in the target": "CONNECT example.org:443\nHost: 127.0.0.1:PORT HTTP/1.1\r\n\r\n",
    "another scheme": "GET https://127.0.0.1:PORT/ HTTP/1.1\r\nHost: 127.0.0.1:PORT\r\n\r\n",
    "a websocket": "GET ws://127.0.0.1:PORT/ HTTP/1.1\r\nHost: 127.0.0.1:PORT\r\nUpgrade: websocket\r\n"
    "Connection: Upgrade\r\n\r\n",
    "a request behind a refused one": "GET http://127.0.0.1:1/ HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
    "GET http://127.0.0.1:PORT/ HTTP/1.1\r\nHost: x\r\n\r\n",
    "two lengths": "POST http://127.0.0.1:PORT/ HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n"
    "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "HTTP/2": "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "socks": "\x04\x01\x00\x50\x7f\x00\x00\x01\x00",
}
NETLINK_AUDIT, NETLINK_CONNECTOR = 9, 11
# Settings below /proc/sys that belong to a namespace: they count in the sandbox alone.
OWN_SETTINGS = ("net/", "user/", "fs/mqueue/", "kernel/msg", "kernel/sem", "kernel/shm", "kernel/auto_msgmni")
OWN_SETTING_NAMES = ("kernel/hostname", "kernel/domainname", "kernel/ns_last_pid")


# Numbers of system calls, by machine.
CALLS = {
    "io_uring_setup": {"x86_64": 425, "aarch64": 425},
    "userfaultfd": {"x86_64": 323, "aarch64": 282},
    "keyctl": {"x86_64": 250, "aarch64": 219},  # with zeros it asks for the id of a keyring
    "add_key": {"x86_64": 248, "aarch64": 217},
    "request_key": {"x86_64": 249, "aarch64": 218},
    "bpf": {"x86_64": 321, "aarch64": 280},
    "perf_event_open": {"x86_64": 298, "aarch64": 241},
}
# Calls that the kernel checks the permission of before anything else, with arguments that are wrong in any case.
PRIVILEGED = {
    "mount": ({"x86_64": 165, "aarch64": 40}, (b"none", b"/", b"hitl-probe", 0, 0)),
    "fsopen": ({"x86_64": 430, "aarch64": 430}, (b"hitl-probe", 0)),
    "pivot_root": ({"x86_64": 155, "aarch64": 41}, (b"/", b"/")),
    "swapon": ({"x86_64": 167, "aarch64": 224}, (b"/nowhere", 0)),
    "reboot": ({"x86_64": 169, "aarch64": 142}, (0, 0, 0, 0)),
    "init_module": ({"x86_64": 175, "aarch64": 105}, (0, 0, b"")),
    "finit_module": ({"x86_64": 313, "aarch64": 273}, (-1, b"", 0)),
    "kexec_load": ({"x86_64": 246, "aarch64": 104}, (0, 0, 0, 0xFFFF)),
    "sethostname": ({"x86_64": 170, "aarch64": 161}, (b"x", -1)),
    "fanotify_init": ({"x86_64": 300, "aarch64": 262}, (8, 0)),
    "open_by_handle_at": ({"x86_64": 304, "aarch64": 265}, (-100, b"\x08\0\0\0\x01\0\0\0" + bytes(8), 0)),
    "setns": ({"x86_64": 308, "aarch64": 268}, ("/proc/self/ns/uts", 0)),
}


def permitted(name: str) -> bool:
    """Whether the kernel had another objection than that it is not permitted."""
    numbers, arguments = PRIVILEGED[name]
    given = [os.open(a, os.O_RDONLY) if isinstance(a, str) else a for a in arguments]
    libc = ctypes.CDLL(None, use_errno=True)
    result = libc.syscall(numbers[os.uname().machine], *given)
    return result >= 0 or ctypes.get_errno() not in (errno.EPERM, errno.EACCES, errno.ENOSYS)


def called(name: str) -> bool:
    """Whether the kernel knows the system call. Errors about the invalid arguments do not count."""
    libc = ctypes.CDLL(None, use_errno=True)
    result = libc.syscall(CALLS[name][os.uname().machine], 0, 0, 0, 0, 0)
    return result >= 0 or ctypes.get_errno() != errno.ENOSYS


def connected(address: str, port: int) -> bool:
    socket.create_connection((address, port), CONNECT_S).close()
    return True


def proxied(target: str) -> bool:
    with socket.create_connection(PROXY, CONNECT_S) as proxy:
        proxy.sendall(f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n".encode())
        return proxy.recv(64).split()[1:2] == [b"200"]


def answered(request: str) -> bool:
    """Whether something other than the proxy answers a request; the proxy's refusals are known by their form."""
    with socket.create_connection(PROXY, CONNECT_S) as proxy:
        proxy.settimeout(CONNECT_S)
        proxy.sendall(request.encode("latin-1"))
        found = b""
        while piece := proxy.recv(65536):
            found += piece
            if b'{"error": "' in found:
                return found.count(b"HTTP/1.1 ") > 1
        return b"HTTP/1." in found


def unix(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as one:
        one.settimeout(CONNECT_S)
        one.connect(path)
    return True


def text_of(path: str) -> str:
    with open(path) as file:
        return file.read()


def readable(path: str) -> bool:
    if os.path.isdir(path):
        return bool(os.listdir(path))
    with open(path, "rb") as file:
        return bool(file.read(1))


def writable(path: str) -> bool:
    """Whether the file could be opened for writing, or created; does neither."""
    if os.path.isdir(path):
        return os.access(path, os.W_OK)
    if os.path.exists(path):
        os.close(os.open(path, os.O_WRONLY | os.O_APPEND))
        return True
    parent = os.path.dirname(path)
    while not os.path.exists(parent):
        parent = os.path.dirname(parent)
    return os.access(parent, os.W_OK)


def holds(path: str, secrets: list) -> bool:
    with open(path, "rb") as file:
        found = file.read(1 << 20)
    return any(secret.encode() in found for secret in secrets)


def signalled(pid: int, secrets: list) -> bool:
    """Whether a signal could be sent to the target, which holds the secrets; another process may have its number here."""
    os.kill(pid, 0)
    return holds(f"/proc/{pid}/environ", secrets)


def holds_fds(pid: int, secrets: list) -> bool:
    return any(holds(f"/proc/{pid}/fd/{name}", secrets) for name in os.listdir(f"/proc/{pid}/fd"))


def others() -> list:
    return [pid for pid in os.listdir("/proc") if pid.isdigit() and int(pid) != os.getpid()]


def any_environ(secrets: list) -> bool:
    return any(came_to_something(lambda p=pid: holds(f"/proc/{p}/environ", secrets)) for pid in others())


def any_memory(secrets: list) -> bool:
    def look(pid: str) -> bool:
        with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb") as memory:
            for line in maps:
                if "rw-p" in line:
                    start, end = (int(one, 16) for one in line.split()[0].split("-"))
                    memory.seek(start)
                    found = memory.read(min(end - start, 1 << 22))
                    if any(secret.encode() in found for secret in secrets):
                        return True
        return False

    mine = {str(os.getpid()), str(os.getppid())}  # they have read the targets
    return any(came_to_something(lambda p=pid: look(p)) for pid in others() if pid not in mine)


def sees_process(name: str) -> bool:
    def is_it(pid: str) -> bool:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return os.path.basename(file.read().split(b"\0")[0].decode()).startswith(name)

    return any(came_to_something(lambda p=pid: is_it(p)) for pid in others())


def through_any_root(path: str) -> bool:
    return any(
        came_to_something(lambda p=pid: readable(f"/proc/{p}/root{path}")) for pid in (*others(), "self")
    )


def any_family() -> bool:
    """Whether a socket can be made of a family other than AF_UNIX, AF_INET, AF_INET6 and AF_NETLINK."""

    def made(family: int) -> bool:
        return any(
            came_to_something(lambda k=kind: socket.socket(family, k).fileno() >= 0)
            for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW, socket.SOCK_SEQPACKET)
        )

    return any(made(family) for family in range(3, 64) if family not in (10, 16))


def hears(protocol: int) -> bool:
    """Whether the kernel reports processes that start and end, such as one of this probe's."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, protocol) as one:
        one.settimeout(0.5)
        one.bind((0, 1))
        ran("true")
        return bool(one.recv(1))


def listening() -> set:
    """The TCP ports on which something listens here."""
    lines = [
        line.split() for name in ("tcp", "tcp6") for line in text_of(f"/proc/net/{name}").splitlines()[1:]
    ]
    return {int(line[1].rpartition(":")[2], 16) for line in lines if line[3] == "0A"}


def any_abstract() -> bool:
    names = [line.split()[-1] for line in text_of("/proc/net/unix").splitlines()]
    return any(came_to_something(lambda n=name: unix("\0" + n[1:])) for name in names if name.startswith("@"))


def made_device(path: str) -> bool:
    os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 1))
    os.unlink(path)
    return True


def any_inherited() -> bool:
    """Whether any process here has an open file other than standard streams, pipes, and what commands may read anyway."""
    open_files: set = set()
    streams: set = set()
    for pid in (*others(), "self"):
        for name in os.listdir(f"/proc/{pid}/fd"):
            fd = f"/proc/{pid}/fd/{name}"
            if os.path.lexists(fd):  # the folder's own is closed by now
                (streams if int(name) <= 2 else open_files).add(os.readlink(fd))
    anyway = (os.getcwd(), "/tmp", "/dev/", "/proc/", "/usr/", "/lib", "pipe:", "anon_inode:")
    return any(not found.startswith(anyway) for found in open_files - streams)


def any_sysctl() -> bool:
    found = [os.path.join(at, n)[len("/proc/sys/") :] for at, _, names in os.walk("/proc/sys") for n in names]
    foreign = [n for n in found if not n.startswith(OWN_SETTINGS) and n not in OWN_SETTING_NAMES]
    return any(came_to_something(lambda n=name: writable(f"/proc/sys/{n}")) for name in foreign)


def any_socket() -> bool:
    found = [os.path.join(at, n) for top in ("/tmp", "/run") for at, _, names in os.walk(top) for n in names]
    return any(came_to_something(lambda p=path: unix(p)) for path in found)


def any_writable(folder: str) -> bool:
    return any(came_to_something(lambda a=at: writable(a)) for at, _, _ in os.walk(folder))


def asked_dns() -> bool:
    query = bytes.fromhex("1234010000010000000000000765786d61706c65036f72670000010001")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        one.settimeout(CONNECT_S)
        one.sendto(query, ("8.8.8.8", 53))
        return bool(one.recv(16))


def ran(command: str) -> bool:
    return subprocess.run(["sh", "-c", command], capture_output=True, timeout=20, check=False).returncode == 0


def has_capability(pid: str) -> bool:
    status = text_of(f"/proc/{pid}/status")
    return any(
        int(line.split()[1], 16)
        for line in status.splitlines()
        if line.startswith(("CapEff", "CapPrm", "CapBnd"))
    )


def any_device() -> bool:
    usual = {"null", "zero", "full", "random", "urandom", "tty", "ptmx", "console"}
    return any(
        name not in usual and not os.path.isdir(f"/dev/{name}") and not os.path.islink(f"/dev/{name}")
        for name in os.listdir("/dev")
    )


def came_to_something(attempt: Attempt) -> bool:
    try:
        return bool(attempt())
    except (OSError, ValueError, AttributeError, subprocess.SubprocessError):
        return False


def main() -> None:
    signal.alarm(240)
    with open(sys.argv[1]) as file:
        targets = json.load(file)
    if came_to_something(lambda: connected(*PROXY)):
        print("the proxy answers", flush=True)
    tried = list(attempts(targets))
    for name, attempt in tried:
        if came_to_something(attempt):
            print(f"REACHED {name}", flush=True)
    print(f"tried {len(tried)}")


if __name__ == "__main__":
    main()
