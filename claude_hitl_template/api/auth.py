"""Authenticates callers by an API key in `x-api-key` or a bearer token, on every route but `GET /v1/health`."""

import asyncio
import hmac
import math
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Annotated

import structlog
from fastapi import Depends, Header, Request
from pydantic.json_schema import SkipJsonSchema

from claude_hitl_template.config.secret_files import hash_api_key
from claude_hitl_template.domain.models import ApiKey, Identity, utcnow
from claude_hitl_template.domain.people import Action, Actor, Principal, actions_of, allowed_by
from claude_hitl_template.domain.rate_limit import Throttle, network_of
from claude_hitl_template.errors import (
    Forbidden,
    HitlError,
    InvalidInput,
    NotFound,
    RateLimited,
    Unauthorized,
)
from claude_hitl_template.store.protocol import Clients

REMEMBER_S = 0.5  # how long a key that was found is cached, and so how long a revoked key may still work
REMEMBERED = 10_000
NOTE_USE_S = 60.0  # how exact the recorded last use of a key is
WORKSPACE_HEADER = "anthropic-workspace-id"
log = structlog.get_logger()
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


@dataclass(frozen=True)
class Caller:
    """Who a request is from, and what it may do in the workspace that it is for.

    `principal` is None for the operator key, which is the service's own.
    """

    workspace_id: str
    actor: Actor
    principal: Principal | None
    actions: frozenset[Action]

    def check(self, action: Action) -> None:
        """Raises Forbidden unless the caller may do this here."""
        if action not in self.actions:
            raise Forbidden(f"{_NEEDED[action]}, which {self.actor.name} does not have here with this key")


_NEEDED: Mapping[Action, str] = {
    Action.READ: "seeing this takes a role in this workspace and a key with any scope",
    Action.REQUEST: "starting or changing sessions takes the role requester and a key with the scope sessions",
    Action.DECIDE: "deciding takes the role approver and a key with the scope approvals",
    Action.MANAGE: "this takes the role operator of the workspace and a key with the scope admin",
    Action.ADMINISTER: "this takes the role admin of the service and a key with the scope admin",
}


class Authenticator:
    """Checks keys, and limits each API key's requests with a token bucket of one minute's requests."""

    def __init__(
        self, store: Clients, *, operator_key: str, requests_per_minute: int, wrong_keys: WrongKeys
    ) -> None:
        self._store, self._per_minute, self._wrong_keys = store, requests_per_minute, wrong_keys
        self._operator_key = operator_key.encode()
        self._known: OrderedDict[str, tuple[Identity, float]] = OrderedDict()
        self._looking: dict[str, asyncio.Future[Identity | None]] = {}
        self._uses: dict[str, float] = {}  # when the use of a key was recorded last, by its id
        self._noting = set[asyncio.Task[None]]()
        self._requests = Throttle(requests_per_minute, 60.0)

    async def caller(self, request: Request) -> Caller:
        """Admits a valid API key, in the workspace that the request names, and counts the request.

        Raises Unauthorized, RateLimited, NotFound (a workspace that is not the caller's), InvalidInput (it has to name one).
        """
        identity = await self.find(hash_api_key(presented_key(request)))
        if identity is None:
            raise self._wrong_keys.refusal(request, "this API key is unknown, has expired or was revoked")
        self._count(identity.key)
        self._note_use(identity.key)
        workspace_id = _chosen(request.headers.get(WORKSPACE_HEADER), identity)
        principal = identity.principal
        return Caller(
            workspace_id=workspace_id,
            actor=Actor(name=principal.name, principal_id=principal.id, key_id=identity.key.id),
            principal=principal,
            actions=actions_of(principal.roles_in(workspace_id)) & allowed_by(identity.key.scopes),
        )

    async def administrator(self, request: Request) -> Caller:
        """Admits also the operator key, which may do everything in every workspace."""
        if not self._is_operator(presented_key(request)):
            return await self.caller(request)
        named = request.headers.get(WORKSPACE_HEADER)
        known = await self._store.list_workspaces()
        chosen = next((one.id for one in known if one.id == named or (named is None and one.default)), None)
        if chosen is None:
            raise NotFound("there is no such workspace" if named else "there is no workspace yet: ./hitl up")
        return Caller(chosen, Actor(name="./hitl"), None, frozenset(Action))

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
        identity = await self.find(hash_api_key(presented))
        if identity is None or not identity.key.first:
            why = "only the service's first API key, or ./hitl on its own machine, opens this route"
            raise self._wrong_keys.refusal(request, why)

    async def anyone(self, _request: Request) -> None:
        """Admits every request."""

    async def find(self, secret_hash: str) -> Identity | None:
        """Whom the key with this hash admits; None if it is unknown, has expired or was revoked."""
        now = time.monotonic()
        known = self._known.get(secret_hash)
        if known is not None and known[1] > now:
            return known[0]
        looking = self._looking.get(secret_hash)
        if looking is None:  # hundreds of streams ask at once: one question to the ledger answers them all
            looking = self._looking[secret_hash] = asyncio.ensure_future(self._find(secret_hash))
            looking.add_done_callback(lambda _: self._looking.pop(secret_hash, None))
        return await asyncio.shield(looking)

    async def _find(self, secret_hash: str) -> Identity | None:
        identity = await self._store.find_identity(secret_hash)
        if identity is None:
            self._known.pop(secret_hash, None)
            return None
        self._known[secret_hash] = (identity, time.monotonic() + REMEMBER_S)
        if len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        return identity

    def _note_use(self, key: ApiKey) -> None:
        """Has the use of a key recorded, once a minute, while the request goes on."""
        now = time.monotonic()
        if now - self._uses.get(key.id, -NOTE_USE_S) < NOTE_USE_S:
            return
        self._uses[key.id] = now
        noting = asyncio.create_task(self._noted(key.id))
        self._noting.add(noting)
        noting.add_done_callback(self._noting.discard)

    async def _noted(self, key_id: str) -> None:
        try:
            await self._store.note_key_use(key_id, utcnow())
        except HitlError as error:
            log.warning("the last use of a key could not be recorded", key=key_id, error=str(error))

    def _is_operator(self, presented: str) -> bool:
        return hmac.compare_digest(presented.encode(), self._operator_key)

    def _count(self, key: ApiKey) -> None:
        wait_s = self._requests.wait_s(key.id)
        if wait_s:
            raise RateLimited(f"more than {self._per_minute} requests per minute with this key", wait_s + 1)
        self._requests.take(key.id)


