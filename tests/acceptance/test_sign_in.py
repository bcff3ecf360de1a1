"""A person signs in with a provider in a real browser, does something, signs out, and is removed.

The provider is the package oidc-provider-mock: one that was not written here.
"""

import asyncio
import os
import threading
from collections.abc import Coroutine, Generator, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import oidc_provider_mock
import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.types import ASGIApp

from claude_hitl_template.domain.group_roles import read_group_roles
from claude_hitl_template.signin.oidc import Client, Provider
from claude_hitl_template.store.core import CoreStore
from claude_hitl_template.testing.memory_backend import MemoryBackend
from tests.serving import serving
from tests.sign_in import PASSWORD, add_user, replica

PICTURES = Path(os.environ.get("HITL_TEST_ARTIFACTS", Path(__file__).parents[2] / "test-artifacts"))
SIZES = {"laptop": (1280, 900), "phone": (360, 800)}
SUBJECT = "ann"


@dataclass(frozen=True)
class Pages:
    """The sign-in pages on loopback, and the loop that their store belongs to."""

    url: str
    store: CoreStore
    loop: asyncio.AbstractEventLoop

    def run[T](self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()


@contextmanager
def served(provider: Provider) -> Generator[Pages]:
    started: Future[Pages] = Future()
    ended = threading.Event()

    async def serve() -> None:
        store = CoreStore(MemoryBackend())
        await add_user(store, "bob")
        roles = read_group_roles("approvers=default:approver")
        app: ASGIApp = replica(store, provider=provider, roles=roles)
        async with serving(Starlette(routes=[Mount("/claude-hitl", app)])) as address:
            started.set_result(Pages(f"{address}/claude-hitl", store, asyncio.get_running_loop()))
            await asyncio.to_thread(ended.wait)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        yield started.result(timeout=20)
    finally:
        ended.set()
        thread.join()


@pytest.fixture(scope="module")
def there() -> Iterator[str]:
    """The address of the provider."""
    user = oidc_provider_mock.User(sub=SUBJECT, claims=_claims(["approvers"]))
    with oidc_provider_mock.run_server_in_thread(user_claims=[user]) as server:
        yield f"http://localhost:{server.server_port}"


@pytest.fixture(scope="module")
def pages(there: str) -> Iterator[Pages]:
    with served(Provider(Client(there, "hitl"))) as made:
        yield made


def _claims(groups: list[str]) -> dict[str, object]:
    return {"email": "ann@example.org", "email_verified": True, "groups": groups}


@pytest.fixture
def page(browser: Browser, pages: Pages) -> Iterator[Page]:
    """A browser window of a person who is not signed in. Asserts that the pages' own policy refused nothing of theirs."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme="dark")
    refused: list[str] = []

    def note(message: ConsoleMessage) -> None:
        if pages.url in str(message.location) and message.type == "error":
            refused.append(message.text)

    context.on("console", note)
    context.set_default_timeout(10_000)
    yield context.new_page()
    context.close()
    assert not [text for text in refused if "Content Security Policy" in text]


def picture(page: Page, name: str) -> None:
    """Takes pictures as on a laptop and on a phone; asserts that the page is not wider than either."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    for size, (width, height) in SIZES.items():
        page.set_viewport_size({"width": width, "height": height})
        assert page.evaluate("document.documentElement.scrollWidth") <= width, (
            f"{name} is wider than a {size}"
        )
        page.screenshot(path=PICTURES / f"{name}-{size}.png", full_page=True)
    page.set_viewport_size({"width": 1280, "height": 900})


def sign_in_with_provider(page: Page) -> None:
    page.get_by_role("link", name="Sign in with localhost").click()
    page.get_by_role("button", name=f"Authorize as {SUBJECT}").first.click()


def test_a_person_signs_in_with_the_provider_signs_out_and_is_removed(
    page: Page, pages: Pages, there: str
) -> None:
    page.goto(f"{pages.url}/inbox?state=pending")
    page.get_by_role("heading", name="Sign in").wait_for()
    picture(page, "sign-in")
    sign_in_with_provider(page)
    page.wait_for_url("**/claude-hitl/inbox?state=pending")
    assert "ann@example.org" in page.inner_text("body")
    assert page.evaluate("document.cookie") == ""

    page.goto(f"{pages.url}/account")
    assert "Chrome on Linux (this browser)" in page.inner_text("main")
    assert "approver" in page.inner_text("main")
    picture(page, "account")
    page.get_by_role("button", name="Sign out", exact=True).click()
    page.wait_for_url("**/claude-hitl/sign-in")
    page.goto(f"{pages.url}/inbox")
    page.get_by_role("heading", name="Sign in").wait_for()

    answer = httpx.put(f"{there}/users/{SUBJECT}", json=_claims([]))
    assert answer.is_success, answer.text
    sign_in_with_provider(page)
    page.get_by_text("you have no role in any workspace").wait_for()
    page.get_by_text("Ask an administrator of the service for a role").wait_for()
    picture(page, "refused")
    page.goto(f"{pages.url}/inbox")
    page.get_by_role("heading", name="Sign in").wait_for()


def test_a_person_signs_in_with_a_password_changes_it_and_signs_out_everywhere(
    page: Page, pages: Pages, browser: Browser
) -> None:
    page.goto(f"{pages.url}/account")
    assert page.evaluate("document.activeElement.name") == "name"
    page.get_by_label("Name").fill("bob")
    page.get_by_label("Password").fill("wrong")
    page.keyboard.press("Enter")
    page.get_by_role("alert").get_by_text("do not belong together").wait_for()
    assert page.evaluate("document.activeElement.name") == "password"
    picture(page, "wrong-password")
    page.get_by_label("Password").fill(PASSWORD)
    page.keyboard.press("Enter")
    page.wait_for_url("**/claude-hitl/account")

    new = "a new horse battery"
    page.get_by_label("Present password").fill(PASSWORD)
    page.get_by_label("New password, at least 12 characters").fill(new)
    page.get_by_label("New password again").fill(new)
    page.get_by_role("button", name="Change password").click()
    page.get_by_role("status").get_by_text("The password is changed").wait_for()

    other = browser.new_context()
    elsewhere = other.new_page()
    elsewhere.goto(f"{pages.url}/sign-in?next=/claude-hitl/account")
    elsewhere.get_by_label("Name").fill("bob")
    elsewhere.get_by_label("Password").fill(new)
    elsewhere.keyboard.press("Enter")
    elsewhere.get_by_role("button", name="Sign out everywhere").click()
    elsewhere.wait_for_url("**/claude-hitl/sign-in")
    other.close()
    pages.run(asyncio.sleep(0.5))  # as long as a session that was found is cached
    page.reload()
    page.get_by_role("heading", name="Sign in").wait_for()
