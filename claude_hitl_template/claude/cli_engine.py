"""The engine that drives the real Claude Code CLI, through the Claude Agent SDK."""

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import claude_agent_sdk
import structlog
from claude_agent_sdk import (
    ClaudeAgentOptions,
    ClaudeSDKClient,
    ClaudeSDKError,
    CLIJSONDecodeError,
    HookMatcher,
    McpServerConfig,
    PermissionResultAllow,
    PermissionResultDeny,
    ProcessError,
    ToolPermissionContext,
)
from claude_agent_sdk._cli_version import __cli_version__ as PINNED_CLI  # noqa: N812 - it is a constant
from claude_agent_sdk._errors import MessageParseError

from claude_hitl_template.claude import sandbox
from claude_hitl_template.claude.egress import Egress
from claude_hitl_template.claude.layers import POLICY, Layers
from claude_hitl_template.claude.messages import Reader
from claude_hitl_template.claude.outlets import Outlets
from claude_hitl_template.claude.report import report_server
from claude_hitl_template.claude.sandbox import LAUNCHER, SandboxConfig, default_sandbox
from claude_hitl_template.claude.starts import turn_to_start
from claude_hitl_template.claude.transcripts import TranscriptStore
from claude_hitl_template.claude.user_text import COMMANDS, MENTIONS_OFF, as_said, usable_commands
from claude_hitl_template.domain import missing_dependency
from claude_hitl_template.domain.models import Session
from claude_hitl_template.domain.policy import PermissionPolicy, compile_settings
from claude_hitl_template.domain.policy.floor import BUILT_IN, Floor
from claude_hitl_template.errors import EngineError, HitlError
from claude_hitl_template.session.engine import EngineEvent, Moment, ServerDown, ToolResult, ToolUse
from claude_hitl_template.session.gate import Answer, Gate
from claude_hitl_template.store.protocol import Owners

log = structlog.get_logger()

# Everything the agent can be offered. Tools that outlive a turn (schedules, background work) are left out: a parked
# session has no process that could carry them.
TOOLS = (
    "Bash", "Read", "Write", "Edit", "NotebookEdit", "Glob", "Grep", "WebFetch", "WebSearch",
    "Agent", "AskUserQuestion", "EnterPlanMode", "ExitPlanMode", "Skill",
)  # fmt: skip
HOOK_TIMEOUT_S = 400 * 86400  # the gate decides how long a call waits, not the hook
STDERR_LINES = 20
WATCH_S = 1.0
SET_BY_SDK = ("CLAUDE_AGENT_SDK_VERSION",)  # always set, independent of the environment
# The CLI asks the model again after 0.5, 1, 2, 4, 8, 16 and 32 s, or when a `retry-after` of up to a minute says:
# a model that cannot be reached ends the turn after 65 to 80 s, and one that limits the rate after 7 minutes at most.
MODEL_RETRIES = 7
BUSY_S = 2.0  # after its start a CLI is counted as busy for so long at most
RESPONSE_S = 5.0  # of a CLI that waits for its session; it takes a few milliseconds
START_TIMEOUT_S = 45.0  # it takes a third of a second, or a few seconds on a busy machine
VERSION_TIMEOUT_S = 15.0
LEAST_CLI = "2.1.317"  # older versions let a call pass if the hook that must ask fails; measured on 2.1.316 and 2.1.317
# Set in `--settings` as well: the environment that a layer's settings file sets would replace the process's own.
FIXED = {
    **MENTIONS_OFF,
    "CLAUDE_BASH_MAINTAIN_PROJECT_WORKING_DIR": "1",  # every command starts in the workspace, independent of an earlier `cd`
}
SIGNALLED = 128  # exit statuses from here on mean that a signal ended the process
FIX_UNREADABLE = (
    "Make the program that HITL_CLI_PATH names readable and executable for all users (chmod a+rx), then send your "
    "message again"
)
FIX_CLI = (
    "set HITL_CLI_PATH to a Claude Code CLI that works, or leave it empty for the one that comes with the dependencies "
    "(./hitl up installs them), start the service again, and send your message again"
)


