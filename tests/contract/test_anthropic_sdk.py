"""The official SDK (PyPI `anthropic`, client.beta.sessions), unmodified and strict, works as a client of the service."""

import asyncio
import json
import time
import typing
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from typing import Any

import anthropic
import httpx
import pytest
from anthropic.types.beta import (
    BetaEnvironment,
    BetaManagedAgentsAgent,
    BetaManagedAgentsDeletedSession,
    BetaManagedAgentsSession,
)
from anthropic.types.beta.sessions import (
    BetaManagedAgentsSendSessionEvents,
    BetaManagedAgentsSessionEventType,
    BetaManagedAgentsStreamSessionEvents,
)
from pydantic import BaseModel

from claude_hitl_template.config.secret_files import hash_api_key
from claude_hitl_template.testing.threaded import Threaded

WAIT_S = 90
EVENT_MODELS: dict[str, type[BaseModel]] = {
    typing.get_args(model.model_fields["type"].annotation)[0]: model
    for model in typing.get_args(typing.get_args(BetaManagedAgentsStreamSessionEvents)[0])
}
# What events carry beyond the protocol; a name that is missing here is a misspelt field of the protocol.
OURS = {
    "workspace",
    "concerns",
    "decided_by",
    "updated_input",
    "remember",
    "outcome",
    "session_thread_id",
    "stop_details",
}
DENIED = "not in this folder, please"


class Client:
    """The SDK's client with the steps that all tests share."""

    def __init__(self, served: Threaded, key: str = "alice") -> None:
        secret = served.service.keys[key]
        self.served = served
        # The SDK's own switch: every answer and every event is validated, where it otherwise takes what comes.
        self.sdk = anthropic.Anthropic(
            base_url=served.service.url, api_key=secret, max_retries=0, _strict_response_validation=True
        )
        self.http = httpx.Client(base_url=served.service.url, headers={"x-api-key": secret}, timeout=WAIT_S)

    @property
    def sessions(self) -> Any:
        return self.sdk.beta.sessions

    def close(self) -> None:
        self.sdk.close()
        self.http.close()

    def create(self, prompt: str | None = None, **more: Any) -> str:
        if prompt is not None:
            more["initial_events"] = [message(prompt)]
        more = {"agent": "default", "environment_id": "default", **more}
        return self.sessions.create(**more).id

    def send(self, session_id: str, *events: dict[str, Any]) -> Any:
        return self.sessions.events.send(session_id, events=events)

    def confirm(self, session_id: str, event_id: str, result: str = "allow", **more: Any) -> Any:
        return self.send(session_id, confirmation(event_id, result, **more))

    def settled(self, session_id: str) -> Any:
        """Returns the stop reason once the session does not run. A request that starts it is answered only after it runs."""
        deadline = time.monotonic() + WAIT_S
        while self.sessions.retrieve(session_id).status in ("running", "rescheduling"):
            assert time.monotonic() < deadline, self.types(session_id)
            time.sleep(0.1)
        newest = self.sessions.events.list(session_id, types=["session.status_idle"], order="desc", limit=1)
        return newest.data[0].stop_reason

    def asked(self, session_id: str) -> list[str]:
        """Waits until a human is asked about events, and returns them."""
        reason = self.settled(session_id)
        assert reason.type == "requires_action", self.types(session_id)
        return reason.event_ids

    def finished(self, session_id: str) -> None:
        assert self.settled(session_id).type == "end_turn", self.types(session_id)

    def log(self, session_id: str) -> list[Any]:
        return list(self.sessions.events.list(session_id, limit=1000))

    def types(self, session_id: str) -> list[str]:
        return [e.type for e in self.log(session_id)]

    def said(self, session_id: str) -> str:
        texts = [b.text for e in self.log(session_id) if e.type == "agent.message" for b in e.content]
        return "\n".join(texts)

    def raw_log(self, session_id: str) -> list[dict[str, Any]]:
        return self.http.get(f"/v1/sessions/{session_id}/events", params={"limit": 1000}).json()["data"]

    def wrote(self, session_id: str, name: str) -> bool:
        return (self.served.service.workspace(session_id) / name).exists()


def message(text: str) -> dict[str, Any]:
    return {"type": "user.message", "content": [{"type": "text", "text": text}]}


