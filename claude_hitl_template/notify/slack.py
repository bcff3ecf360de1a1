"""Sends notices to a channel of Slack, as one message for each call, which is updated when the call no longer waits."""

import re
from typing import Any

from claude_hitl_template.domain.notices import ASKING, Notice, Parcel
from claude_hitl_template.errors import InvalidInput
from claude_hitl_template.notify.sender import Gone, Outcome, Refused, Retry, Sent
from claude_hitl_template.presentation.text import visible

API = "https://slack.com/api/"
TIMEOUT_S = 15
MAX_TEXT = 2900  # characters of a section, of which Slack takes 3000
# Errors of the Web API, by what they mean. One that is not listed refuses the message.
_GONE = frozenset({"account_inactive", "channel_not_found", "is_archived", "token_revoked"})
_LATER = frozenset({"fatal_error", "internal_error", "ratelimited", "request_timeout", "service_unavailable"})
_DELETED = frozenset({"cant_update_message", "edit_window_closed", "message_not_found"})
_CHANNEL, _TOKEN = re.compile(r"[CG][A-Z0-9]{5,30}"), re.compile(r"xoxb-[A-Za-z0-9-]{5,500}")
_SETTINGS = frozenset({"invalid_auth", "missing_scope", "not_authed", "not_in_channel", "token_expired"})


def checked(channel: str, token: str) -> tuple[dict[str, str], dict[str, str]]:
    """The settings and the secrets of a channel. Raises InvalidInput that names the field."""
    if not _CHANNEL.fullmatch(channel):
        raise InvalidInput(
            "must be a channel's id, such as C0123456789: Slack shows it in the channel's details", "target"
        )
    if not _TOKEN.fullmatch(token):
        raise InvalidInput("must be a bot token, which begins with xoxb-", "token")
    return {"channel": channel}, {"bot_token": token}


class SlackSender:
    """Sends over channels of the kind slack: to `channel` of the settings, with the secret `bot_token`."""

    def __init__(self, *, api: str = API, timeout_s: int = TIMEOUT_S) -> None:
        self._api, self._timeout_s = api, timeout_s

    async def send(self, parcel: Parcel, link: str) -> Outcome:
        from aiohttp import ClientError  # noqa: PLC0415 - half a second, and many services need none
        from slack_sdk.errors import SlackApiError, SlackClientError  # noqa: PLC0415
        from slack_sdk.web.async_client import AsyncWebClient  # noqa: PLC0415

        client = AsyncWebClient(
            parcel.secret.get("bot_token"), base_url=self._api, timeout=self._timeout_s, retry_handlers=[]
        )
        message, ref = message_of(parcel.notice, link), parcel.external_ref
        try:
            if ref is not None:
                answer = await client.chat_update(channel=ref["channel"], ts=ref["ts"], **message)
            else:
                to = str(parcel.channel.settings.get("channel", ""))
                answer = await client.chat_postMessage(channel=to, unfurl_links=False, **message)
        except SlackApiError as error:
            data: Any = error.response
            return _outcome(str(data.get("error")), data.status_code, data.headers, is_update=ref is not None)
        except TimeoutError:
            return Retry(f"Slack did not answer within {self._timeout_s} s")
        except (ClientError, SlackClientError) as error:
            return Retry(f"Slack cannot be reached ({type(error).__name__})")
        return Sent({"channel": answer["channel"], "ts": answer["ts"]})

    async def close(self) -> None:
        """Each message has a connection of its own."""


def message_of(notice: Notice, link: str) -> dict[str, Any]:
    """The message, in Block Kit. It has no input of the call; the button leads to the card, where it is decided."""
    title = visible(notice.title)
    about = f"\nSeverity: {notice.severity}" if notice.approval_id is not None else ""
    line = f"*{_escaped(title)}*{about}"[:MAX_TEXT]
    label = "Open and decide" if notice.kind in ASKING else "Open"
    button = {
        "type": "button",
        "text": {"type": "plain_text", "text": label},
        "action_id": "open",
        "url": link,
    }
    if notice.kind in ASKING and notice.severity in ("critical", "high"):
        button["style"] = "danger"
    return {
        "text": f"{title}{about}"[:MAX_TEXT],
        "blocks": [
            {"type": "section", "text": {"type": "mrkdwn", "text": line}},
            {"type": "actions", "elements": [button]},
        ],
    }


def _escaped(text: str) -> str:
    """Slack's own escapes, so that no text becomes a link or a mention; marks of emphasis are taken out."""
    plain = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return plain.translate(dict.fromkeys(map(ord, "*~`"), " "))


def _outcome(error: str, status: int, headers: Any, *, is_update: bool) -> Outcome:
    if is_update and error in _DELETED:
        return Sent()  # nothing is left to update
    if status == 429 or status >= 500 or error in _LATER:
        after = str(headers.get("Retry-After", ""))
        return Retry(f"Slack answered {status}", float(after) if after.isdecimal() else None)
    if error in _GONE:
        return Gone(f"Slack says {error}")
    known = error if error in _SETTINGS else "an error"
    return Refused(f"Slack says {known}: correct the token and the channel, and invite the app to it")
