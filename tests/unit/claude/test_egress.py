"""The proxy of a sandbox permits listed hosts only; no spelling of a name or address bypasses it."""

import asyncio
import socket
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog

from claude_hitl_template.claude.egress import REFUSALS_TOLD, Egress
from claude_hitl_template.config.addresses import Resolve, host_of, is_own, is_public, may_reach, resolve
from claude_hitl_template.domain.events import UserInterrupt, UserMessage, UserToolConfirmation
from claude_hitl_template.domain.models import Agent, Approval, ApprovalState, Environment, Networking
from claude_hitl_template.domain.people import Actor
from claude_hitl_template.domain.policy import PermissionPolicy, Rule
from claude_hitl_template.errors import Unavailable
from claude_hitl_template.session.hosts import Access, HostGate
from claude_hitl_template.session.judge import Judge
from claude_hitl_template.store.core import CoreStore
from claude_hitl_template.store.owners import HOSTS_AT_ONCE
from claude_hitl_template.testing.memory_backend import MemoryBackend
from tests.serving import loopback

KEY = "key_1"
NOTHING_LISTED = Networking()


class Unasked(HostGate):
    """A gate with no listed hosts but MCP servers', and without a way to ask a human."""

    def __init__(self, servers: Access = "public") -> None:
        self._servers: Access = servers

    def denied(self, host: Any) -> None: ...

    def standing(self, host: Any) -> None: ...

    def of_server(self, host: Any) -> Access:
        return self._servers

    def unlisted(self, host: Any) -> str:
        return Environment().refuses_server(*host)

    async def ask(self, host: tuple[str, int]) -> str:
        return f"this session may not reach {host[0]}:{host[1]}"


class Listed(Unasked):
    """The operator has listed every host for private addresses, too."""

    def standing(self, host: Any) -> Any:
        return "anywhere"

    async def used(self, host: Any) -> None: ...


def made(
    declared: Sequence[str],
    hosts: HostGate | None = None,
    resolve: Resolve = resolve,
    allows_address: Callable[[str], bool] = may_reach,
    closed: Sequence[str] = (),
) -> Egress:
    return Egress(declared, hosts or Unasked(), closed=closed, resolve=resolve, allows_address=allows_address)


class Site:
    """An ASGI application that records requests and returns their bodies."""

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
async def proxied(egress: Egress) -> AsyncGenerator[str]:
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    listening.listen()
    listening.setblocking(False)
    await egress.serve(listening)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        await egress.close()


async def test_nothing_gets_out_before_a_session_is_assigned(address: str, site: Site) -> None:
    egress = Egress([address], None, allows_address=lambda _: True)
    async with proxied(egress) as proxy:
        refused = await ask(proxy, f"{address}/x")
        assert (refused.status_code, site.asked) == (403, [])
        egress.bind(Listed())  # type: ignore[arg-type]
        assert (await ask(proxy, f"{address}/x")).status_code == 200


async def ask(proxy: str, url: str, content: bytes = b"hi") -> httpx.Response:
    async with httpx.AsyncClient(proxy=proxy, trust_env=False) as http:
        return await http.post(url, content=content)


async def connect(proxy: str, target: str) -> bytes:
    """Sends CONNECT, and returns the first line of the answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(proxy.rpartition(":")[2]))
    writer.write(f"CONNECT {target} HTTP/1.1\r\nhost: {target}\r\n\r\n".encode())
    line = await reader.readline()
    writer.close()
    return line


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
from tests.unit.claude.test_egress import connect, made, proxied
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


# -- what the environment and rules let through, and what is asked for


@dataclass
class Asking:
    """A session in a turn with the proxy of its sandbox, which resolves every name to the test's own site."""

    store: CoreStore
    session_id: str
    hosts: HostGate
    proxy: str
    port: int
    looked_up: list[str]

    async def get(self, host: str) -> httpx.Response:
        return await ask(self.proxy, f"http://{host}:{self.port}/")

    async def approvals(self) -> list[Approval]:
        return (await self.store.list_approvals(KEY, limit=1000, states=list(ApprovalState))).data

    async def decide(self, approval: Approval, result: Any = "allow", **more: Any) -> None:
        said = UserToolConfirmation(
            type="user.tool_confirmation", tool_use_id=approval.event_id, result=result, **more
        )
        await self.store.send_events(self.session_id, KEY, [said], by=Actor(name="ann"))
        await self.look()

    async def look(self) -> None:
        """Processes decisions, as the owner does when it is notified."""
        now = await self.store.snapshot(self.session_id, 1)
        self.hosts.update(now.session, now.approvals)


