"""The Store's rules for couriers, who send what is in the outbox: at least once, and not before it is committed.

A notice becomes one delivery for each channel that gets it. A courier takes deliveries that are due, and no other one does
until `next_at`. If it dies meanwhile, they are due again then.
"""

from collections.abc import Sequence
from datetime import datetime, timedelta

from claude_hitl_template.domain.models import ApprovalState, new_id
from claude_hitl_template.domain.notices import (
    ASKING,
    EVERY_WORKSPACE,
    Channel,
    ChannelState,
    Delivery,
    DeliveryState,
    Notice,
    Parcel,
    Settled,
    ShownCall,
)
from claude_hitl_template.domain.policy.tiers import SEVERITIES
from claude_hitl_template.errors import ConfigError
from claude_hitl_template.store.backend import Tx
from claude_hitl_template.store.base import NOTICES, StoreBase
from claude_hitl_template.store.recipients import Concerned
from claude_hitl_template.store.waiting import shown_call

AT_ONCE = 100  # notices distributed, and deliveries merged into a digest, in one transaction
OF_EACH = 2  # deliveries of one channel that are taken together
TAKEN = timedelta(seconds=60)  # how long a courier has for one send, with its record
GIVEN_UP = timedelta(days=1)
READING = timedelta(seconds=45)  # how long a sign of an open inbox is believed
LOOK_AGAIN = timedelta(seconds=30)
KEPT = timedelta(days=14)
NOTED = timedelta(seconds=60)  # how exactly a channel's last send is recorded while none fails
SHORTEST_WAIT_S = 0.2


