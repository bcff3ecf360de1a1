"""The part of the Store's protocol that concerns channels and notices; see store/protocol.py."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from claude_hitl_template.domain.models import Page
from claude_hitl_template.domain.notices import Channel, Delivery, DeliveryState, Parcel, Settled
from claude_hitl_template.domain.people import SERVICE, Actor


class Channels(Protocol):
    """Methods for those who register where notices are sent. `workspace_id` None: of any workspace, or of a person."""

    async def add_channel(
        self, channel: Channel, secret: Mapping[str, str], *, by: Actor = SERVICE
    ) -> Channel:
        """Registers a channel; the one with this id stays as it is. Raises Conflict for more than CHANNELS of a workspace or
        a person."""
        ...

    async def list_channels(
        self, workspace_id: str | None, *, principal_id: str | None = None
    ) -> list[Channel]:
        """The channels of a workspace (None: of all, with those of people), or those of one person; oldest first."""
        ...

    async def get_channel(self, channel_id: str, workspace_id: str | None) -> Channel:
        """Raises NotFound."""
        ...

    async def channel_secret(self, channel_id: str) -> Mapping[str, str]:
        """The secrets of a channel by name, for a check of what its target sends. Raises NotFound."""
        ...

    async def change_channel(
        self,
        channel_id: str,
        workspace_id: str | None,
        changes: Mapping[str, Any],
        *,
        secret: Mapping[str, str] | None = None,
        by: Actor = SERVICE,
    ) -> Channel:
        """Changes fields of a channel, all but its id, kind and owner, and with `secret` its secrets. It counts as working
        again. Raises NotFound."""
        ...

    async def remove_channel(self, channel_id: str, workspace_id: str | None, *, by: Actor = SERVICE) -> None:
        """With its deliveries. Raises NotFound."""
        ...

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
        """Notices of a workspace (None: of all) and what came out of them, the newest first."""
        ...

    async def redeliver(self, delivery_id: str, workspace_id: str | None, *, by: Actor = SERVICE) -> Delivery:
        """Sends a notice again at once, also one of a call that was decided. Raises NotFound, and Conflict for one without a
        channel."""
        ...

    async def send_test(
        self, channel_id: str, workspace_id: str | None, *, notice_id: str, by: Actor = SERVICE
    ) -> Delivery:
        """Sends a notice of the kind `test` over a channel; again with the same `notice_id` it does nothing. Raises
        NotFound."""
        ...

    async def note_reader(self, principal_id: str) -> None:
        """Records that a person has the inbox open and visible now: their own channels are quiet meanwhile."""
        ...


class Couriers(Protocol):
    """Methods for couriers, who send what the store has committed."""

    async def ping(self, *, write: bool = True) -> None:
        """As in `Reachable`."""
        ...

    async def take_deliveries(
        self, *, limit: int, busy: Sequence[str] = (), timeout_s: float = 0.0
    ) -> list[Parcel]:
        """The notices to send now, as soon as there are any; none after `timeout_s`.

        Another courier gets the same only if its outcome is not recorded within a minute. Of each channel that is not `busy`
        a few are taken. Of one approval a channel gets one notice after the other.
        """
        ...

    async def settle_delivery(self, delivery_ids: Sequence[str], attempt: int, settled: Settled) -> None:
        """Records what came out of a send. It has no effect once another attempt was begun."""
        ...
