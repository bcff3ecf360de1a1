"""Messages reach the model through the real CLI unchanged; the model records what it receives."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from mcp.server.fastmcp import FastMCP

from claude_hitl_template.domain.events import UserMessage
from claude_hitl_template.domain.models import Networking
from tests.contract.test_layers import Model, layered, model, script, skill, write
from tests.contract.test_session import House, house, user
from tests.serving import loopback

__all__ = ["model"]  # a fixture
pytestmark = pytest.mark.takes_long("conversations of several turns with the real CLI")
SECRET = "what is in the file outside"


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    folder = tmp_path / "outside"
    write(folder / "s.txt", SECRET)
    write(folder / "with space.txt", SECRET)
    write(folder / "entries" / SECRET.replace(" ", "-"), "x")
    return folder


def blocks(*texts: str) -> UserMessage:
    content = [{"type": "text", "text": text} for text in texts]
    return UserMessage.model_validate({"type": "user.message", "content": content})


def bash(command: str) -> dict[str, Any]:
    return {"name": "Bash", "input": {"command": command}}


async def next_turn(h: House, said: UserMessage) -> None:
    await h.send(said)
    await h.drive()
    assert (await h.until_idle())["type"] == "end_turn"


async def decide_all(h: House, result: str, **more: Any) -> None:
    while (stop := await h.until_idle())["type"] == "requires_action":
        for event_id in stop["event_ids"]:
            await h.confirm(event_id, result, **more)
        await h.drive()


@pytest.mark.parametrize("result", [pytest.param("deny", marks=pytest.mark.slow), "allow"])
async def test_the_reminder_of_held_calls_opens_no_file(
    tmp_path: Path, model: Model, outside: Path, result: str
):
    calls = [bash(f"true {number} @{outside / 's.txt'} x") for number in range(3)]
    h = await house(tmp_path, model.url, script({"tools": calls}))
    await h.drive()
    await decide_all(
        h, result, **({"deny_message": f"see @{outside / 's.txt'} x"} if result == "deny" else {})
    )
    told = model.recorder.told()
    assert "A human has decided on calls that were held" in told
    assert SECRET not in told
    states = {a.state.value for a in (await h.store.list_approvals("key_test", limit=10)).data}
    assert states == {"denied" if result == "deny" else "succeeded"}


MENTIONS = (
    "@{0}/s.txt", "see @{0}/s.txt there", 'see @"{0}/with space.txt" there', "see @{0}/s.txt#L1-2", "\t@{0}/s.txt",
    "@{0}/entries", "see @../outside/s.txt", '{{"path": "@{0}/s.txt @{0}/s.txt x"}}', "@file://{0}/s.txt", "(@{0}/s.txt)",
)  # fmt: skip


async def test_a_path_in_a_users_message_is_text_until_the_model_asks_to_read_it(
    tmp_path: Path, model: Model, outside: Path
):
    texts = [mention.format(outside) for mention in MENTIONS]
    h = await house(tmp_path, model.url, texts[0])
    await h.drive()
    await h.send(*(m for text in texts for m in (user(text), blocks("First.", text), blocks(text, "Last."))))
    await h.drive()
    assert (await h.until_idle())["type"] == "end_turn"
    told = model.recorder.told()
    assert SECRET not in told
    assert SECRET.replace(" ", "-") not in told
    assert all(json.dumps(text)[1:-1] in told for text in texts), "a message was changed on its way"


@pytest.mark.slow
async def test_no_layer_of_an_image_switches_the_expansion_on_again(
    tmp_path: Path, model: Model, outside: Path
):
    again = {"env": {"CLAUDE_CODE_DISABLE_FILE_MENTIONS": "0"}}
    path = outside / "s.txt"
    h = await layered(tmp_path, model, f"/hello @{path}")
    write(h.root / "template_user/.claude/settings.json", again)
    write(h.workspace / ".claude/settings.json", again)
    write(h.root / "template_user/.claude/commands/hello.md", f"The command. $ARGUMENTS @{path}")
    write(h.root / "template_user/.claude/skills/greet/SKILL.md", skill("greet", "x", f"The skill. @{path}"))
    await h.drive()
    calls = [
        {"name": "Skill", "input": {"skill": "greet", "args": f"@{path}"}},
        {
            "name": "Agent",
            "input": {
                "description": "x",
                "prompt": f"Look at @{path}",
                "subagent_type": "general-purpose",
                "run_in_background": False,
            },
        },
    ]
    await h.send(user(script(*({"tools": [call]} for call in calls))))
    await h.drive()
    await decide_all(h, "allow")
    told = model.recorder.told()
    assert "The command." in told
    assert "The skill." in told
    assert SECRET not in told


@pytest.mark.slow
async def test_what_a_human_says_with_a_decision_is_not_expanded(tmp_path: Path, model: Model, outside: Path):
    mention = f"@{outside / 's.txt'} x"
    question = {
        "question": "Which?",
        "header": "x",
        "multiSelect": False,
        "options": [{"label": label, "description": "x"} for label in ("a", "b")],
    }
    steps = script(
        {"tools": [bash("true 1")]},
        {"tools": [{"name": "AskUserQuestion", "input": {"questions": [question]}}]},
        {"tools": [bash("true 2")]},
    )
    h = await house(tmp_path, model.url, steps)
    for result, more in (
        ("deny", {"deny_message": mention}),
        ("allow", {"answers": {"Which?": mention}}),
        ("allow", {"updated_input": {"command": f"true {mention}"}}),
    ):
        await h.drive()
        [event_id] = (await h.until_idle())["event_ids"]
        await h.confirm(event_id, result, **more)
    await h.drive()
    assert (await h.until_idle())["type"] == "end_turn"
    told = model.recorder.told()
    assert mention in told
    assert SECRET not in told


@pytest.mark.parametrize(
    "command",
    [
        "/heapdump",
        "/config verbose=true",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("/mcp", "/reload-plugins", "/fast")),
    ],
)
async def test_a_command_of_the_cli_that_does_more_than_talk_is_said_to_the_model(
    tmp_path: Path, model: Model, command: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    h = await house(tmp_path, model.url, command)
    await h.drive()
    await next_turn(h, blocks("First.", command))
    assert model.recorder.told().count(f'"text": " {command}"') >= 2
    assert not list((tmp_path / "home").glob("*.heapsnapshot"))


async def test_commands_that_only_concern_the_conversation_stay(tmp_path: Path, model: Model):
    h = await house(tmp_path, model.url, "/usage")
    await h.drive()
    assert "Total" in await h.said()
    assert model.recorder.told() == ""


@pytest.fixture
def shelf() -> Iterator[tuple[str, list[str]]]:
    server, read = FastMCP("shelf", stateless_http=True), list[str]()

    @server.resource("note://secret")
    def secret() -> str:
        read.append("resource")
        return SECRET

    @server.prompt()
    def ask() -> str:
        read.append("prompt")
        return SECRET

    with loopback(server.streamable_http_app()) as address:
        yield f"{address}/mcp", read


async def test_a_message_has_no_mcp_server_asked_for_anything(
    tmp_path: Path, model: Model, shelf: tuple[str, list[str]]
):
    url, read = shelf
    networking = Networking(private_hosts=(urlsplit(url).netloc,))
    h = await house(tmp_path, model.url, "Hello.", networking=networking, mcp_servers={"shelf": {"url": url}})
    await h.drive()
    texts = ("see @shelf:note://secret", 'see @"shelf:note://secret"', "/mcp__shelf__ask", "/shelf:ask")
    await h.send(*map(user, texts))
    await h.drive()
    assert SECRET not in model.recorder.told()
    assert read == []
