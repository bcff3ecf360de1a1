"""The hosts that webhooks may reach at private addresses."""

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


@pytest.mark.parametrize("hosts", ["https://hooks.corp", "a b", "hooks.corp:99999999"])
def test_what_is_no_host_is_refused_at_start_with_the_setting(
    monkeypatch: pytest.MonkeyPatch, hosts: str
) -> None:
    monkeypatch.setenv("HITL_WEBHOOK_PRIVATE_HOSTS", hosts)
    with pytest.raises(ConfigError, match="HITL_WEBHOOK_PRIVATE_HOSTS"):
        Settings.load()