@dataclass(frozen=True)
class CliConfig:
    """Configuration of the CLI. `token` is valid for the model endpoint at `model_url` only.

    With `layers`, the image's settings, commands, skills and plugins are in force; without, no settings file is read.
    Without a `sandbox`, the agent has all permissions of this process. In `starts` the CLIs of a machine take turns in
    starting; without, one starts at once.
    """

    workspace: Path
    config_dir: Path
    model_url: str
    token: str
    cli_path: Path | None = None
    layers: Layers | None = None
    sandbox: SandboxConfig | None = field(default_factory=default_sandbox)
    starts: Path | None = None

    @property
    def cli(self) -> Path:
        return self.cli_path or bundled_cli()


def is_plan_folder(config_dir: Path) -> Callable[[Path], bool]:
    """Whether plan mode keeps drafts there: in the CLI's config folder, which a resume recreates under TMPDIR."""
    temporary = Path(tempfile.gettempdir()).resolve()

    def check(folder: Path) -> bool:
        parent = folder.parent
        resumed = parent.parent == temporary and parent.name.startswith("claude-resume-")
        return folder.name == "plans" and (parent == config_dir.resolve() or resumed)

    return check


def bundled_cli() -> Path:
    return Path(claude_agent_sdk.__file__).parent / "_bundled" / "claude"


def check_cli(path: Path) -> None:
    """Raises EngineError with the fix unless `path` is a CLI that the SDK can drive. Blocking."""
    if not path.is_file() or not os.access(path, os.X_OK):
        raise EngineError(f"there is no program at {path}; {FIX_CLI}", retryable=False)
    if path != bundled_cli():  # that one was built for the SDK
        changed = path.stat()
        _check_version(path, changed.st_mtime_ns, changed.st_size)


@lru_cache(maxsize=8)
def _check_version(path: Path, _changed_ns: int, _size_bytes: int) -> None:
    version = _version(path)
    found = re.match(r"(\d{1,9})\.(\d{1,9})\.(\d{1,9})\b", version)
    if found is None:
        raise EngineError(
            f"{path} does not print its version but {version[:200]!r}; {FIX_CLI}", retryable=False
        )
    if [int(part) for part in found.groups()] < [int(part) for part in LEAST_CLI.split(".")]:
        raise EngineError(
            f"the Claude Code CLI at {path} is {found[0]}, and {LEAST_CLI} is the oldest that can be used; {FIX_CLI}",
            retryable=False,
        )
    if found[0] != PINNED_CLI:
        log.warning(
            "this CLI is not the one that was tested", path=str(path), version=found[0], tested=PINNED_CLI
        )