def confirmation(event_id: str, result: str = "allow", **more: Any) -> dict[str, Any]:
    return {"type": "user.tool_confirmation", "tool_use_id": event_id, "result": result, **more}


def scripted(*steps: dict[str, Any]) -> str:
    """A prompt that the offline model follows. JSON is YAML."""
    first = {**steps[0], "text": "[offline model] I follow the script of a test."}
    return f"```scenario\n{json.dumps([first, *steps[1:]], indent=1)}\n```"


def strictly(model: type[BaseModel], raw: Any) -> None:
    """Raises unless `raw` is valid for the SDK's type, with no conversions except of JSON's strings to times."""
    model.model_validate_json(json.dumps(raw), strict=True)


def check_event(raw: dict[str, Any]) -> None:
    model = EVENT_MODELS[raw["type"]]
    strictly(model, raw)
    assert set(raw) - set(model.model_fields) <= OURS


@pytest.fixture(scope="module")
def parked(client: Client) -> Client:
    return client


@pytest.fixture(scope="module")
def awake(hot: Threaded) -> Iterator[Client]:
    with closing(Client(hot)) as made:
        yield made


# -- sessions


def test_a_session_is_created_idle_and_read_back(parked: Client):
    made = parked.sessions.create(
        agent="default", environment_id="default", title="Tidy up", metadata={"team": "a"}
    )
    assert (made.status, made.title, made.metadata) == ("idle", "Tidy up", {"team": "a"})
    assert parked.sessions.retrieve(made.id).id == made.id
    strictly(BetaManagedAgentsSession, parked.http.get(f"/v1/sessions/{made.id}").json())
    assert parked.log(made.id) == []


def test_a_session_with_initial_events_works_on_them(parked: Client):
    session_id = parked.create("Read hello.txt")
    parked.finished(session_id)
    assert parked.types(session_id)[:2] == ["user.message", "session.status_running"]
    usage = parked.sessions.retrieve(session_id).usage
    assert usage.input_tokens > 0
    assert usage.output_tokens > 0


def test_overrides_of_the_agent_are_kept_with_the_session_and_obeyed(permitted: Client):
    parked = permitted
    agent = {
        "type": "agent_with_overrides",
        "id": "default",
        "version": 1,
        "model": {"id": "claude-opus-4-5"},
        "system": "Be brief.",
        "skills": [],
        "mcp_servers": [],
        "tools": [
            {
                "type": "agent_toolset_20260401",
                "default_config": {"enabled": True, "permission_policy": {"type": "always_ask"}},
                "configs": [
                    {"name": "write", "permission_policy": {"type": "always_allow"}},
                    {"name": "bash", "enabled": False},
                ],
            }
        ],
    }
    made = parked.sessions.create(
        agent=agent,
        environment_id="default",
        initial_events=[message("Write hello.txt with a greeting")],
    )
    assert (made.agent.model.id, made.agent.system) == ("claude-opus-4-5", "Be brief.")
    by_name = {c.name: c for c in made.agent.tools[0].configs}
    assert by_name["write"].permission_policy.type == "always_allow"
    assert not by_name["bash"].enabled
    parked.finished(made.id)
    assert parked.wrote(made.id, "hello.txt")


def test_an_agent_reference_with_its_version_is_taken(parked: Client):
    made = parked.sessions.create(
        agent={"type": "agent", "id": "default", "version": 1}, environment_id="default"
    )
    assert made.agent.version == 1


def test_listing_turns_its_pages_by_itself_and_filters(parking: Threaded):
    bob = Client(parking, "bob")
    made = [bob.create(title=f"number {i}") for i in range(7)]
    bob.sessions.archive(made[0])
    assert [s.id for s in bob.sessions.list(limit=2)] == made[:0:-1]
    assert [s.id for s in bob.sessions.list(limit=3, order="asc")] == made[1:]
    assert len(list(bob.sessions.list(limit=2, include_archived=True))) == 7
    assert [s.id for s in bob.sessions.list(statuses=["terminated"], include_archived=True)] == made[:1]
    assert list(bob.sessions.list(agent_id="another")) == []
    hour = timedelta(hours=1)
    now = datetime.now(UTC)
    assert len(list(bob.sessions.list(limit=2, created_at_gte=now - hour, created_at_lt=now + hour))) == 6
    assert list(bob.sessions.list(created_at_gt=now + hour)) == []
    bob.close()


