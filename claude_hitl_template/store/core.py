"""The Store, put together from its three callers' rules over one backend."""

import uuid
from collections.abc import Callable
from datetime import datetime

from claude_hitl_template.domain.audit.signing import Signer
from claude_hitl_template.domain.models import utcnow
from claude_hitl_template.files.blob_store import FileArea
from claude_hitl_template.store.audit import AuditRules
from claude_hitl_template.store.backend import Backend
from claude_hitl_template.store.base import AskLimits, StoreBase
from claude_hitl_template.store.channels import ChannelRules
from claude_hitl_template.store.clients import ClientRules
from claude_hitl_template.store.couriers import CourierRules
from claude_hitl_template.store.keys import KeyRules
from claude_hitl_template.store.owners import OwnerRules
from claude_hitl_template.store.people import PeopleRules
from claude_hitl_template.store.policies import PolicyRules
from claude_hitl_template.store.sealing import Sealer
from claude_hitl_template.store.sign_ins import SignInRules
from claude_hitl_template.store.supervision import SupervisorRules
from claude_hitl_template.store.waiting import WaitingRules
from claude_hitl_template.store.workspaces import WorkspaceRules


class CoreStore(
    KeyRules,
    PeopleRules,
    PolicyRules,
    SignInRules,
    ChannelRules,
    ClientRules,
    CourierRules,
    OwnerRules,
    SupervisorRules,
    WaitingRules,
    WorkspaceRules,
    AuditRules,
    StoreBase,
):
    """Implements `store.protocol.Store` over any Backend. `clock` returns the current time.

    Without `files`, saved workspaces are in memory and lost with the process; without `signer`, the audit log is signed by
    a key that is; without `sealer`, secrets of channels are encrypted by one. Without `ask_limits` a session may ask without
    limit.
    """

    def __init__(
        self,
        backend: Backend,
        clock: Callable[[], datetime] = utcnow,
        *,
        files: FileArea | None = None,
        signer: Signer | None = None,
        ask_limits: AskLimits | None = None,
        sealer: Sealer | None = None,
    ) -> None:
        files = files or FileArea(f"memory://{uuid.uuid4().hex}")
        super().__init__(
            backend,
            files,
            clock,
            signer or Signer.generate(),
            limits=ask_limits,
            sealer=sealer or Sealer.generate(),
        )
