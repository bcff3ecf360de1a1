"""Parked sessions have no process, cost only rows, and continue after any failure."""

import os
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from claude_hitl_template.cli.host.processes import family
from tests.integration.harness import Service, wait_for

pytestmark = pytest.mark.slow

WRITE = "Write hello.txt with a greeting"
MANY = int(os.environ.get("HITL_TEST_PARKED", "50"))


@pytest.fixture(scope="module")
def parking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service that parks calls at once."""
    one = Service(tmp_path_factory.mktemp("parking"))
    try:
        one.up(HITL_HOT_WINDOW_S="0")
        yield one
    finally:
        one.down()


def test_fifty_parked_sessions_have_no_process_and_each_is_resumed(parking: Service):
    sessions = [parking.start_session(WRITE) for _ in range(MANY)]
    asked = {session.id: session.until_asked() for session in sessions}
    for session in sessions:
        session.until_parked()
    wait_for("the last owners to end", lambda: len(owners(parking)) <= 1 or None)  # one is kept ready
    clis = parking.processes("claude_agent_sdk/_bundled/claude")
    outermost = [cli for cli in clis if cli.parent() not in clis]
    assert len(outermost) <= 1  # that of the next new session, whose id none of these has
    assert not [s for s in sessions if parking.processes(s.transcript_id)]
    assert len(actors(parking)) <= 1
    assert not [name for name in actors(parking) if any(s.id in name for s in sessions)]
    some = [sessions[0], sessions[MANY // 2], sessions[-1]]
    for session in some:
        session.decide(asked[session.id])
    for session in some:
        assert session.until_idle()["type"] == "end_turn"
        assert (session.workspace / "hello.txt").exists()
    waiting = {s.id for s in sessions} - {s.id for s in some}
    inbox = parking.call("GET", "/v1/approvals?states[]=pending&limit=1000")["data"]
    assert {approval["session_id"] for approval in inbox} == waiting


def test_after_down_and_up_everything_goes_on(parking: Service):
    session, refused, talking = (parking.start_session(WRITE) for _ in range(3))
    asked, no = session.until_asked(), refused.until_asked()
    talking.decide(talking.until_asked())
    assert talking.until_idle()["type"] == "end_turn"
    before = session.events()
    running = family(parking.head())
    parking.down()
    assert not [p for p in running if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert not _left(parking.root)
    parking.up()
    assert session.events() == before
    session.decide(asked)
    refused.decide(no, "deny", deny_message="changed my mind")
    assert session.until_idle()["type"] == "end_turn"
    assert (session.workspace / "hello.txt").exists()
    assert refused.until_idle()["type"] == "end_turn"
    assert "changed my mind" in str(refused.events("agent.message"))
    assert not (refused.workspace / "hello.txt").exists()
    talking.say("Read hello.txt")
    wait_for("the second turn", lambda: len(talking.events("session.usage")) >= 2 or None)
    assert "was written by a Claude Code session" in str(talking.events("agent.message"))


def test_a_decision_given_while_nothing_drives_sessions_is_carried_out_later(parking: Service):
    """The service is drained: it accepts decisions, and starts no session."""
    session = parking.start_session(WRITE)
    asked = session.until_asked()
    session.until_parked()
    parking.drain()
    session.decide(asked)
    assert session.get()["status"] == "running"
    parking.down()
    assert not (session.workspace / "hello.txt").exists()
    parking.up()
    assert session.until_idle()["type"] == "end_turn"
    assert (session.workspace / "hello.txt").exists()
    assert [a["state"] for a in session.approvals()] == ["succeeded"]


def owners(service: Service) -> list[psutil.Process]:
    return service.processes("ray::ClaudeSessionActor")


def actors(service: Service) -> list[str]:
    """Returns the names of the session owners that are alive in Ray."""
    return service.python(
        "import ray, json, sys\n"
        "ray.init(address=sys.argv[1], log_to_driver=False, logging_level='error')\n"
        "from claude_hitl_template.cluster.actor import list_actors\n"
        "print(json.dumps(list_actors()))"
    )


def _left(root: Path) -> list[str]:
    """Returns processes whose command line contains the service's folder."""
    found: list[str] = []
    for process in psutil.process_iter():
        try:
            command = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if str(root / "data") in command:
            found.append(command)
    return found
