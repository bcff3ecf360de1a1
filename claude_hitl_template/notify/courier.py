"""The courier: takes what the store has committed, sends it, and records what came out of it.

It may run in several processes. One that dies leaves what it was sending to the next: everything is sent at least once.
"""

import asyncio
import random
import traceback
from collections import Counter
from collections.abc import Callable

import structlog

from claude_hitl_template import fault_points
from claude_hitl_template.domain.notices import Parcel, Settled
from claude_hitl_template.errors import HitlError
from claude_hitl_template.notify.sender import SEND_S, Gone, Outcome, Refused, Retry, Senders, Sent
from claude_hitl_template.store.couriers import OF_EACH
from claude_hitl_template.store.notifying import Couriers

log = structlog.get_logger()

AT_ONCE = 100  # sends
ASK_S = 30.0  # timeout of one call of the ledger, which answers at once if something is due
AGAIN_S = 1.0  # after the ledger was unreachable
FIRST_RETRY_S, LONGEST_RETRY_S, DAY_S = 5.0, 3600.0, 86400.0


class Courier:
    """Sends until `close`.

    Args:
        store: Of the role courier.
        senders: By kind of channel; a channel without one is refused.
        pages_url: Where browsers reach the pages of the service.
        jitter: Returns a factor between its two arguments, for the time between two tries.
        send_s: Timeout of one send.
    """

    def __init__(
        self,
        store: Couriers,
        senders: Senders,
        *,
        pages_url: str,
        jitter: Callable[[float, float], float] = random.uniform,
        send_s: float = SEND_S,
    ) -> None:
        self._store, self._senders, self._pages_url, self._jitter = store, senders, pages_url, jitter
        self._send_s = send_s
        self._sending = Counter[str]()  # by channel
        self._tasks = set[asyncio.Task[None]]()
        self._loop: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._loop = asyncio.create_task(self._run())

    def check_health(self) -> None:
        """Raises RuntimeError when the courier has stopped."""
        if self._loop is not None and self._loop.done():
            raise RuntimeError(f"the courier stopped: {self._loop.exception()}")

    async def close(self) -> None:
        """Ends the loop and the sends; what was not sent is sent by the next courier."""
        tasks = [*self._tasks, *([self._loop] if self._loop is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for sender in self._senders.values():
            await sender.close()

    async def send_due(self, timeout_s: float = 0.0) -> int:
        """Begins to send what is due, as soon as there is something; returns how many sends began."""
        busy = [channel_id for channel_id, count in self._sending.items() if count >= OF_EACH]
        parcels = await self._store.take_deliveries(
            limit=AT_ONCE - len(self._tasks), busy=busy, timeout_s=timeout_s
        )
        for parcel in parcels:
            self._sending[parcel.channel.id] += 1
            task = asyncio.create_task(self._deliver(parcel))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return len(parcels)

    async def settled(self) -> None:
        """Waits until the sends that began have ended."""
        while self._tasks:
            await asyncio.wait(set(self._tasks))

    async def _run(self) -> None:
        while True:
            if len(self._tasks) >= AT_ONCE:
                await asyncio.wait(set(self._tasks), return_when=asyncio.FIRST_COMPLETED)
            try:
                await self.send_due(ASK_S)
            except HitlError as error:
                log.warning("notices cannot be read; trying again", why=str(error))
                await asyncio.sleep(AGAIN_S)

    async def _deliver(self, parcel: Parcel) -> None:
        try:
            await fault_points.reach("send.before")
            outcome = await self._send(parcel)
            await fault_points.reach("send.after")
        finally:
            self._free(parcel.channel.id)
        try:
            settled = self._as_settled(outcome, parcel.attempt)
            await self._store.settle_delivery(parcel.delivery_ids, parcel.attempt, settled)
        except HitlError as error:  # it will be sent again
            log.warning("the outcome of a notice is not recorded", notice=parcel.notice.id, why=str(error))

    def _free(self, channel_id: str) -> None:
        self._sending[channel_id] -= 1
        if not self._sending[channel_id]:
            del self._sending[channel_id]

    async def _send(self, parcel: Parcel) -> Outcome:
        kind = parcel.channel.kind
        sender = self._senders.get(kind)
        if sender is None:
            return Refused(f"this service is not set up to send over {kind}; see docs/notifications.md")
        try:
            async with asyncio.timeout(self._send_s):
                outcome = await sender.send(parcel, link_to(self._pages_url, parcel))
        except TimeoutError:
            outcome = Retry(f"no answer within {self._send_s:g} s")
        except Exception as error:  # noqa: BLE001
            # A defect of one sender must not stop the others. The error's message may quote a secret, so it is not logged.
            where = traceback.extract_tb(error.__traceback__)[-1]
            log.error(  # noqa: TRY400 - with a traceback, the message would be logged
                "a sender failed",
                kind=kind,
                channel=parcel.channel.id,
                error=type(error).__name__,
                where=f"{where.filename}:{where.lineno}",
            )
            outcome = Retry(f"the sender failed ({type(error).__name__}); the service's log says where")
        level = log.info if isinstance(outcome, Sent) else log.warning
        level(
            "notice " + type(outcome).__name__.lower(),
            notice=parcel.notice.id,
            kind=parcel.notice.kind,
            channel=parcel.channel.id,
            attempt=parcel.attempt,
            why=getattr(outcome, "why", None),
        )
        return outcome

    def _as_settled(self, outcome: Outcome, attempt: int) -> Settled:
        match outcome:
            case Sent(external_ref):
                return Settled(state="sent", external_ref=external_ref)
            case Retry(why, after_s):
                return Settled(state="retry", why=why[:500], retry_s=self._retry_s(attempt, after_s))
            case Refused(why):
                return Settled(state="refused", why=why[:500])
            case Gone(why):
                return Settled(state="gone", why=why[:500])

    def _retry_s(self, attempt: int, after_s: float | None) -> float:
        """Seconds until the next try: doubled each time, and spread so that channels do not return together."""
        backoff = min(FIRST_RETRY_S * 2 ** min(attempt - 1, 20), LONGEST_RETRY_S) * self._jitter(0.75, 1.25)
        return min(max(backoff, after_s or 0.0), DAY_S)


def link_to(pages_url: str, parcel: Parcel) -> str:
    """The address of the page that shows what a notice is about."""
    notice = parcel.notice
    if notice.approval_id is not None:
        return f"{pages_url}/inbox/a/{notice.approval_id}"
    if notice.session_id is not None:
        return f"{pages_url}/sessions/{notice.session_id}"
    return f"{pages_url}/inbox"
