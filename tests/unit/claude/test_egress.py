"""The proxy of a sandbox permits listed hosts only; no spelling of a name or address bypasses it."""

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import structlog

from claude_hitl_template.claude.egress import REFUSALS_TOLD, Egress
from claude_hitl_template.config.addresses import host_of, is_own, is_public, may_reach, resolve
from tests.unit.claude.proxies import Listed, Site, Unasked, ask, connect, made, proxied


async def test_nothing_gets_out_before_a_session_is_assigned(address: str, site: Site):
    egress = Egress([address], None, allows_address=lambda _: True)
    async with proxied(egress) as proxy:
        refused = await ask(proxy, f"{address}/x")
        assert (refused.status_code, site.asked) == (403, [])
        egress.bind(Listed())  # type: ignore[arg-type]
        assert (await ask(proxy, f"{address}/x")).status_code == 200


async def test_a_listed_server_is_reached_on_loopback_too(site: Site, address: str):
    async with proxied(made([f"{address}/mcp"], Unasked("anywhere"))) as proxy:
        answer = await ask(proxy, f"{address}/mcp?x=1", b"many words")
    assert (answer.status_code, answer.content) == (200, b"you said many words")
    assert site.asked == ["POST /mcp"]


@pytest.mark.parametrize("name", ["127.0.0.1", "127.0.0.2", "0.0.0.0", "localhost", "wiki.example.org"])
async def test_no_declared_server_is_the_service_itself(site: Site, address: str, name: str):
    """A client of the API may name any server; Ray's ports, the panel's and the API's are not for its sessions."""

    async def resolve(_name: str, _port: int) -> list[str]:
        return ["::ffff:127.0.0.1"]

    port = address.rpartition(":")[2]
    server = f"http://{name}:{port}/mcp"
    for declared, hosts in (([server], Unasked()), ([server], Unasked("anywhere")), ([], Listed())):
        egress = made(declared, hosts, resolve=resolve, closed=[f"http://127.0.0.1:{port}"])
        async with proxied(egress) as proxy:
            assert (await ask(proxy, f"http://{name}:{port}/mcp")).status_code == 403
    assert site.asked == []


@pytest.mark.parametrize("server", ["169.254.169.254", "[fd00:ec2::254]", "100.100.100.200"])
async def test_no_declared_server_is_a_clouds_metadata_service(server: str):
    async with proxied(made([f"http://{server}/latest"])) as proxy:
        assert b" 403 " in await connect(proxy, f"{server}:80")


async def test_a_declared_server_is_reached_through_a_tunnel(site: Site, address: str):
    target = address.removeprefix("http://")
    async with proxied(made([address], Unasked("anywhere"))) as proxy:
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
    async with proxied(made([address], Unasked("anywhere"))) as proxy:
        answer = await ask(proxy, url)
        line = await connect(proxy, url.removeprefix("http://").split("/")[0])
    assert answer.status_code == 403
    assert "may not reach" in answer.json()["error"]
    assert b"403" in line or b"400" in line
    assert site.asked == []


async def test_another_port_of_a_declared_server_is_another_server(site: Site, address: str):
    async with proxied(made([address], Unasked("anywhere"))) as proxy:
        assert (await ask(proxy, "http://127.0.0.1:1/")).status_code == 403


async def test_the_host_of_an_allowed_call_is_open_until_the_call_has_its_result(site: Site, address: str):
    """The name counts as public; here it resolves to the test's own server."""
    port = int(address.rpartition(":")[2])

    async def resolve(name: str, _port: int) -> list[str]:
        assert name == "site.example.org"
        return ["127.0.0.1"]

    url = f"http://site.example.org:{port}/page"
    egress = made([], resolve=resolve, allows_address=lambda _: True)
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

    egress = made([], resolve=resolve)
    egress.open("toolu_1", "https://innocent.example.org/")
    async with proxied(egress) as proxy:
        line = await connect(proxy, "innocent.example.org:443")
    assert b"403" in line