def test_title_and_metadata_are_changed_and_said_in_the_log(parked: Client):
    session_id = parked.create(title="old", metadata={"keep": "1", "drop": "2"})
    changed = parked.sessions.update(session_id, title="new", metadata={"drop": None, "add": "3"})
    assert (changed.title, changed.metadata) == ("new", {"keep": "1", "add": "3"})
    [updated] = parked.raw_log(session_id)
    check_event(updated)
    assert (updated["title"], updated["metadata"]) == ("new", {"keep": "1", "add": "3"})


def test_an_archived_session_can_be_read_and_not_changed(parked: Client):
    session_id = parked.create("Write hello.txt with a greeting")
    [waiting] = parked.asked(session_id)
    archived = parked.sessions.archive(session_id)
    assert archived.status == "terminated"
    assert archived.archived_at is not None
    assert parked.types(session_id)[-1] == "session.status_terminated"
    for change in (
        lambda: parked.send(session_id, message("go on")),
        lambda: parked.confirm(session_id, waiting),
        lambda: parked.sessions.update(session_id, title="x"),
    ):
        with pytest.raises(anthropic.ConflictError):
            change()
    assert not parked.wrote(session_id, "hello.txt")


def test_the_stream_of_a_session_that_is_over_ends_wherever_it_begins(parked: Client):
    session_id = parked.create()
    parked.sessions.archive(session_id)
    with parked.sessions.events.stream(session_id) as stream:
        assert [e.type for e in stream] == []
    newest = len(parked.types(session_id))
    for after, heard in ((newest, []), (newest - 1, ["session.status_terminated"])):
        with parked.sessions.events.stream(session_id, extra_headers={"Last-Event-ID": str(after)}) as stream:
            assert [e.type for e in stream] == heard


def test_a_deleted_session_is_gone_and_its_streams_are_told(parked: Client):
    session_id = parked.create()
    with parked.sessions.events.stream(session_id) as stream:
        deleted = parked.sessions.delete(session_id)
        assert [e.type for e in stream] == ["session.deleted"]
    assert isinstance(deleted, BetaManagedAgentsDeletedSession)
    with pytest.raises(anthropic.NotFoundError):
        parked.sessions.retrieve(session_id)


# -- being asked


def test_an_allowed_call_runs(parked: Client):
    session_id = parked.create("Write hello.txt with a greeting")
    [event_id] = parked.asked(session_id)
    [asked] = [e for e in parked.log(session_id) if e.id == event_id]
    assert (asked.type, asked.name, asked.evaluated_permission) == ("agent.tool_use", "Write", "ask")
    assert not parked.wrote(session_id, "hello.txt")
    sent = parked.confirm(session_id, event_id)
    assert [e.type for e in sent.data] == ["user.tool_confirmation"]
    parked.finished(session_id)
    assert parked.wrote(session_id, "hello.txt")


def test_a_denied_call_does_not_run_and_the_model_is_told_why(parked: Client):
    session_id = parked.create("Write hello.txt with a greeting")
    [event_id] = parked.asked(session_id)
    parked.confirm(session_id, event_id, "deny", deny_message=DENIED)
    parked.finished(session_id)
    assert not parked.wrote(session_id, "hello.txt")
    assert DENIED in parked.said(session_id)


def test_an_edited_input_is_sent_as_an_extra_field_of_the_sdk(parked: Client):
    session_id = parked.create("Write hello.txt with a greeting")
    [event_id] = parked.asked(session_id)
    edited = {"file_path": "other.txt", "content": "edited"}
    parked.confirm(session_id, event_id, updated_input=edited)
    parked.finished(session_id)
    assert parked.wrote(session_id, "other.txt")
    assert not parked.wrote(session_id, "hello.txt")


@pytest.mark.parametrize("house", ["awake", "parked"])
def test_an_interrupt_ends_the_turn_and_the_call_never_runs(house: str, request: pytest.FixtureRequest):
    client: Client = request.getfixturevalue(house)
    session_id = client.create("Write hello.txt with a greeting")
    [event_id] = client.asked(session_id)
    client.send(session_id, {"type": "user.interrupt"})
    client.finished(session_id)
    with pytest.raises(anthropic.ConflictError, match="stopped waiting"):
        client.confirm(session_id, event_id)
    client.send(session_id, message("Ask me a question"))
    assert len(client.asked(session_id)) == 1
    assert not client.wrote(session_id, "hello.txt")


