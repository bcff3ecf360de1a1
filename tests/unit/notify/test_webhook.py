"""Webhooks against real servers: what they receive, and the outcome when they take, refuse or spoil it."""

import asyncio
from base64 import b64decode
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import anthropic
import pytest
from standardwebhooks import Webhook, WebhookVerificationError

from claude_hitl_template.domain.models import utcnow
from claude_hitl_template.domain.notices import SESSION_KINDS, Channel, Notice, Parcel
from claude_hitl_template.errors import InvalidInput
from claude_hitl_template.notify import webhook
from claude_hitl_template.notify.addresses import Targets
from claude_hitl_template.notify.sender import Gone, Outcome, Refused, Retry, Sent
from claude_hitl_template.notify.webhook import WebhookSender, new_secret, rotated

SECRET = new_secret()
LINK = "https://hitl.example.org/claude-hitl/inbox"
NOT_IN_THE_SDK = {"session.failed"}


def parcel(url: str, kind: Any = "session.requires_action", **more: Any) -> Parcel:
    now = utcnow()
    given = {"workspace_id": "wrkspc_1", "session_id": "sesn_1", "created_at": now, "title": "t"} | more
    return Parcel(
        delivery_ids=("dlv_1",),
        attempt=1,
        notice=Notice(id="ntc_1", kind=kind, **given),
        channel=Channel(
            id="chan_1", kind="webhook", workspace_id="wrkspc_1", settings={"url": url}, created_at=now
        ),
        secret={"signing": SECRET},
    )


type Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def target(handle: Handler) -> AsyncIterator[int]:
    """A TCP server on loopback; its port."""

    async def guarded(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await handle(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(guarded, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


class Received:
    """What a target got, which answers with the bytes that it was given."""

    def __init__(self, answer: bytes) -> None:
        self.answer, self.headers, self.body = answer, dict[str, str](), ""

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        self.headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
        # A signature is case-sensitive.
        for line in head[1:]:
            name, _, value = line.partition(": ")
            if name:
                self.headers[name.lower()] = value
        self.body = (await reader.readexactly(int(self.headers["content-length"]))).decode()
        writer.write(self.answer)
        await writer.drain()


def answer(status: str, *headers: str, body: bytes = b"") -> bytes:
    lines = [f"HTTP/1.1 {status}", f"content-length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


@asynccontextmanager
async def sender(targets: Targets, timeout_s: float = 5.0) -> AsyncIterator[WebhookSender]:
    made = WebhookSender(targets, timeout_s=timeout_s)
    yield made
    await made.close()


async def sent_to(handle: Handler, timeout_s: float = 5.0, **more: Any) -> Outcome:
    async with target(handle) as port, sender(Targets([f"127.0.0.1:{port}"]), timeout_s) as made:
        return await made.send(parcel(f"http://127.0.0.1:{port}/hook", **more), LINK)


@pytest.mark.parametrize("kind", sorted(set(SESSION_KINDS) - NOT_IN_THE_SDK))
async def test_the_official_sdk_verifies_and_parses_every_session_event(kind: str):
    received = Received(answer("204 No Content"))
    assert await sent_to(received, kind=kind) == Sent()
    client = anthropic.Anthropic(api_key="none")
    event = client.beta.webhooks.unwrap(received.body, headers=received.headers, key=SECRET)
    assert (event.type, event.id, event.data.type) == ("event", "ntc_1", kind)
    assert event.data.id == "sesn_1"
    assert type(event.data).model_fields["type"].annotation.__args__ == (kind,)  # pyright: ignore
    assert event.created_at.tzinfo is not None


async def test_an_approvals_event_has_its_id_and_no_more():
    received = Received(answer("200 OK"))
    assert (
        await sent_to(received, kind="approval.decided", approval_id="appr_1", severity="high", result="deny")
        == Sent()
    )
    event = Webhook(SECRET).verify(received.body, received.headers)
    assert event["data"] == {
        "type": "approval.decided", "id": "sesn_1", "organization_id": "claude-hitl", "workspace_id": "wrkspc_1",
        "url": LINK, "approval_id": "appr_1", "severity": "high", "result": "deny",
    }  # fmt: skip
    parsed = anthropic.Anthropic(api_key="none").beta.webhooks.unwrap(
        received.body, headers=received.headers, key=SECRET
    )
    assert parsed.data.type == "approval.decided"
    assert isinstance(parsed.id, str)
    with pytest.raises(WebhookVerificationError):
        Webhook(new_secret()).verify(received.body, received.headers)


async def test_for_a_day_a_replaced_secret_signs_as_well():
    before, now = {"signing": SECRET}, utcnow()
    after = rotated(before, new_secret(), now)
    headers = webhook.signed(after, "ntc_1", "{}", now)
    for key in (SECRET, after["signing"]):
        assert Webhook(key).verify("{}", headers) == {}
    late = webhook.signed(after, "ntc_1", "{}", now + timedelta(hours=25))
    assert len(late["webhook-signature"].split()) == 1


@pytest.mark.parametrize(
    ("said", "outcome"),
    [
        (answer("200 OK", body=b"thanks"), Sent()),
        (answer("500 Oops"), Retry("HTTP 500")),
        (answer("429 Too Many", "retry-after: 120"), Retry("HTTP 429", 120.0)),
        (answer("410 Gone"), Gone("HTTP 410")),
        (answer("404 Not Found"), Gone("HTTP 404")),
        (answer("400 Bad"), Refused("HTTP 400")),
        (
            answer("302 Found", "location: http://169.254.169.254/latest/meta-data/"),
            Refused("HTTP 302: redirects are not followed; register the address that it leads to"),
        ),
        (
            b"garbage\r\n\r\n",
            Retry("127.0.0.1 cannot be reached, or does not speak HTTP (RemoteProtocolError)"),
        ),
        (b"", Retry("127.0.0.1 cannot be reached, or does not speak HTTP (RemoteProtocolError)")),
        (answer("200 OK", "content-encoding: gzip", body=b"not gzip"), Sent()),
    ],
)
async def test_what_an_answer_means(said: bytes, outcome: Outcome):
    assert await sent_to(Received(said)) == outcome


async def test_a_refused_connection_is_tried_again():
    async with target(Received(b"")) as port:
        pass
    async with sender(Targets([f"127.0.0.1:{port}"])) as made:
        assert isinstance(await made.send(parcel(f"http://127.0.0.1:{port}/"), LINK), Retry)


async def test_an_answer_of_five_megabytes_is_not_read():
    written = 0

    async def large(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal written
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 5000000\r\n\r\n")
        while written < 5_000_000:
            writer.write(b"x" * 50_000)
            await writer.drain()
            written += 50_000

    assert await sent_to(large) == Sent()
    assert written < 5_000_000


@pytest.mark.parametrize("beginning", [b"", b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n", b"HTTP/1.1 200"])
async def test_a_target_that_hangs_is_left_after_the_timeout(beginning: bytes):
    async def hangs(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(beginning)
        await writer.drain()
        await reader.read(-1)

    assert await sent_to(hangs, timeout_s=0.05) == Retry("no answer within 0.05 s")


@pytest.mark.parametrize(
    "url",
    [
        "http://hooks.example.org/",
        "ftp://hooks.example.org/",
        "https://user:password@hooks.example.org/",
        "https://localhost/",
        "https://127.0.0.1/",
        "https://[::1]/",
        "https://[::ffff:127.0.0.1]/",
        "https://2130706433/",
        "https://0x7f.1/",
        "https://10.0.0.1/",
        "https://169.254.169.254/latest/meta-data/",
        "https://metadata.google.internal/",
        "https://hooks.example.org\\@127.0.0.1/",
        "https://",
        "not a url",
        "https://hooks.example.org:99999/",
    ],
)
def test_an_address_that_may_not_be_registered_is_refused_with_the_field(url: str):
    with pytest.raises(InvalidInput) as refused:
        Targets().check(url)
    assert refused.value.field == "url"


@pytest.mark.parametrize("leads_to", ["127.0.0.1", "169.254.169.254", "10.1.2.3", "::1", "fd00::1"])
async def test_a_public_name_that_leads_inside_is_refused_at_delivery(leads_to: str):
    async def resolve(_name: str, _port: int) -> list[str]:
        return [leads_to]

    async with sender(Targets(resolve=resolve)) as made:
        outcome = await made.send(parcel("https://hooks.example.org/"), LINK)
    assert isinstance(outcome, Refused)
    assert "HITL_WEBHOOK_PRIVATE_HOSTS" in outcome.why


async def test_the_address_that_was_checked_is_the_one_that_is_reached():
    """A second answer of the name server, which leads elsewhere, is not asked for."""
    received, asked = Received(answer("200 OK")), list[str]()

    async def resolve(name: str, _port: int) -> list[str]:
        asked.append(name)
        return ["127.0.0.1"]

    async with target(received) as port:
        targets = Targets([f"hooks.example.org:{port}"], resolve=resolve)
        async with sender(targets) as made:
            assert await made.send(parcel(f"http://hooks.example.org:{port}/hook"), LINK) == Sent()
    assert asked == ["hooks.example.org"]
    assert received.headers["host"] == f"hooks.example.org:{port}"


def test_a_secret_is_of_the_form_that_libraries_expect():
    assert SECRET.startswith("whsec_")
    assert len(b64decode(SECRET.removeprefix("whsec_"))) == 32  # the scheme wants 24 to 64
