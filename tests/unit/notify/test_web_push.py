"""A push is what its receiver can decrypt and check, and the answer of the push service decides its outcome."""

from datetime import timedelta
from email.utils import format_datetime
from typing import Any

import pytest

from claude_hitl_template.config import secret_files
from claude_hitl_template.config.settings import Settings
from claude_hitl_template.domain.models import utcnow
from claude_hitl_template.domain.notices import EVERY_WORKSPACE, Channel, Notice, Parcel
from claude_hitl_template.errors import InvalidInput
from claude_hitl_template.notify.addresses import Targets
from claude_hitl_template.notify.posting import Poster
from claude_hitl_template.notify.push_keys import PushKey, Subscription
from claude_hitl_template.notify.sender import Gone, Outcome, Refused, Retry, Sent
from claude_hitl_template.notify.web_push import WebPushSender
from tests.push_service import Device, checked_claims

CONTACT = "https://hitl.example.org"


def parcel(device: Device, **about: Any) -> Parcel:
    notice = Notice(
        id="ntce_1",
        kind="approval.requested",
        workspace_id="w",
        session_id="sesn_1",
        approval_id="appr_1",
        created_at=utcnow(),
        title="Bash waits for approval",
    ).but(**about)
    channel = Channel(
        id="chan_1",
        kind="web_push",
        workspace_id=EVERY_WORKSPACE,
        principal_id="user_ann",
        created_at=utcnow(),
    )
    return Parcel(
        delivery_ids=("dlvr_1",), attempt=1, notice=notice, channel=channel, secret=device.subscription
    )


@pytest.fixture
def key(tmp_path: Any) -> PushKey:
    settings = Settings(data_dir=tmp_path)  # pyright: ignore[reportCallIssue]
    settings.secrets_dir.mkdir()
    made = secret_files.push_key_pem(settings)
    assert secret_files.push_key_pem(settings) == made, "it is made once"
    assert (settings.secrets_dir / secret_files.PUSH_KEY).stat().st_mode & 0o777 == 0o600
    return PushKey.of_pem(made)


async def push(
    device: Device, key: PushKey, *, timeout_s: float = 5.0, allowed: bool = True, **about: Any
) -> Outcome:
    private = [device.host] if allowed else []
    sender = WebPushSender(Poster(Targets(private), timeout_s=timeout_s), key, CONTACT)
    try:
        return await sender.send(parcel(device, **about), "https://hitl.example.org/claude-hitl/inbox")
    finally:
        await sender.close()


async def test_the_device_decrypts_the_push_and_its_service_knows_who_sent_it(key: PushKey) -> None:
    async with Device().listening() as device:
        assert await push(device, key, severity="high") == Sent()
        assert device.read() == {
            "id": "ntce_1",
            "kind": "approval.requested",
            "title": "Bash waits for approval",
            "severity": "high",
            "approval": "appr_1",
            "session": "sesn_1",
            "at": device.read()["at"],
        }
        assert device.header("content-encoding") == "aes128gcm"
        assert device.header("urgency") == "high"
        scheme, _, given = device.header("authorization").partition(" ")
        token, public = (part.partition("=")[2] for part in given.split(","))
        assert (scheme, public) == ("vapid", key.public)
        claims = checked_claims(token, public)
        assert (claims["aud"], claims["sub"]) == (device.origin, CONTACT)
        assert 0 < claims["exp"] - utcnow().timestamp() <= 24 * 3600


@pytest.mark.parametrize(
    ("status", "headers", "expected"),
    [
        ("404 Not Found", "", Gone("HTTP 404")),
        ("410 Gone", "", Gone("HTTP 410")),
        ("429 Slow", "retry-after: 120\r\n", Retry("HTTP 429", 120.0)),
        ("503 Later", "retry-after: soon\r\n", Retry("HTTP 503")),
        ("400 Bad", "", Refused("HTTP 400")),
    ],
)
async def test_what_the_push_service_answers_decides_the_outcome(
    key: PushKey, status: str, headers: str, expected: Outcome
) -> None:
    body = b"x" * 5_000_000
    answer = f"HTTP/1.1 {status}\r\n{headers}content-length: {len(body)}\r\n\r\n".encode()
    async with Device(answer + body).listening() as device:
        assert await push(device, key) == expected
        assert len(device.heads) == 1


async def test_a_redirect_is_not_followed_and_a_private_address_is_not_reached(key: PushKey) -> None:
    answer = b"HTTP/1.1 307 Elsewhere\r\nlocation: http://169.254.169.254/\r\ncontent-length: 0\r\n\r\n"
    async with Device(answer).listening() as device:
        outcome = await push(device, key)
        assert isinstance(outcome, Refused)
        assert "redirects are not followed" in outcome.why
        assert isinstance(await push(device, key, allowed=False), Refused)
        assert len(device.heads) == 1


async def test_a_date_in_retry_after_is_waited_for(key: PushKey) -> None:
    date = format_datetime(utcnow() + timedelta(hours=1), usegmt=True)
    answer = f"HTTP/1.1 429 Slow\r\nretry-after: {date}\r\ncontent-length: 0\r\n\r\n".encode()
    async with Device(answer).listening() as device:
        outcome = await push(device, key)
    assert isinstance(outcome, Retry)
    assert outcome.after_s is not None
    assert 3500 < outcome.after_s <= 3600


async def test_a_push_service_that_hangs_talks_nonsense_or_is_away_is_tried_again(key: PushKey) -> None:
    async with Device(b"").listening() as device:
        assert await push(device, key, timeout_s=0.1) == Retry("no answer within 0.1 s")
    async with Device(b"nonsense\r\n\r\n").listening() as device:
        assert isinstance(await push(device, key), Retry)
    assert await push(device, key) == Retry(
        "127.0.0.1 cannot be reached, or does not speak HTTP (ConnectError)"
    )


@pytest.mark.parametrize(
    ("field_", "value"),
    [
        ("endpoint", ""),
        ("endpoint", "https://push.example/" + "x" * 2000),
        ("p256dh", "AAAA"),
        ("p256dh", "not base64!"),
        ("auth", "AAAA"),
    ],
)
def test_a_subscription_that_nothing_can_be_sent_to_is_refused_by_its_field(field_: str, value: str) -> None:
    given = Device(origin="https://push.example").subscription
    assert Subscription.of(given).fingerprint
    with pytest.raises(InvalidInput) as caught:
        Subscription.of({**given, field_: value})
    assert caught.value.field == field_
