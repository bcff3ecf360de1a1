"""The guard admits only users whom the panel itself logged in, and still knows."""

import base64
import json
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from jose import jwt
from kodosumi.config import InternalSettings
from starlette.requests import HTTPConnection

from claude_hitl_template.domain.models import utcnow
from claude_hitl_template.domain.people import Actor, Principal, Role
from claude_hitl_template.errors import Unauthorized, Unavailable
from claude_hitl_template.panel.users import Guard, PanelAccess, PanelUser, default_login, panel_user
from claude_hitl_template.store.core import CoreStore
from claude_hitl_template.testing.memory_backend import MemoryBackend
from tests.contract.asking import key_of
from tests.serving import loopback

SECRET, PASSWORD = "secret-of-the-panel-in-these-tests", "password-of-its-admin"
OPERATOR, ANN = str(uuid.uuid4()), str(uuid.uuid4())


@dataclass
class KnownRoles:
    """A panel with the routes that the guard uses: it shows roles to operators only, and its admin can log in."""

    roles: dict[str, dict[str, object]] = field(default_factory=dict[str, dict[str, object]])
    asked: list[str] = field(default_factory=list[str])
    password: str = PASSWORD

    def app(self) -> FastAPI:
        app = FastAPI()

        @app.get("/role/{role_id}")
        def role(role_id: str, request: Request) -> JSONResponse:
            self.asked.append(role_id)
            asking = jwt.decode(request.headers["kodosumi_api_key"], SECRET, ["HS256"])["sub"]
            if not self.roles.get(asking, {}).get("operator"):
                return JSONResponse({"detail": "User not authorized"}, 401)
            found = self.roles.get(role_id)
            shown = {name: value for name, value in (found or {}).items() if name != "operator"}
            return JSONResponse(shown, 200 if found else 404)

        @app.post("/api/login")
        async def login(request: Request) -> JSONResponse:
            if (await request.json())["password"] != self.password:
                return JSONResponse({"detail": "Invalid name or password"}, 401)
            return JSONResponse({"KODOSUMI_API_KEY": token(OPERATOR)})

        return app


def role(role_id: str, name: str, *, operator: bool = False, active: bool = True) -> dict[str, object]:
    return {"id": role_id, "name": name, "active": active, "operator": operator}


def token(role_id: str, *, secret: str = SECRET, ages_in_s: float = 60) -> str:
    claims = {"sub": role_id, "iat": time.time(), "exp": time.time() + ages_in_s}
    return jwt.encode(claims, secret, algorithm="HS256")


def without_signature(role_id: str) -> str:
    parts = ({"alg": "none", "typ": "JWT"}, {"sub": role_id, "exp": time.time() + 60})
    return (
        ".".join(base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in parts)
        + "."
    )


def asking(**headers: str) -> HTTPConnection:
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return HTTPConnection({"type": "http", "headers": raw})


def logged_in(login: str, **headers: str) -> HTTPConnection:
    return asking(cookie=f"other=1; kodosumi_jwt={login}", **headers)


@dataclass
class Scene:
    panel: KnownRoles
    url: str
    store: CoreStore = field(default_factory=lambda: CoreStore(MemoryBackend()))

    def guard(self, *approvers: str, url: str = "") -> Guard:
        return Guard(self.store, PanelAccess(url or self.url, SECRET, PASSWORD), frozenset(approvers))

    async def recognised(self, connection: HTTPConnection, *approvers: str) -> PanelUser:
        await self.guard(*approvers).authenticate(connection)
        return panel_user(Request(connection.scope))


@pytest.fixture
def scene() -> Iterator[Scene]:
    panel = KnownRoles({OPERATOR: role(OPERATOR, "admin", operator=True), ANN: role(ANN, "ann")})
    with loopback(panel.app()) as url:
        yield Scene(panel, url)


async def test_an_operator_is_recognised_and_may_decide_in_every_session(scene: Scene) -> None:
    user = await scene.recognised(logged_in(token(OPERATOR)))
    assert (user.id, user.name, user.operator) == (OPERATOR, "admin", True)
    assert user.may_decide("key of another")


async def test_others_are_recognised_and_decide_in_their_own_sessions(scene: Scene) -> None:
    user = await scene.recognised(logged_in(token(ANN)))
    assert (user.id, user.name, user.operator) == (ANN, "ann", False)
    assert user.may_decide(user.workspace_id)
    assert not user.may_decide("key of another")


async def test_a_named_approver_decides_in_every_session(scene: Scene) -> None:
    user = await scene.recognised(logged_in(token(ANN)), "bob", "ann")
    assert user.may_decide("key of another")
    assert not user.operator


async def test_a_login_may_come_in_kodosumis_header(scene: Scene) -> None:
    connection = HTTPConnection({"type": "http", "headers": [(b"kodosumi_api_key", token(ANN).encode())]})
    assert (await scene.recognised(connection)).name == "ann"


async def test_a_role_of_the_panel_is_the_user_of_its_name(scene: Scene) -> None:
    roles = {"*": (Role.APPROVER,)}
    ann = Principal(id="user_ann", kind="user", name="ann", created_at=utcnow(), roles=roles)
    await scene.store.add_principal(ann)
    user = await scene.recognised(logged_in(token(ANN)), "ann")
    assert user.actor == Actor(name="ann", principal_id="user_ann")
    assert user.may_decide("key of another")
    assert [one.name for one in await scene.store.list_principals()] == ["ann"]


async def test_a_role_with_the_name_of_a_service_account_is_another_one(scene: Scene) -> None:
    await scene.store.add_key("ann", "hash")
    user = await scene.recognised(logged_in(token(ANN)))
    assert user.name == "ann"
    assert user.principal.kind == "user"
    assert {one.kind for one in await scene.store.list_principals()} == {"user", "service_account"}


