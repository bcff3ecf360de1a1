"""Options of the test run."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--hammer", type=int, default=200, help="park-and-resume cycles of the gate's hammer")
