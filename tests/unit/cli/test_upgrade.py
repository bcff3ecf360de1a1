"""`hitl upgrade --check`: the code next to the data folder and the service; and a package next to a checkout."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from alembic import command
from alembic.config import Config

import claude_hitl_template.store
from claude_hitl_template.cli import program
from claude_hitl_template.cli.commands.upgrade import Comparison, describe, notes
from claude_hitl_template.config.settings import Settings
from claude_hitl_template.errors import ConfigError
from claude_hitl_template.store.connect import migrate, migrations, store_url
from tests.commands import hitl

type Make = Callable[..., Settings]

CHANGELOG = "# Changelog\n\n## Unreleased\n\n- c\n\n## 0.2.0\n\n- b\n\n## 0.1.0 (2026-11-29)\n\n- a\n"


def migrate_to(settings: Settings, revision: str) -> None:
    config = Config()
    folder = Path(claude_hitl_template.store.__file__).parent / "migrations"
    config.set_main_option("script_location", str(folder))
    config.attributes["url"] = store_url(settings)
    settings.data_dir.mkdir()
    command.upgrade(config, revision)


def test_an_older_data_folder_is_named_with_what_the_next_start_changes(make_settings: Make) -> None:
    settings = make_settings()
    migrate_to(settings, "0007")
    done = hitl("upgrade", "--check")
    assert done.returncode == 1, done.stderr
    later = [what for revision, what in migrations().items() if revision > "0007"]
    assert f"migration 0007: the next start applies {len(later)} more" in done.stdout
    assert "the severity of calls" in done.stdout
    found = json.loads(hitl("upgrade", "--check", "--json").stdout)
    assert (found["schema"], found["service"], found["pending"]) == ("0007", None, later)


def test_a_current_data_folder_and_a_new_one_need_nothing(make_settings: Make) -> None:
    settings = make_settings()
    assert hitl("upgrade", "--check").returncode == 0
    assert not settings.data_dir.exists()
    settings.data_dir.mkdir()
    migrate(store_url(settings))
    done = hitl("upgrade", "--check")
    assert (done.returncode, "up to date" in done.stdout) == (0, True)


def test_a_service_of_another_version_is_a_difference_and_the_changelog_says_what_is_new() -> None:
    running = Comparison("0.3.0", "new", ("0.1.0", "old"), "0009", False, [], notes(CHANGELOG, "0.1.0"))
    assert running.differs
    lines = describe(running)
    assert "service     0.1.0, code old: another one" in lines[1]
    assert running.notes == ["## Unreleased", "", "- c", "## 0.2.0", "", "- b"]
    assert notes(CHANGELOG, "0.2.0") == notes(CHANGELOG, None) == ["## Unreleased", "", "- c"]


def test_an_installed_package_has_its_data_in_the_users_folder_and_says_what_needs_a_checkout(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(program, "IN_CHECKOUT", False)
    monkeypatch.setattr(program, "NAME", "hitl")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setenv("HITL_HOME", "")
    program.choose_home()
    assert Settings.load().data_dir.name == ".hitl"
    assert Settings.load().home.name == "claude-hitl"
    assert program.named("start it with ./hitl up") == "start it with hitl up"
    with pytest.raises(ConfigError, match="hitl deploy works on the files of a checkout"):
        program.need_checkout("deploy")
