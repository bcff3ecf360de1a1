"""The data folder: nothing in it is open to other users of the machine, whatever made it."""

from pathlib import Path

from claude_hitl_template.config.secret_files import prepare
from claude_hitl_template.config.settings import Settings


def mode(path: Path) -> str:
    return f"{path.stat().st_mode & 0o777:o}"


def test_folders_and_files_that_are_there_are_closed(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path / "data")
    prepare(settings)
    link, elsewhere = settings.secrets_dir / "linked", tmp_path / "elsewhere"
    elsewhere.touch(mode=0o644)
    link.symlink_to(elsewhere)
    settings.database_path.touch()
    opened = (settings.data_dir, settings.secrets_dir, settings.logs_dir)
    files = (settings.database_path, settings.secrets_dir / "signing")
    for path in (*opened, *files):
        path.chmod(0o777)
    prepare(settings)
    assert {mode(path) for path in opened} == {"700"}
    assert {mode(path) for path in files} <= {"600", "700"}
    assert mode(elsewhere) == "644"


def test_the_server_of_a_local_postgres_may_still_pass_through(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path / "data")
    prepare(settings)
    settings.data_dir.chmod(0o711)
    prepare(settings)
    assert mode(settings.data_dir) == "711"
