"""Who calls: an API key in `x-api-key` or as a bearer token, on every route but health."""

import math
import time
from collections import OrderedDict

from fastapi import Request

from claude_hitl_template.config.secret_files import hash_api_key
from claude_hitl_template.domain.models import ApiKey
from claude_hitl_template.domain.rate_limit import Throttle, network_of
from claude_hitl_template.errors import RateLimited, Unauthorized
from claude_hitl_template.store.protocol import Clients

REMEMBER_S = (
    0.5  # how long a key that was found is not looked up again: as long as one that was revoked is still good
)
REMEMBERED = 10_000
WRONG_KEYS = 30  # from one address in a minute


class WrongKeys:
    """Counts wrong keys by the address they come from. Right ones are never held up: they are looked up first."""

    def __init__(self, per_minute: int) -> None:
        self._tries = Throttle(per_minute, 60.0)

    def refusal(self, request: Request, why: str) -> Unauthorized | RateLimited:
        """What a request with a wrong key is answered."""
        address = network_of(request.client.host if request.client else "")
        wait_s = self._tries.wait_s(address)
        if wait_s:
            return RateLimited("too many wrong API keys from this address", math.ceil(wait_s))
        self._tries.take(address)
        return Unauthorized(why)


class Authenticator:
    """Finds keys, and counts their requests: a bucket of one minute's requests each, refilled steadily."""

    def __init__(self, store: Clients, requests_per_minute: int, wrong_keys: WrongKeys) -> None:
        self._store, self._per_minute, self.wrong_keys = store, requests_per_minute, wrong_keys
        self._known: OrderedDict[str, tuple[ApiKey, float]] = OrderedDict()
        self._requests = Throttle(requests_per_minute, 60.0)

    async def __call__(self, request: Request) -> ApiKey:
        key = await self.find(hash_api_key(presented_key(request)))
        if key is None:
            raise self.wrong_keys.refusal(request, "this API key is not known here, or was revoked")
        self._count(key)
        return key

    async def find(self, secret_hash: str) -> ApiKey | None:
        """The key with this hash, unless it is unknown or was revoked."""
        now = time.monotonic()
        known = self._known.get(secret_hash)
        if known is not None and known[1] > now:
            return known[0]
        key = await self._store.find_key(secret_hash)
        if key is None:
            self._known.pop(secret_hash, None)
            return None
        self._known[secret_hash] = (key, now + REMEMBER_S)
        if len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        return key

    def _count(self, key: ApiKey) -> None:
        wait_s = self._requests.wait_s(key.id)
        if wait_s:
            raise RateLimited(f"more than {self._per_minute} requests a minute with this key", wait_s + 1)
        self._requests.take(key.id)


def presented_key(request: Request) -> str:
    """Raises Unauthorized when none came."""
    key = request.headers.get("x-api-key", "")
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if not key and scheme.lower() == "bearer":
        key = token.strip()
    if not key:
        raise Unauthorized("no API key: send it in the header x-api-key, or as a bearer token")
    return key
