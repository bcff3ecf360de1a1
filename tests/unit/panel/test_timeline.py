"""The timeline shows what happened, and nothing in it is markup from others."""

from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from claude_hitl_template.domain import events, missing_dependency
from claude_hitl_template.domain.events import Draft
from claude_hitl_template.domain.models import Agent, Environment, ImageFacts, Session, utcnow
from claude_hitl_template.domain.policy import PermissionPolicy, Rule
from claude_hitl_template.panel import timeline as render
from tests.unit.panel.components import call_view
from tests.unit.panel.html import Reader
from tests.unit.panel.made import PAGES, approval
from tests.unit.panel.nasty import inputs, texts, tools, values


def shown(draft: Draft) -> str:
    """Returns the text of an event that a reader sees."""
    html = render.event_html({"id": draft.id, "type": draft.type, **draft.payload})
    assert html is not None
    reader = Reader(html)
    reader.check()
    return reader.text


@given(tools, inputs(), st.booleans())
def test_any_call_is_shown_whole_and_as_text(tool: str, given_input: dict[str, Any], folded: bool) -> None:
    reader = Reader(call_view(tool, given_input, folded=folded))
    reader.check()


@given(texts, texts, st.booleans())
def test_no_event_lets_markup_through(said: str, name: str, failed: bool) -> None:
    shown(events.agent_message("e", said))
    shown(events.draft("user.message", content=events.text_blocks(said)))
    shown(events.tool_use("t", name, {"command": said, said: name}, "ask", None))
    shown(events.tool_result("t", events.text_blocks(said), failed, outcome="unknown" if failed else None))
    shown(events.session_error(said))
    for extra in (
        {"deny_message": said},
        {"updated_input": {said: name}},
        {"updated_input": {"answers": {said: name}}},
        {"remember": {"rule": said}},
    ):
        result = "deny" if "deny_message" in extra else "allow"
        shown(events.draft("user.tool_confirmation", result=result, decided_by=name, **extra))


def test_a_command_is_shown_as_code_with_its_description() -> None:
    html = call_view("Bash", {"command": "ls -la", "description": "List", "timeout": 5})
    assert "<pre>ls -la</pre>" in html
    assert "List" in html
    assert "timeout" in html


def test_an_edit_is_a_diff_and_a_write_shows_its_content() -> None:
    edit = call_view("Edit", {"file_path": "a", "old_string": "x\ny", "new_string": "x\nz"})
    assert '<span class="hitl-del">- y</span><span class="hitl-add">+ z</span>' in edit
    assert "<pre>hello</pre>" in call_view("Write", {"file_path": "a", "content": "hello"})


def test_a_plan_is_read_as_markdown() -> None:
    assert "<h1>Do</h1>" in call_view("ExitPlanMode", {"plan": "# Do"})


def test_where_something_is_decided_nothing_stands_behind_a_fold() -> None:
    long = {"file_path": "a", "content": "x\n" * 5000}
    assert "<details" not in call_view("Write", long)
    assert "<details" in call_view("Write", long, folded=True)


def test_what_of_a_workspace_is_not_saved_is_said_as_what_it_is() -> None:
    said = shown(events.workspace_unsaved("the workspace was not saved: it is too large"))
    assert "the workspace was not saved" in said
    assert "trying again" not in said
    assert "128.0 MiB of 1.0 GiB" in shown(events.workspace_progress("saving", 2**27, 2**30))


def test_an_unknown_outcome_is_said_loudly() -> None:
    assert "OUTCOME UNKNOWN" in shown(events.tool_result("t", [], is_error=True, outcome="unknown"))


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"result": "allow"}, "Allowed by ann"),
        ({"result": "deny", "deny_message": "too risky"}, "Denied by ann: too risky"),
        ({"result": "allow", "updated_input": {"command": "ls"}}, "Allowed, with an edited input, by ann"),
        ({"result": "allow", "updated_input": {"answers": {"Colour?": "Blue"}}}, "Answered by ann"),
    ],
)
def test_who_decided_what_is_said(extra: dict[str, Any], said: str) -> None:
    assert said in shown(events.draft("user.tool_confirmation", decided_by="ann", **extra))


def test_that_calls_wait_is_no_entry_and_a_finished_turn_is_not_said_twice() -> None:
    waits = {"type": "session.status_idle", "stop_reason": events.requires_action(["a", "b"])}
    assert render.event_html(waits) is None
    assert render.event_html({"type": "session.status_idle", "stop_reason": events.END_TURN}) is None


