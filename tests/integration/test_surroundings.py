"""The service with a shell and a home folder set up for other things: proxies, and the token of another Ray cluster."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

from claude_hitl_template.claude.sandbox import SandboxConfig, fixed
from claude_hitl_template.cli.host.ports import is_free
from claude_hitl_template.cli.host.processes import family
from tests.integration.harness import Service, command_line, script
from tests.recording import refusing_proxy

pytestmark = pytest.mark.slow
MODEL = "http://model.test"


@dataclass
class Surrounded:
    """A service, and the requests that its HTTP and SOCKS proxies received so far."""

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
        home = tmp_path_factory.mktemp("home")
        (home / ".ray").mkdir()
        (home / ".ray" / "auth_token").write_text("of-the-home")
        surroundings |= {"HOME": str(home), "RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "of-the-shell"}
        surroundings |= {"RAY_ADDRESS": "ray://nowhere.test:10001", "RAY_grpc_enable_http_proxy": "1"}
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


def test_ray_lets_in_only_who_has_the_token_of_the_data_folder(one: Surrounded) -> None:
    url = f"http://127.0.0.1:{one.service.environment['HITL_DASHBOARD_PORT']}/api/version"
    for token, status in (
        (None, 401),
        ("of-the-home", 403),
        ("of-the-shell", 403),
        (one.service.ray_token, 200),
    ):
        headers = {"authorization": f"Bearer {token}"} if token else {}
        assert httpx.get(url, headers=headers, timeout=30).status_code == status
    code = "import ray, sys; ray.init(sys.argv[1], log_to_driver=False); print(1)"
    assert one.service.python(code) == 1
    address = f"127.0.0.2:{one.service.environment['HITL_RAY_PORT']}"
    stranger = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "of-the-home"}
    refused = subprocess.run(
        [sys.executable, "-c", code, address], env=stranger, capture_output=True, check=False
    )
    assert refused.returncode != 0


def test_the_token_is_in_no_command_line_environment_or_log(one: Surrounded) -> None:
    service, token = one.service, one.service.ray_token
    session = service.start_session(script("env; cat /proc/self/environ", "sleep 5"))
    session.decide(session.until_asked())
    session.until_asked()
    processes = family(service.head())
    places = {f"process {p.pid}": "\n".join([*p.cmdline(), *p.environ().values()]) for p in processes}
    ray = Path(json.loads(service.hitl("status", "--json").stdout)["ray"]["temp_dir"])
    for path in [*(service.root / "data" / "logs").iterdir(), *(ray / "session_latest" / "logs").rglob("*")]:
        if path.is_file():
            places[str(path)] = path.read_text(errors="replace")
    places["the session's log"] = json.dumps(session.events())
    assert not [place for place, text in places.items() if token in text]
    cli = service.cli_of(session).environ()
    assert not [name for name in cli if name.startswith("RAY_")]
    proxies = {value for name, value in cli.items() if name.lower().endswith("_proxy")}
    assert proxies <= set(fixed(SandboxConfig()).values())  # the sandbox's own, and none of the shell's


def test_rays_folder_is_closed_to_other_users(one: Surrounded) -> None:
    ray = Path(json.loads(one.service.hitl("status", "--json").stdout)["ray"]["temp_dir"])
    assert (ray / "session_latest").is_dir()
    assert any(place.stat().st_mode & 0o077 == 0 for place in (ray, ray.parent))


def test_no_proxy_was_asked_for_anything_of_ours(one: Surrounded) -> None:
    """Runs after the others. Ray's usage reports are off, too."""
    assert one.asked() == []


def test_the_model_is_reached_by_the_proxy(one: Surrounded, tmp_path: Path) -> None:
    """Runs last, because it disables the offline model."""
    key = {"ANTHROPIC_API_KEY": "sk-ant-test", "ANTHROPIC_BASE_URL": MODEL}
    one.service.up(**key)
    session = one.service.start_session("Hello")
    assert session.until_idle()["type"] == "retries_exhausted"
    assert one.http
    assert all(line.startswith(f"POST {MODEL}/v1/messages") for line in one.http), one.http
    assert one.socks == []


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that the user of Postgres can access."""
    made = Path(tempfile.mkdtemp(prefix="hitl-failing-"))
    made.chmod(0o711)
    yield made
    shutil.rmtree(made)


def test_a_start_that_fails_leaves_nothing_running(folder: Path) -> None:
    """The service itself detects an invalid key, after Ray and Postgres were started."""
    one = Service(folder, {"ANTHROPIC_API_KEY": "no key at all", "HITL_PANEL": "true"})
    done = one.hitl("up", "--postgres")
    assert done.returncode == 1
    assert "The Anthropic API key is empty or has characters no key has" in done.stderr
    assert "ending what was started" in done.stderr
    assert not [p for p in psutil.process_iter() if str(folder) in command_line(p)]
    assert all(is_free(int(value)) for name, value in one.environment.items() if name.endswith("_PORT"))
    assert not (folder / "data" / "run.json").exists()
