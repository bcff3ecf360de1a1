"""The inbox in real Chromium, on a phone and on a desktop, in front of the real service with the real CLI."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import anthropic
import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from claude_hitl_template.domain.models import new_id, utcnow
from claude_hitl_template.domain.notices import EVERY_WORKSPACE, Channel, QuietHours
from claude_hitl_template.domain.people import SERVICE, Role
from claude_hitl_template.testing.signed_in import COOKIE, SignedIn
from claude_hitl_template.testing.threaded import Threaded, serve_in_thread
from tests.acceptance.conftest import PICTURES
from tests.sign_in import PASSWORD, add_user

AXE = (Path(__file__).parent / "axe.min.js").read_text()
SIZES = {"phone": (390, 844), "desktop": (1440, 900)}
SECRET = "key-of-the-tests"
CANARY = "canary=sings"
SCRIPT = "<script>fetch('/stolen?' + document.cookie)</script>"
IMAGE = "<img src=x onerror=\"fetch('/stolen?' + document.cookie)\">"
PATIENCE_MS = 30_000
# Waits until the service worker controls the page.
CONTROLLED = """new Promise((done) => {
    const {serviceWorker} = navigator;
    serviceWorker.addEventListener("controllerchange", () => done());
    if (serviceWorker.controller) done();
})"""


class Inbox:
    """The service, and who looks at it."""

    def __init__(self, threaded: Threaded, signed_in: SignedIn) -> None:
        self.threaded, self.url = threaded, threaded.service.url
        self.client = anthropic.Anthropic(base_url=self.url, api_key=SECRET, max_retries=0)
        [key] = [key for key in threaded.run(threaded.service.store.list_keys()) if key.first]
        self.workspace = key.id
        roles = {self.workspace: (Role.APPROVER, Role.REQUESTER)}
        for name in ("ann", "carol"):
            person = signed_in.add(name, roles)
            threaded.run(threaded.service.store.add_principal(person.principal, by=SERVICE))

    def start(self, prompt: str, title: str = "A title") -> str:
        """A session that works on this prompt; returns its id."""
        session = self.client.beta.sessions.create(agent="default", environment_id="default", title=title)
        text: Any = [{"type": "text", "text": prompt}]
        self.client.beta.sessions.events.send(session.id, events=[{"type": "user.message", "content": text}])
        return session.id

    def ask(self, title: str, *calls: tuple[str, dict[str, Any]]) -> list[str]:
        """A session whose agent makes these calls at once; returns the ids of the approvals once they wait."""
        tools = [{"name": name, "input": given} for name, given in calls]
        steps = [{"text": "I do it now.", "tools": tools}, {"text": "Done: {tool_result}"}]
        session = self.start(f"Follow this.\n\n```scenario\n{json.dumps(steps)}\n```", title)
        return self.waiting(session, len(calls))

    def waiting(self, session: str, count: int = 1) -> list[str]:
        deadline = time.monotonic() + PATIENCE_MS / 1000
        while time.monotonic() < deadline:
            page = self.threaded.run(
                self.threaded.service.store.list_waiting([self.workspace], limit=50, session_id=session)
            )
            if len(page.data) >= count:
                return [call.id for call in page.data]
            time.sleep(0.05)
        raise AssertionError("the calls do not wait")

    def add_device(self, person: str) -> None:
        """Registers a phone of this person, to which nothing is sent."""
        channel = Channel(
            id=new_id("chan"),
            kind="web_push",
            workspace_id=EVERY_WORKSPACE,
            principal_id=f"user_{person}",
            name="Chrome on Android",
            settings={"device": "another"},
            quiet_hours=QuietHours(start="22:00", end="07:00", time_zone="Europe/Berlin"),
            created_at=utcnow(),
        )
        self.threaded.run(self.threaded.service.store.add_channel(channel, {}))

    def state(self, approval: str) -> str:
        return self.threaded.run(self.threaded.service.store.get_approval(approval, None)).state.value


@pytest.fixture(scope="module")
def inbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Inbox]:
    signed_in = SignedIn()
    with serve_in_thread(
        tmp_path_factory.mktemp("inbox"),
        keys={"first": SECRET},
        hot_window_s=600.0,
        idle_timeout_s=5.0,
        signed_in=signed_in,
    ) as threaded:
        yield Inbox(threaded, signed_in)


class Reader:
    """One person's browser window. Counts what the person does."""

    def __init__(self, inbox: Inbox, page: Page, size: str) -> None:
        self.inbox, self.page, self.size = inbox, page, size
        self.actions = 0
        self.problems: list[str] = []
        self.requests: list[str] = []
        page.set_default_timeout(PATIENCE_MS)
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("dialog", lambda dialog: self.problems.append(dialog.message))
        page.on("console", self._note)
        page.on("request", lambda request: self.requests.append(request.url))

    def _note(self, message: Any) -> None:
        if "Content Security Policy" in message.text:
            self.problems.append(message.text)

    def open(self, path: str) -> None:
        """Opens a page, and waits until it is live."""
        self.page.goto(f"{self.inbox.url}/{path}")
        if self.page.locator("[data-stream]").count():
            self.page.locator("#live:not([hidden])").wait_for()

    def press(self, target: Locator | str) -> None:
        (self.page.locator(target) if isinstance(target, str) else target).click()
        self.actions += 1

    def key(self, key: str) -> None:
        self.page.keyboard.press(key)
        self.actions += 1

    def sees(self, text: str) -> None:
        self.page.get_by_text(text).first.wait_for()

    def picture(self, name: str) -> None:
        """Takes a picture; asserts that the page is not wider than the screen."""
        width = self.page.viewport_size["width"] if self.page.viewport_size else 0
        assert self.page.evaluate("document.documentElement.scrollWidth") <= width, f"{name} is too wide"
        PICTURES.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=PICTURES / f"inbox-{name}-{self.size}.png")

    def is_accessible(self) -> None:
        """Asserts that axe-core finds no serious violation on the page as it is."""
        self.page.evaluate(AXE)
        found = self.page.evaluate("axe.run(document, {resultTypes: ['violations']})")
        serious = [
            (violation["id"], [node["html"][:200] for node in violation["nodes"]])
            for violation in found["violations"]
            if violation["impact"] in ("serious", "critical")
        ]
        assert serious == []


