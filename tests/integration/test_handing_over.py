"""The supervisor dies at the two fault points that need Ray: before a session has its new epoch, and before its owner
has it.

All others are struck in tests/chaos/test_crash_runs.py.
"""

from collections.abc import Generator, Iterator
from contextlib import contextmanager

import pytest

from tests.chaos.faults import bring_up
from tests.chaos.points import Points
from tests.integration.harness import Service
from tests.postgres import serving

pytestmark = pytest.mark.slow

COMMAND = """```scenario
- text: A command.
  tools:
    - name: Bash
      input: {command: "echo ran >> journal.txt"}
- text: "Done: {tool_result}"
```"""


@contextmanager
def database(backing: str) -> Generator[dict[str, str]]:
    """Yields the service's environment variables for this database."""
    if backing == "sqlite":
        yield {}
    else:
        with serving() as server, server.database() as url:
            yield {"DATABASE_URL": url}


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
def parking(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Service, Points]]:
    """A service that parks waiting calls at once, so that a decided call goes to a new owner."""
    root = tmp_path_factory.mktemp("handing-over")
    points = Points(root / "faults")
    with database(request.param) as told:
        parks = {"HITL_HOT_WINDOW_S": "0", "HITL_IDLE_TIMEOUT_S": "0"}
        one = Service(root, {**points.environment, **parks, **told})
        try:
            bring_up(one)
            yield one, points
        finally:
            one.down()


@pytest.mark.parametrize("decision", ["allow", "deny"])
@pytest.mark.parametrize("point", ["own.before", "own.after"])
def test_what_was_decided_is_handed_over_though_the_supervisor_dies(
    parking: tuple[Service, Points], point: str, decision: str
):
    service, points = parking
    session = service.start_session(COMMAND)
    asked = session.until_asked()
    session.until_parked()
    points.hits()  # of the case before
    points.plan_at(point, "kill")
    session.decide(asked, decision)
    assert session.until_idle()["type"] == "end_turn"
    assert [hit.point for hit in points.hits()] == [point]
    journal = session.workspace / "journal.txt"
    runs = journal.read_text().splitlines() if journal.exists() else []
    told = [approval["state"] for approval in session.approvals()]
    assert (told, runs) == ((["succeeded"], ["ran"]) if decision == "allow" else (["denied"], []))
    seen = [cursor for cursor, _ in session.stream()]
    assert seen == list(range(1, len(seen) + 1))
