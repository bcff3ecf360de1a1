"""On the Serve port the API is unchanged, and Kodosumi's routes are behind the guard and show no traceback."""

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from kodosumi.core import InputsError, Launch, forms
from starlette.requests import HTTPConnection

from claude_hitl_template.api import problems
from claude_hitl_template.domain.models import utcnow
from claude_hitl_template.domain.people import Principal
from claude_hitl_template.errors import Conflict, NotFound, Unauthorized
from claude_hitl_template.panel.gateway import Gateway
from claude_hitl_template.panel.users import PanelUser

OWN, PANEL = "http://service/claude-hitl", "http://panel"
ANN = PanelUser(
    "role-of-ann",
    "ann",
    operator=False,
    approver=False,
    workspace_id="key_ann",
    principal=Principal(id="user_ann", kind="user", name="ann", created_at=utcnow()),
)


class OnlyAnn:
    """Admits only requests that claim to be from Ann."""

    async def authenticate(self, connection: HTTPConnection) -> None:
        if connection.headers.get("login") != "ann":
            raise Unauthorized("who <b>are</b> you?")
        connection.scope.setdefault("state", {})["panel_user"] = ANN


def api() -> FastAPI:
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    problems.install(app)

    @app.get("/v1/stream")
    async def stream() -> StreamingResponse:
        async def lines() -> AsyncIterator[str]:
            for number in range(3):
                yield f"data: {number}\n\n"

        return StreamingResponse(lines(), media_type="text/event-stream")

    return app


def model() -> FastAPI:
    app = FastAPI()

    @app.post("/v1/messages")
    async def messages(request: Request) -> dict[str, str]:
        return {"root": request.scope["root_path"]}

    return app


async def lives(flow_id: str) -> bool:
    return flow_id == "lives"


def front_of(api: Any, model: Any) -> Gateway:
    return Gateway(api=api, model=model, guard=OnlyAnn(), own_url=OWN, panel_url=PANEL, runner_responds=lives)  # pyright: ignore[reportArgumentType]


def front() -> Gateway:
    made = front_of(api(), model())

    @made.get("/seen", entry=True)
    async def seen(request: Request) -> dict[str, Any]:
        names = ("x-kodosumi_user", "x-kodosumi_base", "x-kodosumi-url", "cookie")
        state = {"user": request.state.user, "prefix": request.state.prefix}
        return {**state, **{name: request.headers.getlist(name) for name in names}}

    @made.enter("/fails", forms.Model(forms.InputText(name="how")))
    async def fails(inputs: dict[str, Any]) -> Launch:
        raise {"input": InputsError("no"), "ours": Conflict("<i>decided</i> by ann")}.get(
            inputs["how"], RuntimeError("secret in a local variable")
        )

    @made.get("/gone", entry=True)
    async def gone() -> None:
        raise NotFound("no such approval")

    return made


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(front(), raise_app_exceptions=False, root_path="/claude-hitl")
    async with httpx.AsyncClient(transport=transport, base_url=OWN) as found:
        yield found


LOGIN = {"login": "ann"}


async def test_v1_and_model_ask_for_no_panel_login(client: httpx.AsyncClient) -> None:
    assert (await client.post("/model/v1/messages")).json() == {"root": "/claude-hitl/model"}
    answer = await client.get("/v1/stream")
    assert answer.text == "data: 0\n\ndata: 1\n\ndata: 2\n\n"


async def test_a_stream_of_v1_does_not_pass_kodosumis_middleware() -> None:
    """The middleware runs an application in its own task, with another receive function."""
    received: list[Any] = []

    async def remember(scope: Any, receive: Any, send: Any) -> None:
        received.append(receive)

    async def receive() -> Any:
        raise AssertionError("no caller may receive")

    made = front_of(remember, remember)
    for path in ("/v1/sessions/x/events/stream", "/model/v1/messages", "/elsewhere"):
        await made({"type": "http", "method": "GET", "path": path, "headers": []}, receive, receive)
    assert received == [receive] * 3


async def test_what_nobody_serves_is_not_found_in_the_protocols_shape(client: httpx.AsyncClient) -> None:
    for path in ("/v2/sessions", "/", "/docs", "/redoc"):
        answer = await client.get(path)
        assert answer.status_code == 404
        assert answer.json()["error"]["type"] == "not_found_error"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/seen"), ("GET", "/fails"), ("POST", "/fails"), ("GET", "/_lock_/f/l"), ("POST", "/_lock_/f/l"),
        ("OPTIONS", "/seen"), ("POST", "/seen"),
    ],
)  # fmt: skip
async def test_every_route_of_kodosumi_is_behind_the_guard(
    client: httpx.AsyncClient, method: str, path: str
) -> None:
    answer = await client.request(method, path, headers={"x-kodosumi_user": "admin"})
    assert answer.status_code == 401
    assert answer.text == "who &lt;b&gt;are&lt;/b&gt; you?"  # the panel puts it into a page as it is


async def test_the_list_of_entries_is_open_and_names_nothing_else(client: httpx.AsyncClient) -> None:
    answer = await client.get("/openapi.json")
    assert set(answer.json()["paths"]) == {"/seen", "/fails", "/gone", "/_lock_/{fid}/{lid}"}


async def test_headers_that_kodosumi_believes_come_from_the_service(client: httpx.AsyncClient) -> None:
    forged = {"x-kodosumi_user": "admin", "X-Kodosumi_Base": "http://evil", "x-kodosumi-url": "http://evil"}
    seen = (await client.get("/seen", headers={**LOGIN, **forged, "cookie": "a=1"})).json()
    assert seen == {
        "user": "role-of-ann",
        "prefix": OWN,
        "x-kodosumi_user": ["role-of-ann"],
        "x-kodosumi_base": [OWN],
        "x-kodosumi-url": [PANEL],
        "cookie": ["a=1"],
    }


async def test_a_failure_shows_no_traceback(client: httpx.AsyncClient) -> None:
    answer = await client.post("/fails", headers=LOGIN, json={"how": "else"})
    assert answer.status_code == 500
    assert answer.text == "the service failed on this request; its log says why"


async def test_an_error_of_ours_is_said_escaped(client: httpx.AsyncClient) -> None:
    answer = await client.post("/fails", headers=LOGIN, json={"how": "ours"})
    assert (answer.status_code, answer.text) == (400, "&lt;i&gt;decided&lt;/i&gt; by ann")
    assert (await client.get("/gone", headers=LOGIN)).text == "no such approval"


async def test_input_that_a_form_refuses_goes_back_to_the_form(client: httpx.AsyncClient) -> None:
    answer = await client.post("/fails", headers=LOGIN, json={"how": "input"})
    assert answer.json()["errors"] == {"_global_": ["no"]}


async def test_the_logs_of_a_failure_have_its_cause(
    client: httpx.AsyncClient, capsys: pytest.CaptureFixture[str]
) -> None:
    await client.post("/fails", headers=LOGIN, json={"how": "else"})
    assert "RuntimeError" in capsys.readouterr().out


async def test_a_window_that_closed_or_hangs_is_said_so_and_holds_nobody_up(
    client: httpx.AsyncClient,
) -> None:
    for method in ("GET", "POST"):
        answer = await client.request(method, "/_lock_/died/lid", headers=LOGIN)
        assert answer.status_code == 404
        assert "go on in Approvals" in answer.text