async def test_a_disabled_user_is_refused(scene: Scene) -> None:
    user = await scene.recognised(logged_in(token(ANN)))
    await scene.store.change_principal(user.principal.id, {"disabled": True})
    with pytest.raises(Unauthorized, match="disabled"):
        await scene.recognised(logged_in(token(ANN)))


async def test_a_users_sessions_belong_to_one_key_that_no_secret_opens(scene: Scene) -> None:
    first = await scene.recognised(logged_in(token(ANN)))
    assert (await scene.recognised(logged_in(token(ANN)))).workspace_id == first.workspace_id
    key = key_of(await scene.store.find_identity(f"panel:{ANN}"))
    assert key
    assert key.id == first.workspace_id
    assert (
        len(key.secret_hash) != 64
    )  # hexadecimal characters of a SHA-256, which is what a secret is looked up by


@pytest.mark.parametrize(
    "login",
    [
        "",
        "not a token",
        token(OPERATOR, secret="another panel's"),
        token(OPERATOR, secret=""),
        token(OPERATOR, ages_in_s=-1),
        without_signature(OPERATOR),
        jwt.encode({"sub": OPERATOR}, SECRET, algorithm="HS256"),
        jwt.encode({"exp": time.time() + 60}, SECRET, algorithm="HS256"),
        jwt.encode({"sub": OPERATOR, "exp": time.time() + 60}, SECRET, algorithm="HS512"),
        token("admin"),
    ],
    ids=[
        "none", "no token", "other secret", "empty secret", "expired", "algorithm none", "no expiry", "no role",
        "other algorithm", "a name for an id",
    ],
)  # fmt: skip
async def test_a_login_that_the_panel_did_not_give_is_refused_and_the_panel_not_asked(
    scene: Scene, login: str
) -> None:
    with pytest.raises(Unauthorized):
        await scene.recognised(logged_in(login))
    assert scene.panel.asked == []


async def test_a_header_that_names_a_user_is_worth_nothing(scene: Scene) -> None:
    connection = HTTPConnection({"type": "http", "headers": [(b"x-kodosumi_user", OPERATOR.encode())]})
    with pytest.raises(Unauthorized, match="logged in"):
        await scene.recognised(connection)


async def test_a_role_that_is_not_active_or_gone_is_refused(scene: Scene) -> None:
    scene.panel.roles[ANN]["active"] = False
    with pytest.raises(Unauthorized, match="not active"):
        await scene.recognised(logged_in(token(ANN)))
    scene.panel.roles[OPERATOR]["active"] = False
    with pytest.raises(Unauthorized, match="not active"):
        await scene.recognised(logged_in(token(OPERATOR)))
    del scene.panel.roles[ANN]
    with pytest.raises(Unauthorized, match="does not exist"):
        await scene.recognised(logged_in(token(ANN)))


async def test_the_panel_is_asked_at_its_configured_address_whatever_a_header_says(scene: Scene) -> None:
    rogue = KnownRoles(
        {OPERATOR: role(OPERATOR, "admin", operator=True), ANN: role(ANN, "ann", operator=True)}
    )
    with loopback(rogue.app()) as url:
        connection = logged_in(token(ANN), x_kodosumi_url=url, x_forwarded_host=url.removeprefix("http://"))
        assert not (await scene.recognised(connection)).operator
    assert rogue.asked == []


async def test_what_the_panel_said_is_remembered_for_a_while(scene: Scene) -> None:
    guard = scene.guard()
    for _ in range(3):
        await guard.authenticate(logged_in(token(OPERATOR)))
    assert scene.panel.asked == [OPERATOR]


async def test_a_page_of_another_origin_may_not_act_with_the_users_cookie(scene: Scene) -> None:
    foreign = logged_in(token(OPERATOR), origin="http://127.0.0.1:9999", host="127.0.0.1:3370")
    with pytest.raises(Unauthorized, match="another origin"):
        await scene.recognised(foreign)
    own = logged_in(token(OPERATOR), origin="http://127.0.0.1:3370", host="127.0.0.1:3370")
    assert (await scene.recognised(own)).operator


async def test_a_panel_that_does_not_answer_lets_nobody_in_and_says_so(scene: Scene) -> None:
    guard = scene.guard(url="http://127.0.0.1:1")
    with pytest.raises(Unavailable, match="does not answer at http"):
        await guard.authenticate(logged_in(token(OPERATOR)))


async def test_an_admin_who_changed_the_password_is_recognised_and_others_are_told_why_not(
    scene: Scene,
) -> None:
    scene.panel.password = "changed"
    assert (await scene.recognised(logged_in(token(OPERATOR)))).operator
    with pytest.raises(Unavailable, match="only operators are recognised"):
        await scene.recognised(logged_in(token(ANN)))


async def test_a_panel_with_the_secret_that_everyone_knows_lets_nobody_in_and_says_what_to_set(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KODO_SECRET_KEY", raising=False)
    public = InternalSettings().SECRET_KEY
    secret, password = default_login()
    guard = Guard(scene.store, PanelAccess(scene.url, secret, password), frozenset())
    for known in (public, ""):
        with pytest.raises(Unauthorized, match="KODO_SECRET_KEY"):
            await guard.authenticate(logged_in(token(OPERATOR, secret=known)))
    assert scene.panel.asked == []
    for unset in ("", " "):
        monkeypatch.setenv("KODO_SECRET_KEY", unset)
        assert default_login()[0] == ""
    monkeypatch.setenv("KODO_SECRET_KEY", "of one's own")
    assert default_login()[0] == "of one's own"