def _version(path: Path) -> str:
    """The output of `--version`. Written to a file, because a child process of the CLI could keep a pipe open."""
    with tempfile.TemporaryFile() as output:
        asked = subprocess.Popen(  # noqa: S603 - the operator's own setting
            [LAUNCHER, "--version"],
            env={**os.environ, **sandbox.launch_plan(path, ())},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            asked.wait(VERSION_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(asked.pid, signal.SIGKILL)
            asked.wait()
            return f"nothing for {VERSION_TIMEOUT_S:g} s"
        output.seek(0)
        return output.read(4096).decode(errors="replace").strip()


def _make_workspace(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EngineError(
            f"the session's workspace {folder} cannot be used: {error.strerror}. Make it a folder that the service may "
            "write (or remove what is in its place), then send your message again",
            retryable=False,
        ) from error


def launch_environment(config: CliConfig, outlets: Outlets | None = None) -> dict[str, str]:
    """The environment of LAUNCHER. Of the service's own environment, only variables of the operating system are passed on
    to the CLI."""
    own = {
        "ANTHROPIC_BASE_URL": config.model_url,
        "ANTHROPIC_API_KEY": config.token,
        "CLAUDE_CONFIG_DIR": str(config.config_dir),
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "CLAUDE_CODE_DISABLE_BACKGROUND_TASKS": "1",
        "CLAUDE_CODE_DISABLE_AUTO_MEMORY": "1",
        "CLAUDE_CODE_DISABLE_TERMINAL_TITLE": "1",
        "CLAUDE_CODE_MAX_RETRIES": str(MODEL_RETRIES),
        **sandbox.JAVASCRIPT,
        **FIXED,
        "CLAUDE_AGENT_SDK_CLIENT_APP": "claude-hitl",
        # Set by the SDK if they are not there already: an operator's own values would stay.
        "CLAUDE_CODE_ENTRYPOINT": "sdk-py",
        "CLAUDE_CODE_SDK_READS_SESSION_STATE": "1",
        **(outlets.environment() if outlets else {"IS_SANDBOX": "1"} if os.getuid() == 0 else {}),
    }
    plan = sandbox.launch_plan(
        config.cli,
        [*own, *SET_BY_SDK],
        user_layer=config.layers.user if config.layers else None,
        sandbox=outlets.plan() if outlets else None,
    )
    return {**own, **plan}


class CliEngine:
    """Drives one CLI.

    Without a gate it starts before its session is assigned to this owner: until `bind`, the CLI gets no message, each of
    its calls is denied, its sandbox has no way out, and `transcripts` must have no store. `floor` is the gate's.
    """

    def __init__(
        self,
        session: Session,
        gate: Gate | None,
        transcripts: TranscriptStore,
        config: CliConfig,
        *,
        floor: Floor = BUILT_IN,
    ) -> None:
        self._session, self._gate, self._transcripts, self._config = session, gate, transcripts, config
        self._floor = floor if gate is None else gate.floor
        self._client: ClaudeSDKClient | None = None
        self._commands = COMMANDS
        # Among the CLIs that start. It is kept until the CLI asks the model or runs a call, which a resumed one may do
        # before it is connected: so far it keeps a CPU busy.
        self._place = ExitStack()
        self._outlets = self._make_outlets()
        self._stderr: deque[str] = deque(maxlen=STDERR_LINES)
        self._watching: asyncio.Task[None] | None = None
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def bind(self, session: Session, gate: Gate, store: Owners, token: str) -> None:
        """Assigns the session whose id, agent and environment it was started with, under the present lease."""
        self._session, self._gate = session, gate
        self._transcripts.bind(store)
        if self._outlets is not None:
            self._outlets.bind(token, gate.hosts)

    async def responds(self) -> bool:
        """Whether the CLI of a started engine answers."""
        if self._client is None or self._failed.done():
            return False
        asking = asyncio.create_task(self._client.get_mcp_status())
        await asyncio.wait({asking}, timeout=RESPONSE_S)
        if not asking.done():
            asking.cancel()
            return False
        return asking.exception() is None

    async def start(self, *, resume: bool, plan_mode: bool) -> None:
        if self._client is not None:
            if resume:
                raise EngineError("the CLI was started for a new session, and this one has a transcript")
            return
        await asyncio.to_thread(_make_workspace, self._config.workspace)
        await asyncio.to_thread(check_cli, self._config.cli)
        if self._config.layers is not None:
            self._bound.hold_to(await asyncio.to_thread(self._config.layers.settle, self._config.config_dir))
        try:
            await self._open_outlets()
            if self._config.starts is not None:
                self._place.enter_context(await turn_to_start(self._config.starts))
            await self._connect(resume=resume, plan_mode=plan_mode)
        except BaseException:
            self._place.close()
            await self._close_outlets()
            raise
        # Without a gate it has nothing to do yet; without outlets nothing shows when it asks the model.
        counted_s = 0.0 if self._gate is None or self._outlets is None else BUSY_S
        asyncio.get_running_loop().call_later(counted_s, self._place.close)

    async def _connect(self, *, resume: bool, plan_mode: bool) -> None:
        client = ClaudeSDKClient(self._options(resume=resume, plan_mode=plan_mode))
        try:
            await asyncio.wait_for(client.connect(), START_TIMEOUT_S)
        except TimeoutError as error:
            raise EngineError(
                f"the Claude Code CLI said nothing for {START_TIMEOUT_S:g} s after its start; {FIX_CLI}"
                f"{self._last_words()}",
                retryable=False,
            ) from error
        except (ClaudeSDKError, OSError, RuntimeError) as error:
            if why := self._over_memory():
                raise EngineError(why, retryable=False) from error
            status = error.exit_code if isinstance(error, ProcessError) else None
            if sandbox.refused(self._stderr):
                why = f"no sandbox can be made for the session: {self._stderr[-1]}. {sandbox.FIX}"
                raise EngineError(why, retryable=False) from error
            if sandbox.cannot_run(self._stderr):
                why = (
                    f"the agent's user may not run the Claude Code CLI: {self._stderr[-1]}. {FIX_UNREADABLE}"
                )
                raise EngineError(why, retryable=False) from error
            raise EngineError(
                f"the Claude Code CLI did not start: {error}{self._last_words()}",
                retryable=status is None or status < 0 or status >= SIGNALLED,
            ) from error
        self._client = client
        self._commands = usable_commands((await client.get_server_info() or {}).get("commands") or ())

    async def say(self, message_uuid: str, content: list[dict[str, Any]]) -> None:
        async def one() -> AsyncIterator[dict[str, Any]]:
            servers = (*self._session.agent.mcp_servers, missing_dependency.SERVER)
            literal = as_said(content, self._commands, servers)
            message = {"role": "user", "content": literal}
            yield {"type": "user", "uuid": message_uuid, "message": message, "parent_tool_use_id": None}

        if self._outlets is not None:
            self._outlets.new_turn()
        try:
            await self._connected().query(one())
        except (ClaudeSDKError, OSError) as error:
            raise EngineError(f"the Claude Code CLI has ended: {error}{self._last_words()}") from error

    async def events(self) -> AsyncIterator[EngineEvent]:
        reader = Reader(self._session.transcript_id)
        try:
            async for message in _until(self._connected().receive_messages(), self._failed):
                for event in reader.read(message):
                    yield event if self._outlets is None else self._seen_by(self._outlets.egress, event)
        except (MessageParseError, CLIJSONDecodeError) as error:  # a new process would get the same message
            raise EngineError(
                f"a message of the Claude Code CLI is not understood: {error}", retryable=False
            ) from error
        except (ClaudeSDKError, OSError) as error:
            if why := self._over_memory():
                raise EngineError(why, retryable=False) from error
            raise EngineError(f"the Claude Code CLI ended: {error}{self._last_words()}") from error
        raise EngineError(f"the Claude Code CLI ended without a message{self._last_words()}")

    def _seen_by(self, egress: Egress, event: EngineEvent) -> EngineEvent:
        """The event, with what the proxy knows about it. A WebFetch call that has its result opens no host any more."""
        if isinstance(event, ToolResult):
            egress.shut(event.call_id)
        if isinstance(event, ServerDown) and (server := self._session.agent.mcp_servers.get(event.name)):
            return replace(event, why=egress.why_unreached(str(server["url"])))
        return event

    async def interrupt(self) -> None:
        client = self._connected()
        try:
            await client.interrupt()
        except Exception as error:  # the SDK raises nothing narrower when the CLI refuses, or does not answer
            raise EngineError(f"the Claude Code CLI did not take the interrupt: {error}") from error

    async def stop(self) -> None:
        client, self._client = self._client, None
        self._place.close()
        if client is None:
            return
        ending = asyncio.create_task(self._end(client))
        try:
            await asyncio.shield(ending)
        except asyncio.CancelledError:  # a process that is half ended would be left behind
            await ending
            raise

    async def _end(self, client: ClaudeSDKClient) -> None:
        try:
            await client.disconnect()
        except (ClaudeSDKError, OSError) as error:  # it has ended already
            log.info("cli ended before it was stopped", session=self._session.id, why=str(error))
        await self._close_outlets()
        await asyncio.to_thread(shutil.rmtree, self._config.config_dir, True)

    # -- the sandbox

    def _make_outlets(self) -> Outlets | None:
        config = self._config
        if config.sandbox is None:
            return None
        layers = config.layers
        seen = (
            (layers.user, *layers.plugins, *layers.readable)
            if layers and not config.sandbox.contained
            else ()
        )
        return Outlets(
            replace(config.sandbox, readable=(*config.sandbox.readable, *seen)),
            config.config_dir.with_name(f"{config.config_dir.name}.sandbox"),
            config.workspace,
            config.cli,
            url=config.model_url,
            token=config.token,
            servers=[str(server["url"]) for server in self._session.agent.mcp_servers.values()],
            hosts=None if self._gate is None else self._gate.hosts,
            on_request=self._place.close,
        )

    async def _open_outlets(self) -> None:
        if self._outlets is None:
            log.warning("this session runs without a sandbox", session=self._session.id)
            return
        try:
            await asyncio.to_thread(sandbox.give, self._config.workspace)
            await self._outlets.open()
            self._watching = asyncio.create_task(self._watch_memory(self._outlets))
        except OSError as error:
            raise EngineError(
                f"the session's sandbox cannot be prepared: {error}", retryable=False
            ) from error

    def _over_memory(self) -> str | None:
        """Why the kernel ended a process of the sandbox, if it did."""
        return None if self._outlets is None else self._outlets.over_memory()

    async def _watch_memory(self, outlets: Outlets) -> None:
        """The kernel ends a process of its own choice: the turn must not go on as if its command had only failed."""
        while (why := outlets.over_memory()) is None:  # noqa: ASYNC110 - the kernel counts, without a callback
            await asyncio.sleep(WATCH_S)
        log.warning("over its memory limit", session=self._session.id, why=why)
        if not self._failed.done():
            self._failed.set_exception(EngineError(why, retryable=False))

    async def _close_outlets(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        if self._outlets is not None:
            await self._outlets.close()

    def _connected(self) -> ClaudeSDKClient:
        if self._client is None:
            raise EngineError("the Claude Code CLI is not running")
        return self._client

    @property
    def _bound(self) -> Gate:
        if self._gate is None:
            raise EngineError("the session has not been assigned to this owner")
        return self._gate

    def _last_words(self) -> str:
        return "".join(f"\n  {line}" for line in self._stderr)

    def _denying(self) -> PermissionPolicy:
        """The agent's policy with the floor's rules: the CLI keeps its searches out of what is denied."""
        policy = self._session.agent.policy
        return policy.model_copy(update={"rules": (*policy.rules, *self._floor.rules)})

    def _options(self, *, resume: bool, plan_mode: bool) -> ClaudeAgentOptions:
        agent, layers = self._session.agent, self._config.layers
        tools = enabled_tools(agent.toolset)
        # "Task" is an old name of "Agent" that the CLI still takes.
        settings = {
            **compile_settings(self._denying(), [*tools, "Task"], list(agent.mcp_servers)),
            "env": FIXED | (self._outlets.fixed() if self._outlets else {}),
            "disableSkillShellExecution": True,
            "skipWebFetchPreflight": True,  # it asks a service of Anthropic about each domain, which sandboxes cannot reach
        }
        transcript_id = self._session.transcript_id
        return ClaudeAgentOptions(
            tools=tools,
            system_prompt={"type": "preset", "preset": "claude_code", "append": agent.system or ""},
            model=None if agent.model == "default" else agent.model,
            mcp_servers=self._servers(),
            strict_mcp_config=True,
            permission_mode="plan" if plan_mode else "default",
            cwd=self._config.workspace,
            setting_sources=["user", "project", "local"] if layers else [],
            plugins=[{"type": "local", "path": str(folder)} for folder in layers.plugins] if layers else [],
            extra_args={"managed-settings": json.dumps(POLICY)} if layers else {},
            settings=json.dumps(settings),
            session_id=None if resume else transcript_id,
            resume=transcript_id if resume else None,
            session_store=self._transcripts,
            session_store_flush="eager",
            include_partial_messages=True,
            can_use_tool=self._can_use_tool,
            hooks={
                "PreToolUse": [HookMatcher(hooks=[self._hook], timeout=HOOK_TIMEOUT_S, on_failure="block")],
                "PostToolUse": [HookMatcher(hooks=[self._after])],
                "PostToolUseFailure": [HookMatcher(hooks=[self._after])],
            },
            env=launch_environment(self._config, self._outlets),
            cli_path=LAUNCHER,
            stderr=self._stderr.append,
            max_buffer_size=64 * 1024 * 1024,
        )

    def _servers(self) -> dict[str, McpServerConfig]:
        servers: dict[str, McpServerConfig] = {
            name: {"type": "http", "url": str(c["url"])}
            for name, c in self._session.agent.mcp_servers.items()
        }
        return (
            servers
            if self._config.layers is None
            else {**servers, missing_dependency.SERVER: report_server()}
        )

    # -- what the CLI asks

    async def _hook(self, given: Any, tool_use_id: str | None, _context: Any) -> Any:
        use = ToolUse(
            tool_use_id or "", given["tool_name"], given["tool_input"], given.get("agent_id"), _moment(given)
        )
        answer = await self._ask(self._bound.before(use), use)
        return {
            "hookSpecificOutput": {
                "hookEventName": "PreToolUse",
                "permissionDecision": answer.behavior,
                "permissionDecisionReason": answer.message,
            }
        }

    async def _after(self, given: Any, _tool_use_id: str | None, _context: Any) -> Any:
        """Adds the proxy's refusals during the call for the model: the call's own output may not mention them."""
        refused = self._outlets.egress.refusals() if self._outlets is not None else []
        if not refused:
            return {}
        notice = "\n".join(["The proxy of this sandbox:", *refused])
        return {
            "hookSpecificOutput": {"hookEventName": given["hook_event_name"], "additionalContext": notice}
        }

    async def _can_use_tool(
        self, name: str, given: dict[str, Any], context: ToolPermissionContext
    ) -> PermissionResultAllow | PermissionResultDeny:
        use = ToolUse(context.tool_use_id or "", name, given, context.agent_id)
        answer = await self._ask(self._bound.permit(use), use)
        if answer.behavior == "allow":
            runs = given if answer.run_input is None else answer.run_input
            if name == "WebFetch" and self._outlets is not None:
                self._outlets.egress.open(use.call_id, str(runs.get("url", "")))
            self._place.close()
            return PermissionResultAllow(updated_input=runs)
        return PermissionResultDeny(message=answer.message)

    async def _ask(self, asking: Any, use: ToolUse) -> Answer:
        """A failing gate gives no answer and the call does not run; the next owner of the session asks again. A denial
        would stay in the transcript, and a human's later allow would have no effect."""
        try:
            return await asking
        except HitlError as error:
            log.warning("gate failed", session=self._session.id, call=use.call_id, why=str(error))
            if not self._failed.done():
                why = f"the service could not check whether {use.call_id} may run: {error}"
                self._failed.set_exception(EngineError(why))
            await asyncio.Event().wait()  # until the CLI is ended
            raise


def _moment(given: Mapping[str, Any]) -> Moment:
    """The CLI's state in a hook's input. Plans are next to its transcripts."""
    transcript = Path(given.get("transcript_path") or "")
    known = len(transcript.parents) > 2 and transcript.parents[1].name == "projects"
    return Moment(
        cwd=given["cwd"],
        plan_mode=given.get("permission_mode") == "plan",
        plans=transcript.parents[2] / "plans" if known else None,
    )


async def _until[T](messages: AsyncIterator[T], failed: "asyncio.Future[None]") -> AsyncIterator[T]:
    """The messages, until one fails or `failed` does, whose error is raised."""
    while True:
        coming = asyncio.ensure_future(anext(messages))
        try:
            await asyncio.wait({coming, failed}, return_when=asyncio.FIRST_COMPLETED)
            if failed.done():
                failed.result()
            yield coming.result()
        except StopAsyncIteration:
            return
        finally:
            if not coming.done():
                coming.cancel()


def enabled_tools(toolset: dict[str, Any] | None) -> list[str]:
    """The CLI's tools that an agent_toolset_20260401 enables; all of them without one."""
    if toolset is None:
        return list(TOOLS)
    default = bool((toolset.get("default_config") or {}).get("enabled", True))
    chosen = {c["name"]: bool(c.get("enabled", default)) for c in toolset.get("configs") or []}
    by_wire_name = {"web_fetch": "WebFetch", "web_search": "WebSearch"}
    named = {by_wire_name.get(name, name.capitalize()): on for name, on in chosen.items()}
    return [tool for tool in TOOLS if named.get(tool, default)]
