"""Authenticates users of the panel: verifies the login that the panel forwards, and asks the panel for the role."""

import re
import time
import uuid
from collections import OrderedDict
from dataclasses import dataclass
from urllib.parse import urlsplit

import httpx
import structlog
from jose import JWTError, jwt
from kodosumi.config import InternalSettings
from kodosumi.const import KODOSUMI_BASE
from starlette.requests import HTTPConnection, Request

from claude_hitl_template.config import network
from claude_hitl_template.config.secret_files import PANEL_PROOF, panel_proof
from claude_hitl_template.domain.people import EVERYWHERE, SERVICE, Action, Actor, Principal, Role
from claude_hitl_template.errors import Unauthorized, Unavailable
from claude_hitl_template.store.protocol import Clients

log = structlog.get_logger()
COOKIE, HEADER = "kodosumi_jwt", "KODOSUMI_API_KEY"
ADMIN = "admin"  # the role that Kodosumi creates at its first start
REQUEST_TIMEOUT_S = 10.0
CACHE_S = 30.0  # how long a role that the panel returned is used without asking again
CACHE_SIZE = 10_000
_STATE, _ENTRIES = "panel_user", "panel_entries"
_ADDRESS = re.compile(r"https?://([A-Za-z0-9.-]+)(?::(\d{1,5}))?((?:/[A-Za-z0-9_.-]+)*)/?")


@dataclass(frozen=True)
class PanelUser:
    """A role of the panel, which is a user of the service with a workspace of its own. An `approver` may decide in every
    workspace."""

    id: str
    name: str
    operator: bool
    approver: bool
    workspace_id: str
    principal: Principal

    @property
    def actor(self) -> Actor:
        return Actor(name=self.name, principal_id=self.principal.id)

    def may_decide(self, workspace_id: str) -> bool:
        """Whether this user may decide in that workspace."""
        return self.principal.may(Action.DECIDE, workspace_id)


def panel_user(request: Request) -> PanelUser:
    """The user of a request to one of Kodosumi's routes, which are all behind `Guard`."""
    return request.scope["state"][_STATE]


def remember_entries_path(connection: HTTPConnection) -> None:
    """Stores, for `entries_path`, the address under which the panel lists this application.

    It comes from a header that anyone can set, so only a path of the panel itself is derived from it.
    """
    found = _ADDRESS.fullmatch(connection.headers.get(KODOSUMI_BASE, ""))
    path = f"/inputs/-/{found[1]}/{found[2]}{found[3]}/-" if found else ""
    connection.scope.setdefault("state", {})[_ENTRIES] = path


def entries_path(request: Request) -> str:
    """The path of our entries in the panel; "" in a request to a lock, which the panel forwards without the address."""
    return request.scope["state"][_ENTRIES]


@dataclass(frozen=True)
class PanelAccess:
    """How to reach the panel.

    Attributes:
        url: Its address.
        secret: The secret that signs its logins; "" if it is Kodosumi's public default.
        password: The password of the role `admin`.
    """

    url: str
    secret: str
    password: str


PUBLIC_LOGIN = (
    "this panel signs its logins with Kodosumi's public KODO_SECRET_KEY, so anyone could be anyone here: set it in .env, "
    "and KODO_ADMIN_PASSWORD, before all of Kodosumi's commands, or start the panel with ./hitl up"
)


def default_login() -> tuple[str, str]:
    """Secret and password of a panel that was started without ./hitl up, from the KODO_ settings that it reads, too.

    Returns:
        The secret, "" if it is Kodosumi's public default, and the password.
    """
    found = InternalSettings()
    if found.SECRET_KEY.strip() in ("", InternalSettings.model_fields["SECRET_KEY"].default):
        log.warning(PUBLIC_LOGIN)
        return "", found.ADMIN_PASSWORD
    return found.SECRET_KEY, found.ADMIN_PASSWORD


