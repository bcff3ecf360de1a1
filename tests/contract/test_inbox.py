"""The inbox on each backend: who sees and decides what, and what a form may do."""

import asyncio
import re
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urljoin

import httpx
import pytest
import pytest_asyncio

from claude_hitl_template.domain import events
from claude_hitl_template.domain.models import Approval, ApprovalState, new_id, utcnow
from claude_hitl_template.domain.notices import FAILING, Channel, Settled
from claude_hitl_template.domain.people import SERVICE, Actor, Role
from claude_hitl_template.files.manifest import Manifest, SavedFile, blob_name
from claude_hitl_template.store.core import CoreStore
from claude_hitl_template.testing.clock import FakeClock
from tests.contract.asking import said
from tests.inbox import FOLDER, OWNER, Desk, browser, decision, desk, shown_changes

QUESTIONS = {
    "questions": [
        {"question": "Colour?", "options": [{"label": "Blue"}, {"label": "Green"}]},
        {"question": "Formats?", "multiSelect": True, "options": [{"label": "HTML"}, {"label": "PDF"}]},
    ]
}


@pytest_asyncio.fixture
async def on(store: CoreStore) -> AsyncIterator[Desk]:
    async with desk(store) as made:
        yield made


@pytest_asyncio.fixture
async def client(on: Desk) -> AsyncIterator[httpx.AsyncClient]:
    async with browser(on) as made:
        yield made


async def decide(client: httpx.AsyncClient, approval: Approval, do: str, **fields: str) -> httpx.Response:
    return await client.post(f"inbox/a/{approval.id}/decide", data=decision(approval, do, **fields))


async def state(on: Desk, approval: Approval) -> Approval:
    return await on.store.get_approval(approval.id, None)


def rows(html: str) -> list[str]:
    return re.findall(r'id="row-(\w+)"', html)


# -- who sees what


async def test_the_list_has_what_waits_in_the_readers_workspaces_the_oldest_first(
    on: Desk, clock: FakeClock
) -> None:
    mine = []
    for _ in range(3):
        mine.append(await on.ask(workspace=0))
        clock.move(1)
        theirs = await on.ask(workspace=1)
        clock.move(1)
    expected = {"ann": [a.id for a in mine], "vic": [a.id for a in mine]}
    for person, ids in expected.items():
        async with browser(on, person) as client:
            assert rows((await client.get("inbox")).text) == ids
    async with browser(on, "eve") as client:
        both = rows((await client.get("inbox")).text)
        assert len(both) == 6
        assert both[0] == mine[0].id
        assert both[-1] == theirs.id
        narrowed = await client.get("inbox", params={"workspace": on.workspaces[1]})
        assert len(rows(narrowed.text)) == 3


async def test_a_foreign_call_and_a_foreign_session_do_not_exist(on: Desk) -> None:
    theirs = await on.ask(workspace=1)
    async with browser(on) as client:
        for address in (
            f"inbox/a/{theirs.id}",
            f"sessions/{theirs.session_id}",
            f"sessions/{theirs.session_id}/stream",
            f"sessions/{theirs.session_id}/file?path=a",
            f"sessions/{theirs.session_id}/changes",
            "inbox/a/appr_unknown",
            "sessions/sesn_unknown",
        ):
            assert (await client.get(address)).status_code == 404, address
        assert (await decide(client, theirs, "allow")).status_code == 404
        sent = await client.post(f"sessions/{theirs.session_id}/messages", data=decision(theirs, "archive"))
        assert sent.status_code == 404
    assert (await state(on, theirs)).state is ApprovalState.PENDING


async def test_a_viewer_sees_a_call_without_buttons_and_is_refused(on: Desk) -> None:
    approval = await on.ask()
    async with browser(on, "vic") as client:
        card = await client.get(f"inbox/a/{approval.id}")
        assert card.status_code == 200
        assert 'name="do"' not in card.text
        assert "needs the role approver" in card.text
        assert "checkbox" not in (await client.get("inbox")).text
        for do in ("allow", "deny"):
            assert (await decide(client, approval, do)).status_code == 403
        sent = await client.post(
            f"sessions/{approval.session_id}/messages", data=decision(approval, "archive")
        )
        assert sent.status_code == 403
    assert (await state(on, approval)).state is ApprovalState.PENDING


