"""A service as a user starts it: the demo, the README's example, and a call that a person allows in the panel.

The fast tier starts one service of its own, which is this one.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from claude_hitl_template.cli.host.processes import family
from claude_hitl_template.cluster import setup_worker
from claude_hitl_template.cluster.head import MODULES
from tests.acceptance.browser import Panel
from tests.integration.harness import KEY, Service, command_line

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    one = Service(tmp_path_factory.mktemp("new"), {"HITL_PANEL": "true"})
    try:
        one.up()
        yield one
    finally:
        one.down()


def test_the_demo_that_allows_ends_well_and_the_file_is_there(service: Service):
    done = service.hitl("demo", "--answer", "allow")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no AI" in done.stdout
    assert (service.newest_workspace() / "hello.txt").exists()
    assert str(service.newest_workspace()) in done.stdout.replace("\n", "")


def test_status_and_doctor_find_nothing_wrong(service: Service):
    status = service.hitl("status", "--json")
    assert status.returncode == 0, status.stdout
    assert json.loads(status.stdout)["healthy"] is True
    doctor = service.hitl("doctor")
    assert doctor.returncode == 0, doctor.stdout


def test_the_readmes_example_runs_as_it_stands(service: Service):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    environment = {**os.environ, "HITL_URL": service.base, "HITL_API_KEY": KEY}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        input="y\n",
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Write {'file_path': 'hello.txt'" in done.stdout
    assert "allow? [y/n] " in done.stdout
    assert "Done: `hello.txt`" in done.stdout.splitlines()[-1]
    assert (service.newest_workspace() / "hello.txt").exists()


def test_a_call_is_shown_and_allowed_and_its_file_offered(panel: Panel) -> None:
    session = panel.start("Write hello.txt with a greeting", title="A greeting")
    panel.sees("Waiting for you: one call waits for a decision")
    panel.picture("waiting")
    panel.open_form()
    for part in ("hello.txt", "This file was written by a Claude Code session", "admin", session):
        assert part in panel.page.inner_text("form")
    panel.picture("allow")
    panel.decide("Allow")
    panel.sees("Allowed by admin")
    panel.rests()
    panel.picture("allowed")
    with panel.page.expect_download() as got:
        panel.window().get_by_role("link", name="hello.txt").click()
    assert got.value.path().read_text().startswith("Hello!")
    panel.sees("tokens in")
    panel.sees("reading in the workspace is allowed")


def test_no_process_runs_that_nothing_uses(service: Service):
    running = [command_line(process) for process in family(service.head())]

    def runs(name: str) -> bool:
        return any(name in line for line in running)

    assert runs("gcs_server")
    server = next(p for p in family(service.head()) if setup_worker.TITLE in command_line(p))
    forked = [child for one in server.children() for child in one.children()]
    workers = [line for p in forked if (line := command_line(p)).startswith("ray::")]
    kinds = ("ServeController", "ProxyActor", "Ledger", "Ingress", "Supervisor", "ClaudeSessionActor")
    assert [kind for kind in kinds if not any(kind in line for line in workers)] == []
    assert [name for name in MODULES if name != "UsageStatsHead" and not runs(f"ray-dashboard-{name}")] == []
    unused = ("log_monitor", "autoscaler", "DataHead", "TrainHead", "MetricsHead", "ray.scripts")
    assert [name for name in unused if runs(name)] == []


def test_the_dashboard_serves_what_deploys_and_ray_s_commands_ask_for(service: Service):
    for path in (
        "/api/version", "/api/serve/applications/", "/api/v0/actors", "/api/v0/nodes", "/api/v0/logs?node_ip=127.0.0.2",
        "/api/jobs/", "/api/v0/cluster_metadata", "/nodes?view=summary", "/events",
    ):  # fmt: skip
        assert service.dashboard(path).status_code == 200, path


def test_no_secret_is_in_a_log_or_a_command_line(service: Service):
    secrets = [path.read_text().strip() for path in (service.root / "data" / "secrets").iterdir()]
    assert KEY in secrets
    logs = [
        p
        for p in Path(ray_folder(service)).rglob("*")
        if p.is_file() and p.suffix in (".log", ".out", ".err")
    ]
    logs += (service.root / "data" / "logs").iterdir()
    assert logs
    for path in logs:
        text = path.read_text(errors="replace")
        assert not [secret for secret in secrets if secret in text], path
    for process in family(service.head()):
        shown = " ".join(process.cmdline())
        assert not [secret for secret in secrets if secret in shown]
        environment = " ".join(process.environ().values())
        assert not [secret for secret in secrets if secret in environment], shown


def ray_folder(service: Service) -> str:
    return json.loads(service.hitl("status", "--json").stdout)["ray"]["temp_dir"]