class CourierRules(StoreBase):
    async def take_deliveries(
        self, *, limit: int, busy: Sequence[str] = (), timeout_s: float = 0.0
    ) -> list[Parcel]:
        with self._signals.listen(NOTICES) as listener:
            found = await self._taken(limit, busy)
            if found or timeout_s <= 0:
                return found
            async with self._reading() as tx:
                due = await tx.next_due(busy)
            wait_s = timeout_s if due is None else min(timeout_s, (due - self._clock()).total_seconds())
            await listener.wait(max(wait_s, SHORTEST_WAIT_S))
        return await self._taken(limit, busy)

    async def settle_delivery(self, delivery_ids: Sequence[str], attempt: int, settled: Settled) -> None:
        async with self._writing("settle") as tx:
            found = await tx.delivery(delivery_ids[0]) if delivery_ids else None
            if found is None or found.channel_id is None:
                return
            known = await tx.channel(found.channel_id)
            mine = [
                one
                for one in await tx.locked_deliveries(delivery_ids)
                if one.state == "pending" and one.sending and one.attempts == attempt
            ]
            if not mine:
                return
            for one in mine:
                await tx.put_delivery(await self._settled(tx, one, settled))
                await self._hurry_next(tx, one)
            if known is not None:
                await self._note_channel(tx, *known, settled)
        self._notify(NOTICES)

    async def sweep_deliveries(self) -> int:
        async with self._writing("retire") as tx:
            return await tx.forget_deliveries(self._clock() - KEPT)

    # -- notices become deliveries

    async def _taken(self, limit: int, busy: Sequence[str]) -> list[Parcel]:
        while await self._distribute():
            pass
        now = self._clock()
        async with self._reading() as tx:
            due = await tx.due_deliveries(now, limit=limit, of_each=OF_EACH, busy=busy)
        if not due:
            return []
        async with self._writing("take") as tx:
            return await self._take(tx, due, now)

    async def _distribute(self) -> bool:
        """Distributes some notices; False if there was none."""
        async with self._reading() as tx:
            told = await tx.notices(AT_ONCE)
            planned = {notice.id: await self._plan(tx, notice) for notice in told}
        if not told:
            return False
        async with self._writing("distribute") as tx:
            for notice_id in sorted(await tx.take_notices(list(planned))):
                for delivery in planned[notice_id]:
                    await tx.put_delivery(delivery)
            for approval_id in sorted(
                {n.approval_id for n in told if n.approval_id and n.kind not in ASKING}
            ):
                await self._supersede(tx, approval_id)
        return True

    async def _plan(self, tx: Tx, notice: Notice) -> list[Delivery]:
        """The deliveries of a notice; one without a channel if no person who may decide is reached."""
        channels = await tx.channels([notice.workspace_id, EVERY_WORKSPACE])
        wanting = [one for one in channels if one.wants(notice)]
        if not wanting:
            return []
        concerned = await _concerned(tx, notice, wanting)
        if notice.approval_id is not None and concerned.approval is None:
            return []  # deleted with its session
        chosen = [one for one in wanting if concerned.gets(notice, one)]
        now = self._clock()
        if not chosen:
            unsent = Delivery(
                id=new_id("dlv"),
                notice=notice,
                channel_id=None,
                state="no_recipient",
                created_at=now,
                next_at=now,
                closed_at=now,
            )
            return [unsent] if notice.kind in ASKING else []
        return [
            Delivery(
                id=new_id("dlv"),
                notice=notice,
                channel_id=one.id,
                over=one.label,
                created_at=now,
                next_at=await _first_due(tx, one, notice, now),
            )
            for one in chosen
        ]

    async def _supersede(self, tx: Tx, approval_id: str) -> None:
        """Drops what asks for a decision that is no longer needed. Anything being sent is left to its courier."""
        found = await tx.deliveries_of_approval(approval_id)
        asking = [one.id for one in found if one.state == "pending" and one.notice.kind in ASKING]
        for one in await tx.locked_deliveries(asking) if asking else []:
            if one.state == "pending" and not one.sending and not one.by_hand:
                await tx.put_delivery(self._closed(one, "superseded"))

    # -- taking

    async def _take(self, tx: Tx, due: Sequence[str], now: datetime) -> list[Parcel]:
        found = [
            one for one in await tx.locked_deliveries(due) if one.state == "pending" and one.next_at <= now
        ]
        channels = await tx.channels_of(sorted({one.channel_id for one in found if one.channel_id}))
        people = [c.principal_id for c, _ in channels.values() if c.principal_id is not None]
        reading = await tx.readers(sorted(people), now - READING)
        parcels: list[Parcel] = []
        taken: set[str] = set()
        for one in found:
            if one.id in taken:
                continue
            known = channels.get(one.channel_id or "")
            put_off = await self._put_off(tx, one, known and known[0], reading, now)
            if put_off is not None:
                await tx.put_delivery(put_off)
                continue
            assert known is not None  # noqa: S101 - else it was put off
            merged = await self._merged(tx, one, known[0], now)
            taken |= {each.id for each in merged}
            parcel = await self._parcel(tx, merged, known, now)
            if parcel is not None:
                parcels.append(parcel)
        return parcels

    async def _put_off(
        self, tx: Tx, one: Delivery, channel: Channel | None, reading: set[str], now: datetime
    ) -> Delivery | None:
        """The delivery closed, or due at another time; None if it is to be sent now."""
        if channel is None or channel.state.gone or not channel.enabled:
            return self._closed(one, "gone", "the channel was removed, switched off, or its target is gone")
        if one.sending and one.first_at is not None and now - one.first_at > GIVEN_UP:
            return self._closed(one, "failed", one.last_error or "it was begun, and its outcome not recorded")
        if one.by_hand:
            return None
        if one.notice.kind in ASKING and not await _waits(tx, one):
            return self._closed(one, "superseded")
        due = await _later(tx, one, channel, reading, now)
        return None if due is None else one.but(next_at=due)

    async def _merged(self, tx: Tx, one: Delivery, channel: Channel, now: datetime) -> list[Delivery]:
        """The delivery with all others that a digest has."""
        if channel.digest_s is None or one.notice.severity == "critical" or one.by_hand:
            return [one]
        pending = await tx.pending_of_channel(channel.id, AT_ONCE)
        others = [
            each.id
            for each in pending
            if each.id != one.id
            and not each.sending
            and not each.by_hand
            and each.notice.severity != "critical"
        ]
        merged = [one]
        for each in await tx.locked_deliveries(others) if others else []:
            if each.state != "pending" or each.sending:
                continue
            if each.notice.kind in ASKING and not await _waits(tx, each):
                await tx.put_delivery(self._closed(each, "superseded"))
            else:
                merged.append(each)
        return sorted(merged, key=lambda each: each.id)

    async def _parcel(
        self, tx: Tx, merged: Sequence[Delivery], known: tuple[Channel, str], now: datetime
    ) -> Parcel | None:
        channel, sealed = known
        attempt = max(one.attempts for one in merged) + 1
        try:
            secret = self._sealer.open(sealed)
        except ConfigError as error:
            for one in merged:
                await tx.put_delivery(self._closed(one, "refused", str(error)))
            await self._note_channel(tx, channel, sealed, Settled(state="refused", why=error.message))
            return None
        for one in merged:
            begun = one.but(attempts=attempt, sending=True, next_at=now + TAKEN, first_at=one.first_at or now)
            await tx.put_delivery(begun)
        return Parcel(
            delivery_ids=tuple(one.id for one in merged),
            attempt=attempt,
            notice=merged[0].notice if len(merged) == 1 else _digest(merged, now),
            channel=channel,
            secret=secret,
            external_ref=await _reference(tx, merged[0]) if len(merged) == 1 else None,
            call=await _shown(tx, merged[0], channel) if len(merged) == 1 else None,
        )

    # -- settling

    async def _settled(self, tx: Tx, one: Delivery, settled: Settled) -> Delivery:
        now = self._clock()
        if settled.state != "retry":
            done = self._closed(one, settled.state, settled.why)
            return done.but(external_ref=settled.external_ref or one.external_ref)
        if one.notice.kind in ASKING and not one.by_hand and not await _waits(tx, one):
            return self._closed(one, "superseded", settled.why)
        if now - (one.first_at or now) >= GIVEN_UP:
            return self._closed(one, "failed", settled.why)
        return one.but(
            sending=False, last_error=settled.why, next_at=now + timedelta(seconds=max(settled.retry_s, 0.0))
        )

    async def _hurry_next(self, tx: Tx, one: Delivery) -> None:
        """Makes due what waited for this one: the next notice of the same approval on the same channel."""
        if one.notice.approval_id is None:
            return
        later = [
            each.id
            for each in await tx.deliveries_of_approval(one.notice.approval_id)
            if each.channel_id == one.channel_id and each.id > one.id and each.state == "pending"
        ]
        for each in await tx.locked_deliveries(later) if later else []:
            if not each.sending and not each.attempts:
                await tx.put_delivery(each.but(next_at=min(each.next_at, self._clock())))

    async def _note_channel(self, tx: Tx, channel: Channel, sealed: str, settled: Settled) -> None:
        now, state = self._clock(), channel.state
        if settled.state == "sent":
            if state.failures == 0 and state.last_at is not None and now - state.last_at < NOTED:
                return
            after = ChannelState(last_at=now)
        else:
            after = ChannelState(
                last_at=now,
                last_error=settled.why,
                failures=state.failures + 1,
                failing_since=state.failing_since or now,
                gone=state.gone or settled.state == "gone",
            )
        await tx.put_channel(channel.but(state=after), sealed)

    def _closed(self, one: Delivery, state: DeliveryState, why: str = "") -> Delivery:
        return one.but(state=state, sending=False, last_error=why or None, closed_at=self._clock())


