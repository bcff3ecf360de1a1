"""What every request to Kodosumi's panel passes first: whose page sent it, what it brings, where its path leads."""

import hmac
import json
import math
import re
from collections.abc import Awaitable, Callable, Collection, Mapping
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs, unquote, urlsplit

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocketClose

from claude_hitl_template.config.secret_files import PANEL_PROOF, panel_proof
from claude_hitl_template.domain.rate_limit import Throttle, network_of
from claude_hitl_template.errors import HitlError, InvalidInput, NotFound, RateLimited, TooLarge, Unauthorized
from claude_hitl_template.panel.users import COOKIE, HEADER

log = structlog.get_logger()
LOGIN_TRIES, LOGIN_PERIOD_S = 10, 300.0
LOGIN_BYTES = 64 * 1024
SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
JSON, FORM, MULTIPART = "application/json", "application/x-www-form-urlencoded", "multipart/form-data"
# By the first parts of the path; everything else takes JSON alone. Kodosumi sends a form on as JSON with the form's type.
OTHER_BODIES: Mapping[tuple[str, ...], str] = {
    ("login",): FORM,
    ("admin", "routes"): FORM,
    ("inputs",): FORM,
    ("-",): FORM,
    ("lock",): FORM,
    ("files", "chunk"): MULTIPART,
}
LOGINS = frozenset({("login",), ("api", "login")})
LOGOUTS = frozenset({("logout",), ("admin", "logout")})
# A deployment from here would delete the service, which is not deployed from a file; and Ray's dashboard, which these
# routes ask, wants a token that the panel has no business with.
CLOSED = frozenset({"deploy", "serve"})
MOST_DECODINGS = 4
_REFUSED = re.compile(r"[\x00-\x1f\x7f\\]")
_SECURITY = {
    # Kodosumi's pages have their scripts and styles in them.
    "content-security-policy": "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; font-src 'self' data:; object-src 'none'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'",
    "x-frame-options": "DENY",
    "x-content-type-options": "nosniff",
    # Under a stricter one browsers would send "Origin: null" with forms.
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


class ProtectedPanel:
    """Kodosumi's panel behind checks of its own that hold for every role, operators included.

    Args:
        app: Kodosumi's application.
        hosts: The names, with port, under which the panel may be reached.
        secret: What the panel signs its logins with.
        may_act: Whether the role behind a request, if there is one, exists and is active.
        logins: Counts the logins that failed, by name and by address.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        hosts: Collection[str],
        secret: str,
        may_act: Callable[[Scope], Awaitable[bool]],
        logins: Throttle | None = None,
    ) -> None:
        self._app, self._proof, self._may_act = app, panel_proof(secret), may_act
        self._hosts = frozenset(host.lower() for host in hosts)
        self._logins = logins or Throttle(LOGIN_TRIES, LOGIN_PERIOD_S)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        answering = _Answer(scope, send)
        try:
            await self._checked(HTTPConnection(scope), receive, answering)
        except HitlError as error:
            log.warning("a request to the panel was refused", path=scope["path"], why=str(error))
            refusal = WebSocketClose(1008) if scope["type"] == "websocket" else _refusal(error)
            await refusal(scope, receive, send if scope["type"] == "websocket" else answering)

    async def _checked(self, request: HTTPConnection, receive: Receive, send: "_Answer") -> None:
        self._check_host(request)
        parts = _parts(request.scope)
        check_origin(request, changes=_changes(request, parts))
        if parts[:1] and parts[0] in CLOSED:
            raise NotFound("the service is deployed by ./hitl up or ./hitl deploy, never from the panel")
        _check_body(request, parts)
        if parts in LOGINS:
            await self._log_in(request, parts, receive, send)
            return
        # A login is good for a day; a role that was deleted or switched off meanwhile is not.
        if parts[:1] != ("static",) and not await self._may_act(request.scope):
            raise _NoSuchRole("this role does not exist any more, or is not active: log in again")
        await self._app(request.scope, receive, send)

    def _check_host(self, request: HTTPConnection) -> None:
        """A page elsewhere may have a name of its own that leads here; under that name the panel does not answer."""
        given = request.headers.getlist("host")
        if len(given) != 1 or given[0].lower() not in self._hosts:
            raise InvalidInput(
                "this is not an address of the panel; HITL_PANEL_HOSTS adds names to them", "Host"
            )

    async def _log_in(
        self, request: HTTPConnection, parts: tuple[str, ...], receive: Receive, send: "_Answer"
    ) -> None:
        # The service's own login is not held up by what others try.
        if hmac.compare_digest(request.headers.get(PANEL_PROOF, "").encode(), self._proof.encode()):
            await self._app(request.scope, receive, send)
            return
        body = await _read(receive, LOGIN_BYTES)
        client = request.client.host if request.client else ""
        tried = [f"address {network_of(client)}", *(f"name {name}" for name in _names(request, parts, body))]
        wait_s = max(self._logins.wait_s(key) for key in tried)
        if wait_s:
            raise RateLimited("too many logins failed; wait, then try again", wait_s)
        for key in tried:  # before the answer is known, or tries side by side would not count
            self._logins.take(key)
        await self._app(request.scope, _again(body, receive), send)
        if send.logged_in:
            for key in tried:
                self._logins.give_back(key)


def check_origin(request: HTTPConnection, *, changes: bool) -> None:
    """Raises Unauthorized for what a page of another origin sent with the user's cookie.

    Cookies are shared by all ports of a host and, by their site, by its subdomains. Browsers name the origin with all
    that changes something; of what only reads they say whether another site's page asked. Programs send no cookie.
    """
    origins, host = request.headers.getlist("origin"), request.headers.get("host", "")
    if any(urlsplit(origin).netloc.lower() != host.lower() for origin in origins):
        raise Unauthorized("a page of another origin may not act for you; open the panel itself")
    site = request.headers.get("sec-fetch-site")
    if not changes:
        goes_there = (
            request.headers.get("sec-fetch-mode") == "navigate"
            and request.headers.get("sec-fetch-dest") == "document"
        )
        if site in ("cross-site", "same-site") and not goes_there:
            raise Unauthorized("a page of another origin may not read this")
        return
    if origins:
        return
    if site not in (None, "same-origin", "none"):
        raise Unauthorized("a page of another origin may not act for you; open the panel itself")
    if site is None and COOKIE in request.cookies and not request.headers.get(HEADER):
        raise Unauthorized(
            f"a program shows its login in the header {HEADER}; a cookie needs the header Origin with it"
        )


def _changes(request: HTTPConnection, parts: tuple[str, ...]) -> bool:
    """Whether a request may change something. Kodosumi logs in and out by GET, too."""
    if request.scope["type"] == "websocket" or request.scope["method"] not in SAFE:
        return True
    site = request.headers.get("sec-fetch-site")
    return parts in LOGINS | LOGOUTS and site is not None


def _parts(scope: Scope) -> tuple[str, ...]:
    """The path as Kodosumi's router sees it. Raises InvalidInput for one that leads out of its folder.

    Decoded until nothing changes: whoever passes it on may decode it again.
    """
    _check_path(scope["path"])
    _check_path(scope.get("raw_path", b"").decode("latin-1").partition("?")[0])
    return tuple(part for part in scope["path"].split("/") if part)


def _check_path(path: str, decodings: int = MOST_DECODINGS) -> None:
    if _REFUSED.search(path) or not {"..", "."}.isdisjoint(path.split("/")):
        raise InvalidInput("this path leads out of its folder", "path")
    decoded = unquote(path)
    if decoded != path:
        if not decodings:
            raise InvalidInput("this path is encoded again and again", "path")
        _check_path(decoded, decodings - 1)


def _check_body(request: HTTPConnection, parts: tuple[str, ...]) -> None:
    """Raises InvalidInput: Kodosumi reads JSON whatever a body is called, and pages elsewhere may send what is not."""
    if request.scope["type"] != "http":
        return
    length = request.headers.get("content-length")
    if length in (None, "0") and "transfer-encoding" not in request.headers:
        return
    given = [value.partition(";")[0].strip().lower() for value in request.headers.getlist("content-type")]
    other = next((kind for prefix, kind in OTHER_BODIES.items() if parts[: len(prefix)] == prefix), JSON)
    if len(given) != 1 or given[0] not in (JSON, other):
        raise InvalidInput(f"send {other}", "Content-Type")


def _names(request: HTTPConnection, parts: tuple[str, ...], body: bytes) -> set[str]:
    """Every role that a login may be meant for."""
    found = parse_qs(request.scope["query_string"].decode("latin-1")).get("name", [])
    with_form = request.headers.get("content-type", "").lower().startswith(FORM)
    if with_form:
        found += parse_qs(body.decode("utf-8", "replace")).get("name", [])
    elif body:
        try:
            given = json.loads(body)
            found += [str(given["name"])] if isinstance(given, dict) and "name" in given else []
        except (ValueError, RecursionError):
            pass  # Kodosumi refuses it; the address counts
    return {name.strip() for name in found}


async def _read(receive: Receive, most: int) -> bytes:
    body = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return body
        body += message.get("body", b"")
        if len(body) > most:
            raise TooLarge("a login is not that long")
        if not message.get("more_body"):
            return body


def _again(body: bytes, receive: Receive) -> Receive:
    """Hands out a body that was read, then what comes after it."""
    unread = [body]

    async def read() -> Message:
        return (
            {"type": "http.request", "body": unread.pop(), "more_body": False} if unread else await receive()
        )

    return read


class _Answer:
    """Sends an answer of Kodosumi's with what browsers are to be told, and without what nobody is."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self._scope, self._send = scope, send
        self._start: Message | None = None  # of an error, until its body is there
        self._body = b""
        self.logged_in = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._change(message)
            if message["status"] >= 400 and Headers(raw=message["headers"]).get(
                "content-type", ""
            ).startswith(JSON):
                self._start = message
                return
        elif self._start is not None:
            self._body += message.get("body", b"")
            if message.get("more_body"):
                return
            message = {"type": "http.response.body", "body": _without_traceback(self._body)}
            MutableHeaders(raw=self._start["headers"])["content-length"] = str(len(message["body"]))
            start, self._start = self._start, None
            await self._send(start)
        await self._send(message)

    def _change(self, message: Message) -> None:
        message["headers"] = raw = [
            (bytes(name).lower(), bytes(value)) for name, value in message.get("headers", ())
        ]
        cookies = [value.decode("latin-1") for name, value in raw if name == b"set-cookie"]
        self.logged_in = any(_logs_in(cookie) for cookie in cookies)
        headers = MutableHeaders(raw=raw)
        if cookies:
            del headers["set-cookie"]
            for cookie in cookies:
                headers.append("set-cookie", self._for_the_server_only(cookie))
        headers.update(_SECURITY)
        if "location" in headers:
            headers["location"] = self._within(headers["location"])

    def _for_the_server_only(self, cookie: str) -> str:
        """No script of the panel reads its cookie."""
        said = {part.strip().partition("=")[0].lower() for part in cookie.split(";")[1:]}
        wanted = {"HttpOnly": "HttpOnly", "SameSite": "SameSite=Lax"}
        if self._scope.get("scheme") == "https":
            wanted["Secure"] = "Secure"
        return "; ".join([cookie, *(text for name, text in wanted.items() if name.lower() not in said)])

    def _within(self, location: str) -> str:
        """Kodosumi goes wherever a login form or an address says."""
        host = Headers(scope=self._scope).get("host", "")
        local = location.startswith("/") and not location.startswith(("//", "/\\"))
        inside = local or location.startswith(f"{self._scope.get('scheme')}://{host}/")
        return "/" if _REFUSED.search(location) or not inside else location


def _logs_in(cookie: str) -> bool:
    try:
        found = SimpleCookie(cookie).get(COOKIE)
    except CookieError:
        return False
    return found is not None and found.value != "" and found["max-age"] != "0"


def _without_traceback(body: bytes) -> bytes:
    try:
        said = json.loads(body)
    except ValueError:
        return body
    if isinstance(said, dict) and said.pop("stacktrace", None) is not None:
        return json.dumps(said).encode()
    return body


class _NoSuchRole(HitlError):
    """The login of a role that may not act."""


_STATUSES: Mapping[type[HitlError], int] = {
    Unauthorized: 403,
    _NoSuchRole: 401,
    NotFound: 404,
    TooLarge: 413,
    RateLimited: 429,
}


def _refusal(error: HitlError) -> PlainTextResponse:
    answer = PlainTextResponse(str(error), _STATUSES.get(type(error), 400))
    if isinstance(error, RateLimited):
        answer.headers["retry-after"] = str(math.ceil(error.retry_after_s))
    if isinstance(error, _NoSuchRole):
        answer.delete_cookie(COOKIE)
    return answer
