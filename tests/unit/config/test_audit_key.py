"""The key that signs the audit log is made once, and is readable by the service's user only."""

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from claude_hitl_template.config.secret_files import AUDIT_KEY, audit_signer, prepare
from claude_hitl_template.config.settings import Settings
from claude_hitl_template.errors import ConfigError


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    made = Settings(data_dir=tmp_path / "data")  # type: ignore[call-arg]
    prepare(made)
    return made


def test_the_key_is_made_at_its_first_use_and_stays(settings: Settings):
    path = settings.secrets_dir / AUDIT_KEY
    assert not path.exists()
    with ThreadPoolExecutor(8) as pool:
        made = {signer.jwk["kid"] for signer in pool.map(audit_signer, [settings] * 8)}
    assert {audit_signer(settings).jwk["kid"]} == made
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [one.name for one in settings.secrets_dir.iterdir() if one.name.startswith(AUDIT_KEY)] == [
        AUDIT_KEY
    ]


@pytest.mark.parametrize("text", ["", "no key", "-----BEGIN PRIVATE KEY-----\n"])
def test_a_file_without_a_key_is_an_error_that_names_it(settings: Settings, text: str):
    path = settings.secrets_dir / AUDIT_KEY
    path.write_text(text)
    with pytest.raises(ConfigError, match=AUDIT_KEY) as raised:
        audit_signer(settings)
    assert raised.value.fix
    assert path.read_text() == text