def test_an_interrupt_while_the_model_speaks_ends_the_turn(awake: Client):
    slow = scripted({"text": "", "delay_s": 0.5}, {"text": "never said"})
    session_id = awake.create(slow)
    with awake.sessions.events.stream(session_id, extra_headers={"Last-Event-ID": "0"}) as stream:
        for event in stream:
            if event.type == "span.model_request_start":
                awake.send(session_id, {"type": "user.interrupt"})
            if event.type == "session.status_idle":
                break
    assert "never said" not in awake.said(session_id)


@pytest.mark.parametrize("house", ["awake", "parked"])
def test_an_allow_while_hot_or_parked_lets_the_call_run(house: str, request: pytest.FixtureRequest):
    client: Client = request.getfixturevalue(house)
    session_id = client.create("Run a command")
    [event_id] = client.asked(session_id)
    client.confirm(session_id, event_id)
    client.finished(session_id)
    assert client.wrote(session_id, "date.txt")


def test_messages_while_running_are_queued_and_worked_on_in_order(parked: Client):
    session_id = parked.create(scripted({"tools": []}))
    first = parked.send(session_id, message(scripted({"tools": []})), message("Read hello.txt"))
    assert [e.processed_at for e in first.data] == [None, None]
    parked.finished(session_id)
    log = parked.log(session_id)
    taken = [e.processed_at for e in log if e.type == "user.message"]
    assert len(taken) == 3
    assert taken == sorted(taken)
    assert "could not read it" in parked.said(session_id)


# -- streaming


def test_a_plain_stream_shows_what_happens_from_now_on(parked: Client):
    session_id = parked.create()
    with parked.sessions.events.stream(session_id) as stream:
        parked.send(session_id, message("Read hello.txt"))
        seen = []
        for event in stream:
            seen.append(event.id)
            if event.type == "session.status_idle":
                break
    assert seen == [e["id"] for e in parked.raw_log(session_id)]


def test_previews_announce_the_event_that_follows_whole(parked: Client):
    session_id = parked.create()
    wanted = ["agent.message", "agent.thinking"]
    with parked.sessions.events.stream(session_id, event_deltas=wanted) as stream:
        parked.send(session_id, message(scripted({"thinking": "hm, hm", "delay_s": 0.02})))
        seen = []
        for event in stream:
            seen.append(event)
            if event.type == "session.status_idle":
                break
    started = [e.event.id for e in seen if e.type == "event_start"]
    whole = {e.id: e for e in seen if e.type in ("agent.message", "agent.thinking")}
    assert started
    assert set(started) <= set(whole)
    for event_id in started:
        pieces = [e.delta.content.text for e in seen if e.type == "event_delta" and e.event_id == event_id]
        if whole[event_id].type == "agent.message":
            assert "".join(pieces) == whole[event_id].content[0].text
        else:
            assert pieces == []


def test_a_cut_stream_is_continued_without_gap_or_repeat(parked: Client):
    session_id = parked.create("Do three things at once")
    parked.confirm(session_id, parked.asked(session_id)[0], "deny")
    whole = [e["id"] for e in parked.raw_log(session_id)]
    heard: list[str] = []
    cursor = "0"
    while len(heard) < len(whole):
        headers = {"Last-Event-ID": cursor}
        url = f"/v1/sessions/{session_id}/events/stream"
        with parked.http.stream("GET", url, headers=headers) as stream:
            ids, cursor = _read(stream, min(4, len(whole) - len(heard)), cursor)
        heard += ids
    assert heard[: len(whole)] == whole
    with parked.sessions.events.stream(session_id, extra_headers={"Last-Event-ID": "3"}) as again:
        assert [next(again).id for _ in whole[3:]] == whole[3:]


