"""An approved command in a session's sandbox reaches nothing of the machine and nothing of the service."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import claude_hitl_template
from claude_hitl_template.config.addresses import is_public
from claude_hitl_template.domain.models import ApprovalState
from tests.acceptance import probe
from tests.contract.test_layers import bash, script
from tests.contract.test_session import KEY, driven, house, model_url, user

__all__ = ["model_url"]

SECRET = "canary-7d1e40-of-the-service"
SERVICES = ("GCS", "the dashboard", "Ray Client", "Serve", "the panel")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="there are sandboxes on Linux alone")


@dataclass
class Victims:
    """Targets that this test started for the probes: listeners, sockets, files and a process with a secret."""

    targets: dict[str, Any]
    listeners: list[socket.socket]

    def reached(self) -> int:
        """How many connections the listeners got, whatever the probes made of them."""
        return sum(_is_waiting(one) for one in self.listeners)


def _is_waiting(listener: socket.socket) -> bool:
    listener.setblocking(False)
    try:
        listener.accept()[0].close()
    except BlockingIOError:
        return False
    return True


@pytest.fixture
def victims(tmp_path: Path) -> Iterator[Victims]:
    others = tmp_path / "others"
    others.mkdir()
    with contextlib.ExitStack() as stack:
        ports: dict[str, int] = {}
        listeners: list[socket.socket] = []
        for name in SERVICES:
            listener = stack.enter_context(socket.create_server(("0.0.0.0", 0)))
            ports[name] = listener.getsockname()[1]
            listeners.append(listener)
        own = stack.enter_context(socket.socket(socket.AF_UNIX))
        own.bind(str(others / "sock"))
        own.listen()
        abstract = stack.enter_context(socket.socket(socket.AF_UNIX))
        abstract.bind(f"\0hitl-probe-{os.getpid()}")
        abstract.listen()
        listeners += [own, abstract]
        files = {
            "a key": others / "key",
            "a database": others / "hitl.sqlite3",
            "another's file": others / "note",
        }
        for path in files.values():
            path.write_text(SECRET)
            path.chmod(0o666)
        others.chmod(0o777)
        sleeping = subprocess.Popen(["sleep", "600"], env={"SECRET": SECRET, "PATH": os.environ["PATH"]})
        stack.callback(sleeping.wait)
        stack.callback(sleeping.kill)
        code = {"the code of the gate": probe_of("session/gate.py"), "this checkout": Path(__file__)}
        targets = {
            "addresses": ["127.0.0.1", outer_address()],
            "ports": ports,
            "unix": {"another process": str(others / "sock")},
            "abstract": {"another process": f"hitl-probe-{os.getpid()}"},
            "files": {name: str(path) for name, path in {**files, **code}.items()},
            "secrets": [SECRET, "token"],
            "pids": {"a process with a secret": sleeping.pid, "the owner": os.getpid()},
            "hostname": socket.gethostname(),
        }  # fmt: skip
        yield Victims(targets, listeners)


def probe_of(path: str) -> Path:
    return Path(claude_hitl_template.__file__).parent / path


def outer_address() -> str:
    """Returns an address of this machine other than loopback, if there is one. Sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        try:
            one.connect(("192.0.2.1", 9))
        except OSError:
            return "127.0.0.2"
        return str(one.getsockname()[0])


def test_the_probes_find_what_there_is_where_there_is_no_sandbox(victims: Victims):
    """Otherwise they could fail in a sandbox for another reason."""
    tried = dict(probe.attempts(victims.targets))
    assert len(tried) >= 300
    there = [
        name
        for name in tried
        if name.startswith(("connect to", "socket of", "abstract", "read a", "environment of a"))
    ]
    assert len(there) == 2 * len(SERVICES) + 1 + 1 + 3 + 1
    assert [name for name in there if not probe.came_to_something(tried[name])] == []
    assert victims.reached() == len(SERVICES) + 2


@pytest.mark.slow
async def test_an_approved_command_reaches_nothing(tmp_path: Path, model_url: str, victims: Victims):
    targets = {**victims.targets, "secrets": [SECRET]}
    steps = script({"tools": [bash("python3 probe.py targets.json")]}, {"text": "The model answers."})
    h = await house(tmp_path / "session", model_url, steps, hot_s=600)
    h.patience_s = 300
    h.workspace.mkdir(parents=True)
    shutil.copy(probe.__file__, h.workspace / "probe.py")
    (h.workspace / "targets.json").write_text(json.dumps(targets))
    async with driven(h):
        [event_id] = (await h.until_idle())["event_ids"]
        await h.confirm(event_id)  # the owner ends with the turn, and `driven` waits for that
    # Hosts that the probes wanted to reach are asked for, and nothing else is.
    assert (await h.until_idle())["type"] == "requires_action"
    waiting = (await h.store.list_approvals(KEY, limit=100, states=[ApprovalState.PENDING])).data
    assert {a.kind for a in waiting} == {"network"}
    hosts = {a.input["host"] for a in waiting}
    assert all(host == "example.org" or is_public(host) for host in hosts), hosts
    [result] = [e for e in await h.log("agent.tool_result") if e.payload["tool_use_id"] == event_id]
    said = result.payload["content"][0]["text"].splitlines()
    # That the proxy and the model answer shows that nothing was refused because nothing worked.
    assert victims.reached() == 0
    assert said == ["the proxy answers", f"tried {len(list(probe.attempts(targets)))}"], "\n".join(said)
    assert "The model answers." in await h.said()


@pytest.mark.slow
async def test_what_a_command_leaves_in_a_repository_runs_in_no_process_but_a_command(
    tmp_path: Path, model_url: str
):
    """git runs the programs that a repository's settings name, and the CLI calls git outside of a command's scope."""
    settings = ("core.fsmonitor", "core.pager", "core.sshCommand", "diff.external", "filter.left.clean")
    plant = (
        "git init -q . && printf '#!/bin/sh\\ntouch \"$0.ran\"\\nexit 1\\n' > left && chmod +x left && "
        + " && ".join(f'git config {name} "$PWD/left"' for name in settings)
        + " && git config core.hooksPath . && cp left post-checkout && cp left pre-commit && "
        "echo '* filter=left' > .gitattributes && touch new && rm -f *.ran && ls -a"
    )
    read = {"name": "Read", "input": {"file_path": "new"}}
    h = await house(tmp_path, model_url, script({"tools": [bash(plant)]}), hot_s=600)
    async with driven(h):
        [event_id] = (await h.until_idle())["event_ids"]
        await h.confirm(event_id)
    assert (h.workspace / ".git").is_dir()
    assert (h.workspace / "left").is_file()
    await h.send(user(script({"tools": [read]}, {"text": "read"})))
    await h.drive()
    assert "read" in await h.said()
    assert not list(h.workspace.rglob("*.ran"))
    # A command that calls git runs them, which shows that they are in place.
    await h.send(user(script({"tools": [bash("git status; git diff; ls")]})))
    async with driven(h):
        [event_id] = (await h.until_idle())["event_ids"]
        await h.confirm(event_id)
    assert list(h.workspace.rglob("*.ran"))