class Worker:
    """The service worker of a page, as the push service and the person's taps reach it."""

    def __init__(self, page: Page) -> None:
        page.evaluate("navigator.serviceWorker.ready.then(() => undefined)")
        [self._worker] = page.context.service_workers
        self._devtools = page.context.new_cdp_session(page)
        registrations: list[dict[str, Any]] = []
        self._devtools.on(
            "ServiceWorker.workerRegistrationUpdated",
            lambda event: registrations.extend(event["registrations"]),
        )
        self._devtools.send("ServiceWorker.enable")
        page.evaluate(CONTROLLED)
        self._registration = next(one for one in registrations if not one["isDeleted"])
        self._page = page

    def push(self, notice: dict[str, Any]) -> None:
        """Delivers a push as the browser gets it from its push service, and waits until it is shown."""
        before = len(self.notifications())
        origin = urlsplit(self._page.url)
        self._devtools.send(
            "ServiceWorker.deliverPushMessage",
            {
                "origin": f"{origin.scheme}://{origin.netloc}",
                "registrationId": self._registration["registrationId"],
                "data": json.dumps(notice),
            },
        )
        deadline = time.monotonic() + PATIENCE_MS / 1000
        while len(self.notifications()) == before and time.monotonic() < deadline:
            time.sleep(0.05)

    def notifications(self) -> list[dict[str, str]]:
        return self._page.evaluate(
            "navigator.serviceWorker.ready.then((one) => one.getNotifications())"
            ".then((found) => found.map(({title, body, tag}) => ({title, body, tag})))"
        )

    def tap(self) -> str:
        """Taps the notification. Returns the address that is opened: only a real tap lets a worker open a window."""
        return self._worker.evaluate(
            """async () => {
                let opened;
                self.clients.openWindow = async (url) => { opened = url; };
                await open((await self.registration.getNotifications())[0]);
                return opened;
            }"""
        )

    def tap_on(self, address: str) -> str:
        """Taps a notification whose page is open already. Returns "focused" when that one is shown."""
        return self._worker.evaluate(
            """async (address) => {
                WindowClient.prototype.focus = async function () { return this.url === address ? "focused" : "another"; };
                return open({close() {}, data: {path: new URL(address).pathname}});
            }""",
            address,
        )


