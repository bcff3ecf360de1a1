"""Requests to the service's own addresses bypass proxies; requests to the model's service use the configured one."""

import ast
import asyncio
import gc
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

import claude_hitl_template
from claude_hitl_template.config import network
from claude_hitl_template.config.grpc import GRPC
from claude_hitl_template.errors import ConfigError
from tests.recording import refusing_proxy
from tests.serving import loopback

CODE = Path(claude_hitl_template.__file__).parent
PROXIES = [
    name
    for lower in ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
    for name in (lower, lower.upper())
]
MAKERS = {
    "Client",
    "AsyncClient",
    "get",
    "post",
    "put",
    "patch",
    "delete",
    "head",
    "options",
    "request",
    "stream",
}


@pytest.fixture(autouse=True)
def _no_proxies_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def own() -> Iterator[str]:
    app = FastAPI()
    app.get("/")(lambda: "own")
    with loopback(app) as url:
        yield url


@pytest.mark.parametrize("scheme", ["http", "socks5", "socks5h"])
@pytest.mark.parametrize("variable", [name for name in PROXIES if "no_" not in name.lower()])
def test_our_own_addresses_are_reached_without_the_proxy(
    own: str, monkeypatch: pytest.MonkeyPatch, variable: str, scheme: str
) -> None:
    async def ask() -> str:
        async with network.direct_async() as client:
            return (await client.get(own)).json()

    with refusing_proxy() as (port, asked):
        monkeypatch.setenv(variable, f"{scheme}://127.0.0.1:{port}")
        assert network.request("GET", own).json() == "own"
        with network.direct() as client:
            assert client.get(own).json() == "own"
        assert asyncio.run(ask()) == "own"
        assert asked == []


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"])
def test_the_models_service_is_reached_by_the_proxy(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    with (
        refusing_proxy() as (port, asked),
        network_of(monkeypatch, variable, f"http://127.0.0.1:{port}") as client,
    ):
        assert client.get("http://model.test/v1/models").status_code == 403
    assert asked == ["GET http://model.test/v1/models HTTP/1.1"]


# httpcore does not close what a SOCKS proxy refused; it is collected here, so that no other test is blamed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
def test_the_models_service_is_reached_by_a_socks_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(port: int) -> bool:
        try:
            with network_of(monkeypatch, "ALL_PROXY", f"socks5://127.0.0.1:{port}") as client:
                client.get("http://model.test/")
        except network.UNREACHABLE:
            return False
        return True

    with refusing_proxy() as (port, asked):
        assert not ask(port)
    gc.collect()
    assert [line[0] for line in asked] == ["\x05"]


def network_of(monkeypatch: pytest.MonkeyPatch, variable: str, url: str) -> httpx.Client:
    monkeypatch.setenv(variable, url)
    return network.outward()


@pytest.mark.parametrize("variable", ["http_proxy", "HTTPS_PROXY", "ALL_PROXY"])
@pytest.mark.parametrize(
    "url",
    [
        "socks4://:hunter2@h:1",
        "ftp://hunter2",
        "http://",
        "hunter2:99999",
        "::::",
        "http://[::1",
        "http://h:x",
    ],
)
def test_a_proxy_of_no_use_is_named_and_its_value_is_not(
    monkeypatch: pytest.MonkeyPatch, variable: str, url: str
) -> None:
    monkeypatch.setenv(variable, url)
    for make in (network.outward, network.outward_async, network.check_proxies):
        with pytest.raises(ConfigError, match=rf"^{variable} cannot be used") as raised:
            make()
        assert f"set {variable} to http://HOST:PORT" in raised.value.fix
        assert "hunter2" not in str(raised.value)


def test_a_list_of_exceptions_of_no_use_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "x:y:z")
    with pytest.raises(ConfigError, match=r"^NO_PROXY holds"):
        network.outward()


def test_what_may_reach_the_outside_keeps_its_proxies_and_reaches_us_without_them() -> None:
    given = {
        "http_proxy": "http://p:1",
        "ALL_PROXY": "socks5://p:1",
        "no_proxy": "a.test",
        "NO_PROXY": "b.test",
    }
    found = network.with_proxies({**given, "grpc_proxy": "http://p:1"}, ["10.0.0.5"])
    assert (found["http_proxy"], found["ALL_PROXY"]) == ("http://p:1", "socks5://p:1")
    assert found["no_proxy"] == found["NO_PROXY"]
    bypass = found["no_proxy"].split(",")
    assert {"a.test", "b.test", "localhost", "127.0.0.1", "::1", "10.0.0.5"} <= set(bypass)
    assert (found["grpc_proxy"], found["RAY_grpc_enable_http_proxy"]) == ("", "0")


def test_what_reaches_only_us_has_no_proxies() -> None:
    given = dict.fromkeys(PROXIES, "http://p:1")
    found = network.without_proxies({**given, "PATH": "/bin"})
    assert found == {"PATH": "/bin", "no_proxy": "*", "NO_PROXY": "*", **GRPC}


def test_no_other_module_makes_an_http_client() -> None:
    """A client created elsewhere would send the service's own requests through the environment's proxy."""
    found: list[str] = []
    for path in CODE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                called = ast.unparse(node.func)
                if called.startswith(("httpx.", "requests.", "urllib.request.")) and node.func.attr in MAKERS:
                    found.append(f"{path.relative_to(CODE)}: {called}")
    assert {line.partition(":")[0] for line in found} == {"config/network.py"}, found
