"""The dashboard's answers, and everything that can answer instead of it."""

from collections.abc import Callable
from contextlib import closing

import httpx
import pytest
from fastapi import FastAPI

from claude_hitl_template.cli.deploy.cluster import Cluster, Versions
from claude_hitl_template.cli.deploy.package import Package
from claude_hitl_template.config.build_info import Origin
from claude_hitl_template.errors import ConfigError, Unavailable
from tests.serving import loopback

PACKAGE = Package(Origin("c" * 40, False, "0123456789ab", "3.12", {}), b"zip" * 1000, 1, ())
type Handler = Callable[[httpx.Request], httpx.Response]


def cluster(handler: Handler, said: list[str] | None = None) -> Cluster:
    say = (said if said is not None else []).append
    return Cluster("http://cluster:1", say=say, transport=httpx.MockTransport(handler))


class Store:
    """Ray's package store: a body that broke off is not stored. `broken` uploads break off first."""

    def __init__(self, broken: int = 0) -> None:
        self.broken, self.puts, self.packages = broken, 0, dict[str, bytes]()

    def __call__(self, request: httpx.Request) -> httpx.Response:
        name = request.url.path.rpartition("/")[2]
        if request.method == "GET":
            return httpx.Response(200 if name in self.packages else 404)
        self.puts += 1
        if self.puts <= self.broken:
            raise httpx.WriteError("broken pipe")
        self.packages[name] = request.content
        return httpx.Response(200)


def test_a_package_is_uploaded_once() -> None:
    store = Store()
    assert cluster(store).upload(PACKAGE)
    assert store.packages == {PACKAGE.name: PACKAGE.content}
    assert not cluster(store).upload(PACKAGE)
    assert store.puts == 1


def test_an_upload_that_breaks_off_is_sent_again_whole_and_that_is_said() -> None:
    store, said = Store(broken=2), list[str]()
    assert cluster(store, said).upload(PACKAGE)
    assert store.packages == {PACKAGE.name: PACKAGE.content}
    assert len(said) == 2
    assert "the connection was lost during the upload" in said[0]


def test_an_upload_that_never_gets_through_is_given_up_and_leaves_nothing() -> None:
    store = Store(broken=100)
    with pytest.raises(Unavailable, match="lost during the upload"):
        cluster(store).upload(PACKAGE)
    assert store.packages == {}


def test_a_package_that_the_cluster_does_not_take_says_why() -> None:
    def full(request: httpx.Request) -> httpx.Response:
        return httpx.Response(
            404 if request.method == "GET" else 500, text="Traceback\nValueError: too large\n"
        )

    with pytest.raises(ConfigError, match="ValueError: too large"):
        cluster(full).upload(PACKAGE)


def test_versions_are_read_and_one_that_is_not_told_is_none() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/api/version":
            return httpx.Response(200, json={"ray_version": "2.1"})
        return httpx.Response(200, json={"result": True, "data": told})

    told: object = {"pythonVersion": "3.12.9"}
    assert cluster(answer).versions() == Versions("2.1", "3.12.9")
    told = None
    assert cluster(answer).versions() == Versions("2.1", None)


@pytest.mark.parametrize(
    "answer",
    [
        httpx.Response(200, text="<html>hello</html>"),
        httpx.Response(200, json=[1]),
        httpx.Response(200, json={"version": "1"}),
        httpx.Response(404, text="no"),
        httpx.Response(200, content=b"\xff\xfe"),
    ],
)
def test_what_is_no_dashboard_is_called_so(answer: httpx.Response) -> None:
    with pytest.raises(ConfigError, match="is not Ray's dashboard") as raised:
        cluster(lambda _: answer).versions()
    assert "HITL_DASHBOARD_URL" in raised.value.fix


def test_where_nothing_listens_the_address_is_named_with_what_mends_it(free_port: int) -> None:
    with pytest.raises(Unavailable, match=f"127.0.0.1:{free_port}.*\n.*VM.*--profile"):
        Cluster(f"http://127.0.0.1:{free_port}").versions()


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("token", [None, "of-another"])
def test_a_ray_that_asks_for_its_token_is_called_so_with_where_it_is_shown(
    status: int, token: str | None
) -> None:
    transport = httpx.MockTransport(lambda _: httpx.Response(status, text="Unauthorized"))
    one = Cluster("http://cluster:1", token=token, transport=transport)
    for ask in (one.versions, one.serve, lambda: one.upload(PACKAGE), lambda: one.put_serve({})):
        with pytest.raises(
            ConfigError, match="refuses this machine's token" if token else "requires a token"
        ) as raised:
            ask()
        assert "./hitl status --show-secrets" in raised.value.fix
        assert "HITL_RAY_TOKEN" in raised.value.fix
        assert "of-another" not in str(raised.value)


def test_the_token_is_shown_to_ray() -> None:
    seen: list[str | None] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers.get("authorization"))
        return httpx.Response(200, json={"applications": {}})

    Cluster("http://cluster:1", token="t0ken", transport=httpx.MockTransport(answer)).serve()
    Cluster("http://cluster:1", transport=httpx.MockTransport(answer)).serve()
    assert seen == ["Bearer t0ken", None]


@pytest.mark.parametrize(("mode", "asks"), [("token", True), ("disabled", False), (None, None)])
def test_whether_ray_asks_for_a_token_is_known(mode: str | None, asks: bool | None) -> None:
    body = {} if mode is None else {"authentication_mode": mode}
    assert cluster(lambda _: httpx.Response(200, json=body)).asks_for_token() is asks
    assert cluster(lambda _: httpx.Response(404, text="no")).asks_for_token() is None


def test_the_proxy_of_the_environment_is_not_asked(monkeypatch: pytest.MonkeyPatch, free_port: int) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{free_port}")
    app = FastAPI()
    app.get("/api/serve/applications/")(lambda: {"applications": {}})
    with loopback(app) as url, closing(Cluster(url)) as one:
        assert one.serve() == {"applications": {}}