class Guard:
    """Authenticates users by the login that the panel forwards. A header that only names a user is not trusted.

    Args:
        store: Where each role is a user.
        panel: How to reach the panel.
        approvers: Names of roles that may decide in every workspace.
    """

    def __init__(self, store: Clients, panel: PanelAccess, approvers: frozenset[str]) -> None:
        self._store, self._panel, self._approvers = store, panel, approvers
        self._known: OrderedDict[str, tuple[PanelUser, float]] = OrderedDict()

    async def authenticate(self, connection: HTTPConnection) -> None:
        """Stores the user for `panel_user`. Raises Unauthorized, Unavailable."""
        if not self._panel.secret:
            raise Unauthorized(PUBLIC_LOGIN)
        check_same_origin(connection)
        token = connection.headers.get(HEADER) or connection.cookies.get(COOKIE) or ""
        role_id = self._check(token)
        known = self._known.get(role_id)
        if known is None or known[1] < time.monotonic():
            known = await self._ask(role_id, token), time.monotonic() + CACHE_S
            self._known[role_id] = known
            if len(self._known) > CACHE_SIZE:
                self._known.popitem(last=False)
        connection.scope.setdefault("state", {})[_STATE] = known[0]

    def _check(self, token: str) -> str:
        """The role that a login is for. Checks signature, algorithm and age."""
        if not token:
            raise Unauthorized("open this page through the panel, logged in there")
        options = {"require_exp": True, "require_sub": True}
        try:
            return str(uuid.UUID(jwt.decode(token, self._panel.secret, ["HS256"], options)["sub"]))
        except (JWTError, ValueError) as error:
            raise Unauthorized(
                "this login is not, or no longer, valid here: log in to the panel again. If that does not help, the "
                "panel was not started by ./hitl up and signs its logins with another KODO_SECRET_KEY"
            ) from error

    async def _ask(self, role_id: str, token: str) -> PanelUser:
        role = await self._role(role_id, token)  # the panel returns roles to operators only
        operator = role is not None
        role = role or await self._role(role_id, await self._own_login())
        if role is None or role.get("id") != role_id or not role.get("active"):
            raise Unauthorized("this role does not exist in the panel any more, or is not active")
        return await self._user(role_id, str(role["name"]), operator=operator)

    async def _user(self, role_id: str, name: str, *, operator: bool) -> PanelUser:
        """The user that a role is, made or changed as the panel has it."""
        key = await self._store.add_key(f"panel: {name}", f"panel:{role_id}")  # no secret has such a SHA-256
        principal = await self._store.get_principal(str(key.principal_id))
        if principal.disabled_at is not None:
            raise Unauthorized("this user was disabled; ./hitl users list shows it")
        approver = operator or name in self._approvers
        everywhere = (Role.VIEWER, Role.APPROVER) if approver else ()
        if principal.roles.get(EVERYWHERE, ()) != everywhere:
            roles = {**principal.roles, EVERYWHERE: everywhere}
            principal = await self._store.change_principal(principal.id, {"roles": roles}, by=SERVICE)
        return PanelUser(role_id, name, operator, approver, key.id, principal)

    async def _role(self, role_id: str, token: str) -> dict[str, object] | None:
        """None if the panel does not return the role to the holder of `token`."""
        try:
            async with self._client() as client:
                answer = await client.get(f"/role/{role_id}", headers={HEADER: token})
            return answer.json() if answer.status_code == 200 else None
        except (httpx.HTTPError, ValueError) as error:
            raise self._no_response() from error

    async def _own_login(self) -> str:
        body = {"name": ADMIN, "password": self._panel.password}
        try:
            proof = {PANEL_PROOF: panel_proof(self._panel.secret)}
            async with self._client() as client:
                answer = await client.post("/api/login", json=body, headers=proof)
            if answer.status_code != 200:
                raise Unavailable(
                    f"the panel refuses the login of the service, which logs in as {ADMIN} with the password that the "
                    "panel was first started with; so only operators are recognised"
                )
            return str(answer.json()[HEADER])
        except (httpx.HTTPError, ValueError, KeyError) as error:
            raise self._no_response() from error

    def _client(self) -> httpx.AsyncClient:
        accepted = {"accept": "application/json"}
        return network.direct_async(base_url=self._panel.url, timeout=REQUEST_TIMEOUT_S, headers=accepted)

    def _no_response(self) -> Unavailable:
        return Unavailable(
            f"the panel does not answer at {self._panel.url}, so no user can be authenticated; ./hitl status says why"
        )


def check_same_origin(connection: HTTPConnection) -> None:
    """Raises Unauthorized for what a page of another origin sent with the user's cookie.

    All ports of a host share cookies, and an agent may serve pages on another port.
    """
    origin = connection.headers.get("origin")
    if origin and urlsplit(origin).netloc != connection.headers.get("host"):
        raise Unauthorized("a page of another origin may not act for you; open the panel itself")
