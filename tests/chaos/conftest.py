"""What the tests of chaos share."""

import multiprocessing
from multiprocessing.context import ForkServerContext

import pytest


@pytest.fixture(scope="session")
def processes() -> ForkServerContext:
    """Forked from one that has imported everything: they start at once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.chaos.crash_runs", "tests.chaos.decisions"])
    return context
