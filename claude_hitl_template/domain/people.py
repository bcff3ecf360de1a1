"""Who may do what: workspaces, principals (users and service accounts), their roles, and the scopes of API keys."""

from collections.abc import Iterable, Mapping
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field

from claude_hitl_template.domain.frozen import Frozen


class Role(StrEnum):
    """What a principal is in a workspace. `ADMIN` is a role of the whole service."""

    VIEWER = "viewer"
    REQUESTER = "requester"
    APPROVER = "approver"
    OPERATOR = "operator"
    ADMIN = "admin"


class Action(StrEnum):
    """What a route does.

    READ: see sessions, events, files, approvals and agents of the workspace. REQUEST: create and change sessions and agents,
    send messages. DECIDE: answer calls that wait. MANAGE: members, keys, rules, settings and audit log of the workspace.
    ADMINISTER: users, workspaces and roles of the service.
    """

    READ = "read"
    REQUEST = "request"
    DECIDE = "decide"
    MANAGE = "manage"
    ADMINISTER = "administer"


Scope = Literal["sessions", "approvals", "read", "admin"]
SCOPES: tuple[Scope, ...] = ("sessions", "approvals", "read", "admin")

# What each role may do.
ROLE_ACTIONS: Mapping[Role, frozenset[Action]] = {
    Role.VIEWER: frozenset({Action.READ}),
    Role.REQUESTER: frozenset({Action.READ, Action.REQUEST}),
    Role.APPROVER: frozenset({Action.READ, Action.DECIDE}),
    Role.OPERATOR: frozenset({Action.READ, Action.MANAGE}),
    Role.ADMIN: frozenset({Action.ADMINISTER}),
}
# What a key with a scope may do, as far as its principal may.
SCOPE_ACTIONS: Mapping[Scope, frozenset[Action]] = {
    "sessions": frozenset({Action.READ, Action.REQUEST}),
    "approvals": frozenset({Action.READ, Action.DECIDE}),
    "read": frozenset({Action.READ}),
    "admin": frozenset({Action.READ, Action.MANAGE, Action.ADMINISTER}),
}
WORKSPACE_ROLES = (Role.VIEWER, Role.REQUESTER, Role.APPROVER, Role.OPERATOR)
EVERYWHERE = "*"  # in `Principal.roles`: in every workspace

Name = Annotated[str, Field(min_length=1, max_length=200)]


class Workspace(Frozen):
    """Owns sessions, agents and rules.

    `default`: the one of the service's first key, of which there is one. `separation_of_duties`: who created a session, or
    sent its last message, may not decide on its calls. `version` counts changes.
    """

    id: str
    name: Name
    created_at: datetime
    default: bool = False
    separation_of_duties: bool = False
    version: int = 1


class Principal(Frozen):
    """A user (a person) or a service account (a program).

    `name` is unique; decisions are recorded under it. `roles` is by workspace id, or EVERYWHERE. `groups` are names that
    rules refer to. `external_id` is who it is for the panel ("panel:<role>") or a sign-in provider. `version` counts
    changes.
    """

    id: str
    kind: Literal["user", "service_account"]
    name: Name
    created_at: datetime
    email: str | None = None
    external_id: str | None = None
    roles: dict[str, tuple[Role, ...]] = Field(default_factory=dict[str, tuple[Role, ...]])
    groups: tuple[str, ...] = ()
    disabled_at: datetime | None = None
    version: int = 1

    def roles_in(self, workspace_id: str | None) -> frozenset[Role]:
        """The roles that hold in a workspace, with those that hold everywhere. None, once it is disabled."""
        if self.disabled_at is not None:
            return frozenset()
        own = self.roles.get(workspace_id, ()) if workspace_id is not None else ()
        return frozenset((*own, *self.roles.get(EVERYWHERE, ())))

    def may(self, action: Action, workspace_id: str | None) -> bool:
        return action in actions_of(self.roles_in(workspace_id))

    @property
    def workspace_ids(self) -> tuple[str, ...]:
        """The workspaces that it belongs to by name."""
        return tuple(sorted(workspace for workspace in self.roles if workspace != EVERYWHERE))


class Actor(Frozen):
    """Who does something, for the Store.

    `principal_id` None stands for the service itself, whose permissions are not checked. Decisions are recorded under
    `name`. `key_id` is the API key that the request came with, or the connection with a user of Slack, if it was one;
    idempotency keys are each key's own.
    """

    name: str
    principal_id: str | None = None
    key_id: str | None = None


SERVICE = Actor(name="claude-hitl")


def actions_of(roles: Iterable[Role]) -> frozenset[Action]:
    return frozenset().union(*(ROLE_ACTIONS[role] for role in roles))


def allowed_by(scopes: Iterable[Scope]) -> frozenset[Action]:
    """What a key with these scopes may do at most."""
    return frozenset().union(*(SCOPE_ACTIONS[scope] for scope in scopes))
