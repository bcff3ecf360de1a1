"""Ray lets in only who has the token of its data folder, whatever the user's shell and home say of another Ray."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import typer

from claude_hitl_template.cli.commands import status
from claude_hitl_template.cli.deploy import remote, rollout
from claude_hitl_template.cli.deploy.cluster import Cluster
from claude_hitl_template.cli.host import service
from claude_hitl_template.cli.host.processes import authenticate, panel_environment, ray_environment
from claude_hitl_template.config.secret_files import prepare, ray_token_file, read_ray_token
from claude_hitl_template.config.settings import Settings
from claude_hitl_template.errors import ConfigError
from tests.unit.cli.heads import started

type Make = Callable[..., Settings]


@pytest.fixture(autouse=True)
def _another_ray(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What a user has who works with another Ray, too."""
    (tmp_path / "home" / ".ray").mkdir(parents=True)
    (tmp_path / "home" / ".ray" / "auth_token").write_text("of-the-home")
    (tmp_path / "path").write_text("of-the-path")
    for name, value in {
        "HOME": str(tmp_path / "home"),
        "RAY_AUTH_MODE": "disabled",
        "RAY_AUTH_TOKEN": "of-the-shell",
        "RAY_AUTH_TOKEN_PATH": str(tmp_path / "path"),
        "RAY_ADDRESS": "ray://elsewhere:10001",
    }.items():
        monkeypatch.setenv(name, value)


def test_a_token_is_made_once_and_kept(make_settings: Make) -> None:
    settings = make_settings()
    assert read_ray_token(settings) is None
    prepare(settings)
    made = read_ray_token(settings)
    assert made is not None
    assert len(made) >= 32
    prepare(settings)
    assert read_ray_token(settings) == made
    assert ray_token_file(settings).stat().st_mode & 0o077 == 0


def test_rays_processes_and_the_panels_use_ours_and_no_other(make_settings: Make) -> None:
    settings = make_settings()
    prepare(settings)
    for environment in (ray_environment(settings), panel_environment(settings)):
        assert environment["RAY_AUTH_MODE"] == "token"
        assert environment["RAY_AUTH_TOKEN_PATH"] == str(ray_token_file(settings))
        assert "RAY_AUTH_TOKEN" not in environment
        assert environment["RAY_USAGE_STATS_REPORT_URL"] == "http://127.0.0.1:9/"
        assert str(read_ray_token(settings)) not in environment.values()
    assert "RAY_ADDRESS" not in ray_environment(settings)


def test_ray_itself_reads_ours(make_settings: Make) -> None:
    settings = make_settings()
    prepare(settings)
    code = (
        "import json\n"
        "from ray._raylet import AuthenticationTokenLoader, get_authentication_mode\n"
        "loader = AuthenticationTokenLoader.instance()\n"
        "print(json.dumps([loader.get_raw_token(), str(get_authentication_mode())]))\n"
    )
    said = subprocess.run(
        [sys.executable, "-c", code],
        env=ray_environment(settings),
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    token, mode = json.loads(said)
    assert (token, "TOKEN" in mode or mode.endswith("1")) == (read_ray_token(settings), True)


def test_the_token_of_this_machine_is_sent_to_no_other(make_settings: Make) -> None:
    prepare(make_settings())
    assert read_ray_token(make_settings(dashboard_url="http://elsewhere:8265")) is None
    elsewhere = make_settings(dashboard_url="http://elsewhere:8265", ray_token="t0ken")
    assert read_ray_token(elsewhere) == "t0ken"


def test_a_token_that_is_set_is_used_and_one_that_is_changed_restarts_ray(make_settings: Make) -> None:
    settings = make_settings(ray_token="one")
    prepare(settings)
    assert ray_token_file(settings).read_text() == "one"
    with started(settings):
        assert service.changed_settings(settings) == []
        changed = make_settings(ray_token="two")
        prepare(changed)
        assert service.changed_settings(changed) == ["HITL_RAY_TOKEN"]


@pytest.mark.parametrize("token", ["with space", "t\u00f6ken", "line\nbreak"])
def test_a_token_that_no_header_can_carry_is_refused_and_not_shown(make_settings: Make, token: str) -> None:
    with pytest.raises(ConfigError, match="HITL_RAY_TOKEN is not usable") as raised:
        make_settings(ray_token=token)
    assert token not in str(raised.value)


def test_a_deploy_hands_koco_the_token_in_a_file_of_its_own(make_settings: Make, tmp_path: Path) -> None:
    with_token = rollout._authentication(make_settings(ray_token="t0ken"), tmp_path)  # pyright: ignore[reportPrivateUsage]
    assert "t0ken" not in with_token.values()
    assert (with_token["RAY_AUTH_MODE"], Path(with_token["RAY_AUTH_TOKEN_PATH"]).read_text()) == (
        "token",
        "t0ken",
    )


def test_a_ray_without_a_token_is_deployed_to_without_one(
    make_settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HITL_RAY_TOKEN", raising=False)
    settings = make_settings()
    assert rollout._authentication(settings, tmp_path) == {"RAY_AUTH_MODE": "disabled"}  # pyright: ignore[reportPrivateUsage]


@pytest.mark.parametrize("token", [None, "t0ken"])
def test_ray_client_shows_the_token_that_is_known_and_no_other(
    make_settings: Make, monkeypatch: pytest.MonkeyPatch, token: str | None
) -> None:
    settings = make_settings(**({"ray_token": token} if token else {}))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(name, os.environ[name])  # as it was, after the test
    authenticate(settings)
    assert os.environ.get("RAY_AUTH_TOKEN") == token
    assert os.environ["RAY_AUTH_MODE"] == ("token" if token else "disabled")
    assert "RAY_AUTH_TOKEN_PATH" not in os.environ


def test_the_token_is_shown_where_the_other_secrets_are(make_settings: Make) -> None:
    settings = make_settings()
    prepare(settings)
    facts = {**status.gather(settings), "secrets": status._secrets(settings)}  # pyright: ignore[reportPrivateUsage]
    assert f"Ray's token {read_ray_token(settings)}" in status.describe(facts)


def test_a_ray_that_asks_for_none_is_named(
    make_settings: Make, answering: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    bodies = {"/api/authentication_mode": {"authentication_mode": "disabled"}}
    url = answering(200, {**bodies, "/claude-hitl/v1/health": {"code": "c0de"}})
    with closing(Cluster(url)) as cluster:
        assert cluster.asks_for_token() is False
    (check,) = remote.token_checks(asks=False)
    assert (check.level, "can run code there" in check.found) == ("wrong", True)
    assert not list(remote.token_checks(None))
    make_settings(dashboard_url=url, serve_url=url)
    with pytest.raises(typer.Exit):
        status.status(as_json=False, show_secrets=False, profile=None)
    assert "WARNING    Ray requires none" in capsys.readouterr().out