@asynccontextmanager
async def asking(
    address: str,
    *rules: tuple[str, Any],
    networking: Networking = NOTHING_LISTED,
    default: Any = None,
    running: str = "pip install x",
    led_to: str = "127.0.0.1",
    store: CoreStore | None = None,
    closed: Sequence[str] = (),
    declared: Sequence[str] = (),
    allows_address: Callable[[str], bool] = lambda one: one == "127.0.0.1",
) -> AsyncGenerator[Asking]:
    store = store or CoreStore(MemoryBackend())
    policy = PermissionPolicy(rules=tuple(Rule(rule=r, policy=p) for r, p in rules), default=default)
    said = UserMessage.model_validate({"type": "user.message", "content": [{"type": "text", "text": "go"}]})
    created = await store.create_session(
        KEY,
        agent=Agent(policy=policy),
        environment=Environment(networking=networking),
        title=None,
        metadata={},
        initial=[said],
    )
    session = await store.acquire(created.id, "owner", lease_s=60)
    [queued] = (await store.snapshot(created.id, 1)).queued
    await store.begin_turn(created.id, 1, queued.id)
    folder = Path("/nonexistent/workspace")
    judge = Judge(folder, lambda _: False, plan_mode=False)
    hosts = HostGate(store, session, judge, workspace=folder, running=lambda: running, expiry=lambda: None)
    looked_up: list[str] = []

    async def resolve(name: str, _port: int) -> list[str]:
        looked_up.append(name)
        return [led_to]

    egress = made([*declared, *closed], hosts, resolve, allows_address, closed)
    async with proxied(egress) as proxy:
        yield Asking(store, created.id, hosts, proxy, int(address.rpartition(":")[2]), looked_up)


async def test_listed_hosts_are_reached_unasked(address: str):
    port = address.rpartition(":")[2]
    listed = Networking(allowed_hosts=(f"one.example.org:{port}", f"*.below.example.org:{port}"))
    async with asking(address, networking=listed) as a:
        told = {
            host: (await a.get(host)).status_code
            for host in (
                *("one.example.org", "ONE.Example.ORG.", "x.y.below.example.org"),
                *("below.example.org", "two.example.org"),
            )
        }  # fmt: skip
        asked = [approval.input["host"] for approval in await a.approvals()]
    assert list(told.values()) == [200, 200, 200, 403, 403]
    assert sorted(asked) == ["below.example.org", "two.example.org"]


async def test_a_listed_host_without_a_port_is_listed_for_80_and_443(address: str):
    async with asking(address, networking=Networking(allowed_hosts=("one.example.org",))) as a:
        assert (await a.get("one.example.org")).status_code == 403
        assert (
            a.hosts.standing(("one.example.org", 443))
            == a.hosts.standing(("one.example.org", 80))
            == "public"
        )


async def test_an_unrestricted_environment_reaches_every_public_host_and_no_other(site: Site, address: str):
    wide = Networking(type="unrestricted")
    async with asking(address, networking=wide) as a:
        assert (await a.get("any.example.org")).status_code == 200
    async with asking(address, networking=wide, led_to="169.254.169.254") as a:
        answer = await a.get("metadata.example.org")
        assert (answer.status_code, "private network" in answer.json()["error"]) == (403, True)
        assert await a.approvals() == []


async def test_a_private_host_that_the_operator_names_is_reached_wherever_it_is(address: str):
    port = address.rpartition(":")[2]
    async with asking(address, networking=Networking(private_hosts=(f"mirror.example.org:{port}",))) as a:
        assert (await a.get("mirror.example.org")).status_code == 200
        assert a.hosts.standing(("mirror.example.org", int(port))) == "anywhere"


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost", "wiki.example.org"])
async def test_an_mcp_server_at_a_private_address_is_reached_only_if_the_environment_lists_it(
    site: Site, address: str, name: str
):
    """Each name leads to this machine; the refusal says what to put where."""
    port = address.rpartition(":")[2]
    server, entry = f"http://{name}:{port}/mcp", f"{name}:{port}"
    answers: list[httpx.Response] = []
    for networking in (
        NOTHING_LISTED,
        Networking(type="unrestricted", allowed_hosts=(entry,)),
        Networking(private_hosts=(f"{name}:1",)),
        Networking(private_hosts=(entry,)),
    ):
        async with asking(address, networking=networking, declared=[server], allows_address=may_reach) as a:
            answers.append(await ask(a.proxy, server))
            assert await a.approvals() == []
    assert [answer.status_code for answer in answers] == [403, 403, 403, 200]
    assert f"HITL_PRIVATE_HOSTS={entry} " in answers[0].json()["error"]
    assert site.asked == ["POST /mcp"]


