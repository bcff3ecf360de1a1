"""kill -9 at named points: the decision is kept, the call ran at most once, the log has no gap, the session continues."""

from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from claude_hitl_template.cluster import setup_worker
from tests.integration.harness import Conversation, Service, command_line, kill, wait_for

pytestmark = pytest.mark.slow

type Strike = Callable[[Service, Conversation], None]

# The command leaves one line a run, and then takes its time, so that it can be met while it runs.
SLOW = """```scenario
- text: A command that takes its time.
  tools:
    - name: Bash
      input:
        command: "echo ran >> journal.txt; for i in $(seq 600); do [ -e go ] && break; sleep 0.1; done"
- text: "Done: {tool_result}"
```"""


def journal(session: Conversation) -> list[str]:
    path = session.workspace / "journal.txt"
    return path.read_text().splitlines() if path.exists() else []


def let_go(session: Conversation) -> None:
    """Lets waiting commands end."""
    session.workspace.mkdir(parents=True, exist_ok=True)
    (session.workspace / "go").touch()


def check_log(session: Conversation) -> None:
    told = session.stream()
    assert [cursor for cursor, _ in told] == list(range(1, len(told) + 1))
    ids = [event["id"] for _, event in told]
    assert len(set(ids)) == len(ids)
    assert [e["id"] for e in session.events()] == ids


def check_goes_on(session: Conversation) -> None:
    session.say("Hello")
    wait_for("the next turn", lambda: len(session.events("session.usage")) >= 2 or None)
    assert session.until_idle()["type"] == "end_turn"


def kill_ray(service: Service, _session: Conversation) -> None:
    service.kill_everything()
    service.up()


def kill_fork_server_and_owner(service: Service, session: Conversation) -> None:
    """The next owner cannot be forked."""
    kill(service.processes(setup_worker.TITLE)[0])
    kill(service.owner_of(session))


def kill_process(find: Callable[[Service, Conversation], psutil.Process]) -> Strike:
    def strike(service: Service, session: Conversation) -> None:
        kill(find(service, session))

    return strike


def kill_server_of_its_code_and_owner(service: Service, session: Conversation) -> None:
    """The next owner is forked by another one."""
    owner = service.owner_of(session)
    forks = owner.parent()
    assert forks is not None
    assert setup_worker.TITLE in command_line(forks)
    kill(forks)
    kill(owner)


STRIKES = {
    "the CLI": kill_process(lambda service, session: service.cli_of(session)),
    "the actor": kill_process(lambda service, session: service.owner_of(session)),
    "the ledger": kill_process(lambda service, _: service.replica("Ledger")),
    "the ingress": kill_process(lambda service, _: service.replica("Ingress")),
    "the supervisor": kill_process(lambda service, _: service.replica("Supervisor")),
    "the Serve controller": kill_process(lambda service, _: service.processes("ray::ServeController")[0]),
    "the proxy": kill_process(lambda service, _: service.processes("ray::ProxyActor")[0]),
    "what forks its workers and the actor": kill_server_of_its_code_and_owner,
    "the fork server and the actor": kill_fork_server_and_owner,
    "the whole of Ray": kill_ray,  # the next one has a fork server again
}


@pytest.mark.parametrize("struck", STRIKES)
def test_a_call_waits_and_something_is_killed_then_it_is_allowed(service: Service, struck: str):
    session = service.start_session(SLOW)
    asked = session.until_asked()
    STRIKES[struck](service, session)
    let_go(session)
    session.decide(asked)
    assert session.until_idle()["type"] == "end_turn"
    assert journal(session) == ["ran"]
    assert [a["state"] for a in session.approvals()] == ["succeeded"]
    check_log(session)
    check_goes_on(session)


@pytest.mark.parametrize("struck", ["the CLI", "the actor", "the ledger", "the whole of Ray"])
def test_a_call_runs_and_something_is_killed(service: Service, struck: str):
    session = service.start_session(SLOW)
    session.decide(session.until_asked())
    wait_for("the command to run", lambda: journal(session) or None)
    STRIKES[struck](service, session)
    if struck == "the ledger":  # the command goes on, and its result is recorded once there is a ledger again
        let_go(session)
    assert session.until_idle()["type"] == "end_turn"
    assert journal(session) == ["ran"]
    let_go(session)
    (approval,) = session.approvals()
    known = struck == "the ledger"
    assert approval["state"] == ("succeeded" if known else "unknown")
    results = [e for e in session.events("agent.tool_result") if e["tool_use_id"] == approval["event_id"]]
    assert [e.get("outcome") for e in results] == [None if known else "unknown"]
    check_log(session)
    check_goes_on(session)


@pytest.mark.parametrize("struck", ["the actor", "the ledger", "the supervisor", "the whole of Ray"])
def test_a_decision_is_acknowledged_and_something_is_killed_at_once(service: Service, struck: str):
    session = service.start_session(SLOW)
    asked = session.until_asked()
    owner = service.owner_of(session)
    session.decide(asked)
    kill(owner) if struck == "the actor" else STRIKES[struck](service, session)
    let_go(session)
    assert session.until_idle()["type"] == "end_turn"
    (approval,) = session.approvals()
    assert approval["decision"]["result"] == "allow"
    runs = journal(session)
    assert (approval["state"], runs) in [("succeeded", ["ran"]), ("unknown", ["ran"]), ("unknown", [])]
    check_log(session)
    check_goes_on(session)


def test_a_denied_call_does_not_run_though_its_owner_is_killed_at_once(service: Service):
    session = service.start_session(SLOW)
    asked = session.until_asked()
    owner = service.owner_of(session)
    session.decide(asked, "deny", deny_message="not now")
    kill(owner)
    assert session.until_idle()["type"] == "end_turn"
    assert journal(session) == []
    assert [a["state"] for a in session.approvals()] == ["denied"]
    check_log(session)
    assert Path(session.workspace, "journal.txt").exists() is False
