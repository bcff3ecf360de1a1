"""The proxy of a sandbox: whom it lets through, and that no name, spelling or address leads round that."""

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import httpx
import pytest

from claude_hitl_template.claude.egress import Egress, host_of, is_public, resolve
from tests.serving import loopback


class Site:
    """An ASGI application that says what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def __call__(self, scope, receive, send) -> None:  # type: ignore[no-untyped-def]
        if scope["type"] != "http":
            return
        body = b""
        while (message := await receive()).get("more_body"):
            body += message.get("body", b"")
        body += message.get("body", b"")
        self.asked.append(f"{scope['method']} {scope['path']}")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"you said " + body})


@pytest.fixture
def site() -> Site:
    return Site()


@pytest.fixture
def address(site: Site) -> Iterator[str]:
    with loopback(site) as url:
        yield url


@asynccontextmanager
async def proxied(egress: Egress) -> AsyncIterator[str]:
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    listening.listen()
    listening.setblocking(False)
    await egress.serve(listening)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        await egress.close()


async def ask(proxy: str, url: str, content: bytes = b"hi") -> httpx.Response:
    async with httpx.AsyncClient(proxy=proxy, trust_env=False) as http:
        return await http.post(url, content=content)


async def connect(proxy: str, target: str) -> bytes:
    """The first line of what a CONNECT is answered with."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(proxy.rpartition(":")[2]))
    writer.write(f"CONNECT {target} HTTP/1.1\r\nhost: {target}\r\n\r\n".encode())
    line = await reader.readline()
    writer.close()
    return line


async def test_a_declared_server_is_reached_on_loopback_too(site: Site, address: str):
    async with proxied(Egress([f"{address}/mcp"])) as proxy:
        answer = await ask(proxy, f"{address}/mcp?x=1", b"many words")
    assert (answer.status_code, answer.content) == (200, b"you said many words")
    assert site.asked == ["POST /mcp"]


async def test_a_declared_server_is_reached_through_a_tunnel(site: Site, address: str):
    target = address.removeprefix("http://")
    async with proxied(Egress([address])) as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(proxy.rpartition(":")[2]))
        writer.write(f"CONNECT {target} HTTP/1.1\r\nhost: {target}\r\n\r\n".encode())
        assert b"200" in await reader.readuntil(b"\r\n\r\n")
        writer.write(f"GET /in HTTP/1.1\r\nhost: {target}\r\nconnection: close\r\n\r\n".encode())
        assert b"you said" in await reader.read()
        writer.close()
    assert site.asked == ["GET /in"]


@pytest.mark.parametrize(
    "url",
    [
        "http://example.org/",
        "http://169.254.169.254/latest/meta-data/",
        "http://127.0.0.1:8265/",
    ],
)
async def test_whoever_is_not_declared_is_not_reached_and_the_agent_is_told(
    site: Site, address: str, url: str
):
    async with proxied(Egress([address])) as proxy:
        answer = await ask(proxy, url)
        line = await connect(proxy, url.removeprefix("http://").split("/")[0])
    assert answer.status_code == 403
    assert "may not reach" in answer.json()["error"]
    assert b"403" in line or b"400" in line
    assert site.asked == []


async def test_another_port_of_a_declared_server_is_another_server(site: Site, address: str):
    async with proxied(Egress([address])) as proxy:
        assert (await ask(proxy, "http://127.0.0.1:1/")).status_code == 403


async def test_the_host_of_an_allowed_call_is_open_until_the_call_has_its_result(site: Site, address: str):
    """The name is one of the internet's; here it leads to a server of the test's own."""
    port = int(address.rpartition(":")[2])

    async def resolve(name: str, _port: int) -> list[str]:
        assert name == "site.example.org"
        return ["127.0.0.1"]

    url = f"http://site.example.org:{port}/page"
    egress = Egress([], resolve=resolve, allows_address=lambda _: True)
    async with proxied(egress) as proxy:
        before = await ask(proxy, url)
        egress.open("toolu_1", url)
        during = await ask(proxy, url)
        egress.shut("toolu_1")
        after = await ask(proxy, url)
    assert [before.status_code, during.status_code, after.status_code] == [403, 200, 403]


@pytest.mark.parametrize(
    "led_to", ["127.0.0.1", "10.1.2.3", "169.254.169.254", "::1", "::ffff:127.0.0.1", "fd00::1", "0.0.0.0"]
)
async def test_a_name_that_leads_into_a_private_network_is_refused_though_it_was_allowed(led_to: str):
    async def resolve(_name: str, _port: int) -> list[str]:
        return [led_to]

    egress = Egress([], resolve=resolve)
    egress.open("toolu_1", "https://innocent.example.org/")
    async with proxied(egress) as proxy:
        line = await connect(proxy, "innocent.example.org:443")
    assert b"403" in line


async def test_every_connection_asks_for_the_name_once_and_goes_where_it_was_told(site: Site, address: str):
    """A name server that answers another address the second time leads nowhere else."""
    port, answers = int(address.rpartition(":")[2]), [["127.0.0.1"], ["127.0.0.2"]]

    async def resolve(_name: str, _port: int) -> list[str]:
        return answers.pop(0)

    egress = Egress([], resolve=resolve, allows_address=lambda one: one == "127.0.0.1")
    egress.open("toolu_1", f"http://rebinding.example.org:{port}/")
    async with proxied(egress) as proxy:
        first = await ask(proxy, f"http://rebinding.example.org:{port}/")
        second = await ask(proxy, f"http://rebinding.example.org:{port}/")
    assert [first.status_code, second.status_code] == [200, 403]


@pytest.mark.parametrize(
    "request_", [b"GET / HTTP/1.1\r\nhost: x\r\n\r\n", b"GET file:///etc/passwd HTTP/1.1\r\nhost: x\r\n\r\n"]
)
async def test_what_is_no_request_for_a_proxy_is_refused(request_: bytes):
    async with proxied(Egress([])) as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(proxy.rpartition(":")[2]))
        writer.write(request_)
        assert b"400" in await reader.readline()
        writer.close()


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("1.1.1.1", True), ("2606:4700:4700::1111", True),
        ("127.0.0.1", False), ("127.9.9.9", False), ("0.0.0.0", False), ("10.0.0.1", False), ("172.16.0.1", False),
        ("192.168.1.1", False), ("100.64.0.1", False), ("169.254.169.254", False), ("224.0.0.1", False),
        ("255.255.255.255", False), ("::", False), ("::1", False), ("fe80::1%eth0", False), ("fc00::1", False),
        ("ff02::1", False), ("::ffff:10.0.0.1", False), ("::ffff:1.1.1.1", True), ("2002:7f00:1::", False),
        ("64:ff9b::7f00:1", False), ("fd00:ec2::254", False),
    ],
)  # fmt: skip
def test_only_addresses_of_the_internet_are_public(address: str, public: bool):
    assert is_public(address) == public


@pytest.mark.parametrize("spelling", ["2130706433", "0x7f000001", "0177.0.0.1", "127.1", "localhost"])
async def test_another_spelling_of_loopback_is_loopback(spelling: str):
    try:
        found = await resolve(spelling, 80)
    except OSError:
        return  # not an address here
    assert not any(is_public(address) for address in found)


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("https://Example.ORG./x", ("example.org", 443)),
        ("http://example.org:8080", ("example.org", 8080)),
        ("http://user@example.org", ("example.org", 80)),
        ("ftp://example.org", None),
        ("http://example.org:x", None),
        ("nonsense", None),
    ],
)
def test_whom_a_url_is_for(url: str, host: tuple[str, int] | None):
    assert host_of(url) == host