async def test_every_connection_asks_for_the_name_once_and_goes_where_it_was_told(site: Site, address: str):
    """A name server that returns another address the second time cannot redirect the connection."""
    port, answers = int(address.rpartition(":")[2]), [["127.0.0.1"], ["127.0.0.2"]]

    async def resolve(_name: str, _port: int) -> list[str]:
        return answers.pop(0)

    egress = made([], resolve=resolve, allows_address=lambda one: one == "127.0.0.1")
    egress.open("toolu_1", f"http://rebinding.example.org:{port}/")
    async with proxied(egress) as proxy:
        first = await ask(proxy, f"http://rebinding.example.org:{port}/")
        second = await ask(proxy, f"http://rebinding.example.org:{port}/")
    assert [first.status_code, second.status_code] == [200, 403]


async def test_a_command_that_asks_again_and_again_does_not_fill_the_log():
    async with proxied(egress := made([])) as proxy:
        with structlog.testing.capture_logs() as logged:
            for number in range(60):
                assert (await ask(proxy, f"http://n{number % 30}.example.org/")).status_code == 403
            told = egress.refusals()
            assert (await ask(proxy, "http://n1.example.org/")).status_code == 403
    refused = [line for line in logged if line["event"] == "egress refused"]
    assert len(told) == REFUSALS_TOLD
    assert len(refused) == REFUSALS_TOLD + 1  # the last one belongs to the next call


@pytest.mark.parametrize(
    "request_", [b"GET / HTTP/1.1\r\nhost: x\r\n\r\n", b"GET file:///etc/passwd HTTP/1.1\r\nhost: x\r\n\r\n"]
)
async def test_what_is_no_request_for_a_proxy_is_refused(request_: bytes):
    async with proxied(made([])) as proxy:
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
        ("64:ff9b::7f00:1", False), ("64:ff9b::101:101", True), ("64:ff9b:1::101:101", False), ("fd00:ec2::254", False),
        ("::127.0.0.1", False), ("::ffff:0:10.0.0.1", False), ("fec0::1", False), ("5f00::1", False),
        ("3fff::1", False), ("192.88.99.1", False), ("192.0.0.8", False), ("168.63.129.16", False),
    ],
)  # fmt: skip
def test_only_addresses_of_the_internet_are_public(address: str, public: bool):
    assert is_public(address) == public


def test_this_machines_own_addresses_are_known():
    """This includes public ones, on which the service and Ray may listen."""
    assert is_own("127.0.0.1")
    assert not is_own("192.0.2.1")


@pytest.mark.skipif(sys.platform != "linux", reason="it makes a network namespace")
def test_a_public_address_of_this_machine_is_not_reached_though_the_session_may_reach_every_host():
    script = """
import asyncio, socket
from tests.unit.claude.proxies import connect, made, proxied
async def main():
    listening = socket.create_server(("0.0.0.0", 0))
    egress = made([])
    target = f"11.22.33.44:{listening.getsockname()[1]}"
    egress.open("toolu_1", f"https://{target}/")
    async with proxied(egress) as proxy:
        print((await connect(proxy, target)).decode())
asyncio.run(main())
"""
    network = 'ip link set lo up && ip addr add 11.22.33.44/32 dev lo && exec "$0" -c "$1"'
    done = subprocess.run(
        ["unshare", "--map-root-user", "--net", "sh", "-c", network, sys.executable, script],
        cwd=Path(__file__).parents[3], capture_output=True, text=True, check=False,
    )  # fmt: skip
    if "200" not in done.stdout and "403" not in done.stdout:
        pytest.skip(f"no network namespace can be made here: {done.stderr[-200:]}")
    assert "403" in done.stdout