def test_a_turns_end_tells_its_own_tokens_and_cost() -> None:
    first = {"input_tokens": 1000, "output_tokens": 10, "cache_read_input_tokens": 0, "cost_usd": 0.5}
    second = {"input_tokens": 3000, "output_tokens": 30, "cache_read_input_tokens": 7, "cost_usd": 0.75}
    said = Reader(render.turn_end(second, first)).text
    assert "2,000 tokens in, 20 out, 7 from the cache, $0.2500 (session $0.7500)" in said
    assert "$" not in render.turn_end(second, first, free=True)


def contained() -> Session:
    environment = Environment(image="localhost/worker:1")
    now = utcnow()
    return Session(id="s", key_id="k", environment=environment, created_at=now, updated_at=now)


def test_the_header_says_what_is_in_force() -> None:
    policy = PermissionPolicy(rules=(Rule(rule="Bash(ls)", policy="always_allow"),), default="always_ask")
    agent = Agent(policy=policy, permission_mode="plan")
    now = utcnow()
    session = Session(id="s", key_id="k", title="<b>T</b>", agent=agent, created_at=now, updated_at=now)
    reader = Reader(render.header(session, ["a.txt"]))
    reader.check()
    for part in (
        "<b>T</b>",
        "a plan comes first; every call asks. Rules: Bash(ls): allow",
        "plugins",
        "image",
    ):
        assert part in reader.text


def test_the_header_shows_image_digest_and_plugins() -> None:
    plugin = {"name": "lint", "marketplace": "tools", "commit": "0123456789abcdef", "path": "/app/plugins/x"}
    known = ImageFacts(
        reference="localhost/worker:1",
        digest="sha256:ab",
        version="1.2",
        commit="c0ffee",
        manifest={"plugins": [plugin]},
    )
    for facts, parts in (
        (
            known,
            ("localhost/worker:1", "sha256:ab", "version 1.2, commit c0ffee", "lint@tools (0123456789ab)"),
        ),
        (known.but(digest=None, manifest={}), ("none: made on this machine",)),
        (None, ("localhost/worker:1", "not known")),
    ):
        reader = Reader(render.header(contained(), [], facts))
        reader.check()
        for part in parts:
            assert part in reader.text


@given(values)
def test_whatever_a_manifest_holds_is_text(held: Any) -> None:
    for manifest in ({"plugins": held}, {"plugins": [held]}, {"plugins": [{"name": held, "commit": held}]}):
        facts = ImageFacts(reference="r", version=str(held), commit=str(held), manifest=manifest)
        Reader(render.header(contained(), [], facts)).check()


def reported(name: str, why: str) -> str:
    given_input = {"kind": "system", "name": name, "why": why}
    return shown(events.tool_use("toolu_1", missing_dependency.FULL_NAME, given_input, "allow", None))


@given(texts, texts)
def test_a_missing_tool_is_shown_as_what_it_is_and_as_text(name: str, why: str) -> None:
    assert "The agent misses `jq` (system package): add it to" in reported("jq", f"x{why}")
    assert "The agent misses" not in reported(f"{name} ", why)


@given(texts, texts)
def test_files_on_offer_keep_their_names_as_text(name: str, why: str) -> None:
    reader = Reader(render.downloads("f" * 24, [(name, "1-x", 3)], [(why, name)]))
    reader.check()


def test_a_call_that_waits_leads_to_its_form_and_to_its_card_in_the_inbox() -> None:
    call = approval("Bash", {"command": "ls <b>"})
    reader = Reader(render.decide_link([call], "2", "/inputs/lock/1/2", PAGES))
    reader.check()
    links = [attributes["href"] for tag, attributes in reader.elements if tag == "a"]
    assert links == ["/inputs/lock/1/2", f"{PAGES}/inbox/a/{call.id}"]


def test_a_call_that_waits_says_until_when_only_if_it_expires() -> None:
    due = approval(expires_at=datetime(2026, 5, 1, 12, 30, tzinfo=UTC))
    said = [Reader(render.decide_link(calls, "1", "/", PAGES)).text for calls in ([approval()], [due, due])]
    assert "Waiting for you: one call waits for a decision" in said[0]
    assert "until" not in said[0]
    assert "Waiting for you: 2 calls wait for a decision" in said[1]
    assert "(until 2026-05-01T12:30+00:00)" in said[1]


@pytest.mark.parametrize(
    "card", [render.decide_link([approval()], "a-1", "/", PAGES), render.message_link("a-1", "/")]
)
def test_the_card_of_a_form_is_hidden_once_its_lock_is_closed(card: str) -> None:
    classes = [str(attributes.get("class")).split() for _, attributes in Reader(card).elements]
    assert "hitl-lock-a-1" in classes[0]
    assert render.closed("a-1").strip() == "<style>.hitl-lock-a-1{display:none}</style>"
