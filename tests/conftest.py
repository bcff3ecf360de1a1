"""Options of the test run."""

import pytest
from hypothesis import settings

SCALE = 200

settings.register_profile("ours", deadline=None)  # a slow machine is no failure
settings.load_profile("ours")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--hammer", type=int, default=200, help="park-and-resume cycles of the gate's hammer")
    parser.addoption(
        "--chaos",
        type=int,
        default=50,
        metavar="KILLS",
        help="kills of each run of hitl chaos, one on SQLite and one on Postgres",
    )
    parser.addoption("--scale", type=int, default=SCALE, help="decisions in each of the tests at scale")


@pytest.fixture(scope="session")
def scale(request: pytest.FixtureRequest) -> int:
    """How many decisions a test at scale makes; docs/guarantees.md says how many it was run with."""
    return request.config.getoption("--scale")
