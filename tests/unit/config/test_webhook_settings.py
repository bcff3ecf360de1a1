"""The hosts that webhooks and sessions may reach at private addresses."""

from pathlib import Path

import pytest

from claude_hitl_template.config.settings import Settings, variable
from claude_hitl_template.errors import ConfigError


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(variable(name), raising=False)
    monkeypatch.setenv("HITL_HOME", str(tmp_path))


def test_hosts_are_separated_by_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings.load().webhook_hosts == ()
    monkeypatch.setenv("HITL_WEBHOOK_PRIVATE_HOSTS", "hooks.corp:8080, *.lab.corp,10.0.0.7")
    assert Settings.load().webhook_hosts == ("hooks.corp:8080", "*.lab.corp", "10.0.0.7")


def test_sessions_of_the_default_environment_alone_reach_the_private_hosts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where HITL_ENVIRONMENTS describes the default environment; each other one lists its own."""
    monkeypatch.setenv("HITL_PRIVATE_HOSTS", "localhost:9000, *.lab.corp")
    monkeypatch.setenv("HITL_ENVIRONMENTS", '{"other": {}}')
    found = Settings.load().all_environments()
    assert found["default"].networking.private_hosts == ("localhost:9000", "*.lab.corp")
    assert found["default"].networking.declares("localhost", 9000)
    assert found["other"].networking.private_hosts == ()
    monkeypatch.setenv("HITL_ENVIRONMENTS", '{"default": {"networking": {"private_hosts": ["10.0.0.7"]}}}')
    assert Settings.load().all_environments()["default"].networking.private_hosts == (
        "10.0.0.7", "localhost:9000", "*.lab.corp",
    )  # fmt: skip


@pytest.mark.parametrize("setting", ["HITL_WEBHOOK_PRIVATE_HOSTS", "HITL_PRIVATE_HOSTS"])
@pytest.mark.parametrize("hosts", ["https://hooks.corp", "a b", "hooks.corp:99999999"])
def test_what_is_no_host_is_refused_at_start_with_the_setting(
    monkeypatch: pytest.MonkeyPatch, hosts: str, setting: str
) -> None:
    monkeypatch.setenv(setting, hosts)
    with pytest.raises(ConfigError, match=setting):
        Settings.load()
