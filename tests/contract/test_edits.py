"""An edit is judged like a call: one that the policy denies or the tool would refuse is not a decision, and the call
waits."""

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from claude_hitl_template.claude.cli_engine import TOOLS
from claude_hitl_template.config.secret_files import hash_api_key
from claude_hitl_template.domain.canonical_json import call_digest, digest
from claude_hitl_template.domain.models import Agent, ApprovalState, Environment
from claude_hitl_template.domain.people import Actor
from claude_hitl_template.domain.policy import PermissionPolicy, Rule
from claude_hitl_template.domain.tool_inputs import check_edit, known_fields
from claude_hitl_template.errors import InvalidInput
from claude_hitl_template.model.endpoint import OfflineUpstream
from claude_hitl_template.model.offline import Scenarios
from claude_hitl_template.store.core import CoreStore
from claude_hitl_template.store.protocol import Call
from claude_hitl_template.testing.local_service import serve_in_process
from claude_hitl_template.testing.memory_backend import MemoryBackend
from tests.contract.asking import KEY, asking, key_of, message, said
from tests.contract.test_session import house
from tests.serving import model_app, serving

BASH = {"command": "ls"}
WRITE = {"file_path": "a.txt", "content": "hello"}
NOTEBOOK = {"notebook_path": "a", "new_source": ""}
QUESTION = {"questions": [{"question": "Which?", "header": "W", "options": [], "multiSelect": False}]}

# tool, its input, the edit, the field that is named
REFUSED: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("Write", WRITE, {"content": "x"}, "updated_input.file_path"),
    ("Write", WRITE, {"file_path": "a.txt"}, "updated_input.content"),
    ("Write", WRITE, {"file_path": "", "content": "x"}, "updated_input.file_path"),
    ("Write", WRITE, {"file_path": "a.txt", "content": None}, "updated_input.content"),
    ("Write", WRITE, {**WRITE, "mode": "0777"}, "updated_input.mode"),
    ("Write", WRITE, {}, "updated_input.file_path"),
    ("Bash", BASH, {}, "updated_input.command"),
    ("Bash", BASH, {"command": ["ls"]}, "updated_input.command"),
    ("Bash", BASH, {"command": 5}, "updated_input.command"),
    ("Bash", BASH, {"command": "ls", "timeout": "soon"}, "updated_input.timeout"),
    ("Bash", BASH, {"command": "ls\0rm"}, "updated_input"),
    ("Bash", BASH, {"command": "ls", "run_in_background": "yes"}, "updated_input.run_in_background"),
    ("Edit", {**WRITE, "old_string": "a", "new_string": "b"}, {"file_path": "a"}, "updated_input.old_string"),
    ("NotebookEdit", NOTEBOOK, {"new_source": "x"}, "updated_input.notebook_path"),
    ("NotebookEdit", NOTEBOOK, {**NOTEBOOK, "edit_mode": "eat"}, "updated_input.edit_mode"),
    ("WebFetch", {"url": "https://a.example", "prompt": "x"}, {"url": "nowhere", "prompt": "x"}, "updated_input.url"),
    ("WebFetch", {"url": "https://a.example", "prompt": "x"}, {"url": "https://a.example"}, "updated_input.prompt"),
    ("WebSearch", {"query": "abc"}, {"query": "a"}, "updated_input.query"),
    ("Glob", {"pattern": "*"}, {"path": "."}, "updated_input.pattern"),
    ("Grep", {"pattern": "x"}, {"pattern": "x", "-n": "yes"}, "updated_input.-n"),
    ("Read", {"file_path": "x"}, {"file_path": "x", "limit": 0}, "updated_input.limit"),
    ("Agent", {"description": "d", "prompt": "p"}, {"description": "d"}, "updated_input.prompt"),
    ("ExitPlanMode", {"plan": "# one"}, {"plan": 5}, "updated_input.plan"),
    ("AskUserQuestion", QUESTION, {"answers": {"Which?": 5}}, "answers"),
    ("AskUserQuestion", QUESTION, {"answers": {"Which?": ["a", 5]}}, "answers"),
    ("AskUserQuestion", QUESTION, {"questions": [], "answers": {"Which?": "a"}}, "updated_input.questions"),
]  # fmt: skip
TAKEN: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("Write", WRITE, {"file_path": "b.txt", "content": ""}),
    ("Bash", BASH, {"command": "ls -l", "description": "list", "timeout": 5.5}),
    ("Bash", {**BASH, "odd": 1}, {"command": "ls -l", "odd": 1}),  # the model's own
    ("Edit", {**WRITE, "old_string": "a", "new_string": "b"}, {"file_path": "a", "old_string": "", "new_string": ""}),
    ("mcp__any__tool", {"x": 1}, {"y": [1, None]}),
    ("Unheard", {"x": 1}, {}),
    ("ExitPlanMode", {"plan": "# one"}, {"plan": "# two"}),
]  # fmt: skip


