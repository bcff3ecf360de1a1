"""The commands of README and quickstart, and the README's example, on a service as a user starts it."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.harness import KEY, Service

ROOT = Path(__file__).parents[2]


def workspaces(service: Service) -> list[Path]:
    return sorted((service.root / "data" / "workspaces").iterdir(), key=lambda path: path.stat().st_mtime)


def test_the_demo_that_allows_ends_well_and_the_file_is_there(service: Service):
    done = service.hitl("demo", "--answer", "allow")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no AI" in done.stdout
    assert (workspaces(service)[-1] / "hello.txt").exists()
    assert str(workspaces(service)[-1]) in done.stdout.replace("\n", "")


@pytest.mark.slow
def test_the_demo_that_denies_tells_the_model_and_leaves_no_file(service: Service):
    done = service.hitl("demo", "--answer", "deny", "--deny-message", "not in this house")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "The result was: Denied by a human: not in this house" in done.stdout.replace("\n", " ")
    assert not (workspaces(service)[-1] / "hello.txt").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "prompt", ["Do three things at once", "Ask me a question", "Make a plan first", "Let a subagent do it"]
)
def test_the_demo_goes_through_every_kind_of_approval(service: Service, prompt: str):
    done = service.hitl("demo", "--answer", "allow", "--prompt", prompt)
    assert done.returncode == 0, done.stdout + done.stderr


def test_status_and_doctor_find_nothing_wrong(service: Service):
    status = service.hitl("status", "--json")
    assert status.returncode == 0, status.stdout
    assert json.loads(status.stdout)["healthy"] is True
    doctor = service.hitl("doctor")
    assert doctor.returncode == 0, doctor.stdout


@pytest.mark.slow
def test_a_second_up_changes_nothing(service: Service):
    before = service.head().pid
    service.up()
    assert service.head().pid == before


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
    for process in [service.head(), *service.head().children(recursive=True)]:
        shown = " ".join(process.cmdline())
        assert not [secret for secret in secrets if secret in shown]
        environment = " ".join(process.environ().values())
        assert not [secret for secret in secrets if secret in environment], shown


def ray_folder(service: Service) -> str:
    return json.loads(service.hitl("status", "--json").stdout)["ray"]["temp_dir"]


@pytest.mark.slow
def test_the_quickstarts_commands_run_as_they_stand(service: Service):
    text = (ROOT / "docs" / "quickstart.md").read_text()
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.splitlines()]
    assert lines
    for line in lines:
        program, *arguments = shlex.split(line)
        assert program == "./hitl"
        done = service.hitl(*arguments)
        assert done.returncode == 0, line + done.stdout + done.stderr


@pytest.mark.slow
def test_a_backup_is_made_and_restored(service: Service, tmp_path: Path):
    file = tmp_path / "FILE"
    made = service.hitl("backup", str(file))
    assert made.returncode == 0, made.stdout + made.stderr
    other = Service(tmp_path)
    restored = other.hitl("restore", str(file))
    assert restored.returncode == 0, restored.stdout + restored.stderr
    assert restored.stdout.partition(" sessions")[0] == made.stdout.partition(" sessions")[0]


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
    assert (workspaces(service)[-1] / "hello.txt").exists()
