"""Server-sent events of one session: committed events in order, previews between them, and pings."""

import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from claude_hitl_template.api.auth import Authenticator
from claude_hitl_template.api.followers import Followers, Message
from claude_hitl_template.domain.models import new_id, utcnow
from claude_hitl_template.errors import NotFound

KEEP_ALIVE_S = 10.0
CHECK_KEY_S = 2.0  # how often a stream without messages checks that its key was not revoked; else at each
CONNECTED = ": connected\n\n"
PING = "event: ping\ndata: {}\n\n"


@dataclass(frozen=True)
class EventStream:
    """The stream of a session's events for one API key.

    Attributes:
        secret_hash: Of the key that the client presented; the stream ends when it is revoked.
        after: The seq of the last event that the client has.
        previews: The types of events to preview.
    """

    followers: Followers
    authenticator: Authenticator
    session_id: str
    workspace_id: str
    secret_hash: str
    after: int
    previews: frozenset[str]

    async def messages(self) -> AsyncIterator[str]:
        """Yields messages, one or more at a time, until the session is terminated or deleted, or the key opens nothing any
        more (an error)."""
        yield CONNECTED
        opened = set[str]()
        subscription = self.followers.subscribe(
            self.session_id, self.workspace_id, self.after, previews=bool(self.previews)
        )
        try:
            said_at = time.monotonic()
            while await self.authenticator.find(self.secret_hash):
                found = await subscription.next(CHECK_KEY_S)
                wanted = [m for m in found if m.event is not None or self._wants(m.body, opened)]
                if wanted:  # in one piece: each one costs the proxy as much as a long one
                    yield "".join(message.frame for message in wanted)
                elif time.monotonic() - said_at >= KEEP_ALIVE_S:
                    yield PING
                else:
                    continue
                said_at = time.monotonic()
                if any(m.body["type"] == "session.status_terminated" for m in wanted):
                    return
            yield _refused()
        except NotFound:
            yield Message(_deleted()).frame
        finally:
            subscription.close()

    def _wants(self, preview: dict[str, Any], opened: set[str]) -> bool:
        """True for previews of the wanted types that were seen from their beginning."""
        if preview["type"] == "event_start":
            if preview["event"]["type"] in self.previews:
                opened.add(preview["event"]["id"])
                return True
            return False
        return preview["event_id"] in opened


async def ended() -> AsyncIterator[str]:
    """A stream with nothing more to say."""
    yield CONNECTED


def _refused() -> str:
    """The protocol's error frame, for which the official SDK raises: the answer of 200 is sent already."""
    error = {"type": "authentication_error", "message": "this API key has expired or was revoked"}
    return f"event: error\ndata: {json.dumps({'type': 'error', 'error': error})}\n\n"


def _deleted() -> dict[str, Any]:
    return {"type": "session.deleted", "id": new_id("sevt"), "processed_at": utcnow().isoformat()}