@pytest.mark.parametrize("rule", ["Network(bad.example.org)", "Network(*.example.org)", "Network"])
async def test_a_deny_rule_wins_over_the_environment_and_is_not_asked_about(address: str, rule: str):
    async with asking(address, (rule, "always_deny"), networking=Networking(type="unrestricted")) as a:
        answer = await a.get("bad.example.org")
        assert (answer.status_code, rule in answer.json()["error"]) == (403, True)
        assert await a.approvals() == []
    assert a.looked_up == []


async def test_an_allow_rule_lets_through_unasked(address: str):
    port = address.rpartition(":")[2]
    async with asking(address, (f"Network(*.example.org:{port})", "always_allow")) as a:
        assert (await a.get("any.example.org")).status_code == 200


@pytest.mark.parametrize(("default", "asked"), [("always_allow", 1), ("always_ask", 1), ("always_deny", 0)])
async def test_no_default_of_an_agent_opens_the_network(address: str, default: Any, asked: int):
    async with asking(address, default=default) as a:
        assert (await a.get("any.example.org")).status_code == 403
        assert len(await a.approvals()) == asked


async def test_nothing_is_looked_up_before_it_may_be_reached(address: str):
    """A DNS request can carry data out, too."""
    async with asking(address) as a:
        await a.get("secret-in-a-name.example.org")
        assert a.looked_up == []
        [approval] = await a.approvals()
        await a.decide(approval)
        assert (await a.get("secret-in-a-name.example.org")).status_code == 200
        assert a.looked_up == ["secret-in-a-name.example.org"]


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "10.0.0.1",
        "169.254.169.254",
        "[::1]",
        "[::ffff:10.0.0.1]",
        "router",
        "db.internal",
        "db.localdomain",
        "nas.lan",
        "x.localhost",
    ],
)
async def test_nobody_is_asked_about_what_is_private_whatever_is_said(address: str, host: str):
    async with asking(address) as a:
        assert b" 403 " in await connect(a.proxy, f"{host}:{a.port}")
        assert await a.approvals() == []


async def test_a_name_that_leads_into_a_private_network_is_refused_after_an_allow_too(address: str):
    async with asking(address, led_to="10.0.0.1") as a:
        await a.get("innocent.example.org")
        [approval] = await a.approvals()
        await a.decide(approval)
        answer = await a.get("innocent.example.org")
    assert (answer.status_code, "private network" in answer.json()["error"]) == (403, True)


async def test_the_services_own_public_address_is_closed_whatever_allows_it(address: str):
    """Behind a load balancer it may be an address like any other; its sign-in page is not for agents."""
    async with asking(
        address, networking=Networking(type="unrestricted"), closed=["https://hitl.example.org"]
    ) as a:
        assert b" 403 " in await connect(a.proxy, "HITL.example.org.:443")
        assert a.looked_up == []
        assert b" 200 " in await connect(
            a.proxy, f"hitl.example.org:{a.port}"
        )  # another service of that host


async def test_a_redirect_into_a_private_network_leads_nowhere(address: str):
    """The proxy follows no redirect; a client that does requests the other host from the proxy."""

    async def app(scope: Any, _receive: Any, send: Any) -> None:
        headers = [(b"location", b"http://169.254.169.254/latest/meta-data/")]
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 302, "headers": headers})
            await send({"type": "http.response.body", "body": b""})

    with loopback(app) as redirecting:
        async with (
            asking(redirecting, networking=Networking(type="unrestricted")) as a,
            httpx.AsyncClient(proxy=a.proxy, trust_env=False, follow_redirects=True) as http,
        ):
            answer = await http.get(f"http://one.example.org:{a.port}/")
    assert answer.history[0].status_code == 302
    assert (answer.status_code, str(answer.url)) == (403, "http://169.254.169.254/latest/meta-data/")


@pytest.mark.parametrize("at_once", [True, False])
async def test_a_hundred_requests_to_one_host_are_one_question(address: str, at_once: bool):
    async with asking(address) as a:
        if at_once:
            await asyncio.gather(*(a.hosts.ask(("one.example.org", 443)) for _ in range(100)))
        else:
            for _ in range(100):
                await a.hosts.ask(("one.example.org", 443))
                await a.look()
        assert len(await a.approvals()) == 1


async def test_another_port_is_another_question(address: str):
    async with asking(address) as a:
        await a.hosts.ask(("one.example.org", 443))
        await a.hosts.ask(("one.example.org", 8443))
        assert sorted(approval.input["port"] for approval in await a.approvals()) == [443, 8443]


async def test_no_more_than_twenty_hosts_wait_at_once(address: str):
    async with asking(address) as a:
        said = [await a.hosts.ask((f"h{n}.example.org", 443)) for n in range(HOSTS_AT_ONCE + 5)]
        assert len(await a.approvals()) == HOSTS_AT_ONCE
    assert [str(HOSTS_AT_ONCE) in str(one) for one in said] == [False] * HOSTS_AT_ONCE + [True] * 5


