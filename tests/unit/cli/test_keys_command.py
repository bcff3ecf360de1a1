"""`hitl keys` and `hitl workspaces`: keys are shown once, and roles are given by name."""

import re
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from claude_hitl_template.cli.app import app
from claude_hitl_template.config.settings import Settings
from claude_hitl_template.errors import ConfigError, Conflict, HitlError, InvalidInput, NotFound, Unauthorized
from claude_hitl_template.testing.threaded import Threaded

type Make = Callable[..., Settings]


def run(*arguments: str, group: str = "keys") -> str:
    """Runs a command and returns its output. Raises the command's errors."""
    result = CliRunner().invoke(app, [group, *arguments])
    if isinstance(result.exception, HitlError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def secret_in(said: str) -> str:
    (secret,) = re.findall(r"hitl_[\w-]{43}", said)
    return secret


def works(served: Threaded, key: str) -> bool:
    answer = httpx.get(f"{served.service.url}/v1/sessions", headers={"x-api-key": key}, timeout=30)
    return answer.status_code == 200


@pytest.mark.usefixtures("here")
def test_a_key_is_made_shown_once_listed_and_revoked(served: Threaded) -> None:
    said = run("create", "Bob's laptop")
    secret = secret_in(said)
    (key_id,) = re.findall(r"key_\w+", said)
    assert works(served, secret)
    (line,) = [line for line in run("list").splitlines() if key_id in line]
    assert "Bob's laptop" in line
    assert secret[:11] in line
    assert secret not in run("list")
    assert "is revoked" in run("revoke", key_id.removeprefix("key_")[:-1])
    (line,) = [line for line in run("list").splitlines() if key_id in line]
    assert "revoked" in line


def test_the_key_that_the_command_line_uses_is_replaced_never_revoked(
    served: Threaded, here: Settings
) -> None:
    (first,) = re.findall(r"(key_\w+) .* first key +\S+ +first key", run("list"))
    with pytest.raises(Conflict, match="hitl keys rotate"):
        run("revoke", first)
    said = run("rotate")
    assert str(here.secrets_dir / "api-key") in said
    assert works(served, secret_in(said))
    assert (served.service.folder / "api-key").read_text() == secret_in(said)


@pytest.mark.usefixtures("here")
def test_bad_input_says_what_is_wrong() -> None:
    for name in ("", "  "):
        with pytest.raises(InvalidInput, match="holder"):
            run("create", name)
    with pytest.raises(InvalidInput, match="name"):
        run("create", "x" * 101)
    for command in ("revoke", "rotate"):
        with pytest.raises(NotFound, match="key_none"):
            run(command, "key_none")
        with pytest.raises(InvalidInput, match="hitl keys list"):
            run(command, " ")


def test_where_a_setting_says_the_first_key_it_is_changed_there(here: Settings, make_settings: Make) -> None:
    make_settings(serve_port=here.serve_port, api_key="chosen")
    with pytest.raises(ConfigError, match="HITL_API_KEY"):
        run("rotate")


def test_elsewhere_an_administrators_key_opens_the_same(served: Threaded, make_settings: Make) -> None:
    make_settings(serve_url=served.service.url.removesuffix("/claude-hitl"), api_key="unknown")
    with pytest.raises(Unauthorized):
        run("list")


@pytest.mark.usefixtures("here")
def test_a_key_is_limited_by_roles_scopes_and_days(served: Threaded) -> None:
    made = secret_in(run("create", "limited", "--role", "viewer", "--scope", "read", "--days", "3"))
    headers = {"x-api-key": made}
    assert httpx.get(f"{served.service.url}/v1/sessions", headers=headers).status_code == 200
    body = {"agent": "default", "environment_id": "default"}
    assert httpx.post(f"{served.service.url}/v1/sessions", headers=headers, json=body).status_code == 403
    (line,) = [line for line in run("list").splitlines() if "limited" in line]
    assert re.search(r"until \d{4}-\d\d-\d\d, only read", line)


@pytest.mark.usefixtures("here")
def test_the_example_of_the_guide_runs_as_written() -> None:
    guide = (Path(__file__).parents[3] / "docs" / "people.md").read_text()
    lines = re.findall(r"^    \./hitl (\S+) (.*?)(?: +#.*)?$", guide, re.MULTILINE)
    assert len(lines) == 8
    said = dict[str, str]()
    for group, rest in lines:
        key_id = re.search(r"key_\w+", said.get("keys create robot", ""))
        words = [key_id[0] if key_id and word == "ID" else word for word in rest.split()]
        said[" ".join((group, *words[:2]))] = run(*words, group=group)
    assert "robot" in said["workspaces members --workspace"]
    assert "ann does not belong to research" in said["workspaces roles ann"]


@pytest.mark.usefixtures("here")
def test_workspaces_are_made_changed_and_given_members(served: Threaded) -> None:
    assert "wrkspc_" in run("create", "studies", group="workspaces")
    secret = secret_in(run("create", "helper", "--workspace", "studies"))
    assert "helper" in run("members", "--workspace", "studies", group="workspaces")
    assert "helper" not in run("members", group="workspaces")
    said = run("roles", "helper", "viewer", "approver", "--workspace", "studies", group="workspaces")
    assert "helper is viewer, approver in studies" in said
    body = {"agent": "default", "environment_id": "default"}
    answer = httpx.post(f"{served.service.url}/v1/sessions", headers={"x-api-key": secret}, json=body)
    assert answer.status_code == 403
    assert "requester" in answer.json()["error"]["message"]
    assert "separates duties" in run("set", "studies", "--separation-of-duties", group="workspaces")
    assert re.search(r"yes +studies", run("list", group="workspaces"))
    assert "does not belong" in run("roles", "helper", "--workspace", "studies", group="workspaces")


@pytest.mark.usefixtures("here")
def test_an_unknown_name_of_a_workspace_role_or_holder_is_named() -> None:
    with pytest.raises(InvalidInput, match="no workspace 'nowhere'"):
        run("create", "x", "--workspace", "nowhere")
    with pytest.raises(InvalidInput, match="unknown"):
        run("roles", "unknown", "viewer", group="workspaces")
    run("create", "one", group="workspaces")
    with pytest.raises(Conflict, match="one"):
        run("create", "one", group="workspaces")
    run("create", "known", "--workspace", "one")
    with pytest.raises(InvalidInput, match="roles"):
        run("roles", "known", "king", group="workspaces")
    with pytest.raises(InvalidInput, match="nothing to change"):
        run("set", "one", group="workspaces")
