"""Who is behind a request: the panel's login, verified, and the role asked of the panel itself."""

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
from claude_hitl_template.errors import Unauthorized, Unavailable
from claude_hitl_template.store.protocol import Clients

log = structlog.get_logger()
COOKIE, HEADER = "kodosumi_jwt", "KODOSUMI_API_KEY"
ADMIN = "admin"  # the role that Kodosumi makes at its first start
ASK_S = 10.0
REMEMBER_S = 30.0  # how long what the panel said of a role is believed
REMEMBERED = 10_000
_STATE, _ENTRIES = "panel_user", "panel_entries"
_ADDRESS = re.compile(r"https?://([A-Za-z0-9.-]+)(?::(\d{1,5}))?((?:/[A-Za-z0-9_.-]+)*)/?")


@dataclass(frozen=True)
class PanelUser:
    """A role of the panel. `key_id` is whom its sessions belong to; `approver`: may decide in everyone's sessions."""

    id: str
    name: str
    operator: bool
    approver: bool
    key_id: str

    def may_decide(self, key_id: str) -> bool:
        """Whether this user may decide in the sessions of that key: approvers in all, others in their own."""
        return self.approver or key_id == self.key_id


def panel_user(request: Request) -> PanelUser:
    """The user behind a request to one of Kodosumi's routes, all of which stand behind `Guard`."""
    return request.scope["state"][_STATE]


def note_registered(connection: HTTPConnection) -> None:
    """Keeps, for `entries_path`, the address that the panel knows this application by: one of several that are right.

    It comes from a header that anyone may write, so it only ever names a path of the panel itself.
    """
    found = _ADDRESS.fullmatch(connection.headers.get(KODOSUMI_BASE, ""))
    path = f"/inputs/-/{found[1]}/{found[2]}{found[3]}/-" if found else ""
    connection.scope.setdefault("state", {})[_ENTRIES] = path


def entries_path(request: Request) -> str:
    """The path under which the panel shows our entries; "" behind a lock, which the panel forwards without it."""
    return request.scope["state"][_ENTRIES]


@dataclass(frozen=True)
class PanelAccess:
    """Where the panel is, what it signs its logins with ("": what everyone knows), and the password of its first role."""

    url: str
    secret: str
    password: str


PUBLIC_LOGIN = (
    "this panel signs its logins with Kodosumi's public KODO_SECRET_KEY, so anyone could be anyone here: set it in .env, "
    "and KODO_ADMIN_PASSWORD, before all of Kodosumi's commands, or start the panel with ./hitl up"
)


def default_login() -> tuple[str, str]:
    """Secret and password of a panel that was started without ./hitl up, from the KODO_ settings that it reads too.

    The secret is "" where it is Kodosumi's default, which is public.
    """
    found = InternalSettings()
    if found.SECRET_KEY.strip() in ("", InternalSettings.model_fields["SECRET_KEY"].default):
        log.warning(PUBLIC_LOGIN)
        return "", found.ADMIN_PASSWORD
    return found.SECRET_KEY, found.ADMIN_PASSWORD


class Guard:
    """Recognises users by the login that the panel forwards. A header that only names a user is worth nothing."""

    def __init__(self, store: Clients, panel: PanelAccess, approvers: frozenset[str]) -> None:
        self._store, self._panel, self._approvers = store, panel, approvers
        self._known: OrderedDict[str, tuple[PanelUser, float]] = OrderedDict()

    async def recognise(self, connection: HTTPConnection) -> None:
        """Notes the user for `panel_user`. Raises Unauthorized, Unavailable."""
        if not self._panel.secret:
            raise Unauthorized(PUBLIC_LOGIN)
        refuse_foreign_pages(connection)
        token = connection.headers.get(HEADER) or connection.cookies.get(COOKIE) or ""
        role_id = self._check(token)
        known = self._known.get(role_id)
        if known is None or known[1] < time.monotonic():
            known = await self._ask(role_id, token), time.monotonic() + REMEMBER_S
            self._known[role_id] = known
            if len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
        connection.scope.setdefault("state", {})[_STATE] = known[0]

    def _check(self, token: str) -> str:
        """The role that a login is for. Its signature, its algorithm and its age are checked."""
        if not token:
            raise Unauthorized("this page is opened through the panel, by someone who is logged in there")
        options = {"require_exp": True, "require_sub": True}
        try:
            return str(uuid.UUID(jwt.decode(token, self._panel.secret, ["HS256"], options)["sub"]))
        except (JWTError, ValueError) as error:
            raise Unauthorized(
                "this login is not, or no longer, valid here: log in to the panel again. If that does not help, the "
                "panel was not started by ./hitl up and signs its logins with another KODO_SECRET_KEY"
            ) from error

    async def _ask(self, role_id: str, token: str) -> PanelUser:
        role = await self._role(role_id, token)  # the panel shows roles to operators only
        operator = role is not None
        role = role or await self._role(role_id, await self._own_login())
        if role is None or role.get("id") != role_id or not role.get("active"):
            raise Unauthorized("this role does not exist in the panel any more, or is not active")
        name = str(role["name"])
        key = await self._store.add_key(f"panel: {name}", f"panel:{role_id}")  # no secret has such a SHA-256
        return PanelUser(role_id, name, operator, operator or name in self._approvers, key.id)

    async def _role(self, role_id: str, token: str) -> dict[str, object] | None:
        """None when the panel does not show it to the holder of `token`."""
        try:
            async with self._client() as client:
                answer = await client.get(f"/role/{role_id}", headers={HEADER: token})
            return answer.json() if answer.status_code == 200 else None
        except (httpx.HTTPError, ValueError) as error:
            raise self._silent() from error

    async def _own_login(self) -> str:
        body = {"name": ADMIN, "password": self._panel.password}
        try:
            proof = {PANEL_PROOF: panel_proof(self._panel.secret)}
            async with self._client() as client:
                answer = await client.post("/api/login", json=body, headers=proof)
            if answer.status_code != 200:
                raise Unavailable(
                    f"the panel does not let the service in, which logs in as {ADMIN} with the password that the "
                    "panel was first started with; so only operators are recognised"
                )
            return str(answer.json()[HEADER])
        except (httpx.HTTPError, ValueError, KeyError) as error:
            raise self._silent() from error

    def _client(self) -> httpx.AsyncClient:
        accepted = {"accept": "application/json"}
        return network.direct_async(base_url=self._panel.url, timeout=ASK_S, headers=accepted)

    def _silent(self) -> Unavailable:
        return Unavailable(
            f"the panel does not answer at {self._panel.url}, so nobody can be recognised; ./hitl status says why"
        )


def refuse_foreign_pages(connection: HTTPConnection) -> None:
    """Raises Unauthorized for what a page of another origin sent with the user's cookie.

    Cookies are shared by all ports of a host, and an agent may well serve pages on another one.
    """
    origin = connection.headers.get("origin")
    if origin and urlsplit(origin).netloc != connection.headers.get("host"):
        raise Unauthorized("a page of another origin may not act for you; open the panel itself")
