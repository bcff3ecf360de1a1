"""What the panel's entries and flows stand on. The composition root fills it in."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from claude_hitl_template.models import Agent, Environment
from claude_hitl_template.store.protocol import Store


class Locks(Protocol):
    """The locks of the flow that asks. Kodosumi's own `tracer.lock` does not tell the id that closing one needs."""

    async def wait(self, name: str, lock_id: str, data: Mapping[str, Any], timeout_s: float) -> Any:
        """Shows a lock until it is released, here or in the panel. Returns what it was released with.

        Raises TimeoutError after `timeout_s`.
        """
        ...

    async def release(self, lock_id: str, result: Mapping[str, Any]) -> None:
        """Closes a lock that was not answered in the panel; one that was stays as it is."""
        ...


@dataclass(frozen=True)
class PanelServices:
    """`wait_s`: how long a flow without change goes on before it ends with its session parked."""

    store: Store
    agent: Agent
    environment: Environment
    wait_s: float
