"""The names under which the pages answer. A foreign page may have a name that leads here (DNS rebinding): to a browser,
the pages under that name would be the foreign page's own."""

import socket
from collections.abc import Callable
from urllib.parse import urlsplit

import structlog
from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from claude_hitl_template.config.addresses import is_address
from claude_hitl_template.config.settings import Settings

log = structlog.get_logger()
MISDIRECTED = 421
REFUSAL = "This service does not answer under this name. If it is the right one, the operator sets HITL_PUBLIC_URL to it.\n"


def own_names(settings: Settings, hostname: str | None = None) -> Callable[[str], bool]:
    """Whether a `Host` header is this service's: an address, `localhost`, this machine's name with any domain behind it, or
    a name of HITL_HOST, HITL_PUBLIC_URL or HITL_PANEL_HOSTS."""
    machine = (hostname or socket.gethostname()).lower().partition(".")[0]
    given = [f"//{name.strip()}" for name in settings.panel_hosts.split(",") if name.strip()]
    names = {_name(url) for url in (*given, f"//{settings.host}", settings.public_url or "")}

    def is_own(host: str) -> bool:
        name = _name(f"//{host}")
        labels = name.split(".")
        known = name in names or labels[0] == machine or labels[-1] == "localhost"
        return bool(name) and (known or is_address(name))

    return is_own


def only_under(is_own: Callable[[str], bool], app: ASGIApp) -> ASGIApp:
    """Answers requests under other names with a refusal."""

    async def checked(scope: Scope, receive: Receive, send: Send) -> None:
        hosts = Headers(scope=scope).getlist("host")
        if len(hosts) == 1 and is_own(hosts[0]):
            await app(scope, receive, send)
            return
        log.warning("a page was asked for under another name", hosts=hosts, path=scope["path"])
        await PlainTextResponse(REFUSAL, MISDIRECTED)(scope, receive, send)

    return checked


def _name(url: str) -> str:
    """The host of a URL, in lower case and without the last dot; "" for none."""
    try:
        return (urlsplit(url).hostname or "").removesuffix(".")
    except ValueError:
        return ""
