"""Channels, notices and deliveries of the backend in memory."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from claude_hitl_template.domain.notices import EVERY_WORKSPACE, Channel, Delivery, DeliveryState, Notice


class MemoryNotices:
    """`_s` has a dictionary by id for each of `channels`, `notices`, `sent` (deliveries) and `readers`."""

    _s: Any

    async def channel(self, channel_id: str) -> tuple[Channel, str] | None:
        return self._s.channels.get(channel_id)

    async def channels(
        self, workspace_ids: Sequence[str] | None, *, principal_id: str | None = None
    ) -> list[Channel]:
        found = [channel for channel, _ in self._s.channels.values()]
        mine = (
            one
            for one in found
            if (workspace_ids is None or one.workspace_id in workspace_ids)
            and principal_id in (None, one.principal_id)
        )
        return sorted(mine, key=lambda one: one.id)

    async def channels_of(self, channel_ids: Sequence[str]) -> dict[str, tuple[Channel, str]]:
        return {one: self._s.channels[one] for one in channel_ids if one in self._s.channels}

    async def put_channel(self, channel: Channel, secret: str) -> None:
        self._s.channels[channel.id] = (channel, secret)

    async def delete_channel(self, channel_id: str) -> None:
        self._s.channels.pop(channel_id, None)
        self._s.sent = {k: d for k, d in self._s.sent.items() if d.channel_id != channel_id}

    async def wanted_kinds(self, workspace_id: str) -> set[str]:
        found = await self.channels([workspace_id, EVERY_WORKSPACE])
        return {kind for one in found if one.enabled for kind in one.kinds}

    async def add_notices(self, found: Sequence[Notice]) -> None:
        self._s.notices |= {one.id: one for one in found}

    async def notices(self, limit: int) -> list[Notice]:
        return sorted(self._s.notices.values(), key=lambda one: one.id)[:limit]

    async def take_notices(self, notice_ids: Sequence[str]) -> list[str]:
        return [one for one in notice_ids if self._s.notices.pop(one, None) is not None]

    async def delete_notices_of(self, session_id: str) -> None:
        self._s.notices = {k: n for k, n in self._s.notices.items() if n.session_id != session_id}
        self._s.sent = {k: d for k, d in self._s.sent.items() if d.notice.session_id != session_id}

    async def put_delivery(self, delivery: Delivery) -> None:
        self._s.sent[delivery.id] = delivery

    async def delivery(self, delivery_id: str) -> Delivery | None:
        return self._s.sent.get(delivery_id)

    async def locked_deliveries(self, delivery_ids: Sequence[str]) -> list[Delivery]:
        return [self._s.sent[one] for one in sorted(delivery_ids) if one in self._s.sent]

    def _pending(self, busy: Sequence[str] = ()) -> list[Delivery]:
        found = [d for d in self._s.sent.values() if d.state == "pending" and d.channel_id not in busy]
        return sorted(found, key=lambda d: (d.next_at, d.id))

    async def due_deliveries(
        self, now: datetime, *, limit: int, of_each: int, busy: Sequence[str]
    ) -> list[str]:
        found: list[str] = []
        counts: dict[str | None, int] = {}
        for delivery in self._pending(busy):
            counts[delivery.channel_id] = counts.get(delivery.channel_id, 0) + 1
            if delivery.next_at <= now and counts[delivery.channel_id] <= of_each:
                found.append(delivery.id)
        return found[:limit]

    async def next_due(self, busy: Sequence[str]) -> datetime | None:
        return next((d.next_at for d in self._pending(busy)), None)

    async def pending_of_channel(self, channel_id: str, limit: int) -> list[Delivery]:
        return sorted(
            (d for d in self._pending() if d.channel_id == channel_id), key=lambda d: (d.created_at, d.id)
        )[:limit]

    async def deliveries_of_approval(self, approval_id: str) -> list[Delivery]:
        mine = (d for d in self._s.sent.values() if d.notice.approval_id == approval_id)
        return sorted(mine, key=lambda d: d.id)

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
        found = [
            d
            for d in self._s.sent.values()
            if workspace_id in (None, d.notice.workspace_id)
            and channel_id in (None, d.channel_id)
            and session_id in (None, d.notice.session_id)
            and (not states or d.state in states)
            and (after is None or (d.created_at, d.id) < after)
        ]
        return sorted(found, key=lambda d: (d.created_at, d.id), reverse=True)[:limit]

    async def forget_deliveries(self, before: datetime) -> int:
        kept = {k: d for k, d in self._s.sent.items() if d.state == "pending" or d.created_at >= before}
        forgotten, self._s.sent = len(self._s.sent) - len(kept), kept
        return forgotten

    async def note_reader(self, principal_id: str, at: datetime) -> None:
        self._s.readers[principal_id] = at

    async def readers(self, principal_ids: Sequence[str], since: datetime) -> set[str]:
        return {one for one in principal_ids if one in self._s.readers and self._s.readers[one] >= since}