@pytest.fixture(params=SIZES)
def new_reader(
    request: pytest.FixtureRequest, browser: Browser, inbox: Inbox
) -> Iterator[Callable[..., Reader]]:
    """Opens windows. Asserts that no text from outside was ever executed in one."""
    width, height = SIZES[request.param]
    contexts, readers = list[Any](), list[Reader]()

    def make(person: str = "ann", **options: Any) -> Reader:
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        context.add_cookies(
            [
                {"name": name, "value": value, "url": inbox.url}
                for name, value in ((COOKIE, person), ("canary", "sings"))
            ]
        )
        readers.append(Reader(inbox, context.new_page(), request.param))
        return readers[-1]

    yield make
    for context in contexts:
        context.close()
    for reader in readers:
        assert reader.problems == []
        assert not [url for url in reader.requests if urlsplit(url).path.endswith("stolen")]


@pytest.fixture
def reader(new_reader: Callable[..., Reader]) -> Reader:
    return new_reader()


def test_from_the_list_to_a_recorded_decision_are_two_actions(reader: Reader, inbox: Inbox) -> None:
    [approval] = inbox.ask("Count the files", ("Bash", {"command": "ls | wc -l"}))
    reader.open("inbox")
    reader.press(f"#row-{approval} a.open")
    reader.page.locator("#live:not([hidden])").wait_for()
    reader.picture("card")
    reader.press("[data-key=allow]")
    reader.sees("Allowed by ann")
    assert reader.actions == 2
    assert inbox.state(approval) != "pending"
    reader.sees("It ran: exit status 0.")
    reader.picture("allowed")


@pytest.mark.slow
def test_the_keyboard_alone_does_everything(reader: Reader, inbox: Inbox) -> None:
    calls = [("Bash", {"command": f"echo {word}"}) for word in ("one", "two", "three", "four")]
    one, two, three, four = inbox.ask(f"Four on a {reader.size}", *calls)
    reader.open(f"inbox?q=Four+on+a+{reader.size}")
    reader.key("?")
    reader.page.locator("dialog[open]").wait_for()
    reader.key("Escape")
    for _ in range(2):
        reader.key("j")
    reader.key("k")
    reader.key("o")
    reader.page.wait_for_url(f"**/a/{one}")
    reader.key("a")
    assert reader.page.evaluate("document.activeElement.dataset.key") == "allow"
    assert inbox.state(one) == "pending"  # the key alone decides nothing
    reader.key("Enter")
    reader.sees("Allowed by ann")
    reader.open(f"inbox/a/{two}")
    reader.key("d")
    reader.page.keyboard.type(" ")
    reader.key("Tab")
    reader.page.keyboard.type("not this one")
    reader.key("Tab")
    reader.key("Enter")
    reader.sees("Denied by ann")
    reader.sees("not this one")
    reader.open(f"inbox/a/{three}")
    reader.key("e")
    reader.page.keyboard.press("Control+A")
    reader.page.keyboard.type("echo changed")
    reader.page.get_by_role("button", name="Show the change").focus()
    reader.key("Enter")
    reader.sees("Your edit")
    expect(reader.page.get_by_role("button", name="Allow this edit")).to_be_focused()
    reader.key("Enter")
    reader.sees("Allowed, edited, by ann")
    reader.open(f"inbox/a/{four}")
    reader.key("r")
    reader.page.get_by_role("button", name="Allow and remember", exact=True).focus()
    reader.key("Enter")
    reader.sees("Remembered in this session")
    assert "pending" not in [inbox.state(approval) for approval in (one, two, three, four)]