def _read(stream: httpx.Response, count: int, cursor: str) -> tuple[list[str], str]:
    """Reads at most `count` events, parsed strictly. Returns their ids, and the cursor after the last one."""
    ids: list[str] = []
    for line in stream.iter_lines():
        name, _, value = line.partition(": ")
        if name == "id":
            assert int(value) == int(cursor) + 1
            cursor = value
        elif name == "data" and value != "{}":
            raw = json.loads(value)
            check_event(raw)
            ids.append(raw["id"])
        elif name == "event" and value == "ping":
            break
        if len(ids) == count:
            break
    return ids, cursor


# -- every event of every scenario


def _batch(client: Client) -> str:
    session_id = client.create("Do three things at once")
    waiting = client.asked(session_id)
    assert len(waiting) == 3
    for event_id in waiting:
        client.confirm(session_id, event_id)
    client.finished(session_id)
    assert client.wrote(session_id, "batch.txt")
    return session_id


def _question(client: Client) -> str:
    session_id = client.create("Ask me a question")
    [event_id] = client.asked(session_id)
    [asked] = [e for e in client.log(session_id) if e.id == event_id]
    answers = {q["question"]: q["options"][0]["label"] for q in asked.input["questions"]}
    client.confirm(session_id, event_id, answers=answers)
    client.finished(session_id)
    assert "Blue" in client.said(session_id)
    return session_id


def _plan(client: Client) -> str:
    session_id = client.create("Make a plan first")
    [plan] = client.asked(session_id)
    [shown] = [e for e in client.log(session_id) if e.id == plan]
    assert "planned.txt" in shown.input["plan"]
    client.confirm(session_id, plan)
    [write] = client.asked(session_id)
    client.confirm(session_id, write)
    client.finished(session_id)
    assert client.wrote(session_id, "planned.txt")
    return session_id


def _subagent(client: Client) -> str:
    session_id = client.create("Let a subagent do it")
    reason = client.settled(session_id)
    while reason.type == "requires_action":
        for event_id in reason.event_ids:
            client.confirm(session_id, event_id)
        reason = client.settled(session_id)
    assert client.wrote(session_id, "date.txt")
    return session_id


def _denial(client: Client) -> str:
    session_id = client.create("Run a command")
    client.confirm(session_id, client.asked(session_id)[0], "deny", deny_message=DENIED)
    client.finished(session_id)
    return session_id


def _error(client: Client) -> str:
    session_id = client.create(scripted({"error": {"status": 400, "type": "invalid_request_error"}}))
    assert client.settled(session_id).type == "retries_exhausted"
    assert "session.error" in client.types(session_id)
    return session_id


def _interrupt(client: Client) -> str:
    session_id = client.create("Run a command")
    client.asked(session_id)
    client.send(session_id, {"type": "user.interrupt"})
    client.finished(session_id)
    client.sessions.archive(session_id)
    return session_id


SCENARIOS = (_batch, _question, _plan, _subagent, _denial, _error, _interrupt)


@pytest.mark.parametrize(
    ("house", "scenario"),
    [
        pytest.param(house, scenario, marks=[pytest.mark.slow] * ((number + houses) % 2))
        for houses, house in enumerate(["parked", "awake"])
        for number, scenario in enumerate(SCENARIOS)
    ],
)
def test_every_event_is_what_the_sdk_declares(house: str, scenario: Any, request: pytest.FixtureRequest):
    client: Client = request.getfixturevalue(house)
    session_id = scenario(client)
    log = client.raw_log(session_id)
    for raw in log:
        check_event(raw)
    assert [e.id for e in client.sessions.events.list(session_id, limit=3)] == [e["id"] for e in log]
    strictly(BetaManagedAgentsSession, client.http.get(f"/v1/sessions/{session_id}").json())


def test_what_a_send_answers_is_what_the_sdk_declares(parked: Client):
    session_id = parked.create()
    body = {"events": [message("Read hello.txt"), {"type": "user.interrupt"}]}
    answer = parked.http.post(f"/v1/sessions/{session_id}/events", json=body)
    strictly(BetaManagedAgentsSendSessionEvents, answer.json())


def test_every_event_type_of_the_protocol_can_be_filtered_by(parked: Client):
    session_id = parked.create("Read hello.txt")
    parked.finished(session_id)
    types = list(typing.get_args(BetaManagedAgentsSessionEventType))
    assert [e.id for e in parked.sessions.events.list(session_id, types=types)] == [
        e["id"] for e in parked.raw_log(session_id)
    ]
    assert list(parked.sessions.events.list(session_id, types=["agent.custom_tool_use"])) == []


