"""Statements that are built once, and on SQLite compiled once and executed without SQLAlchemy, which takes ten times as long
as SQLite itself.

A prepared statement is a constant with named parameters (`sa.bindparam`), and `Executor.execute` executes it as any other.
"""

import sqlite3
from collections import namedtuple
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sqlalchemy as sa

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
                make(*(c(v) if c else v for c, v in zip(converts, row, strict=True)))
                for row in cursor.fetchall()
            ],
            cursor.rowcount,
        )

    def _bound(self, given: Mapping[str, Any]) -> list[Any]:
        values = ((given.get(name, constant), convert) for name, constant, convert in self._binds)
        return [convert(value) if convert else value for value, convert in values]


def _to_database(kind: sa.types.TypeEngine[Any], dialect: sa.Dialect) -> _Convert:
    return kind.dialect_impl(dialect).bind_processor(dialect)


def _from_database(kind: sa.types.TypeEngine[Any], dialect: sa.Dialect) -> _Convert:
    return kind.dialect_impl(dialect).result_processor(dialect, None)
