"""The part of the Store's protocol that concerns channels and notices; see store/protocol.py."""

from collections.abc import Mapping
from typing import Any, Protocol

from claude_hitl_template.domain.notices import Channel
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
