"""The sign-in pages: `/sign-in`, its provider's callback, `/sign-out` and `/account`, all below /claude-hitl."""

import hmac
import math
from typing import Annotated, Any

import structlog
from fastapi import APIRouter, Depends, FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp

from claude_hitl_template.config.passwords import MIN_CHARS
from claude_hitl_template.domain.people import Principal
from claude_hitl_template.domain.sign_in import PasswordOf
from claude_hitl_template.errors import (
    Conflict,
    Forbidden,
    HitlError,
    InvalidInput,
    NotFound,
    RateLimited,
    TooLarge,
    Unauthorized,
    Unavailable,
)
from claude_hitl_template.inbox import pages
from claude_hitl_template.presentation.browsers import describe
from claude_hitl_template.signin import cookies
from claude_hitl_template.signin.addresses import ACCOUNT, SIGN_IN, own_path
from claude_hitl_template.signin.browser import (
    CSRF_FIELD,
    TEMPLATES,
    BrowserUser,
    Refused,
    browser_user,
    check_csrf,
    check_same_origin,
    install,
    problem_page,
)
from claude_hitl_template.signin.service import SignIn

log = structlog.get_logger()
CHANGED = "password-changed"  # a query parameter of the account page
MAX_FIELDS, MAX_FIELD_BYTES = 10, 16 * 1024
_UNEXPECTED = "The service failed on this request. Its log says why."
_STATUSES: tuple[tuple[type[HitlError], int], ...] = (
    (Unauthorized, 401),
    (Forbidden, 403),
    (NotFound, 404),
    (Conflict, 409),
    (TooLarge, 413),
    (InvalidInput, 400),
    (RateLimited, 429),
    (Unavailable, 503),
)

router = APIRouter()
User = Annotated[BrowserUser, Depends(browser_user)]


