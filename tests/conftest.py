"""Options of pytest for this repository."""

import gc
from collections.abc import Generator

import pytest
from hypothesis import settings

from tests.tiers import Tiers, chosen

SCALE = 200
FAST_SCALE = 40

settings.register_profile("ours", deadline=None)  # a slow machine is not a failure
settings.load_profile("ours")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--tier",
        choices=["fast", "slow", "all"],
        help="which tests to run; default: fast, or all of what the command line names",
    )
    parser.addoption(
        "--hammer", type=int, default=200, help="park-and-resume cycles of the gate's hammer in the slow tier"
    )
    parser.addoption(
        "--chaos",
        type=int,
        default=50,
        metavar="KILLS",
        help="kills of each run of hitl chaos, one on SQLite and one on Postgres",
    )
    parser.addoption(
        "--scale", type=int, default=SCALE, help="size of each of the tests at scale in the slow tier"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Tiers(chosen(config), limited=not config.option.usepdb), "tiers")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Keeps the garbage collector from going through modules and tests, which all stay, again and again: that took a fifth
    of the collection, in each of the processes that run tests, and time in every test."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(scope="session", params=["fast", pytest.param("slow", marks=pytest.mark.slow)])
def scale(request: pytest.FixtureRequest) -> int:
    """The size of a test at scale; docs/guarantees.md says with how much it was run."""
    return FAST_SCALE if request.param == "fast" else request.config.getoption("--scale")
