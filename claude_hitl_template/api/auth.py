"""Who calls: an API key in `x-api-key` or as a bearer token, on every route but health."""

import time
from collections import OrderedDict

from fastapi import Request

from claude_hitl_template.errors import RateLimited, Unauthorized
from claude_hitl_template.models import ApiKey
from claude_hitl_template.secrets import hash_api_key
from claude_hitl_template.store.protocol import Clients

REMEMBER_S = 30.0  # how long a key that was found is not looked up again
REMEMBERED = 10_000


class Authenticator:
    """Finds keys, and counts their requests: a bucket of one minute's requests each, refilled steadily."""

    def __init__(self, store: Clients, requests_per_minute: int) -> None:
        self._store, self._per_minute = store, requests_per_minute
        self._known: OrderedDict[str, tuple[ApiKey, float]] = OrderedDict()
        self._buckets: dict[str, tuple[float, float]] = {}

    async def __call__(self, request: Request) -> ApiKey:
        key = await self._find(hash_api_key(presented_key(request)))
        self._count(key)
        return key

    async def _find(self, secret_hash: str) -> ApiKey:
        now = time.monotonic()
        known = self._known.get(secret_hash)
        if known is not None and known[1] > now:
            return known[0]
        key = await self._store.find_key(secret_hash)
        if key is None:
            raise Unauthorized("this API key is not known here")
        self._known[secret_hash] = (key, now + REMEMBER_S)
        if len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        return key

    def _count(self, key: ApiKey) -> None:
        now = time.monotonic()
        left, at = self._buckets.get(key.id, (float(self._per_minute), now))
        left = min(left + (now - at) * self._per_minute / 60, self._per_minute)
        if left < 1:
            raise RateLimited(
                f"more than {self._per_minute} requests a minute with this key",
                (1 - left) * 60 / self._per_minute + 1,
            )
        self._buckets[key.id] = (left - 1, now)


def presented_key(request: Request) -> str:
    """Raises Unauthorized when none came."""
    key = request.headers.get("x-api-key", "")
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if not key and scheme.lower() == "bearer":
        key = token.strip()
    if not key:
        raise Unauthorized("no API key: send it in the header x-api-key, or as a bearer token")
    return key
