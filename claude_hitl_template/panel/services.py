"""The dependencies of the panel's entries and flows, which `cluster/` provides."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from claude_hitl_template.domain.models import Agent, Environment, ImageFacts
from claude_hitl_template.store.protocol import Clients, Windows


class Locks(Protocol):
    """The locks of one flow. Kodosumi's own `tracer.lock` does not reveal the id that closing a lock needs."""

    async def wait(self, name: str, lock_id: str, data: Mapping[str, Any], timeout_s: float) -> Any:
        """Keeps the form of a lock answerable until the lock is released.

        Args:
            name: Which form.
            lock_id: Identifies this lock.
            data: Passed to the form.
            timeout_s: How long to wait.

        Returns:
            The value with which the lock was released.

        Raises:
            TimeoutError: It was not released in time.
        """
        ...


@dataclass(frozen=True)
class WindowServices:
    """The dependencies of a flow.

    Attributes:
        store: Gives access to the flow's session only.
        image_facts: As in `api.app.Service`.
        wait_s: How long a flow waits without any change before it ends with its session parked.
        max_upload_bytes: The most that one turn offers for download.
        pages_url: Where browsers reach the pages of the service.
        free: The offline model answered when the window was opened, so nothing costs anything.
    """

    store: Windows
    image_facts: Callable[[str], Awaitable[ImageFacts | None]]
    wait_s: float
    max_upload_bytes: int
    pages_url: str
    free: bool = False


@dataclass(frozen=True)
class PanelServices:
    """The dependencies of the entries.

    Attributes:
        store: The sessions of all keys.
        agent: The agent of new conversations.
        environments: By id; the first is the default.
        max_upload_bytes: The most that one form uploads.
        panel_url: The address of the panel.
        pages_url: Where browsers reach the pages of the service.
        window: Returns, for a session's id, the function that Kodosumi runs as the flow that shows the session.
        is_open: Whether a flow is alive and belongs to a user; takes both ids.
        sandbox: "on", "off" or "none".
        ray_is_open: Whether Ray requires no token.
    """

    store: Clients
    agent: Agent
    environments: Mapping[str, Environment]
    max_upload_bytes: int
    panel_url: str
    pages_url: str
    window: Callable[[str], Callable[..., Any]]
    is_open: Callable[[str, str], Awaitable[bool]]
    sandbox: str = "on"
    ray_is_open: bool = False
