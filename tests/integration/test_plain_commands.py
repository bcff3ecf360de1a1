"""Kodosumi's own three commands, on a plain Ray cluster, start the same panel as `hitl up`."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from claude_hitl_template.cli.host.ports import free_ports
from claude_hitl_template.cli.host.processes import names_secret
from tests.integration.harness import wait_for

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "data" / "config"
BIN = Path(sys.executable).parent
STATUS_S = 60.0
PASSWORD = "password-of-these-tests"


@dataclass
class Plain:
    """A folder with the shipped config and its own ports, in which commands run."""

    folder: Path
    temp: Path
    ports: dict[str, int]
    more: dict[str, str] = field(default_factory=dict[str, str])

    @property
    def environment(self) -> dict[str, str]:
        inherited = {
            k: v for k, v in os.environ.items() if not k.startswith(("HITL_", "ANTHROPIC_", "KODO_", "RAY_"))
        }
        return {
            **inherited,
            "HOME": str(self.folder),  # in which no Ray before left a token
            "HITL_SERVE_PORT": str(self.ports["serve"]),
            "HITL_PANEL_PORT": str(self.ports["panel"]),
            "RAY_DASHBOARD_ADDRESS": f"http://localhost:{self.ports['dashboard']}",
            "KODO_RAY_SERVER": f"localhost:{self.ports['ray']}",
            "KODO_SECRET_KEY": "a secret of these tests",  # with Kodosumi's public one the service admits no user
            "KODO_ADMIN_PASSWORD": PASSWORD,
            **self.more,
            "KODO_APP_SERVER": f"http://localhost:{self.ports['panel']}",
        }

    @property
    def serve(self) -> str:
        return f"http://localhost:{self.ports['serve']}"

    def run(self, *command: str) -> str:
        done = subprocess.run(
            [BIN / command[0], *command[1:]],
            cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=STATUS_S, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def begin(self, *command: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{command[1]}.log").open("wb") as log:
            return subprocess.Popen(
                [BIN / command[0], *command[1:]],
                cwd=self.folder,
                env=self.environment,
                stdout=log,
                stderr=log,
            )

    def family(self) -> list[psutil.Process]:
        """Returns the processes that run in the folder, or whose command line contains Ray's folder."""
        found: dict[int, psutil.Process] = {}
        for process in psutil.process_iter():
            try:
                ours = Path(process.cwd()) == self.folder or str(self.temp) in " ".join(process.cmdline())
                for one in (process, *process.children(recursive=True)) if ours else ():
                    found[one.pid] = one
            except (
                psutil.Error,
                FileNotFoundError,
            ):  # it ended; psutil passes on what the system says of its folder
                continue
        found.pop(os.getpid(), None)
        return list(found.values())


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plain]:
    """The state after the three commands, each as in the guide."""
    ports = dict(zip(("ray", "client", "dashboard", "serve", "panel"), free_ports(5), strict=True))
    folder = tmp_path_factory.mktemp("plain")
    one = Plain(folder, Path(f"/tmp/hitl-plain-{os.getpid()}"), ports)
    shutil.copytree(SHIPPED, folder / "data" / "config")
    config = folder / "data" / "config" / "config.yaml"
    config.write_text(config.read_text().replace("8001", str(ports["serve"])))
    begun: list[subprocess.Popen[bytes]] = []
    try:
        begun.append(one.begin(
            "ray", "start", "--head", "--block", f"--port={ports['ray']}", f"--dashboard-port={ports['dashboard']}",
            f"--ray-client-server-port={ports['client']}", f"--temp-dir={one.temp}", "--disable-usage-stats",
        ))  # fmt: skip
        wait_for("Ray's dashboard", lambda: _answers(one.environment["RAY_DASHBOARD_ADDRESS"]))
        one.run("koco", "deploy", "-r")
        wait_for("the application", lambda: "RUNNING" in one.run("koco", "deploy", "-s") or None)
        # The spooler lists actors without naming a cluster, and others may run on the machine of these tests.
        one.more["RAY_ADDRESS"] = f"localhost:{ports['ray']}"
        one.run("koco", "spool")
        begun.append(one.begin("koco", "serve", "--register", f"{one.serve}/-/routes"))
        yield one
    finally:
        for process in one.family():
            process.kill()
        for process in begun:
            process.kill()
            process.wait()
        psutil.wait_procs(one.family(), timeout=30)
        shutil.rmtree(one.temp, ignore_errors=True)


