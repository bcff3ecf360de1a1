"""Fixture: one service for all tests with calls that wait in the hot window."""

from collections.abc import Iterator

import pytest

from tests.integration.harness import Service


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A running service that keeps the CLI running while calls wait."""
    one = Service(tmp_path_factory.mktemp("service"))
    try:
        one.up(HITL_HOT_WINDOW_S="3600")
        yield one
    finally:
        one.down()
