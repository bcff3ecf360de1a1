"""A host that nobody named is asked for: from a command in the sandbox, on the real CLI, to the decision and back."""

import asyncio
import functools
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from claude_hitl_template.claude import outlets
from claude_hitl_template.claude.egress import Egress
from claude_hitl_template.domain.models import Approval, ApprovalState
from claude_hitl_template.domain.policy import PermissionPolicy, Rule
from claude_hitl_template.domain.policy.floor import Floor
from tests.contract.test_layers import Model, bash, model, script
from tests.contract.test_session import KEY, House, driven, house, model_url, user
from tests.serving import serving

__all__ = ["model", "model_url"]

UNASKED = (Rule(rule="Bash", policy="always_allow"),)
BASH: Any = {"policy": PermissionPolicy(rules=UNASKED), "floor": Floor(rules=UNASKED)}


class Files:
    """A site of the internet, as far as the session knows; it is the test's own, on loopback."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        host = dict(scope["headers"]).get(b"host", b"").decode()
        self.asked.append(f"{scope['method']} {host.partition(':')[0]}{scope['path']}")
        headers = [(b"content-type", b"text/plain")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"the numbers of the year"})


@pytest.fixture
async def site(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[Files, int]]:
    """All names lead to it, and its address counts as one of the internet's."""

    async def resolve(_name: str, _port: int) -> list[str]:
        return ["127.0.0.1"]

    pretended = functools.partial(Egress, resolve=resolve, allows_address=lambda one: one == "127.0.0.1")
    monkeypatch.setattr(outlets, "Egress", pretended)
    files = Files()
    async with serving(files) as url:  # type: ignore[arg-type]
        yield files, int(url.rpartition(":")[2])


def fetch(port: int, host: str = "files.example.org") -> dict[str, Any]:
    return bash(f"curl -sS http://{host}:{port}/year.csv")


async def waiting(h: House) -> list[Approval]:
    found = await h.store.list_approvals(KEY, limit=100, states=[ApprovalState.PENDING])
    return [a for a in found.data if a.kind == "network"]


async def results(h: House) -> list[str]:
    return [e.payload["content"][0]["text"] for e in await h.log("agent.tool_result")]


async def test_a_host_that_is_not_listed_is_asked_for_and_reached_once_it_is_allowed(
    tmp_path: Path, model_url: str, site: tuple[Files, int]
):
    """Decided after the owner ended: another one goes on, and the model is told."""
    files, port = site
    steps = script({"tools": [fetch(port)]}, {"text": "It waits."}, {"tools": [fetch(port)]})
    h = await house(tmp_path, model_url, steps, **BASH)
    await h.drive()
    stop = await h.until_idle()
    assert files.asked == []
    [approval] = await waiting(h)
    assert stop == {"type": "requires_action", "event_ids": [approval.event_id]}
    because = f"curl -sS http://files.example.org:{port}/year.csv"
    assert approval.input == {"host": "files.example.org", "port": port, "because": because}
    assert (await h.store.get_session(h.session.id)).parked
    assert "a human was asked" in (await results(h))[0]

    await h.confirm(approval.event_id)
    assert (await h.store.get_session(h.session.id)).status == "running"
    await h.drive()
    assert (await h.until_idle())["type"] == "end_turn"
    assert files.asked == ["GET files.example.org/year.csv"]
    _, granted, second = await results(h)
    assert "until the end of the turn" in granted
    assert second == "the numbers of the year"
    assert (await h.store.get_approval(approval.id, KEY)).state is ApprovalState.SUCCEEDED


async def test_what_is_allowed_for_now_is_asked_for_again_in_the_next_turn(
    tmp_path: Path, model_url: str, site: tuple[Files, int]
):
    files, port = site
    h = await house(tmp_path, model_url, script({"tools": [fetch(port)]}), **BASH)
    await h.drive()
    [approval] = await waiting(h)
    await h.confirm(approval.event_id)
    await h.drive()
    assert (await h.until_idle())["type"] == "end_turn"
    await h.send(user_script({"tools": [fetch(port)]}))
    await h.drive()
    [again] = await waiting(h)
    assert (files.asked, again.id != approval.id) == ([], True)


