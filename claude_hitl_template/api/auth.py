"""Who calls: an API key in `x-api-key` or as a bearer token, on every route but `GET /v1/health`."""

import asyncio
import hmac
import math
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Annotated

from fastapi import Depends, Request

from claude_hitl_template.config.secret_files import hash_api_key
from claude_hitl_template.domain.models import ApiKey
from claude_hitl_template.domain.rate_limit import Throttle, network_of
from claude_hitl_template.errors import RateLimited, Unauthorized
from claude_hitl_template.store.protocol import Clients

REMEMBER_S = 0.5  # how long a key that was found is cached, and so how long a revoked key may still work
REMEMBERED = 10_000
WRONG_KEYS = 30  # per minute, from one address
_CALLER = "claude_hitl.caller"  # in the scope, which is each request's own


class WrongKeys:
    """Limits how many wrong keys one address may present. Valid keys are looked up first and are never limited."""

    def __init__(self, per_minute: int) -> None:
        self._tries = Throttle(per_minute, 60.0)

    def refusal(self, request: Request, why: str) -> Unauthorized | RateLimited:
        """The error for a request with a wrong key: Unauthorized, or RateLimited once there were too many."""
        address = network_of(request.client.host if request.client else "")
        wait_s = self._tries.wait_s(address)
        if wait_s:
            return RateLimited("too many wrong API keys from this address", math.ceil(wait_s))
        self._tries.take(address)
        return Unauthorized(why)


class Authenticator:
    """Checks keys, and limits each API key's requests with a token bucket of one minute's requests."""

    def __init__(
        self, store: Clients, *, operator_key: str, requests_per_minute: int, wrong_keys: WrongKeys
    ) -> None:
        self._store, self._per_minute, self._wrong_keys = store, requests_per_minute, wrong_keys
        self._operator_key = operator_key.encode()
        self._known: OrderedDict[str, tuple[ApiKey, float]] = OrderedDict()
        self._looking: dict[str, asyncio.Future[ApiKey | None]] = {}
        self._requests = Throttle(requests_per_minute, 60.0)

    async def api_key(self, request: Request) -> ApiKey:
        """Admits a valid API key and counts the request. Raises Unauthorized, RateLimited."""
        key = await self.find(hash_api_key(presented_key(request)))
        if key is None:
            raise self._wrong_keys.refusal(request, "this API key is unknown or was revoked")
        self._count(key)
        return key

    async def operator(self, request: Request) -> None:
        """Admits only the operator key, which `./hitl` reads on the service's own machine."""
        if not self._is_operator(presented_key(request)):
            why = "an API key does not open this route; use ./hitl on the service's own machine"
            raise self._wrong_keys.refusal(request, why)

    async def first_key(self, request: Request) -> None:
        """Admits the operator key and the service's first API key."""
        presented = presented_key(request)
        if self._is_operator(presented):
            return
        key = await self.find(hash_api_key(presented))
        if key is None or not key.first:
            why = "only the service's first API key, or ./hitl on its own machine, opens this route"
            raise self._wrong_keys.refusal(request, why)

    async def anyone(self, _request: Request) -> None:
        """Admits every request."""

    async def find(self, secret_hash: str) -> ApiKey | None:
        """The key with this hash; None if it is unknown or was revoked."""
        now = time.monotonic()
        known = self._known.get(secret_hash)
        if known is not None and known[1] > now:
            return known[0]
        looking = self._looking.get(secret_hash)
        if looking is None:  # hundreds of streams ask at once: one question to the ledger answers them all
            looking = self._looking[secret_hash] = asyncio.ensure_future(self._find(secret_hash))
            looking.add_done_callback(lambda _: self._looking.pop(secret_hash, None))
        return await asyncio.shield(looking)

    async def _find(self, secret_hash: str) -> ApiKey | None:
        key = await self._store.find_key(secret_hash)
        if key is None:
            self._known.pop(secret_hash, None)
            return None
        self._known[secret_hash] = (key, time.monotonic() + REMEMBER_S)
        if len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        return key

    def _is_operator(self, presented: str) -> bool:
        return hmac.compare_digest(presented.encode(), self._operator_key)

    def _count(self, key: ApiKey) -> None:
        wait_s = self._requests.wait_s(key.id)
        if wait_s:
            raise RateLimited(f"more than {self._per_minute} requests per minute with this key", wait_s + 1)
        self._requests.take(key.id)


def presented_key(request: Request) -> str:
    """The key that a request presents. Raises Unauthorized if there is none."""
    key = request.headers.get("x-api-key", "")
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if not key and scheme.lower() == "bearer":
        key = token.strip()
    if not key:
        raise Unauthorized("no API key: send it in the header x-api-key, or as a bearer token")
    return key


class Access:
    """A dependency that says who may call a route, and is the caller's key. Each route has exactly one.

    `routing.Route` checks it before it reads anything else of the request, so that an unknown caller learns nothing and
    makes the service read no body. FastAPI reads a body before it awaits dependencies.
    """

    def __init__(self, check: Callable[[Authenticator, Request], Awaitable[ApiKey | None]]) -> None:
        self._check = check

    async def admit(self, request: Request) -> None:
        """Identifies the caller. Raises Unauthorized, RateLimited."""
        request.scope[_CALLER] = await self._check(request.app.state.authenticator, request)

    async def __call__(self, request: Request) -> ApiKey | None:
        """The caller. Raises KeyError, so that nothing is answered, unless it was admitted."""
        return request.scope[_CALLER]


API_KEY = Access(Authenticator.api_key)
FIRST_KEY = Access(Authenticator.first_key)
OPERATOR = Access(Authenticator.operator)
PUBLIC = Access(Authenticator.anyone)

Caller = Annotated[ApiKey, Depends(API_KEY)]


async def _authenticator(request: Request) -> Authenticator:
    return request.app.state.authenticator


AuthenticatorDep = Annotated[Authenticator, Depends(_authenticator)]
