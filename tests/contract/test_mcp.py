"""Tools of MCP servers: declared over REST, called by the real CLI, through the same gate as every other call."""

import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from anthropic.types.beta import BetaManagedAgentsSession
from mcp.server.fastmcp import FastMCP

from tests.contract.test_anthropic_sdk import Client, check_event, scripted, strictly
from tests.contract.test_session import house, model_url
from tests.serving import loopback

__all__ = ["model_url"]

SERVER = "notes"


@dataclass
class Notes:
    """A real MCP server with two tools, which records its calls."""

    url: str = ""
    added: list[str] = field(default_factory=list[str])
    cleared: int = 0

    def build(self) -> FastMCP:
        server = FastMCP(SERVER, stateless_http=True)

        @server.tool()
        def add(text: str) -> str:
            """Adds a note."""
            self.added.append(text)
            return f"added {text}"

        @server.tool()
        def clear() -> str:
            """Deletes all notes."""
            self.cleared += 1
            return "cleared"

        return server


@pytest.fixture
def notes(list_private: Callable[[str], None]) -> Iterator[Notes]:
    found = Notes()
    with loopback(found.build().streamable_http_app()) as address:
        found.url = f"{address}/mcp"
        list_private(found.url)
        yield found


def agent(notes: Notes, toolset: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    body = {
        "type": "agent_with_overrides",
        "id": "default",
        "mcp_servers": [{"type": "url", "name": SERVER, "url": notes.url}],
        **more,
    }
    if toolset is not None:
        body["tools"] = [{"type": "mcp_toolset", "mcp_server_name": SERVER, **toolset}]
    return body


def calls(*given: tuple[str, dict[str, Any]]) -> str:
    """Returns a prompt with which the offline model makes these calls, one by one."""
    steps = [{"tools": [{"name": f"mcp__{SERVER}__{tool}", "input": body}]} for tool, body in given]
    return scripted(*steps, {"text": "Done."})


def test_a_call_waits_parked_and_runs_once_as_it_was_edited(client: Client, notes: Notes):
    session_id = client.create(calls(("add", {"text": "milk"})), agent=agent(notes))
    [event_id] = client.asked(session_id)
    assert notes.added == []
    client.confirm(session_id, event_id, updated_input={"text": "oat milk"})
    client.finished(session_id)
    assert notes.added == ["oat milk"]
    [use] = [e for e in client.log(session_id) if e.type == "agent.mcp_tool_use"]
    [result] = [e for e in client.log(session_id) if e.type == "agent.mcp_tool_result"]
    assert (use.mcp_server_name, use.name, use.id) == (SERVER, "add", event_id)
    assert (result.mcp_tool_use_id, result.is_error) == (event_id, False)
    assert "added oat milk" in result.content[0].text
    for raw in client.raw_log(session_id):
        check_event(raw)
    raw = client.http.get(f"/v1/sessions/{session_id}").json()
    strictly(BetaManagedAgentsSession, raw)
    assert raw["agent"]["mcp_servers"] == [{"type": "url", "name": SERVER, "url": notes.url}]


def test_a_denied_call_never_reaches_the_server(client: Client, notes: Notes):
    session_id = client.create(calls(("clear", {})), agent=agent(notes))
    [event_id] = client.asked(session_id)
    client.confirm(session_id, event_id, "deny", deny_message="keep them")
    client.finished(session_id)
    assert notes.cleared == 0


def test_a_remembered_tool_is_not_asked_about_again(client: Client, notes: Notes):
    prompt = calls(("add", {"text": "one"}), ("add", {"text": "two"}))
    session_id = client.create(prompt, agent=agent(notes))
    [event_id] = client.asked(session_id)
    client.confirm(session_id, event_id, remember=True)
    client.finished(session_id)
    assert notes.added == ["one", "two"]


def test_a_toolset_says_for_each_tool_whether_it_asks(permitted: Client, notes: Notes):
    client = permitted
    toolset = {
        "default_config": {"permission_policy": {"type": "always_allow"}},
        "configs": [{"name": "clear", "permission_policy": {"type": "always_ask"}}],
    }
    prompt = calls(("add", {"text": "unasked"}), ("clear", {}))
    session_id = client.create(prompt, agent=agent(notes, toolset))
    [event_id] = client.asked(session_id)
    assert (notes.added, notes.cleared) == (["unasked"], 0)
    client.confirm(session_id, event_id)
    client.finished(session_id)
    assert notes.cleared == 1
    shown = client.sessions.retrieve(session_id).agent.tools
    assert [t.type for t in shown] == ["agent_toolset_20260401", "mcp_toolset"]
    assert shown[0].default_config.enabled is False  # `tools` names no built-in ones
    assert shown[1].default_config.permission_policy.type == "always_allow"


@pytest.mark.parametrize(
    ("toolset", "runs"),
    [
        pytest.param(
            {"default_config": {"enabled": False}, "configs": [{"name": "add", "enabled": True}]},
            True,
            marks=pytest.mark.slow,
        ),
        pytest.param({"default_config": {"enabled": False}}, False, marks=pytest.mark.slow),
        ({"configs": [{"name": "add", "enabled": False}]}, False),
    ],
    ids=["the only one switched on", "all switched off", "switched off"],
)
def test_a_tool_that_is_switched_off_never_runs(client: Client, notes: Notes, toolset: Any, runs: bool):
    session_id = client.create(calls(("clear", {}), ("add", {"text": "x"})), agent=agent(notes, toolset))
    if "configs" in toolset and not runs:  # no rule names `clear`, so it asks
        [event_id] = client.asked(session_id)
        client.confirm(session_id, event_id, "deny")
    if runs:
        [event_id] = client.asked(session_id)
        client.confirm(session_id, event_id)
    client.finished(session_id)
    assert (notes.added, notes.cleared) == (["x"] if runs else [], 0)


def test_an_agent_whose_tools_all_run_unasked_still_asks_about_a_server_s(permitted: Client, notes: Notes):
    client = permitted
    toolset = {
        "type": "agent_toolset_20260401",
        "default_config": {"permission_policy": {"type": "always_allow"}},
    }
    session_id = client.create(calls(("add", {"text": "x"})), agent=agent(notes, tools=[toolset]))
    assert client.asked(session_id)
    assert notes.added == []


def test_a_server_that_cannot_be_reached_is_said_with_the_reason_and_the_session_goes_on(
    client: Client, notes: Notes, list_private: Callable[[str], None]
):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # bound and not listening: every connection is refused
        notes.url = f"http://127.0.0.1:{nobody.getsockname()[1]}/mcp"
        list_private(notes.url)
        session_id = client.create("Read hello.txt", agent=agent(notes))
        client.finished(session_id)
    [error] = [e.error for e in client.log(session_id) if e.type == "session.error"]
    assert (error.type, error.mcp_server_name) == ("mcp_connection_failed_error", SERVER)
    assert notes.url in error.message
    assert "cannot be reached: " in error.message
    for raw in client.raw_log(session_id):
        check_event(raw)


@pytest.mark.parametrize("name", [pytest.param("127.0.0.1", marks=pytest.mark.slow), "localhost"])
async def test_a_stored_session_connects_to_no_private_server_that_is_not_listed(
    tmp_path: Path, model_url: str, name: str
):
    """As a session that was created before private servers had to be listed; REST creates none."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        host = f"{name}:{listening.getsockname()[1]}"
        h = await house(
            tmp_path, model_url, "Read hello.txt", mcp_servers={SERVER: {"url": f"http://{host}/mcp"}}
        )
        await h.drive()
        assert (await h.until_idle())["type"] == "end_turn"
        with pytest.raises(BlockingIOError):  # no connection waits to be accepted
            listening.accept()
    [error] = [event.payload["error"] for event in await h.log("session.error")]
    assert (error["type"], error["mcp_server_name"]) == ("mcp_connection_failed_error", SERVER)
    assert f"HITL_PRIVATE_HOSTS={host} " in error["message"]


def server(url: str, name: str = SERVER) -> dict[str, Any]:
    return {"type": "url", "name": name, "url": url}


PRIVATE = [
    "http://127.0.0.1:9000/mcp", "https://localhost:9000/mcp", "http://LOCALHOST.:9000", "http://[::1]:9000/mcp",
    "http://10.1.2.3/mcp", "http://169.254.169.254/", "http://[::ffff:127.0.0.1]/mcp", "http://wiki/mcp",
    "http://wiki.corp/mcp",
]  # fmt: skip


@pytest.mark.parametrize("url", PRIVATE)
def test_a_private_server_that_is_not_listed_is_refused_with_the_line_that_permits_it(
    client: Client, list_private: Callable[[str], None], url: str
):
    servers = [MCP, server(url, "other")]
    body = {
        "agent": {"type": "agent_with_overrides", "id": "default", "mcp_servers": servers},
        "environment_id": "default",
    }
    answer = client.http.post("/v1/sessions", json=body)
    said = answer.json()["error"]["message"]
    assert (answer.status_code, said.partition(": ")[0]) == (400, "agent.mcp_servers.1.url")
    entry = said.partition("HITL_PRIVATE_HOSTS=")[2].split()[0]
    list_private(f"http://{entry}")
    assert client.http.post("/v1/sessions", json=body).status_code == 200


MCP = server("https://notes.example.org/mcp")
TOOLSET = {"type": "mcp_toolset", "mcp_server_name": SERVER}
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"mcp_servers": [{**MCP, "url": "file:///etc/passwd"}]}, "agent.mcp_servers.0.url"),
    ({"mcp_servers": [{**MCP, "url": "http://user:secret@host/mcp"}]}, "agent.mcp_servers.0.url"),
    ({"mcp_servers": [{**MCP, "url": "http://["}]}, "agent.mcp_servers.0.url"),
    ({"mcp_servers": [{**MCP, "url": "http://2130706433:9/mcp"}]}, "agent.mcp_servers.0.url"),
    ({"mcp_servers": [{**MCP, "url": "http://127.0.0.1\\.example.org/mcp"}]}, "agent.mcp_servers.0.url"),
    ({"mcp_servers": [{**MCP, "name": "a__b"}]}, "agent.mcp_servers.0.name"),
    ({"mcp_servers": [{**MCP, "name": "a b"}]}, "agent.mcp_servers.0.name"),
    ({"mcp_servers": [{**MCP, "name": "hitl"}]}, "agent.mcp_servers.0.name"),
    ({"mcp_servers": [{**MCP, "name": "HITL"}]}, "agent.mcp_servers.0.name"),
    ({"mcp_servers": [{**MCP, "type": "stdio"}]}, "agent.mcp_servers.0.type"),
    ({"mcp_servers": [{**MCP, "command": "sh"}]}, "agent.mcp_servers.0.command"),
    ({"mcp_servers": [MCP, MCP]}, "agent.mcp_servers.1.name"),
    ({"mcp_servers": [MCP] * 21}, "agent.mcp_servers"),
    ({"tools": [TOOLSET]}, "agent.tools.0.mcp_server_name"),
    ({"mcp_servers": [MCP], "tools": [TOOLSET, TOOLSET]}, "agent.tools.1.mcp_server_name"),
    ({"tools": [{"type": "agent_toolset_20260401"}] * 2}, "agent.tools.1.type"),
    (
        {"mcp_servers": [MCP], "tools": [{**TOOLSET, "configs": [{"name": "a b"}]}]},
        "agent.tools.0.configs.0.name",
    ),
]


@pytest.mark.parametrize(("wrong", "named"), WRONG)
def test_what_is_wrong_with_a_server_is_named(client: Client, wrong: dict[str, Any], named: str):
    body = {"agent": {"type": "agent_with_overrides", "id": "default", **wrong}, "environment_id": "default"}
    answer = client.http.post("/v1/sessions", json=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["message"].startswith(f"{named}: ")
    assert "secret" not in answer.text
