"""The choice of the processes that a chaos run strikes."""

import subprocess
from types import SimpleNamespace
from typing import Any

import psutil

from claude_hitl_template.domain.models import new_id, transcript_id
from tests.chaos.victims import Victims

# A process that starts another one with the same arguments, as a sandbox does with the CLI, and waits for it.
SANDBOX = 'sh -c "echo there; read -r line" "$0"; true'


def test_the_cli_itself_is_struck_and_not_its_sandbox():
    session_id = new_id("sesn")
    service: Any = SimpleNamespace(head=psutil.Process)
    victims = Victims(service, lambda: [session_id])
    command = ["sh", "-c", SANDBOX, transcript_id(session_id)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as sandbox:
        assert sandbox.stdin is not None
        assert sandbox.stdout is not None
        assert sandbox.stdout.readline() == b"there\n"
        assert len(victims.clis()) == 2
        [(struck, whose)] = victims.find("CLI")
        assert (struck.ppid(), whose) == (sandbox.pid, session_id)
        sandbox.stdin.close()
