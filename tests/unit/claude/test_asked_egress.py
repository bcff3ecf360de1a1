"""The proxy of a sandbox permits what the environment, a rule or a human allows; one is asked once about any other host."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from claude_hitl_template.config.addresses import may_reach
from claude_hitl_template.domain.events import UserInterrupt, UserMessage, UserToolConfirmation
from claude_hitl_template.domain.models import Agent, Approval, ApprovalState, Environment, Networking
from claude_hitl_template.domain.people import Actor
from claude_hitl_template.domain.policy import PermissionPolicy, Rule
from claude_hitl_template.errors import Unavailable
from claude_hitl_template.session.hosts import HostGate
from claude_hitl_template.session.judge import Judge
from claude_hitl_template.store.core import CoreStore
from claude_hitl_template.store.owners import HOSTS_AT_ONCE
from claude_hitl_template.testing.memory_backend import MemoryBackend
from tests.serving import loopback
from tests.unit.claude.proxies import Site, ask, connect, made, proxied

KEY = "key_1"
NOTHING_LISTED = Networking()


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
