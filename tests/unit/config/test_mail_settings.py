"""The settings of the mail server: an unusable one is refused by its name, and the password is kept apart."""

from pathlib import Path

import pytest

from claude_hitl_template.config import secret_files
from claude_hitl_template.config.settings import Settings
from claude_hitl_template.errors import ConfigError


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    monkeypatch.setenv("HITL_HOME", str(tmp_path))
    monkeypatch.setenv("HITL_SMTP_FROM", "hitl@example.org")
    return monkeypatch


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("smtp://user:canary@mail.example.org", "HITL_SMTP_PASSWORD"),
        ("https://mail.example.org", "must be smtps://"),
        ("smtp://", "must be smtps://"),
        ("smtp://mail.example.org:port", "HITL_SMTP_URL"),
    ],
)
def test_a_wrong_server_is_refused_without_its_password(
    chosen: pytest.MonkeyPatch, url: str, why: str
) -> None:
    chosen.setenv("HITL_SMTP_URL", url)
    with pytest.raises(ConfigError, match=why) as caught:
        Settings.load()
    assert "canary" not in str(caught.value)


def test_a_server_needs_a_sender_and_its_password_is_a_file(chosen: pytest.MonkeyPatch) -> None:
    chosen.setenv("HITL_SMTP_URL", "smtps://user@mail.example.org")
    chosen.setenv("HITL_SMTP_PASSWORD", "canary")
    settings = Settings.load()
    secret_files.prepare(settings)
    kept = secret_files.read_smtp_password(settings)
    assert kept is not None
    assert kept.get_secret_value() == "canary"
    chosen.delenv("HITL_SMTP_PASSWORD")
    secret_files.prepare(Settings.load())
    assert secret_files.read_smtp_password(settings) is None
    chosen.delenv("HITL_SMTP_FROM")
    with pytest.raises(ConfigError, match="HITL_SMTP_FROM"):
        Settings.load()