@pytest.mark.parametrize("is_free", [True, False])
async def test_a_sessions_page_shows_no_dollars_for_the_offline_model(on: Desk, is_free: bool) -> None:
    approval = await on.ask()
    async with browser(on, is_free=is_free) as client:
        text = (await client.get(f"sessions/{approval.session_id}")).text
    assert ("free of charge" in text, "$0.0000" in text) == (is_free, not is_free)


@pytest.mark.parametrize("sandboxed", [True, False])
async def test_a_card_says_where_there_is_no_sandbox(on: Desk, sandboxed: bool) -> None:
    approval = await on.ask()
    async with browser(on, sandboxed=sandboxed) as client:
        card = (await client.get(f"inbox/a/{approval.id}")).text
    assert ("There is no sandbox" in card) is not sandboxed


async def test_a_browser_that_is_not_signed_in_sees_nothing(on: Desk) -> None:
    approval = await on.ask(title="secret title")
    async with browser(on, "a stranger") as client:
        for address in (
            "inbox",
            "inbox/list",
            f"inbox/a/{approval.id}",
            "inbox/stream",
            "sessions",
            "sessions/new",
        ):
            answer = await client.get(address)
            assert answer.status_code == 403
            assert "secret title" not in answer.text


async def test_a_form_of_another_page_does_nothing(on: Desk, client: httpx.AsyncClient) -> None:
    approval = await on.ask()
    for csrf in ("", "wrong"):
        answer = await client.post(
            f"inbox/a/{approval.id}/decide", data={**decision(approval, "allow"), "csrf": csrf}
        )
        assert answer.status_code == 403
    assert (await state(on, approval)).state is ApprovalState.PENDING


# -- decisions


async def test_allow_records_who_decided_and_the_same_form_twice_is_one_decision(
    on: Desk, client: httpx.AsyncClient
) -> None:
    approval = await on.ask()
    form = decision(approval, "allow")
    for _ in range(2):
        answer = await client.post(f"inbox/a/{approval.id}/decide", data=form)
        assert answer.status_code == 303
        assert answer.headers["location"].endswith(f"/inbox/a/{approval.id}")
    decided = await state(on, approval)
    assert decided.decision is not None
    assert (decided.state, decided.decision.decided_by) == (ApprovalState.ALLOWED, "ann")
    shown = await client.get(f"inbox/a/{approval.id}")
    assert "Allowed by ann" in shown.text
    assert 'name="do"' not in shown.text


async def test_a_decision_made_elsewhere_is_shown_and_the_second_one_refused(
    on: Desk, client: httpx.AsyncClient
) -> None:
    approval = await on.ask()
    await on.store.decide(approval.id, None, said("x", "deny", deny_message="no"), by=Actor(name="carol"))
    answer = await decide(client, approval, "allow")
    assert answer.status_code == 409
    assert "Denied by carol" in answer.text
    assert "was not recorded" in answer.text
    assert 'name="do"' not in answer.text


async def test_a_call_that_is_not_the_one_that_was_shown_is_not_decided(
    on: Desk, client: httpx.AsyncClient
) -> None:
    approval = await on.ask()
    for digest in ("", "0" * 64):
        answer = await decide(client, approval, "allow", digest=digest)
        assert answer.status_code == 409
        assert "not the one that was shown" in answer.text
    assert (await state(on, approval)).state is ApprovalState.PENDING


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"quick": "Too broad", "reason": "only tests"}, "Too broad. only tests"),
        ({"quick": "Too broad"}, "Too broad"),
        ({"reason": "line\r\nline"}, "line\nline"),
        ({}, None),
    ],
)
async def test_a_denial_has_its_reason(
    on: Desk, client: httpx.AsyncClient, fields: dict[str, str], reason: str | None
) -> None:
    approval = await on.ask()
    assert (await decide(client, approval, "deny", **fields)).status_code == 303
    decided = await state(on, approval)
    assert decided.decision is not None
    assert (decided.state, decided.decision.deny_message) == (ApprovalState.DENIED, reason)


@pytest.mark.parametrize("do", ["", "nothing", "answer", "later", "sudo"])
async def test_enter_and_unknown_choices_decide_nothing(on: Desk, client: httpx.AsyncClient, do: str) -> None:
    approval = await on.ask()
    assert (await decide(client, approval, do)).status_code == 400
    assert (await state(on, approval)).state is ApprovalState.PENDING


