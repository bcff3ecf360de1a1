"""The Store, put together from its three callers' rules over one backend."""

from collections.abc import Callable
from datetime import datetime

from claude_hitl_template.models import utcnow
from claude_hitl_template.store.backend import Backend
from claude_hitl_template.store.base import StoreBase
from claude_hitl_template.store.clients import ClientRules
from claude_hitl_template.store.owners import OwnerRules
from claude_hitl_template.store.supervision import SupervisorRules


class CoreStore(ClientRules, OwnerRules, SupervisorRules, StoreBase):
    """Implements `store.protocol.Store` over any Backend. `clock` tells the time, for tests to move it."""

    def __init__(self, backend: Backend, clock: Callable[[], datetime] = utcnow) -> None:
        super().__init__(backend, clock)
