"""Decisions in Slack: of presses that Slack signed for the channel, as the person who connected, of calls shown whole."""

import asyncio
import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import pytest_asyncio

from claude_hitl_template.config.secret_files import SigningKey
from claude_hitl_template.domain.models import Approval, ApprovalState, new_id
from claude_hitl_template.domain.notices import APPROVAL_KINDS, Channel
from claude_hitl_template.domain.people import SERVICE, Actor
from claude_hitl_template.domain.policy.tiers import WorkspacePolicy
from claude_hitl_template.notify.addresses import Targets
from claude_hitl_template.notify.courier import Courier
from claude_hitl_template.notify.posting import Poster
from claude_hitl_template.notify.slack import SlackSender
from claude_hitl_template.notify.slack_presses import FAILURES, MAX_BYTES, SlackApp, SlackLinks
from claude_hitl_template.signin.addresses import own_path
from claude_hitl_template.store.core import CoreStore
from claude_hitl_template.store.filters import AuditFilter
from claude_hitl_template.testing.clock import FakeClock
from claude_hitl_template.testing.memory_backend import MemoryBackend
from claude_hitl_template.testing.signed_in import CSRF
from tests.contract.asking import said
from tests.inbox import ROOT, Desk, browser, desk
from tests.slack import SIGNING, TOKEN, Slack, signed

PAGES = f"https://hitl.example{ROOT}"
LINK = "inbox/notifications/slack/link"
RULES: list[dict[str, Any]] = [
    {"pattern": "Bash(git push:*)", "action": "ask", "severity": "critical"},
    {"pattern": "Bash(make:*)", "action": "ask", "severity": "high", "quorum": 2},
]


@dataclass
class Office:
    """A workspace whose calls are sent to a channel of Slack."""

    desk: Desk
    slack: Slack
    clock: FakeClock
    channel: Channel
    courier: Courier
    client: httpx.AsyncClient  # which is not signed in

    async def send(self) -> None:
        while await self.courier.send_due():
            await self.courier.settled()

    async def ask(self, tool: str = "Bash", given: Mapping[str, Any] | None = None, **more: Any) -> Approval:
        """A call that waits, and whose message was sent."""
        approval = await self.desk.ask(tool, given, **more)
        await self.send()
        return approval

    async def now(self, approval: Approval) -> Approval:
        return await self.desk.store.get_approval(approval.id, None)

    def value(self, approval: Approval) -> str:
        return f"{self.channel.id}:{approval.id}:{approval.digest}"

    async def post(self, body: bytes, headers: Mapping[str, str] | None = None) -> httpx.Response:
        """What Slack sends; `headers`: in place of those with its signature."""
        sent = signed(body, self.clock()) if headers is None else headers
        return await self.client.post("slack/interactions", content=body, headers=dict(sent))

    async def press(self, action: str, approval: Approval, user: str = "U1") -> list[dict[str, Any]]:
        """Presses a button; returns the answers that Slack gets."""
        before = len(self.slack.answers)
        answer = await self.post(self.slack.press(action, self.value(approval), user=user))
        assert (answer.status_code, answer.text) == (200, "")
        return self.slack.answers[before:]

    async def token(self, user: str = "U1") -> str:
        """The token of the link that a user of Slack gets who is not connected."""
        [answer] = await self.press("deny", await self.desk.ask(), user)
        assert answer["response_type"] == "ephemeral"
        found = re.search(rf"<{re.escape(PAGES)}/{LINK}\?token=([^|>]+)\|", answer["text"])
        assert found is not None
        return found[1]

    async def connect(
        self, person: str = "ann", token: str | None = None, user: str = "U1"
    ) -> httpx.Response:
        given = {"csrf": CSRF, "token": token or await self.token(user)}
        async with browser(self.desk, person) as client:
            return await client.post(LINK, data=given)

    async def links(self, person: str = "ann") -> list[Channel]:
        mine = await self.desk.store.list_channels(None, principal_id=f"user_{person}")
        return [one for one in mine if one.enabled]


@pytest_asyncio.fixture
async def office() -> AsyncIterator[Office]:
    clock = FakeClock()
    store = CoreStore(MemoryBackend(), clock)
    async with Slack().serving() as slack, desk(store) as on:
        targets = Targets((f"127.0.0.1:{urlsplit(slack.url).port}",))
        poster = Poster(targets)
        on.slack = SlackApp(SlackLinks(SigningKey(b"k" * 32), clock), poster, targets, PAGES, clock)
        await store.set_policy(on.workspaces[0], WorkspacePolicy.model_validate({"rules": RULES}), by=SERVICE)
        channel = Channel(
            id=new_id("chan"),
            kind="slack",
            workspace_id=on.workspaces[0],
            name="C1",
            settings={"channel": "C1", "show_input": True},
            kinds=APPROVAL_KINDS,
            created_at=clock(),
        )
        await store.add_channel(channel, {"bot_token": TOKEN, "signing_secret": SIGNING})
        courier = Courier(store, {"slack": SlackSender(api=slack.url)}, pages_url=PAGES)
        async with browser(on, "") as client:
            yield Office(on, slack, clock, channel, courier, client)
        await courier.close()
        await poster.close()


