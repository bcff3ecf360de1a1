"""`hitl backup` and `hitl restore`."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from claude_hitl_template.cli.common import step
from claude_hitl_template.cli.host import postgres, run_record
from claude_hitl_template.config.secret_files import prepare
from claude_hitl_template.config.settings import Settings
from claude_hitl_template.presentation.text import size

File = Annotated[Path, typer.Argument(metavar="FILE", help="A file that ./hitl backup makes.")]


def backup(file: File) -> None:
    """Writes a consistent copy of the database to a file, whether the service runs or not.

    Not included: files of sessions, and keys (DATA/secrets), which are needed to read the sessions: copy them separately.
    """
    from claude_hitl_template.store.backup import back_up  # noqa: PLC0415  (slow to import)

    settings = Settings.load()
    with _undisturbed(settings), open_database(settings) as url, step("Copying"):
        copied = back_up(url, file)
    typer.echo(f"{copied.sessions} sessions ({copied.rows} rows, {size(file.stat().st_size)}) in {file}")


def restore(
    file: File,
    force: Annotated[bool, typer.Option("--force", help="Replace what is in the database.")] = False,
) -> None:
    """Restores the database from a backup, of SQLite or Postgres into either.

    Calls decided after the backup are asked again. Sessions are visible with the API keys that created them.
    """
    from claude_hitl_template.store.backup import restore as bring_back  # noqa: PLC0415  (slow to import)

    settings = Settings.load()
    with run_record.alone(settings):
        run_record.check_idle(settings, "nothing was changed")
        prepare(settings)
        with open_database(settings) as url, step("Copying"):
            copied = bring_back(url, file, force=force)
    typer.echo(
        f"{copied.sessions} sessions ({copied.rows} rows) as they were at {copied.made_at:%Y-%m-%d %H:%M:%S} UTC"
    )


@contextmanager
def _undisturbed(settings: Settings) -> Generator[None]:
    """Refuses other starts meanwhile: a service that started now would lose the Postgres that this command stops."""
    if run_record.head(settings) is not None or not settings.data_dir.exists():
        yield
        return
    with run_record.alone(settings, step):
        yield


@contextmanager
def open_database(settings: Settings) -> Generator[str]:
    """The database's URL. A local Postgres runs for as long as the context lasts."""
    from claude_hitl_template.store.connect import store_url  # noqa: PLC0415  (slow to import)

    started = postgres.start_missing(settings, make=False)
    try:
        yield store_url(settings)
    finally:
        if started:
            postgres.local(settings).stop()