async def asked(
    tool: str, given: dict[str, Any], policy: PermissionPolicy | None = None, cwd: str = "/w"
) -> tuple[CoreStore, str]:
    store = CoreStore(MemoryBackend())
    session = await store.create_session(
        KEY,
        agent=Agent(policy=policy or PermissionPolicy()),
        environment=Environment(),
        title=None,
        metadata={},
        initial=[message()],
    )
    await store.acquire(session.id, "owner", lease_s=15)
    call = Call(
        call_id="toolu_1",
        tool_name=tool,
        input=given,
        digest=call_digest(given, cwd),
        cwd=cwd,
        folder=".",
        verdict="ask",
    )
    await store.open_calls(session.id, 1, [], [call], cwd=cwd, expires_at=None)
    return store, session.id


async def decide(store: CoreStore, session_id: str, **more: Any) -> None:
    await store.send_events(session_id, KEY, [said("toolu_1", **more)], by=Actor(name="tester"))


async def state(store: CoreStore) -> ApprovalState:
    [approval] = (await store.list_approvals(KEY, limit=10)).data
    return approval.state


@pytest.mark.parametrize(("tool", "given", "edited", "field"), REFUSED)
async def test_an_edit_that_the_tool_would_refuse_names_the_field_and_the_call_still_waits(
    tool: str, given: dict[str, Any], edited: dict[str, Any], field: str
):
    store, session_id = await asked(tool, given)
    with pytest.raises(InvalidInput) as refused:
        await decide(store, session_id, updated_input=edited)
    assert refused.value.field == field
    assert await state(store) is ApprovalState.PENDING
    more = {"answers": {"Which?": "a"}} if tool == "AskUserQuestion" else {}
    await decide(store, session_id, **more)
    assert await state(store) is ApprovalState.ALLOWED


@pytest.mark.parametrize(("tool", "given", "edited"), TAKEN)
async def test_an_edit_that_the_tool_takes_is_what_may_run(
    tool: str, given: dict[str, Any], edited: dict[str, Any]
):
    store, session_id = await asked(tool, given)
    await decide(store, session_id, updated_input=edited)
    claimed = await store.claim(session_id, 1, "toolu_1", call_digest(edited, "/w"), claim_id="c")
    assert claimed.run_input == edited


DENIED: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("Bash", BASH, {"command": "git push"}, "Bash(git push:*)"),
    ("Bash", BASH, {"command": "true; git push"}, "Bash(git push:*)"),
    ("Write", WRITE, {"file_path": "secrets/a.txt", "content": "x"}, "Edit(./secrets/**)"),
    ("Write", WRITE, {"file_path": "x/../secrets/a.txt", "content": "x"}, "Edit(./secrets/**)"),
    (
        "WebFetch",
        {"url": "https://a.example", "prompt": "x"},
        {"url": "https://b.example", "prompt": "x"},
        "WebFetch(domain:b.example)",
    ),
    ("mcp__a__b", {"x": 1}, {"x": 2}, "mcp__a__b"),
]


@pytest.mark.parametrize(("tool", "given", "edited", "rule"), DENIED)
async def test_an_edit_that_a_deny_rule_covers_is_refused_and_the_call_still_waits(
    tool: str, given: dict[str, Any], edited: dict[str, Any], rule: str
):
    policy = PermissionPolicy(rules=(Rule(rule=rule, policy="always_deny"),))
    store, session_id = await asked(tool, given, policy)
    with pytest.raises(InvalidInput, match="denies") as refused:
        await decide(store, session_id, updated_input=edited)
    assert refused.value.field == "updated_input"
    assert await state(store) is ApprovalState.PENDING


async def test_a_digest_is_of_the_input_and_of_the_folder():
    store, session_id = await asked("Bash", BASH)
    await decide(store, session_id)
    [approval] = (await store.list_approvals(KEY, limit=10)).data
    assert approval.run_digest == approval.digest == call_digest(BASH, "/w")
    assert approval.digest not in (digest(BASH), call_digest(BASH, "/elsewhere"))


async def test_a_call_in_another_folder_than_the_sessions_is_not_remembered():
    store, session_id = await asked("Bash", BASH)
    [approval] = (await store.list_approvals(KEY, limit=10)).data
    assert (approval.workspace, approval.but(folder="./sub", cwd="/w/sub").workspace) == (
        Path("/w"),
        Path("/w"),
    )
    assert approval.but(folder="/x", cwd="/x").workspace is None
    elsewhere = Call(
        call_id="toolu_2",
        tool_name="Bash",
        input=BASH,
        digest=call_digest(BASH, "/w/sub"),
        cwd="/w/sub",
        folder="./sub",
        verdict="ask",
    )
    await store.open_calls(session_id, 1, [], [elsewhere], cwd="/w", expires_at=None)
    with pytest.raises(InvalidInput) as refused:
        await store.send_events(session_id, KEY, [said("toolu_2", remember=True)], by=Actor(name="tester"))
    assert refused.value.field == "remember"


