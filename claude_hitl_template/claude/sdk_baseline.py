"""The SDK alone, as a benchmark's measure of comparison: no store, no service, one process with its CLI.

    python -m claude_hitl_template.claude.sdk_baseline

Reads one JSON object a line, and answers each with one. The first says where to work (workspace, config_dir, model_url,
token), and is answered with {"cli"}, the CLI's version; then `do` is one of

- `turn`: says `prompt`, answers {"seconds"} until the turn's end
- `call`: the same with a prompt that makes one gated call, which is allowed `settle_s` after it was asked about;
  answers {"answered_ns"}, the time of the answer since the epoch
- `fresh`: another CLI says `prompt`; answers {"seconds"} from before its start to the first message of the model
- `asks`: another CLI says `prompts`, each of which makes one gated call; answers {"waiting_s"}, from before its start
  until the first call waits, and {"results_s"}, for each call the time from its permission to its result
- `storm`: `count` other CLIs say `prompt`, which makes one gated call, `at_once` of them at once; answers {"seconds"} until
  the last call is allowed

The options are those of `claude.cli` wherever they could matter for time, without its gate and its transcript store.
"""

import asyncio
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from claude_agent_sdk import (
    AssistantMessage,
    ClaudeAgentOptions,
    ClaudeSDKClient,
    PermissionResultAllow,
    ToolPermissionContext,
    UserMessage,
)
from claude_agent_sdk._cli_version import __cli_version__

from claude_hitl_template.claude.cli_engine import TOOLS, bundled_cli


class SdkBaseline:
    def __init__(self, place: dict[str, str]) -> None:
        self._place = place
        self._client = ClaudeSDKClient(self._options())
        self._settle_s, self._answered_ns = 0.0, 0
        self._asked, self._answered = 0.0, 0.0  # perf_counter's times of the last call

    async def connect(self) -> None:
        await self._client.connect()

    async def close(self) -> None:
        await self._client.disconnect()

    async def answer(self, asked: dict[str, Any]) -> dict[str, Any]:
        match asked["do"]:
            case "turn":
                return {"seconds": await self._turn(asked["prompt"])}
            case "call":
                self._settle_s = asked["settle_s"]
                await self._turn(asked["prompt"])
                return {"answered_ns": self._answered_ns}
            case "fresh":
                return {"seconds": await self._fresh(asked["prompt"])}
            case "asks":
                self._settle_s = asked["settle_s"]
                return await self._asks(asked["prompts"])
            case "storm":
                self._settle_s = 0.0
                return {"seconds": await self._storm(asked["prompt"], asked["count"], asked["at_once"])}
            case other:
                raise ValueError(f"{other!r} is nothing that can be done")

    async def _turn(self, prompt: str) -> float:
        began = time.perf_counter()
        await self._client.query(prompt)
        async for _ in self._client.receive_response():
            pass
        return time.perf_counter() - began

    async def _fresh(self, prompt: str) -> float:
        began = time.perf_counter()
        async with self._another("fresh") as client:
            await client.query(prompt)
            async for message in client.receive_response():
                if isinstance(message, AssistantMessage):
                    return time.perf_counter() - began
        raise ValueError("the turn ended without a message of the model")

    async def _asks(self, prompts: list[str]) -> dict[str, Any]:
        began, waiting, results = time.perf_counter(), list[float](), list[float]()
        async with self._another("fresh") as client:
            for prompt in prompts:
                await client.query(prompt)
                async for message in client.receive_response():
                    if isinstance(message, UserMessage):  # the call's result
                        waiting.append(self._asked - began)
                        results.append(time.perf_counter() - self._answered)
        return {"waiting_s": waiting[0], "results_s": results}

    async def _storm(self, prompt: str, count: int, at_once: int) -> float:
        places, began = asyncio.Semaphore(at_once), time.perf_counter()

        async def one(number: int) -> None:
            async with places, self._another(f"storm-{number}") as client:
                await client.query(prompt)
                async for _ in client.receive_response():
                    pass

        await asyncio.gather(*map(one, range(count)))
        return self._answered - began

    def _another(self, folder: str) -> ClaudeSDKClient:
        """Another CLI, which works in a folder of its own."""
        return ClaudeSDKClient(replace(self._options(), cwd=self._folder(folder)))

    async def _allow(
        self, _name: str, given: dict[str, Any], _context: ToolPermissionContext
    ) -> PermissionResultAllow:
        self._asked = time.perf_counter()
        await asyncio.sleep(self._settle_s)
        self._answered_ns, self._answered = time.time_ns(), time.perf_counter()
        return PermissionResultAllow(updated_input=given)

    def _folder(self, name: str) -> Path:
        folder = Path(self._place["workspace"]) / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _options(self) -> ClaudeAgentOptions:
        return ClaudeAgentOptions(
            tools=list(TOOLS),
            system_prompt={"type": "preset", "preset": "claude_code", "append": ""},
            strict_mcp_config=True,
            permission_mode="default",
            cwd=self._folder("session"),
            setting_sources=[],
            settings=json.dumps({"permissions": {"ask": ["Bash"]}}),
            include_partial_messages=True,
            can_use_tool=self._allow,
            env=self._environment(),
            cli_path=bundled_cli(),
        )

    def _environment(self) -> dict[str, str]:
        return {
            "ANTHROPIC_BASE_URL": self._place["model_url"],
            "ANTHROPIC_API_KEY": self._place["token"],
            "CLAUDE_CONFIG_DIR": self._place["config_dir"],
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
            "CLAUDE_CODE_DISABLE_BACKGROUND_TASKS": "1",
            "CLAUDE_CODE_DISABLE_AUTO_MEMORY": "1",
            "CLAUDE_CODE_DISABLE_TERMINAL_TITLE": "1",
            # As in a sandbox: a first command waits for what the user's shell profile runs.
            "HOME": str(self._folder("home")),
            **({"IS_SANDBOX": "1"} if os.getuid() == 0 else {}),
        }


async def _main() -> None:
    bare = SdkBaseline(json.loads(await asyncio.to_thread(sys.stdin.readline)))
    await bare.connect()
    try:
        _say({"cli": __cli_version__})
        while line := await asyncio.to_thread(sys.stdin.readline):
            _say(await bare.answer(json.loads(line)))
    finally:
        await bare.close()


def _say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    asyncio.run(_main())
