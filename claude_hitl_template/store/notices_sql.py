"""The statements about channels, notices and deliveries."""

from collections.abc import Sequence
from datetime import datetime

import sqlalchemy as sa

from claude_hitl_template.domain.notices import EVERY_WORKSPACE, Channel, Delivery, DeliveryState, Notice
from claude_hitl_template.store import statements
from claude_hitl_template.store.rows import Statements, document, of_workspace, paged, stored
from claude_hitl_template.store.tables import channels, deliveries, notices, readers

PENDING = "pending"


class NoticesSql(Statements):
    async def channel(self, channel_id: str) -> tuple[Channel, str] | None:
        t = channels.c
        query = sa.select(t.doc, t.secret).where(t.id == channel_id)
        row = await self._one(query.with_for_update() if self._locking else query)
        return (stored(Channel, row), row.secret) if row else None

    async def channels(
        self, workspace_ids: Sequence[str] | None, *, principal_id: str | None = None
    ) -> list[Channel]:
        t = channels.c
        query = sa.select(t.doc)
        if workspace_ids is not None:
            query = query.where(t.workspace_id.in_(workspace_ids))
        if principal_id is not None:
            query = query.where(t.principal_id == principal_id)
        return [stored(Channel, row) for row in await self._all(query.order_by(t.id))]

    async def channels_of(self, channel_ids: Sequence[str]) -> dict[str, tuple[Channel, str]]:
        t = channels.c
        found = await self._all(sa.select(t.id, t.doc, t.secret).where(t.id.in_(channel_ids)))
        return {row.id: (stored(Channel, row), row.secret) for row in found}

    async def put_channel(self, channel: Channel, secret: str) -> None:
        row = {name: getattr(channel, name) for name in ("id", "workspace_id", "principal_id")}
        kinds = " ".join(sorted(channel.kinds)) if channel.enabled else ""
        row |= {"kinds": kinds, "secret": secret}
        await self._upsert(channels, {**row, "doc": document(channel)})

    async def delete_channel(self, channel_id: str) -> None:
        await self._c.execute(sa.delete(deliveries).where(deliveries.c.channel_id == channel_id))
        await self._c.execute(sa.delete(channels).where(channels.c.id == channel_id))

    # -- the outbox

    async def wanted_kinds(self, workspace_id: str) -> set[str]:
        found = await self._all(statements.WANTED_KINDS, key=workspace_id, everywhere=EVERY_WORKSPACE)
        return {kind for row in found for kind in row.kinds.split()}

    async def add_notices(self, found: Sequence[Notice]) -> None:
        rows = [{"id": one.id, "session_id": one.session_id, "doc": document(one)} for one in found]
        await self._c.execute(sa.insert(notices), rows)

    async def notices(self, limit: int) -> list[Notice]:
        query = sa.select(notices.c.doc).order_by(notices.c.id).limit(limit)
        return [stored(Notice, row) for row in await self._all(query)]

    async def take_notices(self, notice_ids: Sequence[str]) -> list[str]:
        t = notices.c
        gone = await self._c.execute(sa.delete(notices).where(t.id.in_(notice_ids)).returning(t.id))
        return [row.id for row in gone.all()]

    async def delete_notices_of(self, session_id: str) -> None:
        await self._c.execute(sa.delete(notices).where(notices.c.session_id == session_id))
        await self._c.execute(sa.delete(deliveries).where(deliveries.c.session_id == session_id))

    # -- deliveries

    async def put_delivery(self, delivery: Delivery) -> None:
        notice = delivery.notice
        row = {
            "id": delivery.id,
            "workspace_id": notice.workspace_id,
            "channel_id": delivery.channel_id,
            "session_id": notice.session_id,
            "approval_id": notice.approval_id,
            "state": delivery.state,
            "created_at": delivery.created_at,
            "next_at": delivery.next_at,
        }
        await self._upsert(deliveries, {**row, "doc": document(delivery)})

    async def delivery(self, delivery_id: str) -> Delivery | None:
        row = await self._one(sa.select(deliveries.c.doc).where(deliveries.c.id == delivery_id))
        return stored(Delivery, row) if row else None

    async def locked_deliveries(self, delivery_ids: Sequence[str]) -> list[Delivery]:
        t = deliveries.c
        query = sa.select(t.doc).where(t.id.in_(delivery_ids)).order_by(t.id)
        query = query.with_for_update(skip_locked=True) if self._locking else query
        return [stored(Delivery, row) for row in await self._all(query)]

    async def due_deliveries(
        self, now: datetime, *, limit: int, of_each: int, busy: Sequence[str]
    ) -> list[str]:
        t = deliveries.c
        place = sa.func.row_number().over(partition_by=t.channel_id, order_by=(t.next_at, t.id))
        ranked = (
            sa.select(t.id, t.next_at, place.label("place"))
            .where(t.state == PENDING, t.next_at <= now, t.channel_id.not_in(busy))
            .subquery()
        )
        query = sa.select(ranked.c.id).where(ranked.c.place <= of_each)
        rows = await self._all(query.order_by(ranked.c.next_at, ranked.c.id).limit(limit))
        return [row.id for row in rows]

    async def next_due(self, busy: Sequence[str]) -> datetime | None:
        t = deliveries.c
        query = sa.select(t.next_at).where(t.state == PENDING, t.channel_id.not_in(busy))
        row = await self._one(query.order_by(t.next_at).limit(1))
        return row.next_at if row else None

    async def pending_of_channel(self, channel_id: str, limit: int) -> list[Delivery]:
        t = deliveries.c
        query = sa.select(t.doc).where(t.channel_id == channel_id, t.state == PENDING)
        rows = await self._all(query.order_by(t.created_at, t.id).limit(limit))
        return [stored(Delivery, row) for row in rows]

    async def deliveries_of_approval(self, approval_id: str) -> list[Delivery]:
        t = deliveries.c
        rows = await self._all(sa.select(t.doc).where(t.approval_id == approval_id).order_by(t.id))
        return [stored(Delivery, row) for row in rows]

    async def deliveries(
        self,
        workspace_id: str | None,
        *,
        after: tuple[datetime, str] | None,
        limit: int,
        channel_id: str | None,
        session_id: str | None,
        states: Sequence[DeliveryState],
    ) -> list[Delivery]:
        t = deliveries.c
        query = sa.select(t.doc).where(*of_workspace(t.workspace_id, workspace_id))
        if channel_id is not None:
            query = query.where(t.channel_id == channel_id)
        if session_id is not None:
            query = query.where(t.session_id == session_id)
        if states:
            query = query.where(t.state.in_(states))
        found = paged(query, t.created_at, t.id, after=after, limit=limit, order="desc")
        return [stored(Delivery, row) for row in await self._all(found, slow=True)]

    async def forget_deliveries(self, before: datetime) -> int:
        t = deliveries.c
        old = sa.delete(deliveries).where(t.created_at < before, t.state != PENDING)
        return (await self._c.execute(old)).rowcount

    # -- who reads the inbox

    async def note_reader(self, principal_id: str, at: datetime) -> None:
        statement = self._insert(readers).values(principal_id=principal_id, seen_at=at)
        await self._c.execute(
            statement.on_conflict_do_update(
                index_elements=[readers.c.principal_id], set_={"seen_at": statement.excluded.seen_at}
            )
        )

    async def readers(self, principal_ids: Sequence[str], since: datetime) -> set[str]:
        t = readers.c
        query = sa.select(t.principal_id).where(t.principal_id.in_(principal_ids), t.seen_at >= since)
        return {row.principal_id for row in await self._all(query)}