async def test_an_approval_of_an_earlier_release_is_decided_and_runs_with_the_digest_that_it_has():
    """Its digest covers the input only, and it has no folder."""
    store = CoreStore(MemoryBackend())
    session_id = await asking(store, "toolu_1")
    [approval] = (await store.list_approvals(KEY, limit=10)).data
    assert (approval.folder, approval.digest) == (None, digest(approval.input))
    edited = {"command": "ls -l"}
    await decide(store, session_id, updated_input=edited)
    claimed = await store.claim(session_id, 1, "toolu_1", digest(edited), claim_id="c")
    assert claimed.run_input == edited


@pytest.mark.slow
async def test_what_is_known_of_the_tools_is_what_the_pinned_cli_says(tmp_path: Path):
    told: dict[str, Any] = {}
    app = model_app(OfflineUpstream(Scenarios.load()))

    async def listening(scope: Any, receive: Any, send: Any) -> None:
        body = bytearray()

        async def hear() -> Any:
            event = await receive()
            body.extend(event.get("body", b""))
            if event["type"] == "http.request" and not event.get("more_body"):
                for tool in json.loads(bytes(body) or b"{}").get("tools") or ():
                    told[tool["name"]] = tool.get("input_schema")
            return event

        await app(scope, hear if scope["type"] == "http" else receive, send)

    async with serving(listening) as url:
        h = await house(tmp_path, url, "hello")
        await asyncio.wait_for(h.drive(), 60)
    hidden = {"run_in_background", "plan", "planFilePath"}  # taken, and not offered in this mode
    for tool in TOOLS:
        known = known_fields(tool)
        if known is None:
            assert tool == "AskUserQuestion"
            continue
        schema = told[tool]
        assert set(known) - hidden == set(schema["properties"]), tool
        assert {name for name, must in known.items() if must} == set(schema.get("required", ())), tool


def test_an_edit_that_changes_nothing_of_an_odd_call_is_no_error():
    check_edit("Bash", {"command": "ls", "odd": 1}, {"command": "ls", "odd": 1})


@pytest.mark.parametrize("through", ["decide", "events"])
async def test_over_rest_such_an_edit_is_a_400_that_names_the_field_and_the_call_still_waits(
    through: str, tmp_path: Path
):
    async with serve_in_process(tmp_path, keys={"me": "secret"}, driving=False, backing="memory") as served:
        key = key_of(await served.store.find_identity(hash_api_key("secret")))
        assert key is not None
        agent = Agent(policy=PermissionPolicy(rules=(Rule(rule="Bash(rm:*)", policy="always_deny"),)))
        session = await served.store.create_session(
            key.id, agent=agent, environment=Environment(), title=None, metadata={}, initial=[message()]
        )
        await served.store.acquire(session.id, "owner", lease_s=60)
        call = Call(
            call_id="toolu_1",
            tool_name="Bash",
            input=BASH,
            digest=call_digest(BASH, "/w"),
            cwd="/w",
            folder=".",
            targets=(),
            verdict="ask",
        )
        [approval] = await served.store.open_calls(session.id, 1, [], [call], cwd="/w", expires_at=None)

        async with httpx.AsyncClient(base_url=served.url, headers={"x-api-key": "secret"}) as client:

            async def post(edited: dict[str, Any]) -> httpx.Response:
                said: dict[str, Any] = {"result": "allow", "updated_input": edited}
                if through == "decide":
                    return await client.post(f"/v1/approvals/{approval.id}/decide", json=said)
                event = {"type": "user.tool_confirmation", "tool_use_id": "toolu_1", **said}
                return await client.post(f"/v1/sessions/{session.id}/events", json={"events": [event]})

            for edited, named in (
                ({}, "command"),
                ({"command": 5}, "command"),
                ({"command": "rm x"}, "denies"),
            ):
                answer = await post(edited)
                assert answer.status_code == 400
                assert "updated_input" in answer.text
                assert named in answer.text
                shown = (await client.get(f"/v1/approvals/{approval.id}")).json()
                assert (shown["state"], shown["cwd"], shown["targets"]) == ("pending", "/w", [])
            assert (await post({"command": "ls -l"})).status_code == 200
            shown = (await client.get(f"/v1/approvals/{approval.id}")).json()
            assert (shown["state"], shown["run_digest"]) == (
                "allowed",
                call_digest({"command": "ls -l"}, "/w"),
            )
