"""What a database looks like from outside. Without SQLAlchemy, which takes longer to import than the rest of a command."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Look:
    """A database as a human wants to see it: where it is, without its password, and what is wrong with it, if anything."""

    place: str
    problem: str | None = None


def sqlite_look(path: Path) -> Look:
    """SQLite is a file that needs nobody to run."""
    return Look(f"SQLite, {path}")