def _answers(url: str) -> bool | None:
    try:
        return httpx.get(url, timeout=5).status_code == 200 or None
    except httpx.TransportError:
        return None


def _log_in(plain: Plain) -> httpx.Client | None:
    client = httpx.Client(base_url=plain.environment["KODO_APP_SERVER"], timeout=30)
    try:
        answer = client.post("/api/login", json={"name": "admin", "password": PASSWORD})
    except httpx.TransportError:
        client.close()
        return None
    assert answer.status_code == 200
    return client


@pytest.fixture
def browser(plain: Plain) -> Iterator[httpx.Client]:
    client = wait_for("the panel", lambda: _log_in(plain))
    yield client
    client.close()


def _entry(browser: httpx.Client, name: str) -> Any:
    found = [
        e for e in browser.get("/flow", params={"pp": 50}).json()["items"] if e["summary"].startswith(name)
    ]
    return found[0] if found else None


def test_the_panel_lists_the_entries_and_opens_their_forms(plain: Plain, browser: httpx.Client) -> None:
    for name in ("Start a conversation", "Approvals"):
        entry = wait_for(name, lambda name=name: _entry(browser, name))
        page = browser.get("/inputs" + entry["url"])
        assert page.status_code == 200
        assert "<form" in page.text


def test_a_conversation_begun_in_the_panel_is_followed_to_where_it_asks(browser: httpx.Client) -> None:
    entry = wait_for("the entry", lambda: _entry(browser, "Start"))
    flow = browser.post(entry["url"], json={"prompt": "Write hello.txt with a greeting"}).json()["result"]

    def asks() -> Any:
        answer = browser.get(f"/outputs/status/{flow}")
        return answer.status_code == 200 and answer.json().get("locks")

    assert wait_for("a lock", asks)


def test_the_service_made_its_folder_and_its_keys_by_itself(plain: Plain) -> None:
    key = (plain.folder / ".hitl" / "secrets" / "api-key").read_text()
    answer = httpx.get(f"{plain.serve}/claude-hitl/v1/sessions", headers={"x-api-key": key})
    assert answer.status_code == 200


def test_the_serve_port_knows_users_by_the_panels_login_here_too(plain: Plain, browser: httpx.Client) -> None:
    entry = wait_for("an entry", lambda: _entry(browser, "Start"))["base_url"]
    assert httpx.get(entry, headers={"x-kodosumi_user": "admin"}).status_code == 401
    assert httpx.get(entry, cookies=dict(browser.cookies)).status_code == 200


def test_a_deploy_onto_this_ray_keeps_its_data_folder(plain: Plain, tmp_path: Path) -> None:
    """Runs after the others, because it deploys this working tree as a package."""
    key = (plain.folder / ".hitl" / "secrets" / "api-key").read_text()
    done = subprocess.run(
        [sys.executable, "-m", "claude_hitl_template.cli", "deploy"],
        cwd=ROOT,
        env={
            **plain.environment,
            "HITL_HOME": str(tmp_path),
            "HITL_DASHBOARD_URL": plain.environment["RAY_DASHBOARD_ADDRESS"],
            "HITL_SERVE_URL": plain.serve,
        },
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    answer = httpx.get(f"{plain.serve}/claude-hitl/v1/version", headers={"x-api-key": key}, timeout=30)
    assert answer.json()["package"]
    assert (plain.folder / ".hitl" / "secrets" / "api-key").read_text() == key


def test_what_is_shipped_names_the_promised_port_and_no_secret() -> None:
    config, app = (
        yaml.safe_load((SHIPPED / f"{name}.yaml").read_text()) for name in ("config", "claude_hitl_template")
    )
    assert config["http_options"] == {"host": "127.0.0.1", "port": 8001}
    assert app["import_path"] == "claude_hitl_template.query:fast_app"
    assert "KODO_CHUNK_SIZE" in app["runtime_env"]["env_vars"]
    assert not [name for name in app["runtime_env"]["env_vars"] if names_secret(name)]
