"""Other services by URL: only those of the list, only at permitted addresses, and the URL is shown to no one."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from claude_hitl_template.domain.models import utcnow
from claude_hitl_template.domain.notices import EVERY_WORKSPACE, Channel, Notice, Parcel
from claude_hitl_template.errors import InvalidInput
from claude_hitl_template.notify.addresses import Targets
from claude_hitl_template.notify.sender import Outcome, Refused, Retry, Sent
from claude_hitl_template.notify.services import ServiceSender, service_name

LINK = "https://hitl.example.org/claude-hitl/inbox/a/appr_1"


@asynccontextmanager
async def service(answer: bytes, bodies: list[dict[str, Any]]) -> AsyncIterator[int]:
    """A service on a port of this machine that keeps what it is sent."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = int(head.partition("content-length: ")[2].partition("\r\n")[0] or 0)
        bodies.append(json.loads(await reader.readexactly(length) or b"{}"))
        writer.write(b"HTTP/1.1 " + answer + b"\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]


async def send(url: str, targets: Targets) -> Outcome:
    notice = Notice(
        id="ntce_1", kind="approval.requested", workspace_id="w", approval_id="appr_1", created_at=utcnow(),
        title="Bash waits for approval",
    )  # fmt: skip
    channel = Channel(id="chan_1", kind="apprise", workspace_id=EVERY_WORKSPACE, created_at=utcnow())
    parcel = Parcel(delivery_ids=("d",), attempt=1, notice=notice, channel=channel, secret={"url": url})
    return await ServiceSender(targets).send(parcel, LINK)


async def test_a_notice_reaches_a_service_and_a_refusal_is_tried_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    bodies: list[dict[str, Any]] = []
    async with service(b"200 OK", bodies) as port:
        url = f"json://user:s3cret@127.0.0.1:{port}/hook"
        targets = Targets([f"127.0.0.1:{port}"])
        assert service_name(url, targets) == "JSON"
        assert await send(url, targets) == Sent()
        assert bodies[0]["title"] == "Bash waits for approval"
        assert LINK in bodies[0]["message"]
        assert await send(url, Targets()) == Refused(
            "https only; http is for hosts that HITL_WEBHOOK_PRIVATE_HOSTS names"
        )
    failed = Retry("JSON cannot be reached, or refused it")
    for answer in (b"500 No", b"302 Elsewhere\r\nlocation: http://169.254.169.254/"):
        async with service(answer, bodies) as port:
            url = f"json://user:s3cret@127.0.0.1:{port}/hook"
            assert await send(url, Targets([f"127.0.0.1:{port}"])) == failed
    assert await send(url, Targets([f"127.0.0.1:{port}"])) == failed  # it does not answer
    assert len(bodies) == 3
    assert "s3cret" not in caplog.text


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("file:///etc/passwd", "begins with one of"),
        ("syslog://", "begins with one of"),
        ("dbus://", "begins with one of"),
        ("windows://", "begins with one of"),
        ("https://hooks.example.org", "begins with one of"),
        ("jsons://169.254.169.254/latest", "private network"),
        ("jsons://localhost/", "private network"),
        ("gotifys://[::1]/token", "private network"),
        ("ntfys://10.0.0.1/topic", "private network"),
        ("ntfys://10.0.0.1?mode=private", "without parameters"),
        ("jsons://hooks.example.org/?redirect=yes", "without parameters"),
        ("jsons://hooks.example.org:x/", "port"),
        ("tgram://s3cret", "lacks a part"),
        ("jsons://a b", "without spaces"),
    ],
)
def test_a_url_of_something_else_is_refused_without_being_quoted(url: str, why: str) -> None:
    with pytest.raises(InvalidInput, match=why) as caught:
        service_name(url, Targets())
    assert caught.value.field == "url"
    assert "s3cret" not in caught.value.message


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("tgram://123456789:abcdefg_hijklmnop/12315544/", "Telegram"),
        ("ntfys://my-topic", "ntfy"),
        ("workflows://prod.logic.azure.com/643e/SIGNATURE", "Microsoft Teams"),
        ("mmosts://chat.example.org/token", "Mattermost"),
    ],
)
def test_services_of_the_list_are_accepted(url: str, name: str) -> None:
    assert service_name(url, Targets()) == name