async def _concerned(tx: Tx, notice: Notice, wanting: Sequence[Channel]) -> Concerned:
    approval = await tx.approval(notice.approval_id) if notice.approval_id is not None else None
    session = await tx.session(notice.session_id) if notice.session_id is not None else None
    workspace = await tx.workspace(notice.workspace_id)
    people = await tx.people(sorted({one.principal_id for one in wanting if one.principal_id is not None}))
    return Concerned(session, approval, people, workspace is not None and workspace.separation_of_duties)


async def _first_due(tx: Tx, channel: Channel, notice: Notice, now: datetime) -> datetime:
    """At once; in a digest, with the notices that wait for it."""
    if channel.digest_s is None or notice.severity == "critical":
        return now
    waiting = [one.next_at for one in await tx.pending_of_channel(channel.id, AT_ONCE) if not one.attempts]
    return min([*waiting, now + timedelta(seconds=channel.digest_s)])


async def _later(
    tx: Tx, one: Delivery, channel: Channel, reading: set[str], now: datetime
) -> datetime | None:
    """When it is due instead of now; None: it is due now."""
    earlier = await _earlier(tx, one)
    if earlier is not None:
        return max(earlier.next_at, now + timedelta(seconds=1))
    quiet = channel.quiet_hours.end_after(now) if channel.quiet_hours is not None else None
    if quiet is not None and one.notice.severity != "critical":
        return quiet
    return now + LOOK_AGAIN if channel.principal_id in reading else None


async def _waits(tx: Tx, one: Delivery) -> bool:
    """Whether the call that a delivery is about still waits."""
    approval = await tx.approval(one.notice.approval_id or "")
    return approval is not None and approval.state is ApprovalState.PENDING


async def _shown(tx: Tx, one: Delivery, channel: Channel) -> ShownCall | None:
    """The call that a delivery asks about, if the channel shows calls and it still waits."""
    if channel.kind != "slack" or channel.settings.get("show_input") is not True:
        return None
    approval = await tx.approval(one.notice.approval_id or "") if one.notice.kind in ASKING else None
    if approval is None or approval.state is not ApprovalState.PENDING:
        return None
    return shown_call(approval)


async def _earlier(tx: Tx, one: Delivery) -> Delivery | None:
    """An earlier notice of the same approval that the channel has not got yet."""
    if one.notice.approval_id is None:
        return None
    found = await tx.deliveries_of_approval(one.notice.approval_id)
    mine = (each for each in found if each.channel_id == one.channel_id and each.id < one.id)
    return next((each for each in mine if each.state == "pending"), None)


async def _reference(tx: Tx, one: Delivery) -> dict[str, object] | None:
    if one.notice.approval_id is None:
        return None
    found = await tx.deliveries_of_approval(one.notice.approval_id)
    known = [each.external_ref for each in found if each.channel_id == one.channel_id and each.external_ref]
    return known[-1] if known else None


def _digest(merged: Sequence[Delivery], now: datetime) -> Notice:
    """One notice that stands for several, of the highest severity among them."""
    first = merged[0].notice
    asking = [one for one in merged if one.notice.kind in ASKING]
    what = "calls wait for approval" if len(asking) == len(merged) else "notices"
    return Notice(
        id=new_id("ntc"),
        kind="digest",
        workspace_id=first.workspace_id,
        severity=SEVERITIES[max(SEVERITIES.index(one.notice.severity) for one in merged)],
        created_at=now,
        title=f"{len(merged)} {what}",
        count=len(merged),
    )
