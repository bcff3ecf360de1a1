"""Settings of the sign-in: a wrong one is named by its variable, and no secret is repeated."""

from pathlib import Path

import pytest

from claude_hitl_template.config.secret_files import (
    ADMIN_PASSWORD,
    OIDC_SECRET,
    SENT_OIDC_SECRET,
    prepare,
    read_admin_password,
    read_oidc_secret,
    write_secret,
)
from claude_hitl_template.config.settings import Settings
from claude_hitl_template.errors import ConfigError

GOOD = {"HITL_OIDC_ISSUER": "https://id.example.org/realms/main", "HITL_OIDC_CLIENT_ID": "hitl"}


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    monkeypatch.setenv("HITL_HOME", str(tmp_path))
    for name, value in GOOD.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


@pytest.mark.usefixtures("chosen")
def test_the_issuer_is_kept_to_the_letter() -> None:
    assert Settings.load().oidc_issuer == GOOD["HITL_OIDC_ISSUER"]
    assert Settings.load().pages_url == "http://127.0.0.1:8001/claude-hitl"


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("HITL_OIDC_ISSUER", "http://id.example.org", "must begin with https://"),
        ("HITL_OIDC_ISSUER", "id.example.org", "must begin with https://"),
        ("HITL_OIDC_ISSUER", "https://user:canary@id.example.org", "holds credentials"),
        ("HITL_OIDC_ISSUER", "https://id.example.org/?a=b", "without a query"),
        ("HITL_OIDC_CLIENT_ID", "", "HITL_OIDC_ISSUER needs HITL_OIDC_CLIENT_ID"),
        ("HITL_OIDC_ROLES", "approvers=approver", "'approvers=approver' is not GROUP=WORKSPACE:ROLE"),
        ("HITL_OIDC_ROLES", "a=default:boss", "there is no role 'boss'"),
        ("HITL_PUBLIC_URL", "https://hitl.example.org/claude-hitl", "must be http://HOST:PORT"),
        ("HITL_PUBLIC_URL", "hitl.example.org", "must be http://HOST:PORT"),
    ],
)
def test_what_is_wrong_is_named(chosen: pytest.MonkeyPatch, name: str, value: str, says: str) -> None:
    chosen.setenv(name, value)
    with pytest.raises(ConfigError) as raised:
        Settings.load()
    assert says in str(raised.value)
    assert name in str(raised.value)
    assert "canary" not in str(raised.value)


def test_the_client_secret_is_in_a_file_and_goes_with_its_setting(chosen: pytest.MonkeyPatch) -> None:
    chosen.setenv("HITL_OIDC_CLIENT_SECRET", "canary")
    settings = Settings.load()
    prepare(settings)
    file = settings.secrets_dir / OIDC_SECRET
    assert file.stat().st_mode & 0o077 == 0
    found = read_oidc_secret(settings)
    assert found is not None
    assert found.get_secret_value() == "canary"
    assert "canary" not in repr(settings)
    write_secret(settings.secrets_dir / SENT_OIDC_SECRET, "sent")
    sent = read_oidc_secret(settings)
    assert sent is not None
    assert sent.get_secret_value() == "sent"
    (settings.secrets_dir / SENT_OIDC_SECRET).unlink()
    chosen.delenv("HITL_OIDC_CLIENT_SECRET")
    prepare(Settings.load())
    assert read_oidc_secret(settings) is None


@pytest.mark.usefixtures("chosen")
def test_the_first_users_password_is_made_once() -> None:
    settings = Settings.load()
    assert read_admin_password(settings) is None
    prepare(settings)
    made = read_admin_password(settings)
    assert made is not None
    assert len(made) >= 16
    assert (settings.secrets_dir / ADMIN_PASSWORD).stat().st_mode & 0o077 == 0
    prepare(settings)
    assert read_admin_password(settings) == made
