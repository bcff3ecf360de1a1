"""Webhooks: events in the shapes of the Managed Agents API, signed as Standard Webhooks has it.

`anthropic.Anthropic().beta.webhooks.unwrap` verifies and parses them.
"""

import hashlib
import json
import secrets
from base64 import b64encode
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from typing import Any

from standardwebhooks import Webhook

from claude_hitl_template.domain.models import utcnow
from claude_hitl_template.domain.notices import Parcel
from claude_hitl_template.notify.addresses import Targets
from claude_hitl_template.notify.posting import TIMEOUT_S, Poster
from claude_hitl_template.notify.sender import Outcome

OLD_SECRET_FOR = timedelta(hours=24)
ORGANIZATION = "claude-hitl"  # there is one, and the shape wants it


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
        self._poster, self._clock = Poster(targets, timeout_s=timeout_s), clock

    async def send(self, parcel: Parcel, link: str) -> Outcome:
        body = json.dumps(payload(parcel, link), separators=(",", ":"))
        headers = signed(parcel.secret, parcel.notice.id, body, self._clock())
        url = str(parcel.channel.settings.get("url", ""))
        return await self._poster.post(url, body.encode(), {"content-type": "application/json", **headers})

    async def close(self) -> None:
        await self._poster.close()
