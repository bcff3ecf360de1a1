"""The contract of a notification channel: one sender for each kind of channel, and what came out of a send."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from claude_hitl_template.domain.notices import ChannelKind, Parcel


@dataclass(frozen=True)
class Sent:
    """The target has it. `external_ref` (JSON) is kept for the channel's next send about the same approval."""

    external_ref: dict[str, Any] | None = None


@dataclass(frozen=True)
class Retry:
    """It may work later. `after_s`: not before so many seconds; None leaves that to the courier."""

    why: str
    after_s: float | None = None


@dataclass(frozen=True)
class Refused:
    """It will not work however often it is tried, for instance because the settings are wrong."""

    why: str


@dataclass(frozen=True)
class Gone:
    """The target no longer exists: nothing more is sent over the channel."""

    why: str


type Outcome = Sent | Retry | Refused | Gone


class Sender(Protocol):
    """Sends over one kind of channel. One instance serves all channels of the kind, several at once."""

    async def send(self, parcel: Parcel, link: str) -> Outcome:
        """Sends one notice.

        Args:
            parcel: The notice, the channel with its secrets, and the reference of an earlier message to update.
            link: The address of the page that shows what the notice is about.

        Returns:
            The outcome. `why` is shown to operators: it has no secret and nothing that the target returned as text.

        An exception is taken as `Retry`, and logged by its class. The courier cancels a send that takes longer than SEND_S.
        """
        ...

    async def close(self) -> None:
        """Closes connections; nothing is sent afterwards."""
        ...


SEND_S = 30.0

type Senders = Mapping[ChannelKind, Sender]