async def test_an_edit_is_shown_as_a_diff_before_it_is_recorded(on: Desk, client: httpx.AsyncClient) -> None:
    approval = await on.ask("Bash", {"command": "npm test\nnpm run build", "description": "d"})
    shown = await decide(client, approval, "preview", text="npm test\r\nnpm run lint")
    assert shown.status_code == 200
    assert "Allow this edit" in shown.text
    assert "<mark>lint</mark>" in shown.text
    assert (await state(on, approval)).state is ApprovalState.PENDING
    assert (await decide(client, approval, "edit", text="npm test\r\nnpm run lint")).status_code == 303
    assert (await state(on, approval)).run_input == {"command": "npm test\nnpm run lint", "description": "d"}


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"text": ""}, "at least 1 character"),
        ({"as": "json", "json": '{"command": 1}'}, "command"),
        ({"as": "json", "json": "{"}, "not JSON"),
        ({"as": "json", "json": '{"command": "ls", "extra": 1}'}, "takes no such field"),
    ],
)
async def test_an_edit_that_cannot_run_is_refused_where_it_was_typed(
    on: Desk, client: httpx.AsyncClient, fields: dict[str, str], problem: str
) -> None:
    approval = await on.ask("Bash", {"command": "ls"})
    for do in ("preview", "edit"):
        answer = await decide(client, approval, do, **fields)
        assert answer.status_code == 400
        assert problem in answer.text
    assert (await state(on, approval)).state is ApprovalState.PENDING


async def test_remember_records_the_rule_that_was_chosen(on: Desk, client: httpx.AsyncClient) -> None:
    approval = await on.ask("Bash", {"command": "npm test --watch"})
    card = await client.get(f"inbox/a/{approval.id}")
    assert "Bash(npm test:*)" in card.text
    assert (await decide(client, approval, "remember", rule="7")).status_code == 400
    assert (await decide(client, approval, "remember", rule="1")).status_code == 303
    decided = await state(on, approval)
    assert decided.decision is not None
    assert decided.decision.remember is not None
    assert decided.decision.remember.rule == "Bash(npm test:*)"


async def test_a_long_call_is_allowed_only_by_a_form_that_says_it_was_read(
    on: Desk, client: httpx.AsyncClient
) -> None:
    approval = await on.ask("Write", {"file_path": "/w/a", "content": "line\n" * 100}, targets=["./a"])
    assert "I have read all of it" in (await client.get(f"inbox/a/{approval.id}")).text
    refused = await decide(client, approval, "allow")
    assert refused.status_code == 400
    assert "read it to its end" in refused.text
    assert (await decide(client, approval, "allow", read="on")).status_code == 303


async def test_a_very_large_call_is_shown_whole_and_once(on: Desk, client: httpx.AsyncClient) -> None:
    content = "a line of a large file\n" * 50_000
    approval = await on.ask("Write", {"file_path": "/w/a", "content": content}, targets=["./a"])
    card = (await client.get(f"inbox/a/{approval.id}")).text
    assert card.count("a line of a large file") == 50_000
    assert 'data-sheet="edit"' not in card


async def test_questions_are_answered_by_choice_and_in_own_words(on: Desk, client: httpx.AsyncClient) -> None:
    approval = await on.ask("AskUserQuestion", QUESTIONS)
    name = approval.id
    wrong = await decide(client, approval, "answer", **{f"{name}.q0": "1"})
    assert wrong.status_code == 400
    assert "choose at least one answer" in wrong.text
    assert re.search(rf'name="{name}.q0" value="1" checked', wrong.text)
    answered = {f"{name}.q0": "1", f"{name}.q1.o0": "on", f"{name}.q1.own": "Plain text"}
    assert (await decide(client, approval, "answer", **answered)).status_code == 303
    run_input = (await state(on, approval)).run_input
    assert run_input is not None
    assert run_input["answers"] == {"Colour?": "Green", "Formats?": "HTML, Plain text"}


# -- batches