@pytest.mark.slow
def test_a_decision_made_elsewhere_is_shown_at_once(new_reader: Callable[..., Reader], inbox: Inbox) -> None:
    reader, other = new_reader(), new_reader("carol")
    [approval] = inbox.ask("Elsewhere", ("Bash", {"command": "echo elsewhere"}))
    reader.open(f"inbox/a/{approval}")
    other.open(f"inbox/a/{approval}")
    other.press("details[data-sheet=deny] > summary")
    other.press(other.page.get_by_text("Too broad"))
    other.picture("deny")
    other.press("[data-sheet=deny] button.deny")
    other.sees("Denied by carol")
    reader.sees("Denied by carol")
    assert reader.page.locator("[data-key=allow]").count() == 0
    reader.picture("elsewhere")


@pytest.mark.slow
def test_offline_is_said_with_its_time_and_nothing_can_be_decided(reader: Reader, inbox: Inbox) -> None:
    [approval] = inbox.ask("Offline", ("Bash", {"command": "echo offline"}))
    reader.open("inbox")
    reader.page.evaluate(CONTROLLED)  # it goes offline, too
    reader.open(f"inbox/a/{approval}")
    reader.page.context.set_offline(True)
    reader.sees("Offline since")
    assert reader.page.locator("[data-key=allow]").is_disabled()
    reader.picture("offline")
    reader.page.context.set_offline(False)
    reader.page.locator("#offline").wait_for(state="hidden")
    reader.press("[data-key=allow]")
    reader.sees("Allowed by ann")


@pytest.mark.slow
def test_calls_come_and_go_in_the_list_without_a_reload(
    new_reader: Callable[..., Reader], inbox: Inbox
) -> None:
    reader = new_reader()
    reader.open(f"inbox?q=Live+on+a+{reader.size}")
    reader.sees("Nothing that waits matches")
    first, second = inbox.ask(
        f"Live on a {reader.size}", ("Bash", {"command": "echo a"}), ("Bash", {"command": "echo b"})
    )
    for approval in (first, second):
        reader.page.locator(f"#row-{approval}").wait_for()
    reader.page.locator(f"#row-{first} input").check()
    reader.page.locator(f"#row-{second} input").check()
    reader.picture("batch")
    reader.press("#batch .allow")
    reader.sees("2 of 2 recorded")
    for approval in (first, second):
        reader.page.locator(f"#row-{approval}").wait_for(state="detached")


@pytest.mark.slow
def test_a_long_call_is_allowed_only_after_it_was_scrolled_through(reader: Reader, inbox: Inbox) -> None:
    content = "\n".join(f"row {n}" for n in range(300))
    [approval] = inbox.ask("Long", ("Write", {"file_path": "rows.txt", "content": content}))
    reader.open(f"inbox/a/{approval}")
    allow = reader.page.locator("[data-key=allow]")
    assert allow.is_disabled()
    reader.page.evaluate("scrollTo(0, document.documentElement.scrollHeight)")
    reader.page.wait_for_timeout(200)
    assert allow.is_disabled(), "who jumps to the end has not seen the middle"
    reader.page.evaluate("scrollTo(0, 0)")
    while allow.is_disabled():
        reader.page.mouse.wheel(0, 300)
        reader.page.wait_for_timeout(20)
    allow.click()
    reader.sees("Allowed by ann")


@pytest.mark.slow
def test_a_session_is_started_and_followed_in_the_browser(reader: Reader, inbox: Inbox) -> None:
    reader.open("sessions/new")
    reader.page.locator("textarea[name=prompt]").fill("Write hello.txt with a greeting")
    reader.picture("new-session")
    reader.press(reader.page.get_by_role("button", name="Start"))
    reader.page.wait_for_url("**/sessions/sesn_*")
    decide = reader.page.get_by_role("link", name="Decide on Write")
    decide.wait_for()
    reader.picture("session")
    reader.press(decide)
    reader.press("[data-key=allow]")
    reader.sees("Allowed by ann")
    reader.press(reader.page.get_by_role("link", name="Open the session"))
    reader.page.get_by_role("link", name="hello.txt").wait_for()
    reader.press(reader.page.get_by_role("link", name="What the last turn changed"))
    reader.sees("new file: 3 added, 0 removed")
    reader.picture("changes")
    reader.page.go_back()
    reader.page.locator("textarea[name=text]").fill("Read hello.txt")
    reader.press(reader.page.get_by_role("button", name="Send"))
    reader.sees("It says:")
    reader.picture("session-after")


