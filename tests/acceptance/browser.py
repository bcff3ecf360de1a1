"""Drives a browser in front of the real panel, and does in it what a person would."""

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Locator, Page, Playwright

from tests.integration.harness import PATIENCE_S, Service

SIZES = {"laptop": (1280, 900), "phone": (390, 844)}
PATIENCE_MS = PATIENCE_S * 1000
MISSING = "no Chromium on this machine: apt-get install chromium"


def launch(playwright: Playwright) -> Browser:
    """Starts the machine's Chromium. Without one the tests are skipped; in CI they fail."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None and os.environ.get("CI") == "true":
        pytest.fail(MISSING)
    if found is None:
        pytest.skip(MISSING)
    return playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])


class Panel:
    """One person's browser window on the panel of `service`."""

    def __init__(self, service: Service, context: BrowserContext, pictures: Path) -> None:
        self.service, self.context, self._pictures = service, context, pictures
        self.requests: list[str] = []
        self.problems: list[str] = []
        context.on("request", lambda request: self.requests.append(request.url))
        context.set_default_timeout(PATIENCE_MS)
        self.page: Page = context.new_page()
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("console", self._note_refused)
        self.page.on("dialog", lambda dialog: self.problems.append(dialog.message))

    def _note_refused(self, message: ConsoleMessage) -> None:
        """Records violations of the page's content security policy, except for a foreign font that Kodosumi's pages
        request."""
        if "Content Security Policy" in message.text and "cdn.jsdelivr.net" not in message.text:
            self.problems.append(message.text)

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.service.environment['HITL_PANEL_PORT']}"

    def entry(self, name: str) -> str:
        return f"{self.base}/inputs/-/127.0.0.1/{self.service.environment['HITL_SERVE_PORT']}/claude-hitl/-/{name}"

    def log_in(self, name: str, password: str) -> None:
        self.page.goto(self.base)
        self.page.fill("input[name=name]", name)
        self.page.fill("input[name=password]", password)
        self.page.keyboard.press("Enter")
        self.page.wait_for_url("**/admin/flow")

    def picture(self, name: str) -> None:
        """Takes pictures of the page as on a laptop and on a phone; asserts that neither is wider than its screen."""
        for size, (width, height) in SIZES.items():
            self.page.set_viewport_size({"width": width, "height": height})
            assert self.page.evaluate("document.documentElement.scrollWidth") <= width, (
                f"{name} is wider than a {size}"
            )
            self.page.screenshot(path=self._pictures / f"{name}-{size}.png")
        self.page.set_viewport_size({"width": 1280, "height": 900})

    # -- conversations

    def start(
        self, prompt: str, *, policy: str = "risky", files: Sequence[dict[str, Any]] = (), **options: str
    ) -> str:
        """Starts a conversation and returns its session's id, once its window shows it."""
        self.page.goto(self.entry("start"))
        self.page.fill("[name=prompt]", prompt)
        self.page.select_option("[name=policy]", policy)
        if options:
            self.page.get_by_text("Options").click()
        for name, value in options.items():
            self.page.fill(f"[name={name}]", value)
        self.upload(files)
        self.page.get_by_role("button", name="Start", exact=True).click()
        return self.session()

    def upload(self, files: Sequence[dict[str, Any]]) -> None:
        """Chooses files in the form that is shown, and waits until the panel has them."""
        if files:
            self.page.set_input_files("#hitl-pick", list(files))
            uploaded = self.page.locator("#hitl-list li", has_text=re.compile(r": uploaded\s*$"))
            uploaded.nth(len(files) - 1).wait_for()

    def session(self) -> str:
        self.page.wait_for_url("**/admin/status/view/*")
        shown = self.page.locator("#output dd").first
        shown.wait_for()
        found = re.search(r"sesn_\w+", shown.inner_text())
        assert found
        return found[0]

    def flow(self) -> str:
        return self.page.url.rsplit("/", 1)[-1]

    def window(self) -> Locator:
        return self.page.locator("#output")

    def sees(self, text: str) -> None:
        """Waits until the window shows `text`."""
        self.window().get_by_text(text).filter(visible=True).first.wait_for()

    def open_form(self, label: str = "Decide on") -> None:
        self.window().get_by_role("link", name=label).last.click()
        self.page.wait_for_url("**/inputs/lock/**")

    def press(self, name: str) -> None:
        self.page.get_by_role("button", name=name, exact=True).click()

    def decide(self, name: str) -> None:
        """Presses a button of an open form, and waits until the window is shown again."""
        self.press(name)
        self.page.wait_for_url("**/admin/status/view/*")

    def rests(self) -> None:
        """Waits until the window asks for the next message."""
        self.window().get_by_role("link", name="Go on, or end the conversation").last.wait_for()
