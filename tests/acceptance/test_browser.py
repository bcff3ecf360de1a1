"""A person's actions in the panel: start, decide, answer and continue, and the errors that may occur meanwhile.

The call that is allowed as shown is in test_new_service.py.
"""

import json
import re
import sqlite3
from collections.abc import Callable
from contextlib import closing
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from tests.acceptance.browser import Panel
from tests.integration.harness import Conversation, Service
from tests.serving import loopback

pytestmark = pytest.mark.slow

WRITE, COMMAND = "Write hello.txt with a greeting", "Run a command"
SCRIPT = "<script>fetch('/stolen?' + document.cookie)</script>"
IMAGE = "<img src=x onerror=\"fetch('/stolen?' + document.cookie)\">"
HIDDEN = "\u202egnp.exe\u2066 \x1b[31mred\x1b[0m"


def scenario(*steps: dict[str, Any]) -> str:
    """A prompt that the offline model follows."""
    return f"Follow this.\n\n```scenario\n{json.dumps(list(steps))}\n```"


def command(text: str, description: str) -> str:
    given = {"command": text, "description": description}
    return scenario(
        {"text": "I run it.", "tools": [{"name": "Bash", "input": given}]},
        {"when": "ok", "text": "It printed: {tool_result}"},
        {"when": "denied", "text": "It was refused: {tool_result}"},
    )


def log_of(panel: Panel, session: str, kind: str) -> list[Any]:
    """Returns events of a panel user's session, which REST does not show, from the database."""
    query = "select payload from events where session_id = ? and type = ? order by seq"
    with closing(sqlite3.connect(panel.service.root / "data" / "hitl.sqlite3")) as database:
        return [json.loads(payload) for (payload,) in database.execute(query, (session, kind))]


def test_a_person_logs_in_and_finds_the_three_entries(new_panel: Callable[[], Panel], password: str) -> None:
    panel = new_panel()
    panel.log_in("admin", password)
    for name in ("Start a conversation", "Continue a conversation", "Approvals"):
        panel.page.get_by_text(name, exact=True).first.wait_for()
    panel.picture("services")
    panel.page.get_by_text("Start a conversation", exact=True).first.click()
    panel.page.locator("[name=prompt]").wait_for()
    panel.picture("start")


def test_a_page_elsewhere_does_nothing_with_a_persons_login_and_no_script_reads_it(panel: Panel) -> None:
    assert "canary" in panel.page.evaluate("document.cookie")
    assert "kodosumi_jwt" not in panel.page.evaluate("document.cookie")
    assert panel.page.evaluate("fetch('/role').then(answer => answer.status)") == 200
    before = panel.page.request.get(f"{panel.base}/role").json()
    role = json.dumps({"name": "mallory", "email": "m@example.com", "password": "p", "operator": True})
    send = """([url, body]) => fetch(url, {method: 'POST', mode: 'no-cors', credentials: 'include', body})
        .then(() => 'sent', () => 'refused')"""
    elsewhere = panel.context.new_page()
    with loopback(FastAPI()) as foreign:  # the same host, and so the same site, at another port
        elsewhere.goto(f"{foreign}/openapi.json")
        assert elsewhere.evaluate(send, [f"{panel.base}/role", role]) == "refused"
    elsewhere.close()
    assert panel.page.request.get(f"{panel.base}/role").json() == before


def test_a_call_is_edited_and_what_is_no_json_decides_nothing(panel: Panel) -> None:
    panel.start(COMMAND)
    panel.sees("Waiting for you")
    panel.open_form()
    panel.page.get_by_text("Edit", exact=True).click()
    area = panel.page.locator("textarea[name$='.input']")
    area.fill('{"command": "echo <b>&amp;</b>')
    panel.press("Allow this instead")
    panel.page.get_by_text("the input is not JSON").wait_for()
    assert area.input_value() == '{"command": "echo <b>&amp;</b>'
    panel.picture("edit-wrong")
    area.fill('{"command": "echo edited > date.txt && cat date.txt"}')
    panel.picture("edit")
    panel.decide("Allow this instead")
    panel.sees("Allowed, with an edited input, by admin")
    panel.sees("The command ran and printed: edited")
    panel.rests()
    panel.picture("edited")