@pytest.mark.slow
def test_the_inbox_can_be_installed_and_keeps_no_page_with_a_call(reader: Reader, inbox: Inbox) -> None:
    [approval] = inbox.ask("Installed", ("Bash", {"command": "echo installed"}))
    reader.open(f"inbox/a/{approval}")
    devtools = reader.page.context.new_cdp_session(reader.page)
    assert devtools.send("Page.getAppManifest")["errors"] == []
    problems = devtools.send("Page.getInstallabilityErrors")["installabilityErrors"]
    assert [one["errorId"] for one in problems] == ["in-incognito"]  # as each window of the tests is
    reader.page.evaluate("navigator.serviceWorker.ready.then(() => undefined)")
    reader.open("inbox")  # through the service worker
    kept = reader.page.evaluate(
        "caches.keys().then((names) => Promise.all(names.map((name) => caches.open(name).then((one) => one.keys()))))"
        ".then((found) => found.flat().map((request) => new URL(request.url).pathname))"
    )
    shell = [path for path in kept if path.startswith("/claude-hitl/inbox/static/")]
    assert shell
    assert set(kept) - set(shell) == {"/claude-hitl/inbox/offline"}
    reader.page.context.set_offline(True)
    reader.page.goto(f"{inbox.url}/inbox/a/{approval}")
    reader.sees("nothing can be decided until the connection is back")
    assert reader.page.get_by_text("echo installed").count() == 0
    reader.picture("no-connection")
    reader.page.context.set_offline(False)
    reader.sees("echo installed")


@pytest.mark.slow
def test_from_a_push_to_a_recorded_decision_are_two_actions(
    new_reader: Callable[..., Reader], inbox: Inbox
) -> None:
    reader = new_reader(permissions=["notifications"])
    [approval] = inbox.ask("Pushed", ("Bash", {"command": "echo pushed"}))
    reader.open("inbox/notifications")
    worker = Worker(reader.page)
    worker.push(
        {"id": "ntce_1", "title": "Bash waits for approval", "severity": "high", "approval": approval}
    )
    [shown] = worker.notifications()
    assert shown == {"title": "Bash waits for approval", "body": "Severity: high", "tag": approval}
    address = worker.tap()
    reader.actions += 1
    reader.page.goto(address)
    reader.page.locator("#live:not([hidden])").wait_for()
    reader.press("[data-key=allow]")
    reader.sees("Allowed by ann")
    assert inbox.state(approval) != "pending"
    assert reader.actions == 2
    assert worker.notifications() == []
    assert worker.tap_on(address) == "focused", "an open card is shown again, not opened twice"


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_serious_violation(new_reader: Callable[..., Reader], inbox: Inbox, scheme: str) -> None:
    reader = new_reader(color_scheme=scheme, reduced_motion="reduce")
    calls = inbox.ask(
        "Accessible",
        ("Bash", {"command": "cd /tmp && rm -rf x; curl https://x.example", "description": "Clean"}),
        ("Edit", {"file_path": "a.py", "old_string": "one", "new_string": "two"}),
        ("Write", {"file_path": "b.py", "content": "x\n"}),
    )
    question = inbox.waiting(inbox.start("Ask me a question", "Question"))
    reader.open("inbox")
    reader.page.locator(".tick input").first.check()
    reader.is_accessible()
    for approval in [*calls, *question]:
        reader.open(f"inbox/a/{approval}")
        reader.is_accessible()
    reader.open(f"inbox/a/{calls[0]}")
    for sheet in ("deny", "edit", "remember"):
        reader.press(f"details[data-sheet={sheet}] > summary")
        reader.is_accessible()
        reader.page.keyboard.press("Escape")
    reader.press("[data-key=allow]")
    reader.sees("Allowed by ann")
    reader.is_accessible()
    reader.open("sessions")
    reader.is_accessible()
    reader.press(".item a.open >> nth=0")
    reader.page.locator("#state").wait_for()
    reader.is_accessible()
    reader.open("sessions/new")
    reader.is_accessible()
    inbox.add_device("ann")
    reader.open("inbox/notifications")
    reader.page.get_by_text("Notifications are off.").wait_for()
    reader.is_accessible()
    reader.picture(f"notifications-{scheme}")


