"""A person signs in with a provider in a real browser, allows a call, signs out, and is removed.

The provider is the package oidc-provider-mock: one that was not written here.
"""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import httpx
import oidc_provider_mock
import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page

from claude_hitl_template.domain.group_roles import read_group_roles
from claude_hitl_template.domain.models import Approval
from claude_hitl_template.signin.oidc import Client, Provider
from claude_hitl_template.signin.service import REMEMBER_S
from claude_hitl_template.store.core import CoreStore
from claude_hitl_template.testing.signed_in import SignedIn
from claude_hitl_template.testing.threaded import Threaded, serve_in_thread
from tests.acceptance.conftest import PICTURES
from tests.inbox import Desk
from tests.sign_in import PASSWORD, add_user

AXE = (Path(__file__).parent / "axe.min.js").read_text()
SIZES = {"laptop": (1280, 900), "phone": (360, 800)}
SUBJECT = "ann"


@pytest.fixture(scope="module")
def there() -> Iterator[str]:
    """The address of the provider."""
    user = oidc_provider_mock.User(sub=SUBJECT, claims=_claims(["approvers"]))
    with oidc_provider_mock.run_server_in_thread(user_claims=[user]) as server:
        yield f"http://localhost:{server.server_port}"


@pytest.fixture(scope="module")
def served(there: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Threaded]:
    """The service, with a local user `bob`."""
    with serve_in_thread(
        tmp_path_factory.mktemp("sign-in"),
        keys={"first": "first-secret"},
        backing="memory",
        driving=False,
        provider=Provider(Client(there, "hitl")),
        group_roles=read_group_roles("approvers=default:approver"),
    ) as made:
        made.run(add_user(made.service.store, "bob"))
        yield made


async def a_call_waits(store: CoreStore) -> Approval:
    [default] = [workspace.id for workspace in await store.list_workspaces() if workspace.default]
    desk = Desk(store, SignedIn(), (default, default))
    return await desk.ask(given={"command": "make release"}, title="Release")


def _claims(groups: list[str]) -> dict[str, object]:
    return {"email": "ann@example.org", "email_verified": True, "groups": groups}


@pytest.fixture
def page(browser: Browser, served: Threaded) -> Iterator[Page]:
    """A browser window of a person who is not signed in. Asserts that the pages' own policy refused nothing of theirs."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme="dark")
    refused: list[str] = []

    def note(message: ConsoleMessage) -> None:
        if served.service.url in str(message.location) and "Content Security Policy" in message.text:
            refused.append(message.text)

    context.on("console", note)
    context.set_default_timeout(10_000)
    yield context.new_page()
    context.close()
    assert refused == []


def picture(page: Page, name: str) -> None:
    """Takes pictures as on a laptop and on a phone; asserts that the page is not wider than either, and accessible."""
    page.evaluate(AXE)
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
    assert [one["id"] for one in found if one["impact"] in ("serious", "critical")] == []
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


def test_a_person_signs_in_with_the_provider_allows_a_call_signs_out_and_is_removed(
    page: Page, served: Threaded, there: str
) -> None:
    url, store = served.service.url, served.service.store
    approval = served.run(a_call_waits(store))
    page.goto(f"{url}/inbox?state=pending")
    page.get_by_role("heading", name="Sign in").wait_for()
    picture(page, "sign-in")
    sign_in_with_provider(page)
    page.wait_for_url("**/claude-hitl/inbox?state=pending")
    assert page.evaluate("document.cookie") == ""
    page.get_by_role("link", name="make release").click()
    page.get_by_role("button", name="Allow").click()
    page.get_by_text("Allowed").first.wait_for()
    decided = served.run(store.get_approval(approval.id, None)).decision
    user = served.run(store.find_principal(external_id=f"{there}|{SUBJECT}"))
    assert user is not None
    assert decided is not None
    assert (decided.result, decided.decided_by, decided.decider_id) == ("allow", "ann@example.org", user.id)

    page.goto(f"{url}/account")
    assert "Chrome on Linux (this browser)" in page.inner_text("main")
    assert "approver" in page.inner_text("main")
    picture(page, "account")
    page.get_by_role("button", name="Sign out", exact=True).click()
    page.wait_for_url("**/claude-hitl/sign-in")
    page.goto(f"{url}/inbox")
    page.get_by_role("heading", name="Sign in").wait_for()

    answer = httpx.put(f"{there}/users/{SUBJECT}", json=_claims([]))
    assert answer.is_success, answer.text
    sign_in_with_provider(page)
    page.get_by_text("you have no role in any workspace").wait_for()
    page.get_by_text("Ask an administrator of the service for a role").wait_for()
    picture(page, "refused")
    page.goto(f"{url}/inbox")
    page.get_by_role("heading", name="Sign in").wait_for()


@pytest.mark.slow
def test_a_person_signs_in_with_a_password_changes_it_and_signs_out_everywhere(
    page: Page, served: Threaded, browser: Browser
) -> None:
    url = served.service.url
    page.goto(f"{url}/account")
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
    elsewhere.goto(f"{url}/sign-in?next=/claude-hitl/account")
    elsewhere.get_by_label("Name").fill("bob")
    elsewhere.get_by_label("Password").fill(new)
    elsewhere.keyboard.press("Enter")
    elsewhere.get_by_role("button", name="Sign out everywhere").click()
    elsewhere.wait_for_url("**/claude-hitl/sign-in")
    other.close()
    served.run(asyncio.sleep(REMEMBER_S))  # as long as a session that was found is cached
    page.reload()
    page.get_by_role("heading", name="Sign in").wait_for()
