"""Renders the pages. `templates/base.html.j2` is the frame of every page of this service, also of those for signing in."""

import hashlib
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from jinja2 import Environment
from starlette.requests import HTTPConnection, Request
from starlette.responses import HTMLResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from claude_hitl_template.domain.models import utcnow
from claude_hitl_template.domain.policy import mcp_parts
from claude_hitl_template.errors import NotFound
from claude_hitl_template.presentation.html import line_count, templates
from claude_hitl_template.presentation.text import age, visible
from claude_hitl_template.presentation.views import PERMISSION_TEXT

TEMPLATES = Path(__file__).parent / "templates"
STATIC = Path(__file__).parent / "static"
_KINDS = {
    ".css": "text/css",
    ".js": "text/javascript",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".txt": "text/plain",
    ".webmanifest": "application/manifest+json",
}
_SHELL = ("base.html.j2", "offline.html.j2")  # templates of the page that the service worker keeps
SECURITY_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; worker-src 'self'; manifest-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    # Nothing goes to other sites. With `no-referrer` browsers would also send "Origin: null" with our own forms.
    "referrer-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=(), payment=()",
}


class SignedIn(Protocol):
    """What the frame shows of the person who is signed in."""

    @property
    def name(self) -> str: ...


def _age(at: datetime) -> str:
    return age(at.isoformat())


_LABELS = {"AskUserQuestion": "Question", "ExitPlanMode": "Plan", "Network": "Host"}


def tool_label(tool_name: str) -> str:
    """A tool's short name for people."""
    server, tool = mcp_parts(tool_name)
    return f"{server}: {tool}" if server else _LABELS.get(tool_name, tool_name)


def _lines(text: str) -> str:
    count = line_count(text.removesuffix("\n"))
    return f"{count} line{'' if count == 1 else 's'}"


def time_left(at: datetime, now: datetime | None = None) -> str:
    """How long until a time: `5s`, `12m`, `3h`, `4d`; "0s" once it is past."""
    return age((now or utcnow()).isoformat(), at.astimezone(UTC))


def environment(*folders: Path) -> Environment:
    """Templates of `folders` that may extend those of the inbox."""
    made = templates(
        *folders,
        TEMPLATES,
        age=_age,
        left=time_left,
        tool_label=tool_label,
        lines=_lines,
        PERMISSION_TEXT=PERMISSION_TEXT,
    )
    made.filters["visible"] = visible
    return made


_ENVIRONMENT = environment()


def is_partial(request: HTTPConnection) -> bool:
    """Whether a script of a page asks, for a part of it."""
    return request.headers.get("hx-request") == "true"


def render(
    request: HTTPConnection,
    template: str,
    *,
    user: SignedIn | None = None,
    environment: Environment = _ENVIRONMENT,
    **context: Any,
) -> str:
    """The HTML of a template. `base`, `static`, `user`, `nav` and `shell_version` are defined in each."""
    base = request.scope.get("root_path", "")

    def static(name: str) -> str:
        return f"{base}/inbox/static/{name}?v={_version(name)}"

    defined: dict[str, Any] = {
        "base": base,
        "static": static,
        "user": user,
        "nav": "",
        "shell_version": _shell_version(),
    }
    defined.update(context)
    return environment.get_template(template).render(defined)


def page(
    request: HTTPConnection,
    template: str,
    *,
    status: int = 200,
    user: SignedIn | None = None,
    environment: Environment = _ENVIRONMENT,
    **context: Any,
) -> HTMLResponse:
    """A page, or a part of one, as the response to a request."""
    return HTMLResponse(render(request, template, user=user, environment=environment, **context), status)


async def static_file(request: Request) -> Response:
    """Serves a file of `static/`. The address has its version, so a browser may keep it."""
    name = request.path_params["name"]
    if name not in _names():
        raise NotFound("there is no such file")
    kept = (
        "public, max-age=31536000, immutable"
        if request.query_params.get("v") == _version(name)
        else "no-cache"
    )
    kind = _KINDS[Path(name).suffix]
    return Response(_content(name), media_type=kind, headers={"cache-control": kept})


async def manifest(_request: Request) -> Response:
    """What a browser needs to install the inbox as an application."""
    return _unversioned("manifest.webmanifest")


async def worker(request: Request) -> Response:
    """The service worker, for all pages of the service."""
    return _unversioned("worker.js", {"service-worker-allowed": f"{request.scope.get('root_path', '')}/"})


def _unversioned(name: str, headers: Mapping[str, str] | None = None) -> Response:
    kind = _KINDS[Path(name).suffix]
    return Response(_content(name), media_type=kind, headers={"cache-control": "no-cache", **(headers or {})})


async def offline(request: Request) -> Response:
    """The page that the service worker shows without a connection."""
    return page(request, "offline.html.j2")


def secured(app: ASGIApp) -> ASGIApp:
    """Adds the security headers to every response. What does not say otherwise is not stored by the browser."""
    added = [(name.encode(), value.encode()) for name, value in SECURITY_HEADERS.items()]
    no_store = (b"cache-control", b"no-store")

    async def respond(scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = list(message.get("headers", ()))
                names = {name.lower() for name, _ in headers}
                headers += [header for header in added if header[0] not in names]
                message = {
                    **message,
                    "headers": headers if b"cache-control" in names else [*headers, no_store],
                }
            await send(message)

        await app(scope, receive, with_headers)

    return respond


@cache
def _names() -> frozenset[str]:
    return frozenset(path.name for path in STATIC.iterdir() if path.suffix in _KINDS)


@cache
def _content(name: str) -> bytes:
    return (STATIC / name).read_bytes()


@cache
def _version(name: str) -> str:
    return hashlib.sha256(_content(name)).hexdigest()[:12]


@cache
def _shell_version() -> str:
    """Differs after each change of what the service worker keeps, and of the worker itself."""
    parts = [_content(name) for name in sorted(_names())] + [
        (TEMPLATES / name).read_bytes() for name in _SHELL
    ]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:12]