# -- deciding


async def test_a_person_connects_once_and_then_decides_with_one_press(office: Office) -> None:
    approval = await office.ask(given={"command": "ls -l 'a & b'"})
    buttons = office.slack.buttons()
    assert list(buttons) == ["allow", "open", "deny"]
    assert buttons["allow"]["value"] == office.value(approval)
    assert office.slack.calls[-1][1]["blocks"][1]["elements"][0]["elements"][0]["text"] == "ls -l 'a & b'"
    assert (await office.connect()).headers["location"].endswith("/inbox/notifications?done=connected")
    assert (await office.now(approval)).state is ApprovalState.PENDING
    body = office.slack.press("allow", office.value(approval))
    for _ in range(2):  # Slack sends a press again
        office.slack.answers.clear()
        assert (await office.post(body)).status_code == 200
        [answer] = office.slack.answers
        assert answer["replace_original"] is True
        assert "Bash was allowed by ann" in answer["text"]
        assert [one["action_id"] for one in answer["blocks"][-1]["elements"]] == ["open"]
    decided = await office.now(approval)
    assert (decided.state, decided.run_input) == (ApprovalState.ALLOWED, approval.input)
    assert decided.decision is not None
    assert (decided.decision.decided_by, decided.decision.decider_id) == ("ann", "user_ann")
    sent = await office.desk.store.list_events(approval.session_id, None, limit=100)
    assert [one.type for one in sent.data].count("user.tool_confirmation") == 1
    wanted = AuditFilter(action="approval.decided")
    listed = await office.desk.store.list_audit(approval.workspace_id, limit=9, matching=wanted)
    [entry] = [one for one in listed.data if one.target == approval.id]
    [link] = await office.links()
    assert (entry.actor.id, entry.actor.key_id) == ("user_ann", link.id)
    await office.send()
    method, updated = office.slack.calls[-1]
    assert method == "chat.update"
    assert "allowed by ann" in updated["text"]


async def test_of_two_who_must_agree_the_first_press_updates_the_message(office: Office) -> None:
    for person, user in (("ann", "U1"), ("eve", "U2")):
        await office.connect(person, user=user)
    approval = await office.ask(given={"command": "make all"})
    [answer] = await office.press("allow", approval)
    assert "Others must allow it" in answer["text"]
    await office.send()
    method, updated = office.slack.calls[-1]
    assert method == "chat.update"
    assert "1 of 2 allowed it" in updated["blocks"][2]["text"]["text"]
    assert list(office.slack.buttons()) == ["allow", "open", "deny"]
    assert (await office.now(approval)).state is ApprovalState.PENDING
    await office.press("allow", approval, "U2")
    assert (await office.now(approval)).state is ApprovalState.ALLOWED


async def test_a_call_that_was_decided_or_changed_is_not_decided_again(office: Office) -> None:
    await office.connect()
    approval = await office.ask()
    changed = approval.but(digest="0" * 64)
    [answer] = await office.press("allow", changed)
    assert "not the one that was shown" in answer["text"]
    assert (await office.now(approval)).state is ApprovalState.PENDING
    await office.desk.store.decide(approval.id, None, said("x", "deny"), by=Actor(name="carol"))
    replaced, answer = await office.press("allow", approval)
    assert replaced["replace_original"] is True
    assert "Bash was denied by carol" in replaced["text"]
    assert "Denied by carol" in answer["text"]
    assert (await office.now(approval)).state is ApprovalState.DENIED


async def test_a_role_that_does_not_decide_and_another_workspace_get_an_answer_and_no_decision(
    office: Office,
) -> None:
    await office.connect("vic")
    approval, elsewhere = await office.ask(), await office.desk.ask(workspace=1)
    [answer] = await office.press("allow", approval)
    assert "vic may not decide here" in answer["text"]
    [answer] = await office.press("deny", elsewhere)
    assert "does not exist" in answer["text"]
    for one in (approval, elsewhere):
        assert (await office.now(one)).state is ApprovalState.PENDING


# -- what is shown


