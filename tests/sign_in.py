"""Replicas of the sign-in pages over one store, and browsers in front of them, without a network."""

import re
from datetime import UTC, datetime
from html import unescape
from typing import Annotated, Any

import httpx
from argon2 import PasswordHasher
from fastapi import Depends, FastAPI, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from claude_hitl_template.config.passwords import Passwords
from claude_hitl_template.config.secret_files import SigningKey
from claude_hitl_template.domain.models import new_id
from claude_hitl_template.domain.people import SERVICE, Principal, Role, Workspace
from claude_hitl_template.inbox import pages
from claude_hitl_template.inbox.app import with_pages
from claude_hitl_template.signin.addresses import PARTS
from claude_hitl_template.signin.browser import BrowserUser, browser_user, check_csrf, install
from claude_hitl_template.signin.cookies import Signer
from claude_hitl_template.signin.pages import build_sign_in_app
from claude_hitl_template.signin.service import SignIn
from claude_hitl_template.store.core import CoreStore

ROOT = "/claude-hitl"
HOST = "http://hitl.example.org"
PASSWORD = "correct horse battery"
PASSWORDS = Passwords(PasswordHasher(time_cost=1, memory_cost=8, parallelism=1))
KEY = SigningKey(b"the signing key of every replica")


def replica(store: CoreStore, **options: Any) -> ASGIApp:
    """The sign-in pages, and a page `/inbox` that needs them. Options are those of SignIn."""
    sign_in = SignIn(store, Signer(KEY), passwords=PASSWORDS, **options)
    app = FastAPI()
    app.router.routes.append(Route("/inbox/static/{name}", pages.static_file))
    install(app, sign_in)

    @app.get("/inbox")
    async def show(user: Annotated[BrowserUser, Depends(browser_user)]) -> Response:
        return JSONResponse({"name": user.name, "workspaces": user.workspace_ids, "csrf": user.csrf})

    @app.post("/inbox")
    async def act(request: Request, user: Annotated[BrowserUser, Depends(browser_user)]) -> Response:
        await check_csrf(request, user)
        return JSONResponse({"done_by": user.actor.principal_id, "form": dict(await request.form())})

    return with_pages(app, {PARTS: build_sign_in_app(sign_in)})


class Browser:
    """A browser at one address. It sends what browsers send: cookies, `Origin`, `Sec-Fetch-Site`."""

    def __init__(self, app: ASGIApp, *, host: str = HOST, address: str = "192.0.2.1") -> None:
        self.host = host
        self._transport = httpx.ASGITransport(app=app, root_path=ROOT, client=(address, 1))
        self._http = httpx.AsyncClient(
            transport=self._transport,
            base_url=host,
            headers={"user-agent": "Mozilla/5.0 (X11; Linux) Firefox/140"},
        )

    @property
    def cookies(self) -> dict[str, str]:
        return {cookie.name: cookie.value or "" for cookie in self._http.cookies.jar}

    def set_cookie(self, name: str, value: str) -> None:
        """Sets a cookie as the service sets it."""
        path = "/" if name.startswith("__Host-") else ROOT
        self._http.cookies.set(name, value, domain=self.host.partition("//")[2], path=path)

    def at(self, app: ASGIApp) -> "Browser":
        """The same browser, whose next requests another replica answers."""
        other = Browser(app, host=self.host)
        other._http.cookies.jar = self._http.cookies.jar
        return other

    async def get(self, path: str, **headers: str) -> httpx.Response:
        return await self._http.get(f"{ROOT}{path}", headers=headers)

    async def post(self, path: str, fields: dict[str, str], **headers: str) -> httpx.Response:
        """Sends a form. A header that is "" is left out."""
        sent = {"origin": self.host, "sec_fetch_site": "same-origin", **headers}
        sent = {name.replace("_", "-"): value for name, value in sent.items() if value}
        return await self._http.post(f"{ROOT}{path}", data=fields, headers=sent)

    async def form(self, path: str = "/sign-in") -> dict[str, str]:
        """The hidden fields of a page's first form."""
        return hidden_fields((await self.get(path)).text)

    async def sign_in(
        self, name: str = "ann", password: str = PASSWORD, *, next_url: str = ""
    ) -> httpx.Response:
        form = await self.form(f"/sign-in?next={next_url}")
        return await self.post("/sign-in", {**form, "name": name, "password": password})

    async def user(self) -> str | None:
        """The name that the page `/inbox` shows; None if it wants a sign-in first."""
        answer = await self.get("/inbox")
        return answer.json()["name"] if answer.status_code == 200 else None

    async def csrf(self) -> str:
        return (await self.get("/inbox")).json()["csrf"]

    async def close(self) -> None:
        await self._http.aclose()


def hidden_fields(html: str) -> dict[str, str]:
    found = re.findall(r'<input type="hidden" name="([^"]*)" value="([^"]*)"', html)
    return {name: unescape(value) for name, value in reversed(found)}


def said(answer: httpx.Response) -> str:
    """The text of a page, without markup."""
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", answer.text)).split())


def payments() -> Workspace:
    return Workspace(id=new_id("wrkspc"), name="payments", created_at=datetime.now(UTC))


async def add_user(
    store: CoreStore, name: str = "ann", *, password: str | None = PASSWORD, **changes: Any
) -> Principal:
    """A user with a role in the default workspace, and a password."""
    workspaces = [one for one in await store.list_workspaces() if one.default]
    if not workspaces:
        await store.set_first_key("hash of the first key")
        workspaces = [one for one in await store.list_workspaces() if one.default]
    roles = {workspaces[0].id: (Role.APPROVER,)}
    fields = {"kind": "user", "created_at": datetime.now(UTC), "roles": roles, **changes}
    user = await store.add_principal(Principal(id=new_id("user"), name=name, **fields), by=SERVICE)
    if password is not None:
        await store.set_password(user.id, await PASSWORDS.hash(password))
    return user