def _chosen(named: str | None, identity: Identity) -> str:
    """The id of the workspace that a request is for."""
    known = {workspace.id: workspace for workspace in identity.workspaces}
    if named is not None:
        if named not in known:
            raise NotFound(f"{WORKSPACE_HEADER}: {identity.principal.name} has no workspace {named[:100]!r}")
        return named
    default = next((name for name, workspace in known.items() if workspace.default), None)
    if default is None and len(known) > 1:
        raise InvalidInput(
            f"is missing: {identity.principal.name} belongs to several workspaces ({', '.join(known)})",
            WORKSPACE_HEADER,
        )
    if not known:
        raise Forbidden(f"{identity.principal.name} is in no workspace; an administrator adds it to one")
    return default or next(iter(known))


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
    """A dependency that says who may call a route, and is the caller. Each route has exactly one.

    `routing.Route` checks it before it reads anything else of the request, so that an unknown caller learns nothing and
    makes the service read no body. FastAPI reads a body before it awaits dependencies.

    Args:
        check: Identifies the caller.
        needs: The caller must be allowed to do one of these; () for what `check` alone decides.
    """

    def __init__(
        self, check: Callable[[Authenticator, Request], Awaitable[Caller | None]], *needs: Action
    ) -> None:
        self._check, self.needs = check, needs

    async def admit(self, request: Request) -> None:
        """Identifies the caller. Raises Unauthorized, Forbidden, RateLimited, NotFound, InvalidInput."""
        caller = await self._check(request.app.state.authenticator, request)
        if caller is not None and self.needs and not caller.actions.intersection(self.needs):
            caller.check(self.needs[0])
        request.scope[_CALLER] = caller

    async def __call__(self, request: Request) -> Caller | None:
        """The caller. Raises KeyError, so that nothing is answered, unless it was admitted."""
        return request.scope[_CALLER]


_WorkspaceId = Annotated[
    str | SkipJsonSchema[None],
    Header(alias=WORKSPACE_HEADER, description="The workspace, for callers that belong to several."),
]


class WorkspaceAccess(Access):
    """Access to what belongs to a workspace, which a header may name."""

    async def __call__(self, request: Request, _workspace_id: _WorkspaceId = None) -> Caller | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        return request.scope[_CALLER]


READ = WorkspaceAccess(Authenticator.caller, Action.READ)
REQUEST = WorkspaceAccess(Authenticator.caller, Action.REQUEST)
DECIDE = WorkspaceAccess(Authenticator.caller, Action.DECIDE)
TAKE_PART = WorkspaceAccess(Authenticator.caller, Action.REQUEST, Action.DECIDE)  # the body says which
MANAGE = WorkspaceAccess(Authenticator.administrator, Action.MANAGE, Action.ADMINISTER)
ADMINISTER = WorkspaceAccess(Authenticator.administrator, Action.ADMINISTER)
FIRST_KEY = Access(Authenticator.first_key)
OPERATOR = Access(Authenticator.operator)
PUBLIC = Access(Authenticator.anyone)


async def _caller(request: Request) -> Caller:
    return request.scope[_CALLER]


CallerDep = Annotated[Caller, Depends(_caller)]


async def _authenticator(request: Request) -> Authenticator:
    return request.app.state.authenticator


AuthenticatorDep = Annotated[Authenticator, Depends(_authenticator)]
