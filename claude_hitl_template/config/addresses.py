"""Which addresses are public, and what a URL leads to: for what is reached on behalf of others."""

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

from claude_hitl_template.domain.policy.web import clear_name

PORTS = {"http": 80, "https": 443}
# Top-level names that the internet has not: RFC 6761, 6762 (appendix G) and 8375, and what systems call themselves.
NEVER_PUBLIC = (
    "corp", "home", "home.arpa", "internal", "intranet", "invalid", "lan", "local", "localdomain", "localhost", "private",
    "test",
)  # fmt: skip
# What Python's list of addresses that are not global lacks.
NOT_PUBLIC = tuple(
    ipaddress.ip_network(network)
    for network in (
        "168.63.129.16/32",  # Azure's service for its machines, from inside of them alone
        "192.0.0.0/24",  # of protocols, not of hosts
        "192.88.99.0/24",  # relays of 6to4, which led into other networks
        "64:ff9b:1::/48",  # NAT64 of one's own network, whatever lies behind
        "3fff::/20",  # for documentation
        "5f00::/16",  # segments of one's own network
        "fec0::/10",  # site-local
    )
)
# Their last 32 bits are an IPv4 address: NAT64, IPv4-compatible, IPv4-translated.
EMBEDDING = tuple(ipaddress.ip_network(network) for network in ("64:ff9b::/96", "::/96", "::ffff:0:0:0/96"))

type Host = tuple[str, int]
type Resolve = Callable[[str, int], Awaitable[list[str]]]


async def resolve(name: str, port: int) -> list[str]:
    """The addresses of a name, as this machine knows them. Raises OSError."""
    found = await asyncio.get_running_loop().getaddrinfo(name, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[4][0]) for address in found))


def is_public(address: str) -> bool:
    """Whether an address is public: not loopback, private, link-local (metadata), reserved or multicast, and not an embedded
    form of one of those."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if any(found in network for network in NOT_PUBLIC if network.version == found.version):
        return False
    inner = _embedded(found)
    if inner is not None:
        return is_public(str(inner))
    return found.is_global and not found.is_multicast


def _embedded(found: ipaddress.IPv4Address | ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address inside of an IPv6 address."""
    if isinstance(found, ipaddress.IPv4Address):
        return None
    inner = found.ipv4_mapped or found.sixtofour or (found.teredo[1] if found.teredo else None)
    if inner is None and any(found in network for network in EMBEDDING):
        return ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
    return inner


def plain(address: str) -> str:
    """The address without its zone; the IPv4 address inside of an IPv6 address, if there is one."""
    found = ipaddress.ip_address(address.partition("%")[0])
    return str(_embedded(found) or found)


def is_own(address: str) -> bool:
    """Whether it is one of this machine's addresses, public ones too: its services listen there. Nothing is sent."""
    found = ipaddress.ip_address(address)
    if found.is_loopback or found.is_unspecified:
        return True
    family = socket.AF_INET6 if found.version == 6 else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as one:
        try:
            one.connect((address, 9))
        except OSError:  # no route leads there
            return False
        return bool(one.getsockname()[0] == address)  # the kernel answers an address of its own from itself


def may_reach(address: str) -> bool:
    return is_public(address) and not is_own(address)


def host_of(url: str) -> Host | None:
    """Host and port of a URL; None if it is not http or https, or its host is ambiguous."""
    try:
        found = urlsplit(url)
        port = PORTS[found.scheme] if found.port is None else found.port
        name = clear_name((found.hostname or "").encode("idna").decode())
    except (ValueError, KeyError):
        return None
    return (name, port) if name and port else None


def is_private_name(name: str) -> bool:
    """Whether a name certainly has no public address, without a DNS query."""
    return "." not in name or name.endswith(tuple(f".{top}" for top in NEVER_PUBLIC))


def is_private(name: str, may_reach: Callable[[str], bool] = may_reach) -> bool:
    """Whether a host is certainly this machine or in a private network, without a DNS query.

    Args:
        name: A name or an address, as `host_of` has it.
        may_reach: Whether an address is one that others may be sent to.
    """
    return not may_reach(name) if is_address(name) else is_private_name(name)


def is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
