"""The real Claude Code CLI accepts what the offline model sends, scenario by scenario, failure by failure."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from claude_agent_sdk import (
    AssistantMessage,
    ClaudeAgentOptions,
    ClaudeSDKClient,
    HookMatcher,
    InMemorySessionStore,
    Message,
    PermissionResultAllow,
    PermissionResultDeny,
    ResultMessage,
    StreamEvent,
    SystemMessage,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
    UserMessage,
)

from claude_hitl_template.errors import Unauthorized
from claude_hitl_template.model import tokens
from claude_hitl_template.model.endpoint import OfflineUpstream
from claude_hitl_template.model.offline import HELD_MARKER, Scenarios
from tests.serving import model_app, serving

SECRET = b"a secret of at least sixteen bytes"
TOKEN = tokens.mint(SECRET, "sesn_1", 1)
SCENARIOS = Scenarios.load()
TURN_TIMEOUT_S = 20

Decide = Callable[[str, dict[str, Any]], PermissionResultAllow | PermissionResultDeny]


def allow(tool: str, given: dict[str, Any]) -> PermissionResultAllow:
    """Allows all calls, and chooses the first option of each question."""
    if tool == "AskUserQuestion":
        answers = {question["question"]: question["options"][0]["label"] for question in given["questions"]}
        return PermissionResultAllow(updated_input={**given, "answers": answers})
    return PermissionResultAllow()


def deny(tool: str, given: dict[str, Any]) -> PermissionResultDeny:
    return PermissionResultDeny(message="a human said no")


@dataclass
class Turn:
    """The output of one turn, including that of subagents."""

    asked: list[str] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)

    @property
    def blocks(self) -> list[Any]:
        said = (m for m in self.messages if isinstance(m, AssistantMessage | UserMessage))
        return [block for m in said if isinstance(m.content, list) for block in m.content]

    @property
    def calls(self) -> list[str]:
        return [block.name for block in self.blocks if isinstance(block, ToolUseBlock)]

    @property
    def failed_results(self) -> list[ToolResultBlock]:
        return [block for block in self.blocks if isinstance(block, ToolResultBlock) and block.is_error]

    @property
    def texts(self) -> list[str]:
        return [block.text for block in self.blocks if isinstance(block, TextBlock)]

    @property
    def retries(self) -> list[dict[str, Any]]:
        return [m.data for m in self.messages if isinstance(m, SystemMessage) and m.subtype == "api_retry"]

    @property
    def result(self) -> ResultMessage:
        [result] = [m for m in self.messages if isinstance(m, ResultMessage)]
        return result


@pytest.fixture(scope="module")
async def url() -> AsyncIterator[str]:
    async def verify(token: str) -> None:
        if tokens.check(SECRET, token) != ("sesn_1", 1):
            raise Unauthorized("not this session's token")

    async with serving(model_app(OfflineUpstream(SCENARIOS), verify)) as url:
        yield url


class Cli:
    """The real CLI, in its own folder."""

    def __init__(self, url: str, folder: Path) -> None:
        self._url = url
        self.folder = folder
        self.store = InMemorySessionStore()

    async def turn(
        self, prompt: str = "", decide: Decide = allow, env: dict[str, str] | None = None, **more: Any
    ) -> Turn:
        """Runs one turn in a new process. Without a prompt, continues the resumed session."""
        turn = Turn()

        async def can_use_tool(tool: str, given: dict[str, Any], _: object) -> Any:
            turn.asked.append(tool)
            return decide(tool, given)

        options = ClaudeAgentOptions(
            cwd=self.folder,
            setting_sources=[],
            can_use_tool=can_use_tool,
            session_store=self.store,
            session_store_flush="eager",
            env={
                "ANTHROPIC_BASE_URL": self._url,
                "ANTHROPIC_API_KEY": TOKEN,
                "CLAUDE_CONFIG_DIR": str(self.folder / "config"),
                "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
                "CLAUDE_CODE_MAX_RETRIES": "1",
                "IS_SANDBOX": "1",
                **(env or {}),
            },
            **more,
        )
        async with asyncio.timeout(TURN_TIMEOUT_S), ClaudeSDKClient(options) as client:
            if prompt:
                await client.query(prompt)
            async for received in client.receive_response():
                turn.messages.append(received)
        return turn


@pytest.fixture
def cli(url: str, tmp_path: Path) -> Cli:
    return Cli(url, tmp_path)


async def test_a_prompt_without_a_scenario_is_told_that_this_is_no_ai_in_pieces_that_can_be_previewed(
    cli: Cli,
):
    turn = await cli.turn("What is the meaning of life?", include_partial_messages=True)

    [text] = turn.texts
    assert text.startswith("[offline model] I am a scripted stand-in, not an AI")
    events = [m.event for m in turn.messages if isinstance(m, StreamEvent)]
    pieces = [e["delta"]["text"] for e in events if e["type"] == "content_block_delta"]
    assert len(pieces) > 5
    assert "".join(pieces) == text


async def test_thinking_reaches_the_client_and_the_session_goes_on_after_it(cli: Cli):
    turn = await cli.turn(
        "```scenario\n- {thinking: 'Let me see.', tools: [{name: ListAgents}]}\n- {text: Seen.}\n```"
    )

    [thought] = [block.thinking for block in turn.blocks if isinstance(block, ThinkingBlock)]
    assert thought == "Let me see."
    assert turn.texts == ["Seen."]


async def test_an_allowed_write_makes_the_file_in_the_working_directory(cli: Cli):
    turn = await cli.turn("Write hello.txt with a greeting")

    assert turn.asked == ["Write"]
    assert (cli.folder / "hello.txt").read_text().startswith("Hello!")
    assert turn.texts[0].startswith("[offline model]")
    assert turn.texts[-1].startswith("Done:")


async def test_a_denied_write_makes_no_file_and_the_model_says_why(cli: Cli):
    turn = await cli.turn("Write hello.txt with a greeting", deny)

    assert not (cli.folder / "hello.txt").exists()
    assert "refused" in turn.texts[-1]
    assert "a human said no" in turn.texts[-1]


@pytest.mark.parametrize(
    "scenario",
    [
        pytest.param(scenario, marks=[pytest.mark.slow] * (scenario.name not in ("batch", "plan")))
        for scenario in SCENARIOS.known
    ],
    ids=lambda scenario: scenario.name,
)
async def test_every_shipped_scenario_runs_to_its_end_when_all_is_allowed(cli: Cli, scenario: Any):
    (cli.folder / "hello.txt").write_text("Hello from the test.\n")
    turn = await cli.turn(
        scenario.prompt, settings='{"permissions":{"ask":["Write(hello.txt)","Read(hello.txt)"]}}'
    )

    assert not turn.result.is_error
    assert "{" not in turn.texts[-1]
    assert scenario.steps[-1].when or turn.texts[-1] == scenario.steps[-1].text


async def test_a_held_call_is_made_again_after_parking_and_the_scenario_ends_once(cli: Cli):
    """Of three calls, the second is held and the first parks the session; then another process continues it."""
    decisions = iter(["defer"])

    async def park(*_: object) -> Any:
        decision = next(decisions, "deny")
        return {
            "hookSpecificOutput": {
                "hookEventName": "PreToolUse",
                "permissionDecision": decision,
                "permissionDecisionReason": f"{HELD_MARKER}; issue this call again afterwards",
            }
        }

    ask = '{"permissions":{"ask":["Bash","Write"]}}'
    hooks: Any = {"PreToolUse": [HookMatcher(hooks=[park], timeout=600)]}
    parked = await cli.turn("Do three things at once", settings=ask, hooks=hooks)
    assert parked.result.stop_reason == "tool_deferred"
    assert not (cli.folder / "batch.txt").exists()

    resumed = await cli.turn(settings=ask, resume=parked.result.session_id)
    assert resumed.asked == ["Write", "Bash", "Bash"]
    assert resumed.calls == ["Bash", "Bash"]
    [text] = resumed.texts
    assert text.startswith("All three calls ran.")
    assert (cli.folder / "batch/date.txt").exists()
    assert (cli.folder / "batch/system.txt").exists()


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (401, "authentication_failed"),
        pytest.param(429, "rate_limit", marks=pytest.mark.slow),
        pytest.param(500, "server_error", marks=pytest.mark.slow),
        pytest.param(529, "server_error", marks=pytest.mark.slow),
    ],
)
async def test_an_error_status_is_retried_and_then_ends_the_turn(cli: Cli, status: int, error: str):
    turn = await cli.turn(f"```scenario\n- error: {{status: {status}, message: simulated outage}}\n```")

    assert [retry["error_status"] for retry in turn.retries] == [status]
    assert turn.result.is_error
    assert "simulated outage" in turn.texts[-1]
    assert [m.error for m in turn.messages if isinstance(m, AssistantMessage)] == [error]


async def test_retry_after_is_obeyed(cli: Cli):
    turn = await cli.turn("```scenario\n- error: {status: 429, retry_after_s: 2}\n```")

    [retry] = turn.retries
    assert 2000 <= retry["retry_delay_ms"] < 3000


@pytest.mark.parametrize("status", ["cut", pytest.param("malformed", marks=pytest.mark.slow)])
async def test_a_stream_that_breaks_off_in_its_first_block_is_asked_for_again(cli: Cli, status: str):
    turn = await cli.turn(
        f"```scenario\n- {{text: One two three four five six., error: {{status: {status}}}}}\n```"
    )

    assert turn.texts == ["One two three four five six."]
    assert not turn.result.is_error


@pytest.mark.parametrize("status", [pytest.param("cut", marks=pytest.mark.slow), "malformed"])
async def test_a_call_that_was_cut_off_is_made_again_and_runs_once(cli: Cli, status: str):
    turn = await cli.turn(
        "```scenario\n"
        "- text: I run it.\n"
        "  tools: [{name: Bash, input: {command: 'echo ran >> once.txt'}}]\n"
        f"  error: {{status: {status}}}\n"
        "- text: Done.\n"
        "```"
    )

    assert (cli.folder / "once.txt").read_text() == "ran\n"
    assert turn.texts[-1] == "Done."


async def test_of_a_batch_that_was_cut_off_the_cli_runs_the_finished_calls_and_forgets_the_last(cli: Cli):
    """The gate relies on this behaviour of the CLI: a call counts only once its block is complete."""
    turn = await cli.turn(
        "```scenario\n"
        "- text: I run both.\n"
        "  tools:\n"
        "    - {name: Bash, input: {command: 'echo ran >> first.txt'}}\n"
        "    - {name: Bash, input: {command: 'echo ran >> second.txt'}}\n"
        "  error: {status: malformed}\n"
        "- text: Done.\n"
        "```"
    )

    assert (cli.folder / "first.txt").read_text() == "ran\n"
    assert not (cli.folder / "second.txt").exists()
    assert turn.texts[-1] == "Done."


async def test_a_wrong_token_gets_no_answer(cli: Cli):
    turn = await cli.turn("Hello", env={"ANTHROPIC_API_KEY": TOKEN + "0", "CLAUDE_CODE_MAX_RETRIES": "0"})

    assert turn.result.is_error
    assert "403" in turn.texts[-1]


async def test_the_context_command_can_count_tokens(cli: Cli):
    turn = await cli.turn("/context")

    assert "Context Usage" in turn.texts[-1]