@pytest.mark.parametrize(
    ("tool", "given", "more", "why"),
    [
        ("Bash", {"command": "git push"}, {}, "critical"),
        ("Bash", {"command": "x" * 5_000_000}, {}, "x" * 99 + "…"),
        ("Bash", {"command": "echo \u202egnp.x"}, {}, "does not say all"),
        ("Bash", {"command": "echo  two"}, {}, "does not say all"),
        ("Bash", {"command": "echo '&lt;'"}, {}, "does not say all"),
        ("Bash", {"command": "ls", "run_in_background": True}, {}, "does not say all"),
        ("Bash", {"command": "ls"}, {"folder": "./sub"}, "does not say all"),
        ("Edit", {"file_path": "/w/a", "old_string": "a", "new_string": "b"}, {}, "does not say all"),
        ("Read", {"file_path": "/w/a"}, {"targets": ["//etc/passwd"]}, "does not say all"),
    ],
    ids=("critical", "5 MB", "hidden", "spaces", "entity", "option", "folder", "edit", "link"),
)
async def test_a_call_that_slack_does_not_show_whole_is_denied_there_and_not_allowed(
    office: Office, tool: str, given: dict[str, Any], more: dict[str, Any], why: str
) -> None:
    await office.connect()
    approval = await office.ask(tool, given, **more)
    assert list(office.slack.buttons()) == ["open", "deny"]
    assert office.slack.buttons()["open"]["url"] == f"{PAGES}/inbox/a/{approval.id}"
    shown = str(office.slack.calls[-1][1]["blocks"])
    assert why in shown
    assert "\u202e" not in shown
    assert len(shown) < 5000
    [answer] = await office.press("allow", approval)  # forged: there is no such button
    assert "does not show all" in answer["text"]
    assert (await office.now(approval)).state is ApprovalState.PENDING
    await office.press("deny", approval)
    assert (await office.now(approval)).state is ApprovalState.DENIED


async def test_marks_are_shown_and_a_channel_shows_no_input_unless_it_is_set_to(office: Office) -> None:
    await office.connect()
    await office.ask(given={"command": "rm -r canary"})
    assert "deletes or overwrites" in office.slack.calls[-1][1]["blocks"][2]["text"]["text"]
    await office.desk.store.change_channel(office.channel.id, None, {"settings": {"channel": "C1"}})
    approval = await office.ask(given={"command": "rm -r canary"})
    assert "canary" not in str(office.slack.calls[-1])
    assert list(office.slack.buttons()) == ["open"]
    [answer] = await office.press("allow", approval)
    assert "does not show all" in answer["text"]
    assert (await office.now(approval)).state is ApprovalState.PENDING
    opened = office.slack.press("open", office.slack.buttons()["open"]["value"])
    assert (await office.post(opened)).status_code == 200


# -- who sent it


async def test_what_slack_did_not_sign_for_this_channel_now_is_refused(office: Office) -> None:
    await office.connect()
    approval, store = await office.ask(), office.desk.store
    other = office.channel.but(id="chan_other")
    await store.add_channel(other, {"bot_token": TOKEN, "signing_secret": "o7her5ecre7" * 3})
    body = office.slack.press("allow", office.value(approval))
    right = signed(body, office.clock())
    office.slack.answers.clear()
    for wrong in (
        {},
        signed(body, office.clock(), "o7her5ecre7" * 3),
        signed(body + b"&a=b", office.clock()),
        {**right, "x-slack-request-timestamp": str(int(right["x-slack-request-timestamp"]) - 1)},
        {**right, "x-slack-request-timestamp": "now"},
        {**right, "x-slack-signature": "v0=" + "\u00e9" * 64},
    ):
        given = {name: value.encode("latin-1") for name, value in wrong.items()}
        assert (await office.post(body, given)).status_code == 401  # pyright: ignore[reportArgumentType]
    office.clock.move(301)
    assert (await office.post(body, right)).status_code == 401
    office.clock.move(-602)
    assert (await office.post(body, right)).status_code == 401
    office.clock.move(301)
    await store.change_channel(other.id, None, {}, secret={"bot_token": TOKEN})
    for missing in (other.id, "chan_none"):
        unknown = office.slack.press("allow", f"{missing}:{approval.id}:{approval.digest}")
        assert (await office.post(unknown)).status_code == 404
    await store.remove_channel(office.channel.id, None)
    assert (await office.post(body)).status_code == 404
    assert (await office.now(approval)).state is ApprovalState.PENDING
    assert office.slack.answers == []


