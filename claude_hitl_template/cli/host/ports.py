"""Ports of this machine: which are free, which process holds one, and which the system does not assign to others."""

import errno
import random
import socket
from contextlib import suppress
from itertools import islice

import psutil

from claude_hitl_template.errors import ConfigError

_RAY_NAMES = ("raylet", "gcs_server")
# Above what others' Ray workers take by default, and below what Linux and macOS hand out to connections: such a port
# could be taken before the process that it was chosen for listens there.
_CHOSEN_FROM = range(20_000, 32_768)


def free_ports(count: int) -> list[int]:
    """Random free ports, all different."""
    by_chance = random.SystemRandom().sample(_CHOSEN_FROM, len(_CHOSEN_FROM))
    return list(islice(filter(is_free, by_chance), count))


def check_free(port: int, name: str) -> None:
    """`name` is the variable that chooses the port. Raises ConfigError, with who has it."""
    if not is_free(port):
        raise ConfigError(*taken(port, name))


def check_address(host: str, name: str) -> None:
    """`name` is the variable that chooses the address. Raises ConfigError where this machine does not have it."""
    if not is_own(host):
        raise ConfigError(
            f"{host} ({name}) is not an address of this machine, so nothing can listen on it",
            f"set {name} to 127.0.0.1, 0.0.0.0, or an IPv4 address that `ip address` or `ifconfig` shows",
        )


def is_own(host: str) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((host, 0))
        except OSError:
            return False
    return True


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return False
            raise ConfigError(
                f"port {port} cannot be used: {error.strerror}", "choose one above 1023"
            ) from error
    return True


def taken(port: int, name: str) -> tuple[str, str]:
    """The problem and the fix for a port that is taken."""
    holder = holder_of(port)
    if holder is None:
        return f"port {port} ({name}) is taken by another process", f"choose another port with {name}"
    who = f"{holder.name()} (process {holder.pid})"
    if _is_ray(holder):
        return (
            f"port {port} ({name}) is taken by another Ray cluster: {who}",
            "choose other ports (HITL_RAY_PORT and so on, see .env.example), or end that cluster with its own means",
        )
    return f"port {port} ({name}) is taken by {who}", f"end it, or choose another port with {name}"


def holder_of(port: int) -> psutil.Process | None:
    """The process that listens on a port, as far as this user may know."""
    try:
        listening = psutil.net_connections("tcp")
        pid = next(
            c.pid for c in listening if c.status == psutil.CONN_LISTEN and c.laddr and c.laddr[1] == port
        )
        return psutil.Process(pid) if pid else None
    except (StopIteration, psutil.Error):
        return None


def _is_ray(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        line = " ".join(process.cmdline())
        return process.name() in _RAY_NAMES or "ray/dashboard" in line or "ray.util.client.server" in line
    return False
