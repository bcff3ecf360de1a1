"""Webhooks: events in the shapes of the Managed Agents API, signed as Standard Webhooks has it.

`anthropic.Anthropic().beta.webhooks.unwrap` verifies and parses them.
"""

import asyncio
import hashlib
import json
import secrets
from base64 import b64encode
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from http import HTTPStatus
from typing import Any

import httpx
from standardwebhooks import Webhook

from claude_hitl_template import __version__
from claude_hitl_template.config.network import UNREACHABLE, direct_async
from claude_hitl_template.domain.canonical_json import shown_host
from claude_hitl_template.domain.models import utcnow
from claude_hitl_template.domain.notices import Parcel
from claude_hitl_template.notify.addresses import Targets, at_address
from claude_hitl_template.notify.sender import Gone, Outcome, Refused, Retry, Sent

TIMEOUT_S = 15.0  # of one delivery as a whole
READ_BYTES = 4096  # of an answer, which is not used
OLD_SECRET_FOR = timedelta(hours=24)
ORGANIZATION = "claude-hitl"  # there is one, and the shape wants it
_LATER = frozenset({408, 409, 425, 429})  # refusals that may pass


def new_secret() -> str:
    return f"whsec_{b64encode(secrets.token_bytes(32)).decode()}"


def secret_of(seed: str) -> str:
    """The same secret for the same seed, which only the service knows."""
    return f"whsec_{b64encode(hashlib.sha256(f'webhook\n{seed}'.encode()).digest()).decode()}"


def rotated(before: Mapping[str, str], secret: str, now: datetime) -> dict[str, str]:
    """The secrets of a channel with a new one; the one until now signs as well for a day."""
    until = (now + OLD_SECRET_FOR).isoformat()
    return {"signing": secret, "previous": before["signing"], "previous_until": until}


def payload(parcel: Parcel, link: str) -> dict[str, Any]:
    """The event. `data` has more than the API's own for approvals: ids, severity and result, and never an input."""
    notice = parcel.notice
    data: dict[str, Any] = {
        "type": notice.kind,
        "id": notice.session_id or parcel.channel.id,
        "organization_id": ORGANIZATION,
        "workspace_id": notice.workspace_id,
        "url": link,
    }
    if notice.approval_id is not None:
        data |= {"approval_id": notice.approval_id, "severity": notice.severity}
    if notice.result is not None:
        data["result"] = notice.result
    created_at = notice.created_at.isoformat().replace("+00:00", "Z")
    return {"type": "event", "id": notice.id, "created_at": created_at, "data": data}


def signed(secret: Mapping[str, str], message_id: str, body: str, now: datetime) -> dict[str, str]:
    """The headers that prove where a body is from: one signature by each secret that holds now."""
    keys = [secret["signing"]]
    if "previous" in secret and now < datetime.fromisoformat(secret["previous_until"]):
        keys.append(secret["previous"])
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(int(now.timestamp())),
        "webhook-signature": " ".join(Webhook(key).sign(message_id, now, body) for key in keys),
    }


class WebhookSender:
    """Posts to the URL in the channel's settings. Its secret is `signing`."""

    def __init__(
        self, targets: Targets, clock: Callable[[], datetime] = utcnow, *, timeout_s: float = TIMEOUT_S
    ) -> None:
        self._targets, self._clock, self._timeout_s = targets, clock, timeout_s
        # No connection is kept: it belongs to an address that was checked for one delivery.
        self._client = direct_async(
            timeout=timeout_s, follow_redirects=False, limits=httpx.Limits(max_keepalive_connections=0)
        )

    async def send(self, parcel: Parcel, link: str) -> Outcome:
        url = str(parcel.channel.settings.get("url", ""))
        try:
            async with asyncio.timeout(self._timeout_s):
                found = await self._targets.address(url)
                if isinstance(found, (Refused, Retry)):
                    return found
                address, host = found
                body = json.dumps(payload(parcel, link), separators=(",", ":"))
                headers = signed(parcel.secret, parcel.notice.id, body, self._clock())
                return await self._post(at_address(url, address), host, headers, body)
        except TimeoutError:
            return Retry(f"no answer within {self._timeout_s:g} s")

    async def close(self) -> None:
        await self._client.aclose()

    async def _post(self, url: str, host: tuple[str, int], headers: Mapping[str, str], body: str) -> Outcome:
        name, port = host
        is_usual = port == (443 if url.startswith("https:") else 80)
        own = {
            "host": name if is_usual else shown_host(name, port),
            "content-type": "application/json",
            "user-agent": f"claude-hitl/{__version__}",
        }
        try:
            async with self._client.stream(
                "POST", url, content=body, headers={**own, **headers}, extensions={"sni_hostname": name}
            ) as answer:
                await _read_some(answer)
                return outcome_of(answer.status_code, answer.headers.get("retry-after"))
        except httpx.TimeoutException:
            return Retry(f"no answer within {self._timeout_s:g} s")
        except (*UNREACHABLE, httpx.DecodingError) as error:
            return Retry(f"{name} cannot be reached, or does not speak HTTP ({type(error).__name__})")


async def _read_some(answer: httpx.Response) -> None:
    """Reads the beginning of an answer, so that a target that waits for it to be read sees no broken connection."""
    size = 0
    async for piece in answer.aiter_raw(READ_BYTES):
        size += len(piece)
        if size >= READ_BYTES:
            return


def outcome_of(status: int, retry_after: str | None = None) -> Outcome:
    """What a status of the target means."""
    if 200 <= status < 300:
        return Sent()
    said = f"HTTP {status}"
    if status in (HTTPStatus.NOT_FOUND, HTTPStatus.GONE):
        return Gone(said)
    if 300 <= status < 400:
        return Refused(f"{said}: redirects are not followed; register the address that it leads to")
    if status in _LATER or status >= 500:
        after_s = float(retry_after) if retry_after is not None and retry_after.isdecimal() else None
        return Retry(said, after_s)
    return Refused(said)
