"""Starts the real panel, spooler and Serve, and a browser in front of them."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright

from tests.acceptance.browser import Panel, launch
from tests.integration.harness import Service, kill

PICTURES = Path(os.environ.get("HITL_TEST_ARTIFACTS", Path(__file__).parents[2] / "test-artifacts"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        one = launch(playwright)
        yield one
        one.close()


@pytest.fixture(scope="module")
def service(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service that parks calls as soon as they wait, as most calls do in practice."""
    one = Service(
        tmp_path_factory.mktemp("acceptance"),
        {
            "HITL_PANEL": "true",
            "HITL_HOT_WINDOW_S": "0",
            "HITL_IDLE_TIMEOUT_S": "5",
            "HITL_MAX_UPLOAD_BYTES": "4096",
        },
    )
    try:
        one.up()
        yield one
    finally:
        one.down()


@pytest.fixture
def new_panel(browser: Browser, service: Service) -> Iterator[Callable[[], Panel]]:
    """Opens windows of users who are not logged in yet. Asserts that no text from outside was ever executed in one."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    opened: list[Panel] = []

    def make() -> Panel:
        context = browser.new_context(viewport={"width": 1280, "height": 900})
        opened.append(Panel(service, context, PICTURES))
        context.add_cookies([{"name": "canary", "value": "sings", "url": opened[-1].base}])
        return opened[-1]

    yield make
    for runner in service.processes("ray::Runner"):  # each open window would slow the next test down
        kill(runner)
    for panel in opened:
        panel.context.close()
        assert not panel.problems
        assert not [url for url in panel.requests if "stolen" in url]


@pytest.fixture
def password(service: Service) -> str:
    return (service.root / "data" / "secrets" / "panel-password").read_text().strip()


@pytest.fixture
def panel(new_panel: Callable[[], Panel], password: str) -> Panel:
    """The operator's window, logged in."""
    one = new_panel()
    one.log_in("admin", password)
    return one