async def test_a_request_with_two_lengths_reaches_the_server_with_one():
    """Servers differ in which length they use, and could take the rest for another request."""
    got = asyncio.Queue[bytes]()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await got.put(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    target = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with proxied(made([f"http://{target}/"], Unasked("anywhere"))) as proxy:
        for lengths in (
            b"content-length: 4\r\ntransfer-encoding: chunked",
            b"transfer-encoding: chunked\r\ncontent-length: 4",
        ):
            reader, writer = await asyncio.open_connection("127.0.0.1", int(proxy.rpartition(":")[2]))
            head = f"POST http://{target}/ HTTP/1.1\r\nhost: {target}\r\n".encode() + lengths
            writer.write(head + b"\r\n\r\n4\r\nabcd\r\n0\r\n\r\n")
            await reader.readline()
            writer.close()
            head = (await got.get()).lower()
            assert b"transfer-encoding: chunked" in head
            assert b"content-length" not in head
    server.close()


@pytest.mark.parametrize(
    "lengths",
    [
        b"content-length: 4\r\ncontent-length: 5",
        b"content-length: +4",
        b"transfer-encoding: chunked, gzip",
        b"transfer-encoding: xchunked",
        b"content-length : 4",
    ],
)
async def test_a_request_whose_end_is_unclear_reaches_no_server(site: Site, address: str, lengths: bytes):
    target = address.removeprefix("http://")
    async with proxied(made([address], Unasked("anywhere"))) as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(proxy.rpartition(":")[2]))
        writer.write(f"POST {address}/ HTTP/1.1\r\nhost: {target}\r\n".encode() + lengths + b"\r\n\r\nabcd")
        assert b" 2" not in await reader.readline()
        writer.close()
    assert site.asked == []


@pytest.mark.parametrize(
    "target",
    [
        "[::ffff:127.0.0.1]:{port}", "[::ffff:7f00:1]:{port}", "[::127.0.0.1]:{port}", "[64:ff9b::7f00:1]:{port}",
        "127.0.0.1.:{port}", "2130706433:{port}", "0x7f.1:{port}", "127.1:{port}", "0.0.0.0:{port}", "[::]:{port}",
        "localhost.:{port}", "evil@127.0.0.1:{port}", "127.0.0.1:{port}@evil", "[::1%25lo]:{port}",
    ],
)  # fmt: skip
async def test_no_spelling_of_loopback_is_reached_though_a_rule_allows_every_host(
    site: Site, address: str, target: str
):
    class Everyone(Unasked):
        def standing(self, host: Any) -> Any:
            return "public"

        async def used(self, host: Any) -> None: ...

    async with proxied(made([], Everyone(), allows_address=may_reach)) as proxy:
        line = await connect(proxy, target.format(port=address.rpartition(":")[2]))
    assert b" 200" not in line
    assert site.asked == []


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
        ("http://user:pass@example.org@evil.example", ("evil.example", 80)),
        ("http://EXAMPLE.org:443", ("example.org", 443)),
        ("http://b\u00fccher.example/", ("xn--bcher-kva.example", 80)),
        ("http://1.1.1.1/", ("1.1.1.1", 80)),
        ("http://[2606:4700::1111]:8080/", ("2606:4700::1111", 8080)),
        ("http://[2606:4700:0:0:0:0:0:1111]/", ("2606:4700::1111", 80)),
        ("http://[::FFFF:127.0.0.1]/", ("::ffff:7f00:1", 80)),
        ("http://[fe80::1%25eth0]/", None),
        ("http://2130706433/", None),
        ("http://0x7f000001/", None),
        ("http://0177.0.0.1/", None),
        ("http://127.1/", None),
        ("http://1.2.3.4.5/", None),
        ("http://example..org/", None),
        ("http://-example.org/", None),
        ("http://exa mple.org/", None),
        ("http://example.org:0/", None),
        ("http://example.org:65536/", None),
        ("http:///x", None),
        ("ftp://example.org", None),
        ("http://example.org:x", None),
        ("nonsense", None),
    ],
)
def test_whom_a_url_is_for(url: str, host: tuple[str, int] | None):
    assert host_of(url) == host
