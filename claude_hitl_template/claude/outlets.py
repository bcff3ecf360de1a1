"""The sockets that an owner serves to its sandbox, for as long as the CLI runs: the model and the proxy."""

import asyncio
import shutil
import socket
from collections.abc import Callable, Iterable
from pathlib import Path

from claude_hitl_template.claude import sandbox
from claude_hitl_template.claude.egress import Egress
from claude_hitl_template.claude.injection import Injector
from claude_hitl_template.claude.limits import ControlGroups, over_memory
from claude_hitl_template.claude.sandbox import SandboxConfig, SandboxPaths
from claude_hitl_template.model.socket import Budget, ModelSocket
from claude_hitl_template.session.hosts import HostGate

MODEL_URL = "http://model.hitl"  # a name for the CLI's requests; it is not looked up
PLACEHOLDER_KEY = "the-owner-has-the-token"


class Outlets:
    """The sockets of one CLI's sandbox. Call `open` first, and always `close`.

    Without `hosts` and a token, nothing gets out until `bind`. `on_request` is called when the CLI asks the model.
    """

    def __init__(
        self,
        config: SandboxConfig,
        run: Path,
        workspace: Path,
        cli: Path,
        *,
        url: str,
        token: str,
        servers: Iterable[str],
        hosts: HostGate | None,
        on_request: Callable[[], None],
    ) -> None:
        self._config = config
        self._places = SandboxPaths(run, workspace, cli)
        self._model = ModelSocket(
            url,
            token,
            Budget(config.requests, config.model_bytes),
            config.model_sockets,
            on_request=on_request,
        )
        self._injector = Injector(config.credentials, run)
        servers = servers if hosts is not None and hosts.allows_mcp_servers else ()
        self.egress = Egress(servers, hosts, self._injector, closed=config.closed)
        self._groups, self._joined = ControlGroups(), list[str]()
        self._taking: asyncio.Task[None] | None = None
        self._hand_over: socket.socket | None = None

    async def open(self) -> None:
        """Makes the sandbox's folders, and listens. Raises OSError."""
        places = self._places
        await asyncio.to_thread(sandbox.make_sandbox_paths, places.run, places.workspace, places.cli)
        await asyncio.to_thread(self._injector.make)
        self._joined = await asyncio.to_thread(self._groups.make, self._config.limits)
        model, hand_over = (socket.socket(socket.AF_UNIX) for _ in range(2))
        self._hand_over = hand_over  # a task that is cancelled before it starts closes nothing
        sandbox.bind(model, places.sockets / Path(sandbox.MODEL_SOCKET).name)
        sandbox.bind(hand_over, places.hand_over)
        await self._model.serve(model)
        self._taking = asyncio.create_task(self._take(hand_over))

    def plan(self) -> dict[str, object]:
        return sandbox.plan_of(self._config, self._places, self._joined)

    def environment(self) -> dict[str, str]:
        """The CLI's environment: the local socket in place of the model's URL and key."""
        return {
            **sandbox.environment_of(self._config),
            "ANTHROPIC_BASE_URL": MODEL_URL,
            "ANTHROPIC_API_KEY": PLACEHOLDER_KEY,
        }

    def fixed(self) -> dict[str, str]:
        """The variables that a settings file of an image must not override."""
        return sandbox.fixed(self._config)

    def bind(self, token: str, hosts: HostGate) -> None:
        """Opens the ways out of a sandbox that was made before its session was assigned."""
        self._model.token = token
        self.egress.bind(hosts)

    def new_turn(self) -> None:
        self._model.new_turn()

    def over_memory(self) -> str | None:
        """Why the session is stopped, once the kernel has ended a process of the sandbox at its memory limit."""
        limits = self._config.limits
        if not self._groups.ended_for_memory():
            return None
        return over_memory(limits.most_memory_bytes, limits.memory_bytes)

    async def close(self) -> None:
        if self._taking is not None:
            self._taking.cancel()
            await asyncio.gather(self._taking, return_exceptions=True)
        if self._hand_over is not None:
            self._hand_over.close()
        await self.egress.close()
        await self._model.close()
        await asyncio.to_thread(self._groups.remove)
        await asyncio.to_thread(shutil.rmtree, self._places.run, True)

    async def _take(self, hand_over: socket.socket) -> None:
        """Gets the socket that listens on the sandbox's loopback interface, and serves the proxy there."""
        with hand_over:
            hand_over.setblocking(False)
            loop = asyncio.get_running_loop()
            launcher, _ = await loop.sock_accept(hand_over)
        with launcher:
            launcher.setblocking(False)
            readable = asyncio.Event()
            loop.add_reader(launcher, readable.set)
            try:
                await readable.wait()
            finally:
                loop.remove_reader(launcher)
            _, descriptors, _, _ = socket.recv_fds(launcher, 1, 1)
        for descriptor in descriptors:
            listening = socket.socket(fileno=descriptor)
            listening.setblocking(False)
            await self.egress.serve(listening)