def test_a_call_is_denied_with_a_reason_that_the_agent_is_told(panel: Panel) -> None:
    panel.start(COMMAND)
    panel.sees("Waiting for you")
    panel.open_form()
    panel.page.fill("textarea[name$='.reason']", "not today")
    panel.picture("deny")
    panel.decide("Deny")
    panel.sees("Denied by admin: not today")
    panel.sees("The command did not succeed")
    panel.rests()
    panel.picture("denied")


def test_a_rule_is_remembered(panel: Panel) -> None:
    panel.start(COMMAND)
    panel.sees("Waiting for you")
    panel.open_form()
    panel.decide("Allow and remember")
    panel.sees("Remembered for this session")
    panel.rests()


def test_a_question_is_answered_with_labels_and_own_words(panel: Panel) -> None:
    panel.start("Ask me a question")
    panel.sees("Waiting for you")
    panel.open_form()
    panel.press("Answer")
    panel.page.get_by_text("choose an answer, or write one of your own").first.wait_for()
    panel.page.get_by_text("Green").first.click()
    panel.page.get_by_text("For the browser.").click()
    panel.page.locator("textarea[name$='.q1.own']").fill("Plain text")
    panel.picture("question")
    panel.decide("Answer")
    panel.sees("Answered by admin")
    panel.rests()
    panel.sees("HTML, Plain text")
    panel.picture("answered")


def test_a_plan_is_read_and_accepted(panel: Panel) -> None:
    panel.start("Make a plan first")
    panel.sees("Waiting for you")
    panel.open_form()
    panel.page.get_by_role("heading", name="Plan", exact=True).wait_for()
    panel.picture("plan")
    panel.decide("Accept the plan")
    panel.sees("You approved the plan")
    panel.sees("Write: ")
    assert panel.window().get_by_role("link", name="Decide on").count() == 1, "the plan's card is gone"
    panel.open_form()
    panel.decide("Allow")
    panel.sees("The plan is carried out.")
    panel.rests()
    assert not panel.window().get_by_text("Waiting for you").filter(visible=True).count()


def test_a_batch_is_one_form(panel: Panel) -> None:
    panel.start("Do three things at once")
    panel.sees("3 calls wait")
    panel.open_form()
    radios = panel.page.locator("input[type=radio]")
    radios.and_(panel.page.locator("[value=allow]")).nth(0).check()
    radios.and_(panel.page.locator("[value=allow]")).nth(1).check()
    radios.and_(panel.page.locator("[value=deny]")).nth(2).check()
    panel.picture("batch")
    panel.decide("Send decisions")
    panel.sees("Denied by admin")
    panel.rests()


def test_a_parked_conversation_is_continued_and_ended(panel: Panel) -> None:
    session = panel.start(WRITE, title="To be continued")
    panel.sees("Waiting for you")
    panel.open_form()
    panel.decide("Allow")
    panel.rests()
    panel.page.goto(panel.entry("continue"))
    panel.picture("continue-list")
    panel.page.locator(f"button[value={session}]").click()
    panel.page.get_by_text("Claude said last").wait_for()
    panel.page.fill("[name=text]", "Read hello.txt")
    panel.upload([{"name": "more.txt", "mimeType": "text/plain", "buffer": b"with a message"}])
    panel.picture("continue")
    panel.press("Send")
    assert panel.session() == session
    panel.sees("It says:")
    panel.rests()
    uploaded = panel.service.root / "data" / "workspaces" / session / "more.txt"
    assert uploaded.read_text() == "with a message"
    panel.open_form("Go on, or end the conversation")
    panel.decide("End the conversation")
    panel.page.get_by_text("The conversation has ended.").first.wait_for()
    panel.picture("ended")


def test_a_session_that_rest_started_is_decided_from_approvals(panel: Panel) -> None:
    session = panel.service.start_session(COMMAND)
    session.until_asked()
    panel.page.goto(panel.entry("approvals"))
    row = panel.page.locator("button[name=open]", has_text=session.id)
    row.wait_for()
    panel.picture("approvals")
    row.click()
    panel.page.get_by_text("for ./hitl key").or_(
        panel.page.get_by_text("./hitl key, waiting")
    ).first.wait_for()
    panel.picture("approval")
    panel.press("Allow")
    panel.page.get_by_text("Done. Bash: Allowed by admin").wait_for()
    session.until_idle()
    (said,) = session.events("user.tool_confirmation")
    assert said["decided_by"] == "admin"


