"""The Store's rules for channels: where notices are sent."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from claude_hitl_template.domain.audit import SERVICE_CHAIN
from claude_hitl_template.domain.models import Page
from claude_hitl_template.domain.notices import (
    EVERY_WORKSPACE,
    Channel,
    ChannelState,
    Delivery,
    DeliveryState,
    Notice,
)
from claude_hitl_template.domain.people import SERVICE, Actor
from claude_hitl_template.errors import Conflict, NotFound
from claude_hitl_template.store.backend import Tx
from claude_hitl_template.store.base import NOTICES, StoreBase, decode_time_cursor, encode_cursor
from claude_hitl_template.store.pages import fill
from claude_hitl_template.store.recording import record

CHANNELS = 50  # of one workspace, and of one person
_RECORDED = ("name", "settings", "kinds", "min_severity", "quiet_hours", "digest_s", "enabled")


class ChannelRules(StoreBase):
    async def add_channel(
        self, channel: Channel, secret: Mapping[str, str], *, by: Actor = SERVICE
    ) -> Channel:
        async with self._writing("add_key") as tx:
            await tx.lock("channels")
            known = await tx.channel(channel.id)
            if known is not None:
                return known[0]
            others = await tx.channels([channel.workspace_id], principal_id=channel.principal_id)
            mine = [one for one in others if one.principal_id == channel.principal_id]
            if len(mine) >= CHANNELS:
                raise Conflict(f"there are {CHANNELS} channels here, the most there may be; remove one")
            await tx.put_channel(channel, self._sealer.seal(secret))
            _record(tx, "channel.created", channel, by, self._clock(), changed=_RECORDED)
        return channel

    async def list_channels(
        self, workspace_id: str | None, *, principal_id: str | None = None
    ) -> list[Channel]:
        async with self._reading() as tx:
            return await tx.channels(
                None if workspace_id is None else [workspace_id], principal_id=principal_id
            )

    async def get_channel(self, channel_id: str, workspace_id: str | None) -> Channel:
        async with self._reading() as tx:
            return (await _channel(tx, channel_id, workspace_id))[0]

    async def channel_secret(self, channel_id: str) -> Mapping[str, str]:
        async with self._reading() as tx:
            return self._sealer.open((await _channel(tx, channel_id, None))[1])

    async def change_channel(
        self,
        channel_id: str,
        workspace_id: str | None,
        changes: Mapping[str, Any],
        *,
        secret: Mapping[str, str] | None = None,
        by: Actor = SERVICE,
    ) -> Channel:
        async with self._writing("add_key") as tx:
            before, sealed = await _channel(tx, channel_id, workspace_id)
            after = before.but(**changes)
            if after == before and secret is None:
                return before
            after = after.but(state=ChannelState())
            await tx.put_channel(after, sealed if secret is None else self._sealer.seal(secret))
            changed = [name for name in _RECORDED if getattr(before, name) != getattr(after, name)]
            if secret is not None:
                changed.append("secret")
            _record(tx, "channel.changed", after, by, self._clock(), changed=changed)
        return after

    async def remove_channel(self, channel_id: str, workspace_id: str | None, *, by: Actor = SERVICE) -> None:
        async with self._writing("add_key") as tx:
            channel, _ = await _channel(tx, channel_id, workspace_id)
            await tx.delete_channel(channel_id)
            _record(tx, "channel.removed", channel, by, self._clock())

    # -- deliveries

    async def list_deliveries(
        self,
        workspace_id: str | None,
        *,
        limit: int,
        page: str | None = None,
        channel_id: str | None = None,
        session_id: str | None = None,
        states: Sequence[DeliveryState] = (),
    ) -> Page[Delivery]:
        after = decode_time_cursor("deliveries", page)
        async with self._reading() as tx:

            async def fetch(after: tuple[datetime, str] | None, count: int) -> list[Delivery]:
                return await tx.deliveries(
                    workspace_id,
                    after=after,
                    limit=count,
                    channel_id=channel_id,
                    session_id=session_id,
                    states=states,
                )

            found, more = await fill(fetch, _place, after, limit)
        last = found[-1] if more else None
        next_page = encode_cursor("deliveries", last.created_at.isoformat(), last.id) if last else None
        return Page(data=found, next_page=next_page)

    async def redeliver(self, delivery_id: str, workspace_id: str | None, *, by: Actor = SERVICE) -> Delivery:
        async with self._writing("add_key") as tx:
            found = await tx.delivery(delivery_id)
            if found is None or workspace_id not in (None, found.notice.workspace_id):
                raise NotFound(f"there is no delivery {delivery_id!r}")
            channel = await tx.channel(found.channel_id) if found.channel_id is not None else None
            if channel is None:
                raise Conflict(f"{delivery_id} has no channel that it could be sent over")
            again = Delivery(
                id=found.id,
                notice=found.notice,
                channel_id=found.channel_id,
                over=channel[0].label,
                created_at=found.created_at,
                next_at=self._clock(),
                attempts=found.attempts,
                external_ref=found.external_ref,
                by_hand=True,
            )
            await tx.put_delivery(again)
            details = {"channel_id": found.channel_id, "notice_id": found.notice.id}
            record(
                tx,
                found.notice.workspace_id,
                "delivery.repeated",
                by,
                found.id,
                details=details,
                now=self._clock(),
            )
        self._notify(NOTICES)
        return again

    async def send_test(
        self, channel_id: str, workspace_id: str | None, *, notice_id: str, by: Actor = SERVICE
    ) -> Delivery:
        async with self._writing("add_key") as tx:
            channel, _ = await _channel(tx, channel_id, workspace_id)
            now, delivery_id = self._clock(), f"{notice_id}_{channel_id}"
            known = await tx.delivery(delivery_id)
            if known is not None:
                return known
            notice = Notice(
                id=notice_id,
                kind="test",
                workspace_id=channel.workspace_id,
                created_at=now,
                title=f"A test, asked for by {by.name}",
            )
            made = Delivery(
                id=delivery_id,
                notice=notice,
                channel_id=channel_id,
                over=channel.label,
                created_at=now,
                next_at=now,
                by_hand=True,
            )
            await tx.put_delivery(made)
        self._notify(NOTICES)
        return made

    async def note_reader(self, principal_id: str) -> None:
        if not await self.list_channels(None, principal_id=principal_id):
            return  # there is nothing to hold back
        async with self._backend.begin(write=True) as tx:
            await tx.note_reader(principal_id, self._clock())


def _place(delivery: Delivery) -> tuple[datetime, str]:
    return delivery.created_at, delivery.id


async def _channel(tx: Tx, channel_id: str, workspace_id: str | None) -> tuple[Channel, str]:
    found = await tx.channel(channel_id)
    if found is None or workspace_id not in (None, found[0].workspace_id):
        raise NotFound(f"there is no channel {channel_id!r}")
    return found


def _record(tx: Tx, action: str, channel: Channel, by: Actor, now: datetime, *, changed: Any = ()) -> None:
    """The names of the fields that changed, and no value: an address may be personal, or a secret."""
    chain = SERVICE_CHAIN if channel.workspace_id == EVERY_WORKSPACE else channel.workspace_id
    details = {"kind": channel.kind, "principal_id": channel.principal_id, "changed": list(changed)}
    record(tx, chain, action, by, channel.id, details=details, now=now)
