"""Sends notices to services that `apprise` knows, each by a URL that holds its tokens."""

import asyncio
import logging
from typing import Any
from urllib.parse import urlsplit

from claude_hitl_template.domain.notices import Parcel
from claude_hitl_template.errors import InvalidInput
from claude_hitl_template.notify.addresses import Targets
from claude_hitl_template.notify.sender import Outcome, Refused, Retry, Sent

# By scheme: the service's name, and how the host that the URL names is reached ("" if the service has one of its own).
# Nothing else is accepted: other schemes run programs, write files or speak to this machine.
SERVICES = {
    "discord": ("Discord", ""),
    "gchat": ("Google Chat", ""),
    "msteams": ("Microsoft Teams", ""),
    "workflows": ("Microsoft Teams", "https"),
    "opsgenie": ("Opsgenie", ""),
    "pagerduty": ("PagerDuty", ""),
    "pbul": ("Pushbullet", ""),
    "pover": ("Pushover", ""),
    "tgram": ("Telegram", ""),
    "wxteams": ("Webex", ""),
    "zulip": ("Zulip", ""),
    "ntfy": ("ntfy", "http"),
    "ntfys": ("ntfy", "https"),
    "gotifys": ("Gotify", "https"),
    "mmosts": ("Mattermost", "https"),
    "rockets": ("Rocket.Chat", "https"),
    "json": ("JSON", "http"),
    "jsons": ("JSON", "https"),
}
NTFY = ("ntfy", "ntfys")
MAX_URL = 2000


def service_name(url: str, targets: Targets) -> str:
    """The name of the service that a URL is for. Raises InvalidInput, which does not quote the URL."""
    if len(url) > MAX_URL or not url.isascii() or any(mark.isspace() for mark in url):
        raise InvalidInput(f"at most {MAX_URL} ASCII characters without spaces", "url")
    found = urlsplit(url)
    if found.scheme not in SERVICES:
        raise InvalidInput(f"begins with one of {', '.join(f'{one}://' for one in SERVICES)}", "url")
    if found.query or found.fragment:
        raise InvalidInput("without parameters: nothing behind a ? or #", "url")
    target = _own_target(url)
    if target is not None:
        targets.check(target)
    if _made(url) is None:
        raise InvalidInput("it lacks a part; see https://github.com/caronc/apprise/wiki", "url")
    return SERVICES[found.scheme][0]


def _own_target(url: str) -> str | None:
    """The host that the URL names, as a URL to check; None if the service has a host of its own."""
    found = urlsplit(url)
    scheme = SERVICES[found.scheme][1]
    if not scheme or (
        found.scheme in NTFY and not found.path.strip("/")
    ):  # then the "host" is a topic of ntfy.sh
        return None
    try:
        port = f":{found.port}" if found.port else ""
    except ValueError as error:
        raise InvalidInput("its port is not a number", "url") from error
    host = found.hostname or ""
    return f"{scheme}://{f'[{host}]' if ':' in host else host}{port}/"


def _made(url: str) -> Any:
    """The library's object for a URL; None for a URL that it cannot use."""
    from apprise import Apprise, AppriseAsset  # noqa: PLC0415 - half a second, and many services need none

    logging.getLogger("apprise").disabled = True  # it logs URLs
    asset = AppriseAsset(app_id="claude-hitl", http_redirects=False)
    return Apprise.instantiate(url, asset=asset, suppress_exceptions=True)


class ServiceSender:
    """Sends over channels of the kind apprise, to the secret `url`."""

    def __init__(self, targets: Targets) -> None:
        self._targets = targets

    async def send(self, parcel: Parcel, link: str) -> Outcome:
        url, notice = parcel.secret.get("url", ""), parcel.notice
        try:
            name = service_name(url, self._targets)
            target = _own_target(url)
        except InvalidInput as error:
            return Refused(error.message)
        found = await self._targets.address(target) if target is not None else None
        if isinstance(found, (Refused, Retry)):
            return found
        about = f"Severity: {notice.severity}\n" if notice.approval_id is not None else ""
        text = {"title": notice.title, "body": f"{about}{link}"}
        is_sent = await asyncio.to_thread(lambda: _made(url).notify(**text))
        return Sent() if is_sent else Retry(f"{name} cannot be reached, or refused it")

    async def close(self) -> None:
        """Each notice has a connection of its own."""
