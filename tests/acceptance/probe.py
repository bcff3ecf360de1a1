"""What an approved command may try: run inside of a sandbox, it says of each attempt whether it came to something.

    python3 probe.py TARGETS.json

The targets are of whoever runs the test, and nothing else is tried but what every machine has. An attempt looks whether a
way is open, and never uses it: nothing is written, killed or changed, also where there is no sandbox. Needs the
standard library alone.

TARGETS: {"addresses": [..], "ports": {name: port}, "unix": {name: path}, "abstract": {name: name}, "files": {name: path},
"secrets": [..], "pids": {name: pid}}
"""

import ctypes
import errno
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator

CONNECT_S = 2.0
PROXY = ("127.0.0.1", 3128)
Attempt = Callable[[], bool]


def attempts(targets: dict) -> Iterator[tuple[str, Attempt]]:
    for name, port in targets["ports"].items():
        for address in targets["addresses"]:
            yield f"connect to {name} at {address}", lambda a=address, p=port: connected(a, p)
            yield f"{name} at {address} through the proxy", lambda a=address, p=port: proxied(f"{a}:{p}")
        yield f"http to {name} through the proxy", lambda p=port: fetched(f"http://127.0.0.1:{p}/")
    for name, path in targets["unix"].items():
        yield f"socket of {name}", lambda p=path: unix(p)
    for name, abstract in targets["abstract"].items():
        yield f"abstract socket of {name}", lambda a=abstract: unix("\0" + a)
    for name, path in targets["files"].items():
        yield f"read {name}", lambda p=path: readable(p)
        yield f"write {name}", lambda p=path: os.path.exists(p) and writable(p)
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
    for path in SYSTEM_FILES:
        yield f"write {path}", lambda p=path: writable(p)
    for path in PRIVATE_FILES:
        yield f"read {path}", lambda p=path: readable(p)
    for name, command in COMMANDS.items():
        yield name, lambda c=command: ran(c)
    yield "become root", lambda: os.setuid(0) is None
    yield "a capability", has_capability
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
    for name in ("io_uring_setup", "userfaultfd", "keyctl"):
        yield f"the call {name}", lambda n=name: called(n)
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
}


# Numbers of system calls, by machine.
CALLS = {
    "io_uring_setup": {"x86_64": 425, "aarch64": 425},
    "userfaultfd": {"x86_64": 323, "aarch64": 282},
    "keyctl": {"x86_64": 250, "aarch64": 219},  # with zeros it asks for the id of a keyring
}


def called(name: str) -> bool:
    """Whether the kernel knows the call here; what it says of arguments that make no sense does not count."""
    libc = ctypes.CDLL(None, use_errno=True)
    result = libc.syscall(CALLS[name][os.uname().machine], 0, 0, 0, 0, 0)
    return result >= 0 or ctypes.get_errno() != errno.ENOSYS


def connected(address: str, port: int) -> bool:
    socket.create_connection((address, port), CONNECT_S).close()
    return True


def proxied(target: str) -> bool:
    with socket.create_connection(PROXY, CONNECT_S) as proxy:
        proxy.sendall(f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n".encode())
        return b" 200" in proxy.recv(64)


def fetched(url: str) -> bool:
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({"http": f"http://{PROXY[0]}:{PROXY[1]}"})
    )
    return opener.open(url, timeout=CONNECT_S).status < 400


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
    """Whether it could be opened to be written, or made; it is neither."""
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
    """A process of this number may be one of this command's own."""
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


def has_capability() -> bool:
    status = text_of("/proc/self/status")
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
