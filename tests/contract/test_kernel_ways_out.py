"""The kernel's ways out of a sandbox other than files, processes and networks, tried in real sandboxes."""

import ctypes
import os
import sys
from pathlib import Path

import pytest

from claude_hitl_template.claude.syscall_filter import MACHINES
from tests.acceptance.probe import CALLS
from tests.sandboxed import run_in_sandbox

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or os.uname().machine not in MACHINES,
    reason="the filter is for Linux on these machines",
)
KEY = b"hitl-canary-key"
SESSION, JOIN, SEARCH = -3, 1, 10  # KEY_SPEC_SESSION_KEYRING, KEYCTL_JOIN_SESSION_KEYRING, KEYCTL_SEARCH


def syscall(name: str, *arguments: object) -> int:
    numbers = {
        **{name: by[os.uname().machine] for name, by in CALLS.items()},
        "add_key": MACHINES[os.uname().machine].absent[0],
    }
    return int(ctypes.CDLL(None).syscall(numbers[name], *arguments))


def test_keys_of_the_services_session_are_not_in_the_sandbox(tmp_path: Path):
    """Every child of a process inherits the session keyring, whatever its namespaces."""
    if (
        syscall("keyctl", JOIN, b"hitl-test") < 0
        or syscall("add_key", b"user", KEY, b"secret", 6, SESSION) < 0
    ):
        pytest.skip("this machine has no keyrings")
    search = f"""python3 -c '
import ctypes
print(ctypes.CDLL(None).syscall({CALLS["keyctl"][os.uname().machine]}, {SEARCH}, {SESSION}, b"user", b"{KEY.decode()}", 0))
'"""
    assert syscall("keyctl", SEARCH, SESSION, b"user", KEY, 0) > 0
    assert run_in_sandbox(tmp_path, search).strip() == "-1"


def test_no_socket_leads_round_the_network_namespace(tmp_path: Path):
    """AF_VSOCK leads to the host of a virtual machine from any namespace."""
    made = """python3 -c '
import socket
for family in (socket.AF_VSOCK, socket.AF_PACKET, 38, socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK):
    try:
        socket.socket(family, socket.SOCK_RAW if family == 16 else socket.SOCK_STREAM).close()
        print(int(family))
    except OSError:
        pass
'"""
    assert run_in_sandbox(tmp_path, made).split() == ["1", "2", "10", "16"]


def test_a_command_sees_none_of_the_cli_s_variables_in_its_scopes_own_process(tmp_path: Path):
    said = run_in_sandbox(tmp_path, "tr '\\0' '\\n' </proc/1/environ | cut -d= -f1")
    assert "CLAUDE_CONFIG_DIR" in said
    assert "ANTHROPIC" not in said
    assert "CLAUDE_CODE_SHELL_PREFIX" not in said
    assert "BUN_JSC" not in said
