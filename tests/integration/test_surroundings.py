"""The service where the user's shell and home are full of what concerns others: proxies, and another Ray's token."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.integration.harness import Service
from tests.recording import refusing_proxy

pytestmark = pytest.mark.slow
MODEL = "http://model.test"


@dataclass
class Surrounded:
    """A service; what its proxies were asked for so far, by HTTP and by SOCKS."""

    service: Service
    http: list[str]
    socks: list[str]

    def asked(self) -> list[str]:
        return [*self.http, *self.socks]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Surrounded]:
    with refusing_proxy() as (http, by_http), refusing_proxy() as (socks, by_socks):
        named = {"http_proxy": f"http://127.0.0.1:{http}", "https_proxy": f"http://127.0.0.1:{http}"}
        named |= {"all_proxy": f"socks5://127.0.0.1:{socks}", "no_proxy": ""}
        surroundings = named | {name.upper(): value for name, value in named.items()}
        one = Service(tmp_path_factory.mktemp("surrounded"), {**surroundings, "HITL_PANEL": "true"})
        try:
            one.up()
            yield Surrounded(one, by_http, by_socks)
        finally:
            one.down()


def test_a_gated_call_is_asked_for_decided_and_run(one: Surrounded) -> None:
    done = one.service.hitl("demo", "--answer", "allow")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "hello.txt" in done.stdout


@pytest.mark.parametrize(
    "command", ["status", "doctor", "doctor --remote", "sessions", "approvals", "secrets list"]
)
def test_each_command_finds_the_service_that_runs(one: Surrounded, command: str) -> None:
    done = one.service.hitl(*command.split())
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_proxy_was_asked_for_anything_of_ours(one: Surrounded) -> None:
    """After the others."""
    assert one.asked() == []


def test_the_model_is_reached_by_the_proxy(one: Surrounded, tmp_path: Path) -> None:
    """Last, for it takes the offline model away."""
    key = {"ANTHROPIC_API_KEY": "sk-ant-test", "ANTHROPIC_BASE_URL": MODEL}
    one.service.up(**key)
    session = one.service.start_session("Hello")
    assert session.until_idle()["type"] == "retries_exhausted"
    assert one.http
    assert all(line.startswith(f"POST {MODEL}/v1/messages") for line in one.http), one.http
    assert one.socks == []