def build_sign_in_app(sign_in: SignIn) -> ASGIApp:
    """The pages' application, for the paths below ROOT that begin with one of `addresses.PARTS`."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    install(app, sign_in)
    app.include_router(router)
    for kind in (HitlError, HTTPException, Exception):
        app.add_exception_handler(kind, _problem)
    return pages.secured(app)


def _sign_in(request: Request) -> SignIn:
    return request.app.state.users


SignInDep = Annotated[SignIn, Depends(_sign_in)]


# -- sign in


@router.get("/sign-in")
async def show_sign_in(request: Request, sign_in: SignInDep) -> Response:
    """The form. A browser that is signed in goes on to where it wanted to go."""
    next_url = own_path(request.query_params.get("next", ""))
    try:
        user = await sign_in.user(request)
    except Refused:  # a user without a workspace may sign in as another one
        user = None
    return _go(next_url) if user else _form(request, sign_in, next_url)


@router.post("/sign-in")
async def sign_in_with_password(request: Request, sign_in: SignInDep) -> Response:
    check_same_origin(request)
    given = await _fields(request)
    next_url, name = own_path(given.get("next", "")), given.get("name", "")
    form_token = cookies.get(request, "form", secure=sign_in.is_secure(request))
    if not form_token or not _equal(sign_in.signer.form(form_token), given.get(CSRF_FIELD, "")):
        problem = "This form was too old, or this browser accepts no cookies. Sign in once more."
        return _form(request, sign_in, next_url, problem=problem, status=400, name=name)
    try:
        found = await sign_in.with_password(request, name, given.get("password", ""))
    except (Unauthorized, RateLimited) as error:
        return _form(
            request, sign_in, next_url, problem=_said(error), status=_status(error), name=name, of=error
        )
    return await _signed_in(request, sign_in, found.principal, next_url, password=found)


@router.get("/sign-in/provider")
async def start_at_provider(request: Request, sign_in: SignInDep) -> Response:
    """Sends the browser to the sign-in provider."""
    if sign_in.provider is None:
        raise NotFound("This service has no sign-in provider.")
    pending, cookie = sign_in.start(request, own_path(request.query_params.get("next", "")))
    response = _go(await sign_in.provider.address(pending.flow))
    cookies.put(response, "flow", cookie, secure=sign_in.is_secure(request), max_age_s=cookies.FLOW_S)
    return response


@router.get("/sign-in/callback")
async def come_back_from_provider(request: Request, sign_in: SignInDep) -> Response:
    """Where the sign-in provider sends the browser."""
    if sign_in.provider is None:
        raise NotFound("This service has no sign-in provider.")
    secure = sign_in.is_secure(request)
    pending = sign_in.signer.find_flow(cookies.get(request, "flow", secure=secure))
    if pending is None:
        raise Refused(
            f"This sign-in began in another browser, or more than {cookies.FLOW_S // 60} minutes ago.",
            "Sign in again.",
            400,
        )
    principal = await sign_in.with_provider(sign_in.provider, pending, dict(request.query_params))
    response = await _signed_in(request, sign_in, principal, pending.next_url)
    cookies.remove(response, "flow", secure=secure)
    return response


async def _signed_in(
    request: Request,
    sign_in: SignIn,
    principal: Principal,
    next_url: str,
    *,
    password: PasswordOf | None = None,
) -> Response:
    response = _go(next_url)
    await sign_in.begin(request, response, principal, password=password)
    cookies.remove(response, "form", secure=sign_in.is_secure(request))
    return response


def _form(
    request: Request,
    sign_in: SignIn,
    next_url: str,
    *,
    problem: str = "",
    status: int = 200,
    name: str = "",
    of: HitlError | None = None,
) -> Response:
    secure = sign_in.is_secure(request)
    token = cookies.get(request, "form", secure=secure) or cookies.new_token()
    response = _page(
        request,
        "sign_in.html.j2",
        status=status,
        problem=problem,
        name=name,
        next_url=next_url,
        csrf=sign_in.signer.form(token),
        provider=sign_in.provider.name if sign_in.provider else None,
    )
    cookies.put(response, "form", token, secure=secure)
    return _with_wait(response, of)


# -- sign out, and the account


@router.post("/sign-out")
async def sign_out(request: Request, sign_in: SignInDep, user: User) -> Response:
    await check_csrf(request, user)
    await sign_in.end(user, user.session_id)
    return _signed_out(request, sign_in)


@router.get("/account")
async def show_account(request: Request, sign_in: SignInDep, user: User) -> Response:
    done = (
        "The password is changed. Other browsers are signed out." if CHANGED in request.query_params else ""
    )
    return await _account(request, sign_in, user, done=done)


@router.post("/account/sessions")
async def end_sessions(request: Request, sign_in: SignInDep, user: User) -> Response:
    """Signs out one browser, `session_id`, or all of them, this one included."""
    await check_csrf(request, user)
    session_id = (await _fields(request)).get("session_id") or None
    await sign_in.end(user, session_id)
    return _signed_out(request, sign_in) if session_id in (None, user.session_id) else _go(ACCOUNT)


@router.post("/account/password")
async def change_password(request: Request, sign_in: SignInDep, user: User) -> Response:
    """Changes the password. Every browser is signed out but this one, which gets a new session."""
    await check_csrf(request, user)
    given = await _fields(request)
    try:
        _check_same(given.get("new"), given.get("again"))
        found = await sign_in.change_password(request, user, given.get("old", ""), given.get("new", ""))
    except (InvalidInput, Unauthorized, RateLimited) as error:
        return _with_wait(
            await _account(request, sign_in, user, problem=_said(error), status=_status(error)), error
        )
    response = _go(f"{ACCOUNT}?{CHANGED}=yes")
    await sign_in.begin(request, response, found.principal, password=found)
    return response


def _check_same(new: str | None, again: str | None) -> None:
    if new != again:
        raise InvalidInput("The two new passwords differ.")


async def _account(
    request: Request,
    sign_in: SignIn,
    user: BrowserUser,
    *,
    problem: str = "",
    done: str = "",
    status: int = 200,
) -> Response:
    return _page(
        request,
        "account.html.j2",
        status=status,
        user=user,
        sessions=await sign_in.sessions(user),
        has_password=await sign_in.has_password(user),
        workspaces=await sign_in.roles(user),
        problem=problem,
        done=done,
        describe=describe,
        min_chars=MIN_CHARS,
    )


# -- responses


def _page(request: Request, template: str, **context: Any) -> Response:
    return pages.page(request, template, environment=TEMPLATES, nav="account", **context)


async def _problem(request: Request, error: Exception) -> Response:
    status, what = _status(error), _said(error)
    if status >= 500:
        log.error("a page failed", path=request.url.path, why=what, exc_info=status == 500 and error)
    return _with_wait(problem_page(request, what, "", status=status), error)


def _said(error: Exception) -> str:
    if isinstance(error, RateLimited):
        return f"Too many sign-ins failed. Wait {math.ceil(error.retry_after_s)} s, then try again."
    if isinstance(error, HitlError):
        return str(error)
    if isinstance(error, HTTPException) and error.status_code < 500:
        return "There is no such page." if error.status_code == 404 else str(error.detail)
    return _UNEXPECTED


def _status(error: Exception) -> int:
    if isinstance(error, HTTPException):
        return error.status_code
    return next((status for kind, status in _STATUSES if isinstance(error, kind)), 500)


def _with_wait(response: Response, error: Exception | None) -> Response:
    if isinstance(error, (RateLimited, Unavailable)):
        response.headers["retry-after"] = str(math.ceil(error.retry_after_s))
    return response


def _go(address: str) -> Response:
    return RedirectResponse(address, 303)


def _signed_out(request: Request, sign_in: SignIn) -> Response:
    response = _go(SIGN_IN)
    cookies.remove(response, "session", secure=sign_in.is_secure(request))
    return response


async def _fields(request: Request) -> dict[str, str]:
    """The fields of a form. Raises HTTPException for one that is too large."""
    form = await request.form(max_files=0, max_fields=MAX_FIELDS, max_part_size=MAX_FIELD_BYTES)
    return {name: value for name, value in form.items() if isinstance(value, str)}


def _equal(one: str, other: str) -> bool:
    return hmac.compare_digest(one.encode(), other.encode("utf-8", "surrogatepass"))
