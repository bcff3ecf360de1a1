"""The inbox where a workspace's rules ask: severity, reasons, votes, who looks at a call; and batches of one severity."""

import re
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest_asyncio

from claude_hitl_template.domain.models import Approval, ApprovalState
from claude_hitl_template.domain.people import SERVICE
from claude_hitl_template.domain.policy import Verdict
from claude_hitl_template.domain.policy.command_segments import JudgedSegment
from claude_hitl_template.domain.policy.tiers import WorkspacePolicy
from claude_hitl_template.store.core import CoreStore
from tests.inbox import Desk, browser, decision, desk

RULES: list[dict[str, Any]] = [
    {"pattern": "Bash(git push:*)", "action": "ask", "severity": "critical", "quorum": 2, "reason": "It leaves the house"},
    {"pattern": "Bash(rm:*)", "action": "ask", "severity": "high"},
    {"pattern": "Bash(ls:*)", "action": "ask", "severity": "low"},
]  # fmt: skip


@pytest_asyncio.fixture
async def on(store: CoreStore) -> AsyncIterator[Desk]:
    async with desk(store) as made:
        policy = WorkspacePolicy.model_validate({"rules": RULES})
        await store.set_policy(made.workspaces[0], policy, by=SERVICE)
        yield made


@pytest_asyncio.fixture
async def client(on: Desk) -> AsyncIterator[httpx.AsyncClient]:
    async with browser(on) as made:
        yield made


def rows(html: str) -> list[str]:
    return re.findall(r'id="row-(\w+)"', html)


async def asked(on: Desk, *commands: str) -> list[Approval]:
    return [await on.ask("Bash", {"command": command}) for command in commands]


async def test_the_most_severe_calls_are_first_on_every_page(on: Desk, client: httpx.AsyncClient) -> None:
    low, plain, high, critical, later = await asked(on, "ls", "pwd", "rm a", "git push", "rm b")
    expected = [critical.id, high.id, later.id, plain.id, low.id]
    assert rows((await client.get("inbox")).text) == expected
    ids, page = [], None
    while True:
        found = await on.store.list_waiting(list(on.workspaces), limit=2, page=page)
        ids += [call.id for call in found.data]
        page = found.next_page
        if page is None:
            break
    assert ids == expected
    assert rows((await client.get("inbox", params={"severity": "high"})).text) == [high.id, later.id]


async def test_the_card_says_which_rule_asked_and_counts_who_agreed(
    on: Desk, client: httpx.AsyncClient
) -> None:
    [approval] = await asked(on, "git push")
    card = (await client.get(f"inbox/a/{approval.id}")).text
    for part in ("It leaves the house", "Bash(git push:*)", "2 of the role approver", 'class="sev critical"'):
        assert part in card
    first = await client.post(f"inbox/a/{approval.id}/decide", data=decision(approval, "allow"))
    assert first.status_code == 303
    card = (await client.get(f"inbox/a/{approval.id}")).text
    assert "You allowed this call" in card
    assert "Allowed so far by ann" in card
    assert "allowed by 1 of 2" in (await client.get("inbox")).text
    async with browser(on, "eve") as other:
        await other.post(f"inbox/a/{approval.id}/decide", data=decision(approval, "allow"))
    assert (await on.store.get_approval(approval.id, None)).state is ApprovalState.ALLOWED


async def test_a_batch_has_one_severity_and_no_critical_call(on: Desk, client: httpx.AsyncClient) -> None:
    low, high, one, two = await asked(on, "ls", "rm a", "git push", "git push origin")
    listed = (await client.get("inbox")).text
    assert f'value="{high.id}:{high.digest}"' in listed
    assert f'value="{one.id}:' not in listed

    async def batch(*approvals: Approval) -> str:
        ticked = [f"{a.id}:{a.digest}" for a in approvals]
        return (await client.post("inbox/batch", data={**decision(low, "allow"), "call": ticked})).text

    assert "one severity at a time" in await batch(low, high)
    assert "decided on its own" in await batch(one, two)
    states = {(await on.store.get_approval(a.id, None)).state for a in (low, high, one, two)}
    assert states == {ApprovalState.PENDING}
    assert "1 of 1 recorded" in await batch(low)


async def test_who_looks_at_a_call_is_shown_to_others(on: Desk, client: httpx.AsyncClient) -> None:
    [approval] = await asked(on, "rm a")
    async with browser(on, "eve") as other:
        form = decision(approval, "claim")
        assert (await other.post(f"inbox/a/{approval.id}/claim", data=form)).status_code == 303
        assert "I no longer look at it" in (await other.get(f"inbox/a/{approval.id}")).text
        assert "<b>eve</b> looks at it" in (await client.get(f"inbox/a/{approval.id}")).text
        assert "eve looks at it" in (await client.get("inbox")).text
        second = await client.post(f"inbox/a/{approval.id}/claim", data=form)
        assert second.status_code == 409
        await other.post(f"inbox/a/{approval.id}/claim", data=decision(approval, "release"))
    assert "looks at it" not in (await client.get("inbox")).text


async def test_separation_of_duties_is_said_before_a_decision(on: Desk, client: httpx.AsyncClient) -> None:
    await on.store.change_workspace(on.workspaces[0], {"separation_of_duties": True}, by=SERVICE)
    started = await client.post("sessions/new", data={**decision(await on.ask(), ""), "prompt": "go"})
    session = await on.store.get_session(started.headers["location"].rpartition("/")[2])
    await on.store.acquire(session.id, "owner", lease_s=600)
    approval = await on.ask(session=session)
    card = (await client.get(f"inbox/a/{approval.id}")).text
    assert "separates duties" in card
    assert 'name="do" value="allow"' not in card
    refused = await client.post(f"inbox/a/{approval.id}/decide", data=decision(approval, "allow"))
    assert refused.status_code == 403
    assert "separates duties" in refused.text


async def test_the_command_of_a_line_that_asks_is_marked_and_its_rule_offered(
    on: Desk, client: httpx.AsyncClient
) -> None:
    line = "git status && npm test"
    judged = (
        JudgedSegment(start=0, end=10, verdict=Verdict.allow, source="Bash(git status)"),
        JudgedSegment(start=14, end=22, verdict=Verdict.ask, source="default"),
    )
    approval = await on.ask("Bash", {"command": line}, segments=judged)
    card = (await client.get(f"inbox/a/{approval.id}")).text
    assert '<mark class="seg asked">npm test</mark>' in card
    assert '<span class="seg">git status</span>' in card
    assert "Bash(npm test)" in card
    answer = await client.post(f"inbox/a/{approval.id}/decide", data=decision(approval, "remember", rule="0"))
    assert answer.status_code == 303
    decided = (await on.store.get_approval(approval.id, None)).decision
    assert decided is not None
    assert decided.remember is not None
    assert decided.remember.rule == "Bash(npm test)"
