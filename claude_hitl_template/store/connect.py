"""Which database the Store is kept in, as the settings say."""

from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy.exc import DBAPIError
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_exponential_jitter

from claude_hitl_template.config.secret_files import read_database_url
from claude_hitl_template.config.settings import Settings
from claude_hitl_template.errors import ConfigError, HitlError, StoreUnreachable
from claude_hitl_template.store.database_status import DatabaseStatus, sqlite_status
from claude_hitl_template.store.postgres import (
    CONNECTIONS,
    PostgresBackend,
    connect_args,
    passes,
    postgres_url,
)
from claude_hitl_template.store.sqlite import SqliteBackend, sqlite_url


def store_url(settings: Settings) -> str:
    """With the password in it, if there is one. Raises ConfigError."""
    url = read_database_url(settings)
    return sqlite_url(settings.database_path) if url is None else url.get_secret_value()


def check_database(settings: Settings) -> DatabaseStatus:
    """Asks the database once. Raises ConfigError for a URL that is not usable."""
    url = store_url(settings)
    if url.startswith("sqlite"):
        return sqlite_status(settings.database_path)
    made = postgres_url(url)
    place = f"Postgres at {made.host or 'a local socket'}:{made.port or 5432}/{made.database or ''}"
    engine = sa.create_engine(made, poolclass=sa.pool.NullPool, connect_args=connect_args(made))
    try:
        with engine.connect() as connection:
            version = connection.execute(sa.text("show server_version")).scalar_one()
            slots = connection.execute(sa.text("show max_connections")).scalar_one()
    except DBAPIError as error:
        return DatabaseStatus(place, str(error.orig).strip().partition("\n")[0])
    needed = settings.ledger_replicas * CONNECTIONS
    if int(slots) < needed:
        return DatabaseStatus(
            place, f"it takes {slots} connections, and {settings.ledger_replicas} ledgers may need {needed}"
        )
    return DatabaseStatus(f"{place}, version {str(version).partition(' ')[0]}")


def check_replicas(settings: Settings) -> None:
    """Raises ConfigError if the settings ask for more ledgers than the database supports."""
    if settings.ledger_replicas > 1 and store_url(settings).startswith("sqlite"):
        raise ConfigError(
            "HITL_LEDGER_REPLICAS is more than 1, and SQLite takes one process only",
            "set DATABASE_URL, start with ./hitl up --postgres, or unset HITL_LEDGER_REPLICAS",
        )


def open_backend(settings: Settings, *, patience_s: float) -> SqliteBackend | PostgresBackend:
    """The database, with the newest schema. Blocking. Raises ConfigError, also when it was away for `patience_s`."""
    url = store_url(settings)
    prepare_schema(url, patience_s=patience_s)
    return SqliteBackend(url) if url.startswith("sqlite") else PostgresBackend(url)


def prepare_schema(url: str, *, patience_s: float) -> None:
    """Migrates the database, and waits for one that is unreachable. Raises ConfigError."""
    patiently = Retrying(
        retry=retry_if_exception_type(StoreUnreachable),
        stop=stop_after_delay(patience_s),
        wait=wait_exponential_jitter(multiplier=0.2, max=2.0),
        reraise=True,
    )
    try:
        patiently(migrate, url)
    except StoreUnreachable as error:
        raise ConfigError(str(error), "start the database, or correct DATABASE_URL") from error


def migrations() -> dict[str, str]:
    """What each migration does, by its revision, oldest first."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    scripts = ScriptDirectory.from_config(config).walk_revisions()
    return {script.revision: script.doc for script in reversed(list(scripts))}


def migrate(url: str) -> None:
    """Brings the schema at `url` to the newest migration. Blocking. A schema that is newer yet is left as it is.

    Ledgers that start at once take turns. Raises ConfigError when the database cannot be opened or written, StoreUnreachable
    when it does not answer.
    """
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.attributes["url"] = url
    try:
        command.upgrade(config, "head")
    except DBAPIError as error:
        raise unusable(url, error) from error


def unusable(url: str, error: DBAPIError) -> HitlError:
    """The error to raise for a database that failed."""
    if sa.make_url(url).get_backend_name() == "sqlite":
        return ConfigError(
            f"the database cannot be opened or written: {error.orig}",
            "check that the data folder (HITL_DATA_DIR) exists, is writable, and that the disk has room",
        )
    if passes(error):
        return StoreUnreachable(f"the database does not answer: {error.orig}")
    return ConfigError(
        f"the database cannot be used: {error.orig}",
        "correct DATABASE_URL; its user must be able to connect and to create tables",
    )
