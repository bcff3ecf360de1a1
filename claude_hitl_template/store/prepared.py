"""Statements that are built once, and on SQLite compiled once and executed without SQLAlchemy, which takes ten times as long
as SQLite itself.

A prepared statement is a constant with named parameters (`sa.bindparam`), and `Executor.execute` executes it as any other.
"""

import sqlite3
from collections import namedtuple
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from claude_hitl_template.store import json_text
from claude_hitl_template.store.tables import Name, UtcDateTime

_MARK = "prepared"

type Parameters = Mapping[str, Any] | Sequence[Mapping[str, Any]] | None
type _Convert = Callable[[Any], Any] | None


def prepared[S: sa.Executable](statement: S) -> S:
    """Marks a statement that is kept, and always executed with the same names of parameters."""
    return statement.execution_options(**{_MARK: True})


def is_prepared(statement: Any) -> bool:
    return _MARK in statement.get_execution_options()


class Rows(list[Any]):
    """All rows of a result, with the methods of SQLAlchemy's results that the Store uses."""

    def __init__(self, rows: Sequence[Any], rowcount: int) -> None:
        super().__init__(rows)
        self.rowcount = rowcount

    def first(self) -> Any | None:
        return self[0] if self else None

    def all(self) -> list[Any]:
        return self


class Compiled:
    """A prepared statement for SQLite. `names`: of the parameters that it is given."""

    def __init__(self, statement: Any, names: Sequence[str], dialect: sa.Dialect) -> None:
        compiled = statement.compile(dialect=dialect, column_keys=list(names) if statement.is_dml else None)
        self._sql = str(compiled)
        order: Sequence[str] = compiled.positiontup
        self._binds = [
            (name, compiled.binds[name].value, _to_database(compiled.binds[name].type, dialect))
            for name in order
        ]
        columns = [] if statement.is_dml else list(statement.selected_columns)
        # Such as `SELECT doc`: a row of the fields' names. `_asdict` is what SQLAlchemy's rows have, too.
        names = [column.name for column in columns]
        self._row = namedtuple("Row", names) if names else None  # pyright: ignore[reportUntypedNamedTuple]
        self._converts = [_from_database(column.type, dialect) for column in columns]

    def execute(self, connection: sqlite3.Connection, parameters: Parameters) -> Rows:
        """Raises sqlite3.Error."""
        if isinstance(parameters, Sequence):
            cursor = connection.executemany(self._sql, [self._bound(each) for each in parameters])
        else:
            cursor = connection.execute(self._sql, self._bound(parameters or {}))
        make = self._row
        if make is None:
            return Rows([], cursor.rowcount)
        converts = self._converts
        return Rows(
            [
                make(*[c(v) if c else v for c, v in zip(converts, row, strict=True)])
                for row in cursor.fetchall()
            ],
            cursor.rowcount,
        )

    def _bound(self, given: Mapping[str, Any]) -> list[Any]:
        return [
            convert(given.get(name, constant)) if convert else given.get(name, constant)
            for name, constant, convert in self._binds
        ]


def _utc_text(value: datetime | None) -> str | None:
    return (
        None if value is None else value.astimezone(UTC).replace(tzinfo=None).isoformat(" ", "microseconds")
    )


def _utc(text: str | None) -> datetime | None:
    return None if text is None else datetime.fromisoformat(text).replace(tzinfo=UTC)


# What SQLAlchemy's own conversions do for these types on SQLite, in one call instead of three.
_CONVERSIONS: Mapping[type, tuple[_Convert, _Convert]] = {
    Name: (None, None),
    UtcDateTime: (_utc_text, _utc),
    sa.JSON: (json_text.dumps, lambda text: None if text is None else json_text.loads(text)),
}


def _to_database(kind: sa.types.TypeEngine[Any], dialect: sa.Dialect) -> _Convert:
    known = _CONVERSIONS.get(type(kind))
    return known[0] if known else kind.dialect_impl(dialect).bind_processor(dialect)


def _from_database(kind: sa.types.TypeEngine[Any], dialect: sa.Dialect) -> _Convert:
    known = _CONVERSIONS.get(type(kind))
    return known[1] if known else kind.dialect_impl(dialect).result_processor(dialect, None)
