"""`./hitl up --postgres` starts the service with its own Postgres, and starts both again after everything was killed."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.integration.harness import Service, command_line, kill
from tests.postgres import require

pytestmark = pytest.mark.slow


@pytest.fixture
def service() -> Iterator[Service]:
    require()
    folder = Path(tempfile.mkdtemp(prefix="hitl-own-postgres-"))
    folder.chmod(0o711)  # root's Postgres runs as another user
    one = Service(folder, {"HITL_HOT_WINDOW_S": "0", "HITL_IDLE_TIMEOUT_S": "1"})
    try:
        yield one
    finally:
        one.down()
        shutil.rmtree(folder)


def server(service: Service) -> psutil.Process:
    """The Postgres that `status` shows."""
    database = json.loads(service.hitl("status", "--json").stdout)["database"]
    assert database["place"].startswith("Postgres at 127.0.0.1:")
    return psutil.Process(database["pid"])


def test_what_waits_is_decided_after_service_and_postgres_were_killed_and_all_was_started_again(
    service: Service,
):
    done = service.hitl("up", "--postgres")
    assert done.returncode == 0, done.stdout + done.stderr
    session = service.start_session("Write hello.txt with a greeting")
    asked = session.until_asked()
    session.until_parked()
    before, postgres = session.events(), server(service)
    workers = postgres.children(recursive=True)
    service.kill_everything()
    kill(postgres)
    psutil.wait_procs([postgres, *workers], timeout=30)
    service.up()
    assert server(service) != postgres
    assert session.events() == before
    session.decide(asked)
    assert session.until_idle()["type"] == "end_turn"
    assert (session.workspace / "hello.txt").is_file()
    assert service.hitl("down").returncode == 0
    assert not [p for p in psutil.process_iter() if str(service.root) in command_line(p)]
