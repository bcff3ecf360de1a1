"""Sends notices to people's devices through the push services of their browsers (RFC 8030, 8291)."""

import base64
import hashlib
import json
from typing import Any

from claude_hitl_template.domain.notices import Notice, Parcel
from claude_hitl_template.notify.posting import Poster
from claude_hitl_template.notify.push_keys import PushKey, Subscription
from claude_hitl_template.notify.sender import Outcome

KEPT_S = 24 * 3600  # by the push service, for a device that is switched off


class WebPushSender:
    """Sends over channels of the kind web_push.

    `contact` goes to the push services, which reject one that is not an https or mailto address.
    """

    def __init__(self, poster: Poster, key: PushKey, contact: str) -> None:
        self._poster, self._key, self._contact = poster, key, contact

    async def send(self, parcel: Parcel, link: str) -> Outcome:
        """See `Sender`. The device finds the page by the ids, so `link` is not sent."""
        from pywebpush import WebPusher  # noqa: PLC0415 - takes a second, and most services send no push

        subscription = Subscription.of(parcel.secret)
        keys = {"p256dh": subscription.p256dh, "auth": subscription.auth}
        pusher = WebPusher({"endpoint": subscription.endpoint, "keys": keys})
        headers = {
            "authorization": self._key.authorization(subscription.endpoint, self._contact),
            "content-encoding": "aes128gcm",
            "content-type": "application/octet-stream",
            "ttl": str(KEPT_S),
            "urgency": "high" if parcel.notice.severity in ("critical", "high") else "normal",
            "topic": _topic(parcel.notice),
        }
        body = pusher.encode(json.dumps(_payload(parcel.notice)).encode())["body"]
        return await self._poster.post(subscription.endpoint, body, headers)

    async def close(self) -> None:
        await self._poster.close()


def _payload(notice: Notice) -> dict[str, Any]:
    """What the service worker (`inbox/static/worker.js`) reads."""
    return {
        "id": notice.id,
        "kind": notice.kind,
        "title": notice.title,
        "severity": notice.severity,
        "approval": notice.approval_id,
        "session": notice.session_id,
        "at": notice.created_at.isoformat(),
    }


def _topic(notice: Notice) -> str:
    """A later push about the same approval takes the place of one that the device has not had yet."""
    about = hashlib.sha256((notice.approval_id or notice.id).encode()).digest()
    return base64.urlsafe_b64encode(about)[:32].decode()