async def test_what_is_remembered_is_reached_unasked_from_then_on(
    tmp_path: Path, model_url: str, site: tuple[Files, int]
):
    files, port = site
    h = await house(tmp_path, model_url, script({"tools": [fetch(port)]}), **BASH)
    await h.drive()
    [approval] = await waiting(h)
    await h.confirm(approval.event_id, remember=True)
    await h.drive()
    await h.send(user_script({"tools": [fetch(port)]}))
    await h.drive()
    assert (await h.until_idle())["type"] == "end_turn"
    assert files.asked == ["GET files.example.org/year.csv"]
    rules = (await h.store.get_session(h.session.id)).rules
    assert [rule.rule for rule in rules] == [f"Network(files.example.org:{port})"]


async def test_a_host_that_is_denied_is_refused_at_once_and_not_asked_for_again_in_that_turn(
    tmp_path: Path, model_url: str, site: tuple[Files, int]
):
    files, port = site
    steps = script({"tools": [fetch(port)]}, {"text": "It waits."}, {"tools": [fetch(port)]})
    h = await house(tmp_path, model_url, steps, **BASH)
    await h.drive()
    [approval] = await waiting(h)
    await h.confirm(approval.event_id, "deny", deny_message="that is not our data")
    await h.drive()
    assert (await h.until_idle())["type"] == "end_turn"
    assert files.asked == []
    assert "that is not our data" in (await results(h))[-1]
    found = await h.store.list_approvals(KEY, limit=100)
    assert [a.state.value for a in found.data if a.kind == "network"] == ["denied"]


async def test_two_hosts_at_once_are_two_questions_and_a_hundred_requests_to_one_are_one(
    tmp_path: Path, model_url: str, site: tuple[Files, int]
):
    files, port = site
    many = f"for n in $(seq 100); do curl -s http://a.example.org:{port}/$n -o /dev/null & done; wait"
    steps = script({"tools": [bash(f"{many}; curl -sS http://b.example.org:{port}/")]})
    h = await house(tmp_path, model_url, steps, **BASH)
    await h.drive()
    stop = await h.until_idle()
    asked = await waiting(h)
    assert sorted(a.input["host"] for a in asked) == ["a.example.org", "b.example.org"]
    assert sorted(stop["event_ids"]) == sorted(a.event_id for a in asked)
    assert files.asked == []


async def test_a_decision_while_the_turn_goes_on_opens_the_host_for_the_same_turn(
    tmp_path: Path, model_url: str, site: tuple[Files, int]
):
    """The command tries again until it is let through; nothing else tells the model."""
    files, port = site
    until = f"until curl -sSf http://files.example.org:{port}/year.csv; do sleep 0.1; done"
    h = await house(tmp_path, model_url, script({"tools": [bash(until)]}), hot_s=30, **BASH)
    async with driven(h):
        while not (asked := await waiting(h)):
            await asyncio.sleep(0.05)
        assert (await h.store.get_session(h.session.id)).status == "running"
        await h.confirm(asked[0].event_id)
        assert (await h.until_idle())["type"] == "end_turn"
    assert files.asked == ["GET files.example.org/year.csv"]
    # It was used in the turn in which it was allowed: the model needs no reminder.
    assert len(await h.log("session.status_running")) == 1
    assert (await h.store.get_approval(asked[0].id, KEY)).state is ApprovalState.SUCCEEDED


def user_script(*steps: dict[str, Any]) -> Any:
    return user(script(*steps))


@pytest.mark.parametrize("fails", [True, False])
async def test_the_model_is_told_that_a_human_was_asked_though_the_program_shows_nothing_of_it(
    tmp_path: Path, model: Model, site: tuple[Files, int], fails: bool
):
    """As curl does with what a CONNECT is answered with."""
    command = f"curl -s https://files.example.org/{'' if fails else ' || true'}"
    h = await house(tmp_path, model.url, script({"tools": [bash(command)]}), **BASH)
    await h.drive()
    assert len(await waiting(h)) == 1
    assert "human was asked" not in (await results(h))[0]
    assert "may not reach files.example.org:443 yet: a human was asked" in model.recorder.told()
