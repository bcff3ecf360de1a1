"""Simulates hosts on this machine: network namespaces on one bridge, as a laptop, a virtual machine and a second node.

`mac` is only a client: each port of the VM's loopback is forwarded to its own, as OrbStack and `ssh -L` do. What the test
process does while it is `inside` a host, and what it starts there, has that host's network.
"""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
NETWORK = "10.77.0"
ADDRESSES = {"vm": f"{NETWORK}.1", "mac": f"{NETWORK}.2", "node": f"{NETWORK}.3"}
NAMESPACES = Path("/run/netns")
CLONE_NEWNET = 0x40000000


def require_namespaces() -> None:
    """Skips a test if this machine does not permit network namespaces; in CI it fails instead."""
    missing = "" if shutil.which("ip") else "the command ip (apt-get install iproute2)"
    if sys.platform != "linux" or os.getuid() != 0:
        missing = "root on Linux"
    if not missing:
        probe = f"hitl-{uuid.uuid4().hex[:6]}"
        made = _ip("netns", "add", probe, check=False)
        missing = f"network namespaces: {made.stderr.strip()}" if made.returncode else ""
        _ip("netns", "delete", probe, check=False)
    if missing:
        why = f"two hosts cannot be tested without {missing}"
        if os.environ.get("CI"):
            pytest.fail(why)
        pytest.skip(why)


@dataclass
class Hosts:
    """The namespaces; `open` creates them, and `close` removes them completely."""

    mark: str = field(default_factory=lambda: f"hitl-{uuid.uuid4().hex[:6]}")
    forwarders: list[subprocess.Popen[bytes]] = field(default_factory=list[subprocess.Popen[bytes]])

    def open(self) -> None:
        for name in ADDRESSES:
            _ip("netns", "add", self.namespace(name))
            self.ip(name, "link", "set", "lo", "up")
        self.ip("vm", "link", "add", "bridge", "type", "bridge")
        self.ip("vm", "address", "add", f"{ADDRESSES['vm']}/24", "dev", "bridge")
        self.ip("vm", "link", "set", "bridge", "up")
        for name in ("mac", "node"):
            other = ("peer", "name", "eth0", "netns", self.namespace(name))
            self.ip("vm", "link", "add", f"to-{name}", "type", "veth", *other)
            self.ip("vm", "link", "set", f"to-{name}", "master", "bridge", "up")
            self.ip(name, "address", "add", f"{ADDRESSES[name]}/24", "dev", "eth0")
            self.ip(name, "link", "set", "eth0", "up")

    def close(self) -> None:
        for name in ADDRESSES:
            self.end(name)
            _ip("netns", "delete", self.namespace(name), check=False)
        self.unforward()

    def end(self, name: str) -> None:
        """Ends all processes on a host, as if it were switched off."""
        found = [psutil.Process(pid) for pid in self.processes(name) if pid != os.getpid()]
        for process in found:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        psutil.wait_procs(found, timeout=30)

    def processes(self, name: str) -> list[int]:
        """Returns the processes in that host's network, and those that they started: a sandbox has its own network."""
        said = _ip("netns", "pids", self.namespace(name), check=False).stdout
        found = {int(line) for line in said.split()}
        for pid in found - {os.getpid()}:
            with suppress(psutil.NoSuchProcess):
                found |= {child.pid for child in psutil.Process(pid).children(recursive=True)}
        return sorted(found)

    def running(self, name: str, words: str) -> list[int]:
        """Returns the processes on that host whose command line contains `words`."""
        found: list[int] = []
        for pid in self.processes(name):
            with suppress(psutil.Error):
                if words in " ".join(psutil.Process(pid).cmdline()):
                    found.append(pid)
        return found

    @contextmanager
    def cut_off(self, name: str) -> Iterator[None]:
        """Drops all packets to and from that host meanwhile, without an error to either side."""
        self.ip("vm", "link", "set", f"to-{name}", "down")
        try:
            yield
        finally:
            self.ip("vm", "link", "set", f"to-{name}", "up")

    def namespace(self, name: str) -> str:
        return f"{self.mark}-{name}"

    def ip(self, name: str, *args: str) -> None:
        _ip("-n", self.namespace(name), *args)

    def on(self, name: str, *command: str) -> tuple[str, ...]:
        """Returns the command line that runs `command` on that host."""
        return ("ip", "netns", "exec", self.namespace(name), *command)

    @contextmanager
    def inside(self, name: str) -> Iterator[None]:
        """Moves this thread, and the processes that it starts, to that host."""
        with Path("/proc/thread-self/ns/net").open() as before:
            with (NAMESPACES / self.namespace(name)).open() as there:
                os.setns(there.fileno(), CLONE_NEWNET)
            try:
                yield
            finally:
                os.setns(before.fileno(), CLONE_NEWNET)

    def forward(self, ports: Sequence[int]) -> None:
        """Forwards the same ports of the mac to the VM's loopback, until `unforward`."""
        there = str(NAMESPACES / self.namespace("vm"))
        command = (sys.executable, "-m", "tests.acceptance.hosts", there, *map(str, ports))
        forwarder = subprocess.Popen(self.on("mac", *command), cwd=ROOT, stdout=subprocess.PIPE)
        self.forwarders.append(forwarder)
        assert forwarder.stdout is not None
        with forwarder.stdout as said:
            assert said.readline() == b"ready\n"

    def unforward(self) -> None:
        """Ends forwarding, so that the VM looks switched off from the mac."""
        while self.forwarders:
            forwarder = self.forwarders.pop()
            forwarder.kill()
            forwarder.wait()


def _ip(*args: str, check: bool = True) -> "subprocess.CompletedProcess[str]":
    done = subprocess.run(["ip", *args], capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, f"ip {' '.join(args)}: {done.stderr}"
    return done


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while chunk := await reader.read(65536):
            writer.write(chunk)
            await writer.drain()
    writer.close()


async def _serve(namespace: str, ports: list[int]) -> None:
    """Listens in the network in which it was started, and connects in another one."""

    def connected(port: int):
        async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                other_reader, other_writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:  # no process listens in the VM: the connection is closed without an answer
                writer.close()
                return
            await asyncio.gather(_copy(reader, other_writer), _copy(other_reader, writer))

        return one

    for port in ports:
        await asyncio.start_server(connected(port), "127.0.0.1", port)
    with Path(namespace).open() as there:
        os.setns(there.fileno(), CLONE_NEWNET)
    print("ready", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1], [int(port) for port in sys.argv[2:]]))
