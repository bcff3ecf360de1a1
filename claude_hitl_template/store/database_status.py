"""The status of a database. Without SQLAlchemy, which takes longer to import than the rest of a command."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class DatabaseStatus:
    """A database for display: its URL without the password, and its problem if it has one."""

    place: str
    problem: str | None = None


def sqlite_status(path: Path) -> DatabaseStatus:
    """SQLite is a file; no server can be unreachable."""
    return DatabaseStatus(f"SQLite, {path}")
