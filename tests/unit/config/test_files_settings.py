"""The settings of the file area and of excluded files."""

from pathlib import Path

import pytest

from claude_hitl_template.config.settings import Settings, variable
from claude_hitl_template.errors import ConfigError


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(variable(name), raising=False)
    monkeypatch.setenv("HITL_HOME", str(tmp_path))


def test_files_are_in_the_data_folder_unless_another_place_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert Settings.load().files_at == (tmp_path / ".hitl" / "files").as_uri()
    monkeypatch.setenv("HITL_FILES_URL", "s3://bucket/folder")
    assert Settings.load().files_at == "s3://bucket/folder"


def test_credentials_in_the_url_are_refused_and_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HITL_FILES_URL", "ftp://ann:hunter2@host/folder")
    with pytest.raises(ConfigError, match="HITL_FILES_URL") as caught:
        Settings.load()
    assert "hunter2" not in str(caught.value)


def test_globs_are_told_apart_by_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings.load().excluded == ("__pycache__/", ".cache/")
    monkeypatch.setenv("HITL_WORKSPACE_EXCLUDE", " *.o, build/ ,,")
    assert Settings.load().excluded == ("*.o", "build/")