def test_two_approvers_agree_in_the_panel_and_the_terminal_and_the_requester_may_not(panel: Panel) -> None:
    service = panel.service
    policy = service.root / "rules.yaml"
    policy.write_text("rules:\n- {pattern: Bash, action: ask, quorum: 2, reason: two pairs of eyes}\n")
    assert service.hitl("rules", "set", str(policy)).returncode == 0
    assert service.hitl("workspaces", "set", "default", "--separation-of-duties").returncode == 0
    created = service.hitl("keys", "create", "robot", "--role", "requester", "--role", "approver").stdout
    key = re.search(r"hitl_[\w-]{43}", created)
    assert key
    try:
        robot = {"x-api-key": key[0]}
        message = {"type": "user.message", "content": [{"type": "text", "text": COMMAND}]}
        body = {"agent": "default", "environment_id": "default", "initial_events": [message]}
        made = httpx.post(f"{service.base}/v1/sessions", json=body, headers=robot, timeout=30)
        session = Conversation(service, made.json()["id"])
        asked = session.until_asked()
        (waiting,) = [one for one in session.approvals() if one["event_id"] == asked]
        decide = f"{service.base}/v1/approvals/{waiting['id']}/decide"
        own = httpx.post(decide, json={"result": "allow"}, headers=robot, timeout=30)
        assert own.status_code == 403
        assert "separates duties" in own.json()["error"]["message"]
        said = service.hitl("approvals", "allow", waiting["id"])
        assert said.returncode == 0, said.stderr
        (waiting,) = [one for one in session.approvals() if one["event_id"] == asked]
        assert (waiting["state"], [vote["name"] for vote in waiting["votes"]]) == ("pending", ["./hitl key"])
        panel.page.goto(panel.entry("approvals"))
        panel.page.locator("button[name=open]", has_text=session.id).click()
        panel.page.get_by_text("two pairs of eyes").first.wait_for()
        panel.page.get_by_text("1 of 2").first.wait_for()
        panel.picture("one-of-two")
        panel.press("Allow")
        panel.page.get_by_text("Done. Bash: Allowed by admin").wait_for()
        session.until_idle()
        (said,) = session.events("user.tool_confirmation")
        assert said["decided_by"] == "admin"
    finally:
        policy.write_text("rules: []\n")
        assert service.hitl("rules", "set", str(policy)).returncode == 0
        assert service.hitl("workspaces", "set", "default", "--no-separation-of-duties").returncode == 0


def test_payloads_are_text_in_every_place_and_no_page_runs_a_script(panel: Panel) -> None:
    harmful = f"cat <<'END'\n{SCRIPT}{IMAGE} & \"quoted\"\nEND\n# 日本"
    quoted = command(harmful, HIDDEN)  # the CLI itself refuses control characters in a command
    files = [{"name": f"{IMAGE}.txt", "mimeType": "text/plain", "buffer": b"uploaded"}]
    session = panel.start(f"{SCRIPT}{IMAGE}\n{quoted}", files=files, title=f"{IMAGE}{HIDDEN}")
    panel.sees("Waiting for you")
    panel.picture("payload")
    panel.open_form()
    shown = panel.page.inner_text("form")
    for part in ("<script>", "<img src=x", "\\u202e", "\\x1b", "\\u2066"):
        assert part in shown
    assert "\u202e" not in shown
    panel.picture("payload-form")
    panel.page.get_by_text("Edit", exact=True).click()
    panel.decide("Allow this instead")  # unchanged: what was shown is what runs, to the byte
    panel.rests()
    (said,) = log_of(panel, session, "user.tool_confirmation")
    assert "updated_input" not in said
    assert "<script>" in panel.window().inner_text()
    (uploaded,) = (panel.service.root / "data" / "workspaces" / session).glob("*.txt")
    assert uploaded.read_text() == "uploaded"
    panel.picture("payload-done")
    for address in ("/admin/timeline/view", "/admin/dashboard", f"/outputs/html/{panel.flow()}"):
        panel.page.goto(panel.base + address, wait_until="networkidle")
    for name in ("continue", "approvals"):
        panel.page.goto(panel.entry(name))


def test_the_canary_would_have_noticed(new_panel: Callable[[], Panel], password: str) -> None:
    panel = new_panel()
    panel.log_in("admin", password)
    with panel.page.expect_request("**/stolen?*canary=sings*"):
        panel.page.evaluate("payload => document.body.insertAdjacentHTML('beforeend', payload)", IMAGE)
    panel.requests.clear()