async def test_a_batch_says_what_happened_to_each_call(on: Desk, client: httpx.AsyncClient) -> None:
    fine = await on.ask("Bash", {"command": "ls"})
    opaque = await on.ask("Write", {"file_path": "/w/a", "content": "x"})
    decided = await on.ask("Bash", {"command": "pwd"})
    await on.store.decide(decided.id, None, said("x", "deny"), by=Actor(name="carol"))
    foreign = await on.ask(workspace=1)
    changed = await on.ask("Bash", {"command": "id"})
    ticked = [f"{a.id}:{a.digest}" for a in (fine, opaque, decided, foreign)] + [f"{changed.id}:{'0' * 64}"]
    form = {"csrf": decision(fine, "")["csrf"], "nonce": "n", "do": "allow", "call": ticked}
    answer = await client.post("inbox/batch", data=form)
    assert answer.status_code == 200
    for part in (
        "1 of 5 recorded",
        "does not say all",
        "Denied by carol",
        "there is no approval",
        "not the call that was shown",
    ):
        assert part in answer.text
    states = [(await state(on, a)).state.value for a in (fine, opaque, decided, foreign, changed)]
    assert states == ["allowed", "pending", "denied", "pending", "pending"]
    again = await client.post("inbox/batch", data=form)
    assert "1 of 5 recorded" in again.text
    denied = await client.post(
        "inbox/batch", data={**form, "do": "deny", "call": [f"{opaque.id}:{opaque.digest}"]}
    )
    assert "1 of 1 recorded" in denied.text
    assert "so nothing was decided" in (await client.post("inbox/batch", data={**form, "call": []})).text


# -- long lists


