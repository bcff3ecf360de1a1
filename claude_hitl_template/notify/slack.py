"""Sends notices to a channel of Slack, as one message for each call, which is updated when the call no longer waits.

A channel with the setting `show_input` shows the line of each call. If it has a signing secret, too, the message has buttons
that decide (`notify/slack_presses.py`): Allow only where that line is the whole call.
"""

import re
from typing import Any

from claude_hitl_template.domain.notices import ASKING, Notice, Parcel, ShownCall
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
_SIGNING = re.compile(r"[A-Za-z0-9]{16,128}")
_ENTITY = re.compile(r"&(?:amp|lt|gt|#)")  # Slack may show one as the character that it stands for
NOT_WHOLE = "This line does not say all that the call does. Open it to allow it."
CRITICAL = "A critical call is allowed in the inbox only. Open it to allow it."
_SETTINGS = frozenset({"invalid_auth", "missing_scope", "not_authed", "not_in_channel", "token_expired"})


def checked(
    channel: str, token: str, *, signing_secret: str = "", show_input: bool = False
) -> tuple[dict[str, Any], dict[str, str]]:
    """The settings and the secrets of a channel. Raises InvalidInput that names the field.

    Args:
        channel: Its id.
        token: The app's bot token.
        signing_secret: Of the app; "" for messages without buttons that decide.
        show_input: Whether messages show the line of a call.
    """
    if not _CHANNEL.fullmatch(channel):
        raise InvalidInput(
            "must be a channel's id, such as C0123456789: Slack shows it in the channel's details", "target"
        )
    if not _TOKEN.fullmatch(token):
        raise InvalidInput("must be a bot token, which begins with xoxb-", "token")
    if signing_secret and not _SIGNING.fullmatch(signing_secret):
        raise InvalidInput(
            "must be the signing secret from the app's page Basic Information", "signing_secret"
        )
    if signing_secret and not show_input:
        raise InvalidInput("is for deciding in Slack; let the channel show the calls, too", "signing_secret")
    signing = {"signing_secret": signing_secret} if signing_secret else {}
    return {"channel": channel, "show_input": show_input}, {"bot_token": token, **signing}


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
        takes_presses = bool(parcel.secret.get("signing_secret"))
        channel_id = parcel.channel.id if takes_presses else None
        message, ref = message_of(parcel.notice, link, parcel.call, channel_id), parcel.external_ref
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


def message_of(
    notice: Notice, link: str, call: ShownCall | None = None, channel_id: str | None = None
) -> dict[str, Any]:
    """The message, in Block Kit.

    Args:
        notice: What it is about.
        link: The address of the card.
        call: The call that it shows; None: the message has no input of the call.
        channel_id: Our id of the channel, to which Slack reports presses; None: none are taken.
    """
    title = visible(notice.title)
    about = f"\nSeverity: {notice.severity}" if notice.approval_id is not None else ""
    line = f"*{escaped(title)}*{about}"[:MAX_TEXT]
    return {
        "text": f"{title}{about}"[:MAX_TEXT],
        "blocks": [
            {"type": "section", "text": {"type": "mrkdwn", "text": line}},
            *(_shown(call) if call is not None else ()),
            {"type": "actions", "elements": _buttons(notice, link, call, channel_id)},
        ],
    }


def may_allow(call: ShownCall) -> bool:
    """Whether Slack shows all of a call that one must know to allow it."""
    return not _why_not(call)


def _why_not(call: ShownCall) -> str:
    if call.severity == "critical":
        return CRITICAL
    return "" if call.is_whole and not _ENTITY.search(call.effect) else NOT_WHOLE


def _shown(call: ShownCall) -> list[dict[str, Any]]:
    """The line of a call as it is written, in a block that Slack does not read as markup; then what is noted about it."""
    blocks: list[dict[str, Any]] = []
    if call.effect:
        text = {"type": "text", "text": call.effect}
        written = {"type": "rich_text_preformatted", "elements": [text]}
        blocks.append({"type": "rich_text", "elements": [written]})
    votes = f"{call.votes} of {call.quorum} allowed it" if call.quorum > 1 else ""
    notes = [note for note in (*map(visible, call.flags), votes, _why_not(call)) if note]
    if notes:
        text = {"type": "mrkdwn", "text": escaped("\n".join(notes))[:MAX_TEXT]}
        blocks.append({"type": "section", "text": text})
    return blocks


def _buttons(
    notice: Notice, link: str, call: ShownCall | None, channel_id: str | None
) -> list[dict[str, Any]]:
    """Allow and Deny are apart, so that a thumb does not take one for the other."""
    asks = notice.kind in ASKING
    opening = _button("open", "Open and decide" if asks else "Open", channel_id) | {"url": link}
    if call is None or channel_id is None or not asks:
        if asks and notice.severity in ("critical", "high"):
            opening["style"] = "danger"
        return [opening]
    value = f"{channel_id}:{notice.approval_id}:{call.digest}"
    deny = _button("deny", "Deny", value) | {"style": "danger"}
    if not may_allow(call):
        return [opening, deny]
    return [_button("allow", "Allow", value) | {"style": "primary", "confirm": _CONFIRM}, opening, deny]


_CONFIRM = {
    "title": {"type": "plain_text", "text": "Allow this call?"},
    "text": {"type": "plain_text", "text": "It runs exactly as the message shows it."},
    "confirm": {"type": "plain_text", "text": "Allow"},
    "deny": {"type": "plain_text", "text": "Back"},
}


def _button(action: str, label: str, value: str | None) -> dict[str, Any]:
    text = {"type": "plain_text", "text": label}
    button: dict[str, Any] = {"type": "button", "text": text, "action_id": action}
    return button if value is None else button | {"value": value}


def escaped(text: str) -> str:
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