@pytest.mark.slow
def test_no_text_from_outside_is_executed(reader: Reader, inbox: Inbox) -> None:
    title = f"{SCRIPT}{IMAGE}"
    calls = inbox.ask(
        title,
        ("Bash", {"command": f"echo '{SCRIPT}'", "description": IMAGE}),
        ("Write", {"file_path": "a'\"><img src=x onerror=alert(1)>.txt", "content": f"{SCRIPT}\n{IMAGE}"}),
        ("WebFetch", {"url": "https://x.example/", "prompt": SCRIPT}),
    )
    reader.open("inbox")
    assert reader.page.evaluate("document.cookie").count(CANARY)
    for approval in calls:
        reader.open(f"inbox/a/{approval}")
        reader.press("details[data-sheet=deny] > summary")
        reader.page.locator("textarea[name=reason]").fill(f"{SCRIPT}{IMAGE}")
        reader.press("[data-sheet=deny] button.deny")
        reader.sees("Denied by ann")
    reader.open(f"inbox?q={quote(SCRIPT)}")
    reader.open("sessions")
    reader.press(".item a.open >> nth=0")
    reader.sees("I do it now.")


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 768, 1600])
def test_no_page_is_wider_than_its_screen(browser: Browser, inbox: Inbox, width: int) -> None:
    wide = "x" * 400
    calls = inbox.ask(
        wide,
        ("Bash", {"command": f"echo {wide} && {wide}", "description": wide}),
        ("Write", {"file_path": f"{wide[:100]}/{wide[:100]}.txt", "content": wide}),
        ("Edit", {"file_path": f"{wide[:100]}.txt", "old_string": wide, "new_string": f"{wide} {wide}"}),
    )
    context = browser.new_context(viewport={"width": width, "height": 800})
    context.add_cookies([{"name": COOKIE, "value": "ann", "url": inbox.url}])
    reader = Reader(inbox, context.new_page(), str(width))
    for path in (
        "inbox",
        *(f"inbox/a/{approval}" for approval in calls),
        "sessions",
        "sessions/new",
        "inbox/notifications",
    ):
        reader.open(path)
        assert reader.page.evaluate("document.documentElement.scrollWidth") <= width, path
    context.close()


@pytest.mark.slow
def test_a_link_to_a_call_leads_there_after_the_sign_in_and_signing_out_elsewhere_ends_it(
    browser: Browser, tmp_path: Path
) -> None:
    with serve_in_thread(
        tmp_path, keys={"first": SECRET}, hot_window_s=600.0, idle_timeout_s=5.0
    ) as threaded:
        store = threaded.service.store
        inbox = Inbox(threaded, SignedIn())
        user = threaded.run(add_user(store, "zoe"))
        [approval] = inbox.ask("A link in a mail", ("Bash", {"command": "echo linked"}))
        context = browser.new_context()
        reader = Reader(inbox, context.new_page(), "desktop")
        reader.page.goto(f"{inbox.url}/inbox/a/{approval}")
        reader.page.locator("input[name=name]").fill("zoe")
        reader.page.locator("input[name=password]").fill(PASSWORD)
        reader.page.keyboard.press("Enter")
        reader.page.wait_for_url(f"**/inbox/a/{approval}")
        reader.press("[data-key=allow]")
        reader.sees("Allowed by zoe")
        threaded.run(store.change_principal(user.id, {"disabled_at": utcnow()}, by=SERVICE))
        reader.page.wait_for_url("**/sign-in*")
        context.close()
        assert reader.problems == []