def test_a_decision_made_elsewhere_closes_the_lock_and_a_late_form_says_whose_it_was(panel: Panel) -> None:
    session = panel.service.start_session(COMMAND)
    event = session.until_asked()
    panel.page.goto(panel.entry("approvals"))
    panel.page.locator("button[name=open]", has_text=session.id).click()
    session.decide(event, "deny", deny_message="by REST")
    panel.press("Allow")
    panel.page.get_by_text("was already decided (deny) by ./hitl key").wait_for()
    panel.page.get_by_text("Denied by ./hitl key").wait_for()
    panel.picture("decided-elsewhere")


def test_a_form_sent_twice_says_so_only_if_it_says_something_else(panel: Panel) -> None:
    panel.start(COMMAND)
    panel.sees("Waiting for you")
    panel.open_form()
    form = panel.page.url
    panel.decide("Allow")
    panel.sees("Allowed by admin")
    panel.page.go_back()
    panel.decide("Allow")
    panel.rests()
    panel.page.goto(form)
    panel.page.get_by_text("Allowed by admin").wait_for()


def test_who_may_not_decide_is_told_so_and_shown_nothing(
    panel: Panel, new_panel: Callable[[], Panel], service: Service
) -> None:
    role = {"name": "guest", "email": "guest@example.com", "password": "guest-password", "operator": False}
    made = panel.page.request.post(f"{panel.base}/role", data=role, headers={"origin": panel.base})
    assert made.ok, made.text()
    panel.start(COMMAND)
    panel.sees("Waiting for you")
    panel.open_form()
    guest = new_panel()
    guest.log_in("guest", "guest-password")
    guest.page.goto(panel.page.url)
    guest.page.get_by_text("You may not decide in this conversation").wait_for()
    assert "date -u" not in guest.page.content()
    guest.picture("not-yours")
    guest.page.goto(guest.entry("approvals"))
    guest.page.get_by_text("Nothing waits for a decision of yours.").wait_for()
    mine = guest.start(WRITE)
    guest.sees("Waiting for you")
    guest.open_form()
    guest.decide("Allow")
    guest.sees("Allowed by guest")
    assert mine


@pytest.mark.parametrize(
    ("prompt", "error"), [("  \n ", "This is empty"), ("x" * 1_048_576, "At most 1,000,000 characters")]
)
def test_an_empty_and_a_huge_prompt_are_refused_and_kept(panel: Panel, prompt: str, error: str) -> None:
    panel.page.goto(panel.entry("start"))
    panel.page.fill("[name=prompt]", prompt)
    panel.press("Start")
    panel.page.get_by_text(error).wait_for()
    assert panel.page.input_value("[name=prompt]") == prompt


def test_files_over_the_limit_are_left_out_and_said(panel: Panel) -> None:
    panel.page.goto(panel.entry("start"))
    files = [{"name": name, "mimeType": "text/plain", "buffer": b"x" * 3000} for name in ("a", "b")]
    panel.page.set_input_files("#hitl-pick", files)
    panel.page.get_by_text("a: uploaded").wait_for()
    panel.page.get_by_text("b: left out, this is over the limit").wait_for()


def test_a_killed_runner_leaves_the_session_and_its_open_form_usable(panel: Panel) -> None:
    panel.start(COMMAND)
    panel.sees("Waiting for you")
    flow = panel.flow()
    panel.open_form()
    code = f"""
import sys, ray
ray.init(sys.argv[1], namespace="kodosumi", log_to_driver=False, logging_level="ERROR")
ray.kill(ray.get_actor({flow!r}))
print(1)
"""
    panel.service.python(code)
    panel.press("Allow")
    panel.session()
    assert panel.flow() != flow
    panel.sees("Allowed by admin")
    panel.rests()


def test_enter_in_a_form_decides_nothing(panel: Panel) -> None:
    panel.start("Ask me a question")
    panel.sees("Waiting for you")
    panel.open_form()
    panel.page.locator("input[type=radio]").first.focus()
    panel.page.keyboard.press("Enter")
    panel.page.get_by_text("Nothing was decided").wait_for()
    panel.page.goto(panel.entry("approvals"))
    panel.page.get_by_text("Which colour should the report have?").first.wait_for()
