"""Checks every request to Kodosumi's panel before the panel sees it: host, origin, path, body, role, failed logins."""

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
MAX_FAILED_LOGINS, LOGIN_PERIOD_S = 10, 300.0
MAX_LOGIN_BYTES = 64 * 1024
SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
JSON, FORM, MULTIPART = "application/json", "application/x-www-form-urlencoded", "multipart/form-data"
# By the first parts of the path; all other paths accept JSON only. Kodosumi forwards a form as JSON with the form's type.
OTHER_CONTENT_TYPES: Mapping[tuple[str, ...], str] = {
    ("login",): FORM,
    ("admin", "routes"): FORM,
    ("inputs",): FORM,
    ("-",): FORM,
    ("lock",): FORM,
    ("files", "chunk"): MULTIPART,
}
LOGINS = frozenset({("login",), ("api", "login")})
LOGOUTS = frozenset({("logout",), ("admin", "logout")})
# A deployment from the panel would delete the service, which is not deployed from a file. These routes also need the
# token of Ray's dashboard, which the panel does not get.
CLOSED_PREFIXES = frozenset({"deploy", "serve"})
MAX_DECODINGS = 4
_UNSAFE_CHARS = re.compile(r"[\x00-\x1f\x7f\\]")
_SECURITY_HEADERS = {
    # Kodosumi's pages have inline scripts and styles.
    "content-security-policy": "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; font-src 'self' data:; object-src 'none'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'",
    "x-frame-options": "DENY",
    "x-content-type-options": "nosniff",
    # With a stricter policy browsers would send "Origin: null" with forms.
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


class ProtectedPanel:
    """Kodosumi's panel behind checks that apply to every role, including operators.

    Args:
        app: Kodosumi's application.
        hosts: The host names, with port, under which the panel may be reached.
        secret: Signs the panel's logins.
        may_act: Whether the role of a request, if it has one, exists and is active.
        logins: Counts failed logins, by name and by address.
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
        self._logins = logins or Throttle(MAX_FAILED_LOGINS, LOGIN_PERIOD_S)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        response = _Response(scope, send)
        try:
            await self._check_and_pass_on(HTTPConnection(scope), receive, response)
        except HitlError as error:
            log.warning("a request to the panel was refused", path=scope["path"], why=str(error))
            refusal = WebSocketClose(1008) if scope["type"] == "websocket" else _refusal(error)
            await refusal(scope, receive, send if scope["type"] == "websocket" else response)

    async def _check_and_pass_on(self, request: HTTPConnection, receive: Receive, send: "_Response") -> None:
        self._check_host(request)
        parts = _parts(request.scope)
        check_origin(request, changes=_changes(request, parts))
        if parts[:1] and parts[0] in CLOSED_PREFIXES:
            raise NotFound("the service is deployed by ./hitl up or ./hitl deploy, never from the panel")
        _check_body(request, parts)
        if parts in LOGINS:
            await self._log_in(request, parts, receive, send)
            return
        # A login is valid for a day, but the role may have been deleted or deactivated since.
        if parts[:1] != ("static",) and not await self._may_act(request.scope):
            raise _InactiveRole("this role does not exist any more, or is not active: log in again")
        await self._app(request.scope, receive, send)

    def _check_host(self, request: HTTPConnection) -> None:
        """A foreign page may have a host name that resolves to the panel; requests under that name are refused."""
        given = request.headers.getlist("host")
        if len(given) != 1 or given[0].lower() not in self._hosts:
            raise InvalidInput(
                "this is not an address of the panel; HITL_PANEL_HOSTS adds names to them", "Host"
            )

    async def _log_in(
        self, request: HTTPConnection, parts: tuple[str, ...], receive: Receive, send: "_Response"
    ) -> None:
        # The login of the service itself is not delayed by failed logins of others.
        if hmac.compare_digest(request.headers.get(PANEL_PROOF, "").encode(), self._proof.encode()):
            await self._app(request.scope, receive, send)
            return
        body = await _read(receive, MAX_LOGIN_BYTES)
        client = request.client.host if request.client else ""
        tried = [
            f"address {network_of(client)}",
            *(f"name {name}" for name in _login_names(request, parts, body)),
        ]
        wait_s = max(self._logins.wait_s(key) for key in tried)
        if wait_s:
            raise RateLimited("too many logins failed; wait, then try again", wait_s)
        for key in tried:  # before the result is known, or concurrent attempts would not count
            self._logins.take(key)
        await self._app(request.scope, _replayed(body, receive), send)
        if send.logged_in:
            for key in tried:
                self._logins.give_back(key)


def check_origin(request: HTTPConnection, *, changes: bool) -> None:
    """Raises Unauthorized for a request that a page of another origin sent with the user's cookie.

    All ports of a host share cookies, and so do the subdomains of a site. Browsers send the origin with every request
    that changes something; with others they say whether a page of another site sent it. Programs send no cookie.
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
    """Whether a request may change something. Kodosumi also logs in and out by GET."""
    if request.scope["type"] == "websocket" or request.scope["method"] not in SAFE:
        return True
    site = request.headers.get("sec-fetch-site")
    return parts in LOGINS | LOGOUTS and site is not None


def _parts(scope: Scope) -> tuple[str, ...]:
    """The parts of the path as Kodosumi's router sees it. Raises InvalidInput for a path that leads out of its folder.

    The path is decoded until it no longer changes, because a later handler may decode it again.
    """
    _check_path(scope["path"])
    _check_path(scope.get("raw_path", b"").decode("latin-1").partition("?")[0])
    return tuple(part for part in scope["path"].split("/") if part)


def _check_path(path: str, decodings: int = MAX_DECODINGS) -> None:
    if _UNSAFE_CHARS.search(path) or not {"..", "."}.isdisjoint(path.split("/")):
        raise InvalidInput("this path leads out of its folder", "path")
    decoded = unquote(path)
    if decoded != path:
        if not decodings:
            raise InvalidInput("this path is encoded too many times", "path")
        _check_path(decoded, decodings - 1)


def _check_body(request: HTTPConnection, parts: tuple[str, ...]) -> None:
    """Raises InvalidInput for a wrong content type.

    Kodosumi parses any body as JSON, and foreign pages may send bodies that are not declared as JSON.
    """
    if request.scope["type"] != "http":
        return
    length = request.headers.get("content-length")
    if length in (None, "0") and "transfer-encoding" not in request.headers:
        return
    given = [value.partition(";")[0].strip().lower() for value in request.headers.getlist("content-type")]
    other = next(
        (kind for prefix, kind in OTHER_CONTENT_TYPES.items() if parts[: len(prefix)] == prefix), JSON
    )
    if len(given) != 1 or given[0] not in (JSON, other):
        raise InvalidInput(f"send {other}", "Content-Type")


def _login_names(request: HTTPConnection, parts: tuple[str, ...], body: bytes) -> set[str]:
    """The names of all roles that a login request could be for."""
    found = parse_qs(request.scope["query_string"].decode("latin-1")).get("name", [])
    with_form = request.headers.get("content-type", "").lower().startswith(FORM)
    if with_form:
        found += parse_qs(body.decode("utf-8", "replace")).get("name", [])
    elif body:
        try:
            given = json.loads(body)
            found += [str(given["name"])] if isinstance(given, dict) and "name" in given else []
        except (ValueError, RecursionError):
            pass  # Kodosumi refuses it; it counts for the address
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


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Returns a body that was read already, then the messages after it."""
    unread = [body]

    async def read() -> Message:
        return (
            {"type": "http.request", "body": unread.pop(), "more_body": False} if unread else await receive()
        )

    return read


class _Response:
    """Sends a response of Kodosumi's with security headers added, and without tracebacks."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self._scope, self._send = scope, send
        self._start: Message | None = None  # of an error response, until its body is complete
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
                headers.append("set-cookie", self._protected_cookie(cookie))
        headers.update(_SECURITY_HEADERS)
        if "location" in headers:
            headers["location"] = self._local_location(headers["location"])

    def _protected_cookie(self, cookie: str) -> str:
        """Adds attributes that keep the cookie from scripts and from other sites."""
        present = {part.strip().partition("=")[0].lower() for part in cookie.split(";")[1:]}
        wanted = {"HttpOnly": "HttpOnly", "SameSite": "SameSite=Lax"}
        if self._scope.get("scheme") == "https":
            wanted["Secure"] = "Secure"
        return "; ".join([cookie, *(text for name, text in wanted.items() if name.lower() not in present)])

    def _local_location(self, location: str) -> str:
        """Kodosumi redirects to any address in a login form or a URL; only addresses of the panel pass."""
        host = Headers(scope=self._scope).get("host", "")
        local = location.startswith("/") and not location.startswith(("//", "/\\"))
        inside = local or location.startswith(f"{self._scope.get('scheme')}://{host}/")
        return "/" if _UNSAFE_CHARS.search(location) or not inside else location


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


class _InactiveRole(HitlError):
    """The role of a login was deleted or deactivated."""


_STATUSES: Mapping[type[HitlError], int] = {
    Unauthorized: 403,
    _InactiveRole: 401,
    NotFound: 404,
    TooLarge: 413,
    RateLimited: 429,
}


def _refusal(error: HitlError) -> PlainTextResponse:
    answer = PlainTextResponse(str(error), _STATUSES.get(type(error), 400))
    if isinstance(error, RateLimited):
        answer.headers["retry-after"] = str(math.ceil(error.retry_after_s))
    if isinstance(error, _InactiveRole):
        answer.delete_cookie(COOKIE)
    return answer
