"""Options of the test run."""

import pytest
from hypothesis import settings

settings.register_profile("ours", deadline=None)  # a slow machine is no failure
settings.load_profile("ours")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--hammer", type=int, default=200, help="park-and-resume cycles of the gate's hammer")
