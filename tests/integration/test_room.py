"""Sessions share the cluster: one without room reports it, and starts when there is room."""

from collections.abc import Iterator

import pytest

from tests.integration.harness import Service, wait_for

pytestmark = pytest.mark.slow

WRITE = "Write hello.txt with a greeting"
RUNS = """```scenario
- text: A command that takes its time.
  tools:
    - name: Bash
      input:
        command: "while [ ! -e go ]; do sleep 0.1; done; echo went"
- text: "Done: {tool_result}"
```"""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service with room for two awake sessions, which stay awake for an hour unless another session needs the room."""
    one = Service(tmp_path_factory.mktemp("small"))
    try:
        one.up(
            HITL_RAY_NUM_CPUS="1",
            HITL_SESSION_CPUS="0.5",
            HITL_HOT_WINDOW_S="3600",
            HITL_IDLE_TIMEOUT_S="3600",
        )
        yield one
    finally:
        one.down()


def test_sessions_that_rest_or_wait_for_a_human_make_room_for_others(small: Service):
    sessions = [small.start_session(WRITE) for _ in range(5)]
    asked = [session.until_asked() for session in sessions]
    for session, event_id in zip(sessions, asked, strict=True):
        session.decide(event_id)
    for session in sessions:
        assert session.until_idle()["type"] == "end_turn"
        assert (session.workspace / "hello.txt").exists()


def test_a_session_without_room_says_so_and_starts_when_there_is_some(small: Service):
    busy = [small.start_session(RUNS) for _ in range(2)]
    for session in busy:
        session.decide(session.until_asked())
        wait_for("the command to run", lambda one=session: one.approvals()[0]["state"] == "claimed" or None)
    waiting = small.start_session(WRITE)
    (told,) = wait_for("the session to say so", lambda: waiting.events("session.error"))
    assert "no room for the session yet: 0 CPUs are free, and it needs 0.5" in told["error"]["message"]
    assert told["error"]["retry_status"] == {"type": "retrying"}
    assert waiting.get()["status"] == "running"
    assert "1 waiting for room" in small.hitl("status").stdout
    (busy[0].workspace / "go").touch()
    waiting.decide(waiting.until_asked())
    assert waiting.until_idle()["type"] == "end_turn"
    (busy[1].workspace / "go").touch()
    for session in busy:
        assert session.until_idle()["type"] == "end_turn"
    assert len(waiting.events("session.error")) == 1


def test_a_session_that_fits_nowhere_ends_its_turn_with_the_reason(small: Service):
    small.down()
    small.up(HITL_SESSION_CPUS="2")
    session = small.start_session(WRITE)
    assert session.until_idle()["type"] == "retries_exhausted"
    told = session.events("session.error")[-1]["error"]["message"]
    assert "the cluster has 1 CPUs" in told
    assert "HITL_SESSION_CPUS" in told
    small.up(HITL_SESSION_CPUS="0.5")
    session.say("Hello")
    session.decide(session.until_asked())
    assert session.until_idle()["type"] == "end_turn"