# -- errors, agents, environments


def test_failures_are_the_sdks_own_errors(parked: Client):
    session_id = parked.create("Write hello.txt with a greeting")
    [event_id] = parked.asked(session_id)
    parked.confirm(session_id, event_id, "deny")
    stranger = parked.sdk.with_options(api_key="wrong")
    with pytest.raises(anthropic.AuthenticationError):
        stranger.beta.sessions.retrieve(session_id)
    with pytest.raises(anthropic.NotFoundError) as missing:
        parked.sessions.retrieve("sesn_none")
    assert missing.value.body["error"]["type"] == "not_found_error"
    with pytest.raises(anthropic.ConflictError, match="already decided"):
        parked.confirm(session_id, event_id, "allow")
    with pytest.raises(anthropic.BadRequestError, match=r"events\.0"):
        parked.send(session_id, {"type": "user.message", "content": "not a list"})
    with pytest.raises(anthropic.BadRequestError):
        parked.confirm(session_id, "toolu_never_asked")


def test_a_key_with_the_scope_sessions_does_all_but_decide(parked: Client, parking: Threaded):
    store, run = parking.service.store, parking.run
    alice = run(store.find_identity(hash_api_key(parking.service.keys["alice"])))
    assert alice is not None
    scoped = store.add_key("robot", hash_api_key("robots"), principal=alice.principal, scopes=["sessions"])
    assert run(scoped).principal_id == alice.principal.id
    sessions: Any = parked.sdk.with_options(api_key="robots").beta.sessions
    made = sessions.create(
        agent="default",
        environment_id="default",
        initial_events=[message("Write hello.txt with a greeting")],
    )
    [event_id] = parked.asked(made.id)
    with pytest.raises(anthropic.PermissionDeniedError, match="approvals"):
        sessions.events.send(made.id, events=[confirmation(event_id)])
    sessions.update(made.id, title="named")
    assert [e.id for e in sessions.events.list(made.id, types=["agent.tool_use"])] == [event_id]
    parked.confirm(made.id, event_id)
    parked.finished(made.id)
    assert parked.wrote(made.id, "hello.txt")
    sessions.archive(made.id)


def test_agents_and_environments_are_found_and_listed(parked: Client):
    beta = parked.sdk.beta
    assert [a.id for a in beta.agents.list(limit=5)] == ["default"]
    assert [e.id for e in beta.environments.list(limit=5)] == ["default"]
    assert beta.agents.retrieve("default", version=1).version == 1
    strictly(BetaManagedAgentsAgent, parked.http.get("/v1/agents/default").json())
    strictly(BetaEnvironment, parked.http.get("/v1/environments/default").json())
    for missing in (
        lambda: beta.agents.retrieve("other"),
        lambda: beta.agents.retrieve("default", version=2),
        lambda: beta.environments.retrieve("other"),
    ):
        with pytest.raises(anthropic.NotFoundError):
            missing()


# -- the asynchronous client


async def test_the_asynchronous_client_does_the_same(parking: Threaded):
    url, key = parking.service.url, parking.service.keys["alice"]
    async with anthropic.AsyncAnthropic(
        base_url=url, api_key=key, max_retries=0, _strict_response_validation=True
    ) as client:
        sessions = client.beta.sessions
        made = await sessions.create(agent="default", environment_id="default")
        stops: list[str] = []
        async with asyncio.timeout(WAIT_S):
            async with await sessions.events.stream(made.id) as stream:
                await sessions.events.send(made.id, events=[message("Write hello.txt with a greeting")])
                async for event in stream:
                    if event.type == "session.status_idle":
                        stops.append(event.stop_reason.type)
                        if event.stop_reason.type == "end_turn":
                            break
                        allowed = [confirmation(i) for i in event.stop_reason.event_ids]
                        await sessions.events.send(made.id, events=allowed)
        listed = [e.id async for e in sessions.events.list(made.id, limit=4)]
        assert made.id in [s.id async for s in sessions.list(limit=2)]
    assert stops == ["requires_action", "end_turn"]
    assert len(listed) == len(set(listed)) > 4
    assert (parking.service.workspace(made.id) / "hello.txt").exists()
