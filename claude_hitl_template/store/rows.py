"""How records are rows: documents, pages, and what all statements share."""

from collections.abc import Sequence
from datetime import datetime
from functools import cache
from typing import Any, Protocol, TypeAliasType, get_args

import sqlalchemy as sa
from pydantic import BaseModel
from sqlalchemy.dialects import postgresql, sqlite

from claude_hitl_template.store import statements
from claude_hitl_template.store.filters import Order

SLOW = "slow"  # an execution option of statements that may scan a table, or return much of one


class Executor(Protocol):
    """Executes statements: SQLAlchemy's AsyncConnection, or a similar class."""

    @property
    def dialect(self) -> sa.Dialect: ...

    async def execute(
        self, statement: Any, parameters: Any = None, *, execution_options: Any = None
    ) -> Any: ...


class Statements:
    """`locking`: writers are kept apart by locks, each session's on its row; otherwise they do not meet at all."""

    def __init__(self, connection: Executor, *, locking: bool = False) -> None:
        self._c, self._locking = connection, locking
        dialect = connection.dialect.name
        self._insert = postgresql.insert if dialect == "postgresql" else sqlite.insert

    async def _one(self, query: statements.Query, **given: Any) -> Any:
        return (await self._c.execute(query, given)).first()

    async def _all(self, query: statements.Query, *, slow: bool = False, **given: Any) -> Sequence[Any]:
        """`slow`: it may scan a table, or return much of one."""
        return (await self._c.execute(query, given, execution_options={SLOW: slow})).all()

    async def _upsert(self, table: sa.Table, row: dict[str, Any], key: str = "id") -> None:
        await self._c.execute(statements.upserting(self._insert, table, tuple(row), key), row)

    def _locked(self, query: statements.Query, *, read: bool = False) -> statements.Query:
        """The query, behind the lock of its rows where there are locks."""
        return query.with_for_update(read=read) if self._locking else query


def stored[T: BaseModel](kind: type[T], row: Any) -> T:
    """A stored record. Unknown fields of a newer version are kept and written back: it may run at the same time."""
    return kind.model_validate(row.doc, extra="allow")


def document(noun: BaseModel) -> dict[str, Any]:
    found = noun.model_dump(mode="json")
    _put_back(noun, found)
    return found


def _put_back(noun: BaseModel, document: dict[str, Any]) -> None:
    """Adds the unknown fields that `stored` kept: a model that forbids extra fields does not serialise them."""
    document.update(noun.model_extra or {})
    for name, key in _holding_records(type(noun)):
        value, stored = getattr(noun, name), document[key]
        if isinstance(value, BaseModel):
            _put_back(value, stored)
        elif isinstance(value, tuple):
            for part, its in zip(value, stored, strict=True):  # pyright: ignore[reportUnknownVariableType]
                if isinstance(part, BaseModel):
                    _put_back(part, its)


@cache
def _holding_records(kind: type[BaseModel]) -> tuple[tuple[str, str], ...]:
    """The fields that may hold other records, each with its key in the document."""
    return tuple(
        (name, field.serialization_alias or name)
        for name, field in kind.model_fields.items()
        if _may_be_record(field.annotation)
    )


def _may_be_record(annotation: Any) -> bool:
    if isinstance(annotation, TypeAliasType):
        return _may_be_record(annotation.__value__)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return True
    return any(map(_may_be_record, get_args(annotation)))


def of_workspace(column: sa.ColumnElement[str], workspace_id: str | None) -> list[sa.ColumnElement[bool]]:
    return [] if workspace_id is None else [column == workspace_id]


def paged(
    query: sa.Select[Any],
    at: sa.Column[datetime],
    id_: sa.Column[str],
    *,
    after: tuple[datetime, str] | None,
    limit: int,
    order: Order,
) -> sa.Select[Any]:
    if after is not None:
        here = sa.tuple_(at, id_)
        there = sa.tuple_(sa.literal(after[0], at.type), sa.literal(after[1], id_.type))
        query = query.where(here > there if order == "asc" else here < there)
    ordering = (at.asc(), id_.asc()) if order == "asc" else (at.desc(), id_.desc())
    return query.order_by(*ordering).limit(limit)
