"""Messages of Slack keep to Block Kit's published limits, are updated once the call no longer waits, and have no input."""

from typing import Any

import pytest

from claude_hitl_template.domain.models import utcnow
from claude_hitl_template.domain.notices import Channel, Notice, Parcel
from claude_hitl_template.notify.sender import Gone, Outcome, Refused, Retry, Sent
from claude_hitl_template.notify.slack import SlackSender
from tests.slack import REFERENCE, TOKEN, Slack

LINK = "https://hitl.example.org/claude-hitl/inbox/a/appr_1"


async def send(slack: Slack, *, ref: dict[str, Any] | None = None, **about: Any) -> Outcome:
    notice = Notice(
        id="ntce_1", kind="approval.requested", workspace_id="w", approval_id="appr_1", created_at=utcnow(),
        title="Bash waits for approval",
    ).but(**about)  # fmt: skip
    channel = Channel(
        id="chan_1", kind="slack", workspace_id="w", created_at=utcnow(), settings={"channel": "C1"}
    )
    parcel = Parcel(
        delivery_ids=("d",),
        attempt=1,
        notice=notice,
        channel=channel,
        secret={"bot_token": TOKEN},
        external_ref=ref,
    )
    return await SlackSender(api=slack.url, timeout_s=2).send(parcel, LINK)


async def test_a_call_is_one_message_that_is_updated_when_it_no_longer_waits() -> None:
    async with Slack().serving() as slack:
        assert await send(slack) == Sent(REFERENCE)
        decided = {"kind": "approval.decided", "title": "Bash was allowed", "result": "allow"}
        assert await send(slack, ref=REFERENCE, **decided) == Sent(REFERENCE)
        [(first, asked), (second, updated)] = slack.calls
        assert (first, asked["channel"]) == ("chat.postMessage", "C1")
        assert asked["blocks"][1]["elements"][0]["url"] == LINK
        assert second == "chat.update"
        assert (updated["channel"], updated["ts"]) == ("C1", REFERENCE["ts"])
        assert "Bash was allowed" in updated["text"]
        assert updated["blocks"][1]["elements"][0]["text"]["text"] == "Open"


async def test_no_title_is_a_mention_a_link_or_too_long() -> None:
    async with Slack().serving() as slack:
        for title in ("<!channel> & <https://evil.example|click> *bold*", "x" * 10_000, "a\u202eb\n\x00"):
            assert isinstance(await send(slack, title=title), Sent)
        text = slack.calls[0][1]["blocks"][0]["text"]["text"]
        assert "<" not in text
        assert "&lt;!channel&gt; &amp;" in text
        assert "\u202e" not in slack.calls[2][1]["blocks"][0]["text"]["text"]


SETTINGS = "correct the token and the channel, and invite the app to it"


@pytest.mark.parametrize(
    ("slack", "ref", "expected"),
    [
        (Slack("ratelimited", 429, {"Retry-After": "30"}), None, Retry("Slack answered 429", 30.0)),
        (Slack("internal_error", 500), None, Retry("Slack answered 500")),
        (Slack("channel_not_found"), None, Gone("Slack says channel_not_found")),
        (Slack("token_revoked"), None, Gone("Slack says token_revoked")),
        (Slack("invalid_auth"), None, Refused(f"Slack says invalid_auth: {SETTINGS}")),
        (Slack("s3cret-words"), None, Refused(f"Slack says an error: {SETTINGS}")),
        (Slack("message_not_found"), REFERENCE, Sent()),
        (Slack("message_not_found"), None, Refused(f"Slack says an error: {SETTINGS}")),
    ],
    ids=lambda value: value.error if isinstance(value, Slack) else "",
)
async def test_what_slack_answers_decides_the_outcome(
    slack: Slack, ref: dict[str, Any] | None, expected: Outcome
) -> None:
    async with slack.serving():
        assert await send(slack, ref=ref) == expected


async def test_slack_that_is_away_is_tried_again() -> None:
    async with Slack().serving() as slack:
        pass
    assert isinstance(await send(slack), Retry)