async def test_nobody_is_asked_when_no_call_runs(address: str):
    async with asking(address, running="") as a:
        assert (await a.get("one.example.org")).status_code == 403
        assert await a.approvals() == []


async def test_a_denied_host_stays_refused_in_its_turn_and_the_agent_is_told_why(address: str):
    async with asking(address) as a:
        await a.get("one.example.org")
        [approval] = await a.approvals()
        await a.decide(approval, "deny", deny_message="not ours")
        again = [(await a.get("one.example.org")).json()["error"] for _ in range(3)]
        assert all("not ours" in one for one in again)
        assert len(await a.approvals()) == 1
        assert (
            await a.store.get_session(a.session_id)
        ).unreported_refusals == ()  # the refusal itself informed the model


@pytest.mark.parametrize("remember", [True, False])
async def test_what_was_used_after_its_decision_needs_no_reminder(address: str, remember: bool):
    async with asking(address) as a:
        await a.get("one.example.org")
        [approval] = await a.approvals()
        await a.decide(approval, remember=remember)
        assert (await a.get("one.example.org")).status_code == 200
        assert [one.reminded for one in await a.approvals()] == [True]


async def test_after_an_interrupt_nothing_is_open_and_nobody_is_asked(address: str):
    async with asking(address) as a:
        await a.get("one.example.org")
        [approval] = await a.approvals()
        await a.decide(approval)
        assert (await a.get("one.example.org")).status_code == 200
        interrupt = UserInterrupt(type="user.interrupt")
        await a.store.send_events(a.session_id, KEY, [interrupt], by=Actor(name="ann"))
        await a.look()
        assert [(await a.get(host)).status_code for host in ("one.example.org", "two.example.org")] == [
            403,
            403,
        ]
        assert len(await a.approvals()) == 1


async def test_a_stale_owner_opens_nothing(address: str):
    async with asking(address) as a:
        await a.get("one.example.org")
        [approval] = await a.approvals()
        await a.decide(approval)
        await a.store.drop_lease(a.session_id, 1)
        await a.store.acquire(a.session_id, "another", lease_s=60)
        assert (await a.get("one.example.org")).status_code == 403
        assert (await a.get("two.example.org")).status_code == 403
        assert len(await a.approvals()) == 1


async def test_a_store_that_is_away_opens_nothing(address: str):
    class StoreUnreachable(CoreStore):
        async def ask_network(self, *_: Any, **__: Any) -> Approval:
            raise Unavailable("the store is unreachable")

    async with asking(address, store=StoreUnreachable(MemoryBackend())) as a:
        answer = await a.get("one.example.org")
    assert (answer.status_code, "try again" in answer.json()["error"]) == (403, True)


async def test_what_a_connect_is_refused_for_is_in_the_first_line(address: str):
    """Programs show only this line."""
    async with asking(address) as a:
        line = await connect(a.proxy, "one.example.org:443")
    assert line.startswith(
        b"HTTP/1.1 403 this session may not reach one.example.org:443 yet: a human was asked"
    )


@pytest.mark.parametrize(
    "target",
    [
        "user@one.example.org:443",
        "one.example.org:443/x",
        "a.example\\@x.example:443",
        "one.example.org",
        "x:y",
        "0x7f.1:1",
    ],
)
async def test_a_tunnel_to_what_can_be_read_in_two_ways_is_refused(address: str, target: str):
    async with asking(address, networking=Networking(type="unrestricted")) as a:
        assert b" 400 " in await connect(a.proxy, target)


async def test_a_large_body_goes_through_a_tunnel_both_ways(address: str):
    """pip and npm fetch packages like this: CONNECT, several requests on one connection, bodies of some MiB."""
    size = 8 * 1024 * 1024
    async with asking(address, networking=Networking(type="unrestricted")) as a:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(a.proxy.rpartition(":")[2]))
        target = f"pypi.example.org:{a.port}"
        writer.write(f"CONNECT {target} HTTP/1.1\r\nhost: {target}\r\n\r\n".encode())
        assert b"200" in await reader.readuntil(b"\r\n\r\n")
        for _ in range(2):
            head = f"POST /up HTTP/1.1\r\nhost: {target}\r\ncontent-length: {size}\r\n\r\n"
            writer.write(head.encode() + b"x" * size)
            await writer.drain()
            assert b"200 OK" in await reader.readuntil(b"\r\n\r\n")
            got = 0
            while got < size + len(b"you said "):
                line = await reader.readuntil(b"\r\n")  # uvicorn answers in chunks
                chunk = int(line, 16)
                got += len(await reader.readexactly(chunk))
                await reader.readexactly(2)
            assert await reader.readuntil(b"\r\n\r\n") == b"0\r\n\r\n"
        writer.close()
