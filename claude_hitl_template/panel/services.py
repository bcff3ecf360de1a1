"""What the panel's entries and flows stand on. The composition root fills it in."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from claude_hitl_template.domain.models import Agent, Environment, ImageFacts
from claude_hitl_template.store.protocol import Clients, Windows


class Locks(Protocol):
    """The locks of the flow that asks. Kodosumi's own `tracer.lock` does not tell the id that closing one needs."""

    async def wait(self, name: str, lock_id: str, data: Mapping[str, Any], timeout_s: float) -> Any:
        """Keeps a lock's form answerable until it is released. Returns what it was released with.

        Raises TimeoutError after `timeout_s`.
        """
        ...


@dataclass(frozen=True)
class WindowServices:
    """What a flow has: the store as far as it shows the flow's session.

    `wait_s`: how long a flow without change goes on before it ends with its session parked. `image_facts` are as in
    `api.app.Service`.
    """

    store: Windows
    image_facts: Callable[[str], Awaitable[ImageFacts | None]]
    wait_s: float
    max_upload_bytes: int


@dataclass(frozen=True)
class PanelServices:
    """What the entries have.

    `environments` by id, the first is the default. `window` is what Kodosumi runs as the flow that shows a session, whose
    id it is given. `is_open` says whether a flow lives and is a user's: (flow, user's id). `sandbox`: "on", "off" or
    "none".
    """

    store: Clients
    agent: Agent
    environments: Mapping[str, Environment]
    max_upload_bytes: int
    panel_url: str
    window: Callable[[str], Callable[..., Any]]
    is_open: Callable[[str, str], Awaitable[bool]]
    sandbox: str = "on"