async def test_a_body_that_is_not_a_press_is_refused_by_name(office: Office) -> None:
    approval = await office.ask()
    value, press = office.value(approval), office.slack.press
    office.slack.answers.clear()
    for body, status, named in (
        (b"", 400, "payload"),
        (b"payload=%7B", 400, "not JSON"),
        (b"payload=%7B%22a%22%3A1%2C%22a%22%3A2%7D", 400, "given twice"),
        (b"payload=[]", 400, "payload.actions"),
        (b"payload={}&payload={}", 400, "payload"),
        (press("allow", "elsewhere:1"), 400, "payload.actions.0.value"),
        (press("allow", office.channel.id), 400, "payload.actions.0.value"),
        (press("remember", value), 400, "payload.actions.0.action_id"),
        (press("allow", value, type="view_submission"), 400, "payload.type"),
        (press("allow", value, user="ann@x"), 400, "payload.user.id"),
        (press("allow", value, response_url="https://evil.example/a"), 400, "payload.response_url"),
        (press("allow", value, response_url="http://hooks.slack.com/a"), 400, "payload.response_url"),
        (b"payload=" + b"x" * MAX_BYTES, 413, "over"),
    ):
        answer = await office.post(body)
        assert (answer.status_code, named in answer.text) == (status, True), answer.text
    assert (await office.now(approval)).state is ApprovalState.PENDING
    assert office.slack.answers == []


async def test_a_network_that_guesses_is_slowed_down(office: Office) -> None:
    body = office.slack.press("open", office.channel.id)
    for _ in range(FAILURES):
        assert (await office.post(body, {})).status_code == 401
    answer = await office.post(body)
    assert answer.status_code == 429
    assert int(answer.headers["retry-after"]) > 0


# -- connecting


async def test_a_link_works_once_for_ten_minutes_and_for_whom_it_is(office: Office) -> None:
    token = await office.token()
    address = f"{ROOT}/{LINK}?token={token}"
    assert own_path(address) == address, "the sign-in returns to it"
    async with browser(office.desk) as client:
        shown = await client.get(LINK, params={"token": token})
        assert "U1 &lt;x&gt;" in shown.text
        assert await office.links() == [], "reading the page connects no one"
        assert (await client.post(LINK, data={"token": token})).status_code == 403
        for wrong in ("", token[:-1] + ("0" if token[-1] != "0" else "1"), "\u00e9.\u00e9", f"e30{token}"):
            assert (await client.get(LINK, params={"token": wrong})).status_code == 400
    assert (await office.connect("bob", token)).status_code == 404, "not of this workspace"
    assert (await office.connect("ann", token)).status_code == 303
    for person in ("eve", "ann"):
        assert (await office.connect(person, token)).status_code == 409
    late = await office.token("U2")
    office.clock.move(601)
    assert (await office.connect("eve", late)).status_code == 400
    assert await office.links("eve") == []


async def test_who_disconnects_decides_no_more_and_no_earlier_link_connects_again(office: Office) -> None:
    token = await office.token()
    await office.connect("ann", token)
    [link] = await office.links()
    address = f"inbox/notifications/slack/{link.id}/disconnect"
    async with browser(office.desk, "eve") as client:
        assert (await client.post(address, data={"csrf": CSRF})).status_code == 404
        assert link.name not in (await client.get("inbox/notifications")).text
    async with browser(office.desk) as client:
        assert "Connected in Slack" in (await client.get("inbox/notifications")).text
        await client.post(address, data={"csrf": CSRF})
        assert "Connected in Slack" not in (await client.get("inbox/notifications")).text
    approval = await office.ask()
    [answer] = await office.press("allow", approval)
    assert "not connected" in answer["text"]
    assert (await office.now(approval)).state is ApprovalState.PENDING
    assert (await office.connect("eve", token)).status_code == 409
    office.clock.move(1)
    assert (await office.connect("eve")).status_code == 303
    await office.press("deny", approval)
    decided = await office.now(approval)
    assert decided.decision is not None
    assert decided.decision.decided_by == "eve"


async def test_a_decision_that_is_not_confirmed_in_time_is_not_acknowledged(office: Office) -> None:
    await office.connect()
    approval, store = await office.ask(), office.desk.store

    class Stuck:
        """A store that does not answer a decision."""

        async def decide(self, *_args: object, **_more: object) -> None:
            await asyncio.Event().wait()

        def __getattr__(self, name: str) -> Any:
            return getattr(store, name)

    stuck = replace(office.desk, store=Stuck(), slack=replace(office.desk.slack, answer_s=0.01))  # pyright: ignore[reportArgumentType]
    async with browser(stuck, "") as client:
        answer = await replace(office, client=client).post(
            office.slack.press("allow", office.value(approval))
        )
    assert answer.status_code == 503
    assert (await office.now(approval)).state is ApprovalState.PENDING