async def test_a_long_list_has_pages_and_is_never_said_to_be_empty_before_its_end(
    on: Desk, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = await on.session()
    for n in range(60):
        await on.ask("Bash", {"command": f"echo {n}"}, session=session)
    wanted = await on.ask("Bash", {"command": "echo needle"}, session=session)
    first = (await client.get("inbox")).text
    found, more = rows(first), re.search(r"inbox/more\?([^\"]+)", first)
    assert more is not None
    assert len(found) == 50
    second = (await client.get(f"inbox/more?{more[1].replace('&amp;', '&')}")).text
    assert rows(second)[-1] == wanted.id
    assert len({*found, *rows(second)}) == 61
    assert 'id="more-row"' not in second
    monkeypatch.setattr("claude_hitl_template.store.waiting.LOOKED_AT", 20)
    page = (await client.get("inbox", params={"q": "needle"})).text
    for _ in range(3):
        assert "Nothing that waits matches" not in page
        assert not rows(page)
        more = re.search(r"inbox/more\?([^\"]+)", page)
        assert more is not None
        page = (await client.get(f"inbox/more?{more[1].replace('&amp;', '&')}")).text
    assert rows(page) == [wanted.id]
    assert (
        "Nothing that waits matches"
        in (await client.get("inbox", params={"q": "nowhere", "session": "x"})).text
    )


async def test_filters_by_session_and_tool(on: Desk, client: httpx.AsyncClient) -> None:
    one, two = await on.ask("Bash"), await on.ask("WebFetch", {"url": "https://a.example", "prompt": "p"})
    assert rows((await client.get("inbox", params={"tool": "WebFetch"})).text) == [two.id]
    assert rows((await client.get("inbox", params={"session": one.session_id})).text) == [one.id]


# -- what a card says


async def test_an_edit_is_shown_in_the_saved_file_or_says_that_the_file_changed(
    on: Desk, client: httpx.AsyncClient
) -> None:
    session = await on.session()
    await on.save(session, {"a.py": "one\ntwo\nthree\n"})
    fits = {"file_path": "/w/a.py", "old_string": "two", "new_string": "2"}
    card = (
        await client.get(f"inbox/a/{(await on.ask('Edit', fits, session=session, targets=['./a.py'])).id}")
    ).text
    assert "one" in card
    assert "three" in card
    assert "changed since" not in card
    gone = {**fits, "old_string": "four"}
    card = (
        await client.get(f"inbox/a/{(await on.ask('Edit', gone, session=session, targets=['./a.py'])).id}")
    ).text
    assert "it changed since, or is not saved yet" in card
    new = {"file_path": "/w/b.py", "content": "x\n"}
    card = (
        await client.get(f"inbox/a/{(await on.ask('Write', new, session=session, targets=['./b.py'])).id}")
    ).text
    assert "New file" in card
    outside = {"file_path": "/etc/x", "content": "x\n"}
    card = (
        await client.get(
            f"inbox/a/{(await on.ask('Write', outside, session=session, targets=['//etc/x'])).id}"
        )
    ).text
    assert "outside of the workspace" in card


async def test_a_file_that_was_saved_after_the_call_is_marked(on: Desk, client: httpx.AsyncClient) -> None:
    session = await on.session()
    approval = await on.ask(
        "Write", {"file_path": "/w/a", "content": "new"}, session=session, targets=["./a"]
    )
    await on.save(session, {"a": "other"}, at=approval.created_at + timedelta(minutes=1))
    assert "newer than this call" in (await client.get(f"inbox/a/{approval.id}")).text


async def test_what_was_decided_before_about_exactly_this_is_said(
    on: Desk, client: httpx.AsyncClient
) -> None:
    session = await on.session()
    first = await on.ask(session=session)
    await decide(client, first, "deny", reason="not now")
    again = await on.ask(session=session)
    card = (await client.get(f"inbox/a/{again.id}")).text
    assert "Denied by ann" in card
    assert "not now" in card


@pytest.mark.parametrize(
    ("is_error", "said_", "shown"),
    [
        (False, "fine", "It ran: exit status 0."),
        (True, "Exit code 3\nbroken", "It ran and failed: exit status 3."),
    ],
)
async def test_afterwards_the_card_says_what_the_call_led_to(
    on: Desk, client: httpx.AsyncClient, is_error: bool, said_: str, shown: str
) -> None:
    approval = await on.ask()
    await decide(client, approval, "allow")
    assert "It has not run yet." in (await client.get(f"inbox/a/{approval.id}")).text
    await on.store.claim(approval.session_id, OWNER, approval.call_id, approval.digest, claim_id="c")
    assert "It is running." in (await client.get(f"inbox/a/{approval.id}")).text
    result = events.tool_result(approval.call_id, events.text_blocks(said_), is_error)
    await on.store.commit(approval.session_id, OWNER, [result])
    card = (await client.get(f"inbox/a/{approval.id}")).text
    assert shown in card
    assert said_.rpartition("\n")[2] in card


# -- changes, live


async def test_changes_of_approvals_are_announced_once_they_are_durable(on: Desk) -> None:
    start = await on.store.wait_approvals(0, timeout_s=0)
    assert not start.complete
    waiting = asyncio.create_task(on.store.wait_approvals(start.position, timeout_s=5))
    approval = await on.ask(workspace=1)
    found = await waiting
    assert found.complete
    [change] = found.changes
    assert (change.id, change.workspace_id, change.state) == (
        approval.id,
        on.workspaces[1],
        ApprovalState.PENDING,
    )
    await on.store.decide(approval.id, None, said("x", "deny"), by=Actor(name="carol"))
    found = await on.store.wait_approvals(found.position, timeout_s=5)
    assert [(c.state, c.decided_by) for c in found.changes] == [(ApprovalState.DENIED, "carol")]
    assert not (await on.store.wait_approvals(found.position, timeout_s=0)).changes


async def test_a_deleted_session_takes_its_calls_out_of_the_inbox(on: Desk) -> None:
    approval = await on.ask()
    start = await on.store.wait_approvals(0, timeout_s=0)
    await on.store.delete_session(approval.session_id, on.workspaces[0])
    found = await on.store.wait_approvals(start.position, timeout_s=1)
    assert [(c.id, c.state) for c in found.changes] == [(approval.id, ApprovalState.SUPERSEDED)]


# -- sessions


async def test_a_session_is_started_written_to_interrupted_and_archived(
    on: Desk, client: httpx.AsyncClient
) -> None:
    assert (await client.get("sessions/new")).status_code == 200
    csrf = {"csrf": decision(await on.ask(), "")["csrf"], "nonce": "once"}
    assert (await client.post("sessions/new", data={**csrf, "prompt": " "})).status_code == 400
    places = [
        (await client.post("sessions/new", data={**csrf, "prompt": "Do it"})).headers["location"]
        for _ in range(2)
    ]
    assert places[0] == places[1]
    session_id = places[0].rpartition("/")[2]
    page = await client.get(f"sessions/{session_id}")
    assert "Do it" in page.text
    sent = await client.post(
        f"sessions/{session_id}/messages", data={**csrf, "nonce": "a", "do": "send", "text": "More"}
    )
    assert sent.status_code == 303
    empty = await client.post(
        f"sessions/{session_id}/messages", data={**csrf, "nonce": "b", "do": "send", "text": ""}
    )
    assert empty.status_code == 400
    running = await client.post(
        f"sessions/{session_id}/messages", data={**csrf, "nonce": "c", "do": "archive"}
    )
    assert running.status_code == 409
    for nonce in ("d", "e"):
        await client.post(f"sessions/{session_id}/messages", data={**csrf, "nonce": nonce, "do": "interrupt"})
    archived = await client.post(
        f"sessions/{session_id}/messages", data={**csrf, "nonce": "f", "do": "archive"}
    )
    assert archived.status_code == 303
    session = await on.store.get_session(session_id)
    assert session.archived_at is not None
    assert "Message to the agent" not in (await client.get(f"sessions/{session_id}")).text


async def test_a_saved_file_is_a_download_that_no_browser_shows(on: Desk, client: httpx.AsyncClient) -> None:
    session = await on.session()
    await on.save(session, {"a <b>.html": "<script>1</script>"})
    assert "a &lt;b&gt;.html" in (await client.get(f"sessions/{session.id}")).text
    answer = await client.get(f"sessions/{session.id}/file", params={"path": "a <b>.html"})
    assert answer.text == "<script>1</script>"
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["content-disposition"].startswith("attachment")


# -- what a turn changed


async def test_what_the_last_turn_changed_is_shown_as_a_diff_of_each_file(
    on: Desk, client: httpx.AsyncClient
) -> None:
    session = await on.session()
    assert (await client.get(f"sessions/{session.id}/changes")).status_code == 404
    before = {"a.py": "one\ntwo\n", "gone": "old words\n", "same": "same\n", "tool": "run\n"}
    await on.save(session, before, links={"link": "a.py"})
    await on.begin_turn(session)
    page = f"sessions/{session.id}"
    assert "/changes" not in (await client.get(page)).text
    after = {"a.py": "one\n2\n", "new": "fresh\n", "same": "same\n", "tool": "run\n"}
    await on.save(session, after, at=utcnow(), links={"link": "/etc/passwd"})
    assert f"{page}/changes" in (await client.get(page)).text
    found = await shown_changes(client, session)
    assert list(found) == ["a.py", "gone", "link", "new"]
    assert found["a.py"].startswith("a.py changed: 1 added, 1 removed Download")
    assert "2 two 2 2" in found["a.py"]
    assert "gone deleted: 0 added, 1 removed" in found["gone"]
    assert "old words" in found["gone"]
    assert "Download" not in found["gone"]
    assert "link to /etc/passwd" in found["link"]
    assert "new new file: 1 added, 0 removed" in found["new"]
    await on.save(session, after, mode=0o755, links={"link": "/etc/passwd"})
    found = await shown_changes(client, session)
    assert "changed, mode 644, now 755: 1 added" in found["a.py"]
    assert found["same"] == "same mode 644, now 755 Download"
    assert "new executable file" in found["new"]


async def test_the_changes_are_those_since_the_turn_began_and_not_what_was_uploaded_with_its_message(
    on: Desk, client: httpx.AsyncClient
) -> None:
    session = await on.session()
    uploaded = SavedFile("upload", 0o644, 1, 0, (blob_name(b"u"),))
    blobs = [b"u", *Manifest.of([uploaded]).encode()]
    await on.store.put_blobs(blobs)
    await on.store.add_files(session.id, None, blob_name(blobs[-1]))
    await on.begin_turn(session)
    whole = Manifest.of([uploaded, SavedFile("made", 0o644, 1, 0, uploaded.chunks)]).encode()
    await on.store.put_blobs(whole)
    saved = blob_name(whole[-1])
    await on.store.save_workspace(session.id, OWNER, saved, taken=[blob_name(blobs[-1])])
    assert list(await shown_changes(client, session)) == ["made"]
    sent = [events.UserMessage.model_validate({"type": "user.message", "content": events.text_blocks("on")})]
    await on.store.send_events(session.id, None, sent, by=SERVICE)
    await on.begin_turn(session)
    assert "changed no file" in (await client.get(f"sessions/{session.id}/changes")).text


# -- headers


async def test_every_response_has_the_security_headers_and_is_not_stored(
    on: Desk, client: httpx.AsyncClient
) -> None:
    approval = await on.ask()
    for address in (
        "inbox",
        f"inbox/a/{approval.id}",
        "sessions",
        "inbox/a/unknown",
        "inbox/none/such",
        "inbox/static/none",
    ):
        headers = (await client.get(address)).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"
        assert headers["referrer-policy"] == "same-origin"
    script = re.search(r'src="/claude-hitl/([^"]+inbox.js[^"]*)"', (await client.get("inbox")).text)
    assert script is not None
    assert "immutable" in (await client.get(script[1])).headers["cache-control"]


async def test_times_are_shown_to_the_reader_as_how_long_ago(on: Desk, client: httpx.AsyncClient) -> None:
    approval = await on.ask(expires_at=datetime(2100, 1, 1, tzinfo=UTC))
    page = (await client.get("inbox")).text
    assert f'datetime="{approval.created_at.isoformat()}"' in page
    assert " left</span>" in page
    assert FOLDER in (await client.get(f"inbox/a/{approval.id}")).text


# -- notifications


async def channel(on: Desk, **more: Any) -> Channel:
    given: dict[str, Any] = {"kind": "webhook", "name": "deploys", "workspace_id": on.workspaces[0]} | more
    return await on.store.add_channel(Channel(id=new_id("chan"), created_at=utcnow(), **given), {})


async def test_a_sessions_page_shows_what_was_sent_about_it_and_managers_see_that_a_channel_fails(
    on: Desk, client: httpx.AsyncClient
) -> None:
    await channel(on)
    approval = await on.ask()
    for attempt in range(1, FAILING + 1):
        [parcel] = await on.store.take_deliveries(limit=1)
        refused = Settled(state="refused", why=f"HTTP 40{attempt}")
        await on.store.settle_delivery(parcel.delivery_ids, parcel.attempt, refused)
        if attempt < FAILING:
            await on.store.redeliver(parcel.delivery_ids[0], None)
    on.signed_in.add("meg", {on.workspaces[0]: (Role.OPERATOR,)})
    said = "Bash waits for approval"
    page = f"sessions/{approval.session_id}"
    shown = (await client.get(page)).text
    assert said in shown
    assert f"webhook deploys refused: HTTP 40{FAILING}" in shown
    alarm = "Notifications over webhook deploys are not delivered"
    assert alarm not in shown + (await client.get("inbox")).text
    async with browser(on, "meg") as manager:
        for address in (page, "inbox"):
            assert alarm in (await manager.get(address)).text


async def test_a_visible_inbox_keeps_its_readers_own_channels_quiet(
    on: Desk, client: httpx.AsyncClient, clock: FakeClock
) -> None:
    await channel(on, workspace_id="*", principal_id=on.signed_in.people["ann"].principal.id)
    await on.ask()
    assert (await client.get("inbox/seen")).status_code == 404  # another site's page can lead here
    assert (await client.get("inbox/seen", headers={"hx-request": "true"})).status_code == 204
    assert await on.store.take_deliveries(limit=1) == []
    clock.move(60)
    assert len(await on.store.take_deliveries(limit=1)) == 1


async def test_the_shell_of_the_installed_inbox_is_served_to_everyone_and_says_nothing_of_anyone(
    on: Desk,
) -> None:
    await on.ask(title="secret title")
    async with browser(on, "a stranger") as client:
        manifest = await client.get("inbox/manifest.webmanifest")
        assert manifest.headers["content-type"].startswith("application/manifest+json")
        assert urljoin(str(manifest.url), manifest.json()["start_url"]).endswith("/claude-hitl/inbox")
        for icon in manifest.json()["icons"]:
            image = await client.get(urljoin(str(manifest.url), icon["src"]))
            assert (image.status_code, image.headers["content-type"]) == (200, icon["type"])
        worker = await client.get("inbox/worker.js")
        assert worker.headers["service-worker-allowed"] == "/claude-hitl/"
        assert worker.headers["cache-control"] == "no-cache"
        offline = await client.get("inbox/offline")
        assert "nothing can be decided" in offline.text
        assert "secret title" not in offline.text
