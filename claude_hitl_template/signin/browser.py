"""What a page needs to know about the browser that asks for it. Each page depends on `browser_user`.

app = FastAPI(); install(app, sign_in)

@app.post("/things")
async def change(request: Request, user: Annotated[BrowserUser, Depends(browser_user)]) -> Response:
    await check_csrf(request, user)
"""

import hmac
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import urlencode, urlsplit

import structlog
from fastapi import FastAPI, Request
from starlette.responses import Response

from claude_hitl_template.domain.people import Action, Actor, Principal
from claude_hitl_template.errors import HitlError
from claude_hitl_template.inbox import pages
from claude_hitl_template.signin.addresses import ROOT, SIGN_IN, own_path

log = structlog.get_logger()
TEMPLATES = pages.environment(Path(__file__).parent / "templates")
CSRF_FIELD, CSRF_HEADER = "csrf", "x-csrf-token"
MAX_FIELDS = 1000


@dataclass(frozen=True)
class BrowserUser:
    """A signed-in person.

    Attributes:
        workspace_ids: The workspaces in which the person has a role; at least one.
        csrf: What each form sends back as `csrf`, and each script as `x-csrf-token`.
        session_id: The public id of the browser's session.
    """

    principal: Principal
    workspace_ids: tuple[str, ...]
    csrf: str
    session_id: str

    @property
    def name(self) -> str:
        return self.principal.name

    @property
    def actor(self) -> Actor:
        """Who acts, for the Store."""
        return Actor(name=self.principal.name, principal_id=self.principal.id)

    def may(self, action: Action, workspace_id: str) -> bool:
        return workspace_id in self.workspace_ids and self.principal.may(action, workspace_id)


class Refused(HitlError):
    """A page cannot be shown, or a sign-in failed. The reader sees what happened and what to do about it."""

    def __init__(self, what: str, fix: str, status: int = 403) -> None:
        super().__init__(what, fix, status)
        self.fix, self.status = fix, status


class SignInNeeded(HitlError):
    """The browser is not signed in. `next_url` is the path to return to afterwards."""

    def __init__(self, next_url: str) -> None:
        super().__init__("sign in first", next_url)
        self.next_url = next_url

    @property
    def address(self) -> str:
        """The path of the sign-in page that returns there."""
        return f"{SIGN_IN}?{urlencode({'next': self.next_url})}"


class Users(Protocol):
    """Who the browser is."""

    async def user(self, request: Request) -> BrowserUser | None:
        """The signed-in user; None without a valid session. Raises Refused for a user in no workspace."""
        ...

    def own_origin(self, request: Request) -> str:
        """Scheme, host and port under which the browser reaches this service."""
        ...


def install(app: FastAPI, users: Users) -> None:
    """Makes `browser_user` and `check_csrf` work in the routes of `app`, and answers what they raise."""
    app.state.users = users
    app.add_exception_handler(SignInNeeded, _to_sign_in)
    app.add_exception_handler(Refused, _refusal)


async def browser_user(request: Request) -> BrowserUser:
    """The signed-in user. Raises SignInNeeded, and Refused for a user in no workspace."""
    users: Users = request.app.state.users
    user = await users.user(request)
    if user is None:
        raise SignInNeeded(_return_path(request))
    return user


async def check_csrf(request: Request, user: BrowserUser) -> None:
    """Raises Refused for a request that a page of this service did not send. For every method that changes something.

    A form is read with at most MAX_FIELDS fields, and afterwards `request.form()` returns it again.
    """
    check_same_origin(request)
    given = request.headers.get(CSRF_HEADER)
    if given is None:
        given = str((await request.form(max_files=0, max_fields=MAX_FIELDS)).get(CSRF_FIELD, ""))
    if not hmac.compare_digest(given.encode("utf-8", "surrogatepass"), user.csrf.encode()):
        raise Refused(
            "This form belongs to another sign-in.", "Go back, reload the page, and send it once more."
        )


def check_same_origin(request: Request) -> None:
    """Raises Refused for what a page of another origin sent.

    Ports of one host share cookies, and so do subdomains of one site, so a cookie alone proves nothing. Browsers send
    `Origin` with every request that changes something.
    """
    users: Users = request.app.state.users
    origins, site = request.headers.getlist("origin"), request.headers.get("sec-fetch-site")
    foreign = any(_normal(origin) != _normal(users.own_origin(request)) for origin in origins)
    if foreign or site not in (None, "same-origin", "none") or (not origins and site is None):
        raise Refused(
            "A page of another address sent this, so nothing was done.",
            "Open the page here and try again. If this is the right address, the operator sets HITL_PUBLIC_URL to it.",
        )


async def _to_sign_in(request: Request, error: Exception) -> Response:
    if not isinstance(error, SignInNeeded):
        raise error
    headers = {"cache-control": "no-store"}
    if pages.is_partial(request):  # a redirect would put the sign-in page into a part of the page
        return Response("sign in first", 401, {**headers, "hx-redirect": error.address})
    return Response(status_code=303, headers={**headers, "location": error.address})


async def _refusal(request: Request, error: Exception) -> Response:
    if not isinstance(error, Refused):
        raise error
    log.warning("a page was refused", path=request.url.path, why=str(error))
    return problem_page(request, str(error), error.fix, status=error.status)


def problem_page(request: Request, what: str, fix: str, *, status: int) -> Response:
    """A page that says what happened and what to do."""
    return pages.page(
        request, "refused.html.j2", status=status, environment=TEMPLATES, what=what, fix=fix, sign_in=SIGN_IN
    )


def _return_path(request: Request) -> str:
    """The page that the user is on: of a script's or a form's request the one that sent it."""
    if request.method in ("GET", "HEAD") and not pages.is_partial(request):
        query = request.url.query
        return own_path(request.url.path + (f"?{query}" if query else ""))
    page = urlsplit(request.headers.get("hx-current-url") or request.headers.get("referer", ""))
    if page.netloc.lower() != request.headers.get("host", "").lower():
        return own_path(ROOT)
    return own_path(page.path + (f"?{page.query}" if page.query else ""))


def _normal(origin: str) -> str:
    """An origin without the default port of its scheme."""
    found = urlsplit(origin.lower())
    default = {"http": ":80", "https": ":443"}.get(found.scheme, "")
    return f"{found.scheme}://{found.netloc.removesuffix(default) if default else found.netloc}"
