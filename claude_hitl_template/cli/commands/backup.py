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
    """Writes everything in the database to a file, as it is at one moment, while the service runs or not.

    Not in it: files of sessions, and keys (DATA/secrets), without which the sessions cannot be read: keep a separate copy.
    """
    from claude_hitl_template.store.backup import back_up  # noqa: PLC0415  (slow to import)

    settings = Settings.load()
    with _undisturbed(settings), _database(settings) as url, step("Copying"):
        copied = back_up(url, file)
    typer.echo(f"{copied.sessions} sessions ({copied.rows} rows, {size(file.stat().st_size)}) in {file}")


def restore(
    file: File,
    force: Annotated[bool, typer.Option("--force", help="Replace what is in the database.")] = False,
) -> None:
    """Makes the database what it was when the backup was made; of SQLite or Postgres, into either.

    What was decided after that is asked again. Sessions are seen with the API keys that made them.
    """
    from claude_hitl_template.store.backup import restore as bring_back  # noqa: PLC0415  (slow to import)

    settings = Settings.load()
    with run_record.alone(settings):
        run_record.check_idle(settings, "nothing was changed")
        prepare(settings)
        with _database(settings) as url, step("Copying"):
            copied = bring_back(url, file, force=force)
    typer.echo(
        f"{copied.sessions} sessions ({copied.rows} rows) as they were at {copied.made_at:%Y-%m-%d %H:%M:%S} UTC"
    )


@contextmanager
def _undisturbed(settings: Settings) -> Generator[None]:
    """While nothing runs, the database is ours alone: a service that starts meanwhile would lose a Postgres that we end."""
    if run_record.head(settings) is not None or not settings.data_dir.exists():
        yield
        return
    with run_record.alone(settings, step):
        yield


@contextmanager
def _database(settings: Settings) -> Generator[str]:
    """Its URL. A Postgres of our own runs meanwhile, whether the service does or not."""
    from claude_hitl_template.store.connect import store_url  # noqa: PLC0415  (slow to import)

    started = postgres.start_missing(settings, make=False)
    try:
        yield store_url(settings)
    finally:
        if started:
            postgres.local(settings).stop()
