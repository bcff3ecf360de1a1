"""Fixtures: a site that the tests' proxies may lead to."""

from collections.abc import Iterator

import pytest

from tests.serving import loopback
from tests.unit.claude.proxies import Site


@pytest.fixture
def site() -> Site:
    return Site()


@pytest.fixture
def address(site: Site) -> Iterator[str]:
    with loopback(site) as url:
        yield url
