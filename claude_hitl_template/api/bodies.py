"""Request bodies. What an agent may override is in agents.py, what a client may send as an event in domain/events.py."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, StringConstraints, field_validator
from pydantic.json_schema import SkipJsonSchema

from claude_hitl_template.api.agents import AgentBody, by_id
from claude_hitl_template.api.parameters import Timestamp
from claude_hitl_template.api.strict_json import Body
from claude_hitl_template.domain.events import ClientEvent, UserMessage, UserToolConfirmation
from claude_hitl_template.domain.models import CLAIM_S, MAX_CLAIM_S
from claude_hitl_template.domain.notices import ApprovalNotice, SessionNotice
from claude_hitl_template.domain.people import SCOPES, Scope
from claude_hitl_template.domain.policy.tiers import (
    MAX_RULES,
    RuleAction,
    Severity,
    WorkspacePolicy,
    WorkspaceRule,
)

Title = Annotated[str, StringConstraints(max_length=500)]
MetaKey = Annotated[str, StringConstraints(min_length=1, max_length=64)]
MetaValue = Annotated[str, StringConstraints(max_length=512)]


class CreateSession(Body):
    """`agent` is an agent's id, or an object that overrides parts of it."""

    agent: Annotated[AgentBody, by_id("agent", AgentBody)]
    environment_id: str
    title: Title | None = None
    metadata: Annotated[dict[MetaKey, MetaValue], Field(max_length=16)] = Field(
        default_factory=dict[str, str]
    )
    initial_events: Annotated[list[UserMessage], Field(max_length=50)] = Field(
        default_factory=list[UserMessage]
    )
    resources: Annotated[list[Any], Field(max_length=0)] = Field(default_factory=list[Any])
    vault_ids: Annotated[list[Any], Field(max_length=0)] = Field(default_factory=list[Any])


class UpdateSession(Body):
    """Fields that are left out stay. `metadata` is a patch: null removes a key."""

    title: Title | None = None
    metadata: dict[MetaKey, MetaValue | None] | None = None


class SendEvents(Body):
    """Events for a session; all of them are accepted, or none."""

    events: list[ClientEvent] = Field(min_length=1, max_length=100)


class Decide(UserToolConfirmation):
    """A decision. The address names the call, so `type` and `tool_use_id` of a `user.tool_confirmation` are left out."""

    type: SkipJsonSchema[Literal["user.tool_confirmation"]] = "user.tool_confirmation"
    tool_use_id: SkipJsonSchema[str] = ""

    @field_validator("type", "tool_use_id", mode="before")
    @classmethod
    def _refuse(cls, _given: Any) -> Any:
        raise ValueError("the address says which call is decided; leave it out")

    def confirmation(self, approval_id: str) -> UserToolConfirmation:
        """This decision on the call of an approval."""
        given = self.model_dump(exclude_unset=True)
        return UserToolConfirmation(type="user.tool_confirmation", tool_use_id=approval_id, **given)


class ClaimApproval(Body):
    """For how long the caller says to be looking at a call; 0: no longer."""

    seconds: Annotated[int, Field(ge=0, le=MAX_CLAIM_S)] = CLAIM_S


class DelegateApproval(Body):
    """Whom a call is handed over to: a person, or a group. One of `principal_id` and `group` is needed."""

    principal_id: str | None = None
    group: Annotated[str, StringConstraints(min_length=1, max_length=200)] | None = None
    note: Annotated[str, StringConstraints(max_length=2000)] = ""


class SetPolicy(Body):
    """A workspace's policy. `version` is the one that it replaces, 0 for the first one; another one now is an error."""

    rules: Annotated[list[WorkspaceRule], Field(max_length=MAX_RULES)]
    default: RuleAction = "allow"
    version: Annotated[int, Field(ge=0)]

    def policy(self) -> WorkspacePolicy:
        return WorkspacePolicy(rules=tuple(self.rules), default=self.default)


WebhookUrl = Annotated[str, StringConstraints(min_length=1, max_length=2000)]
WebhookEvent = ApprovalNotice | SessionNotice
WebhookEvents = Annotated[list[WebhookEvent], Field(min_length=1, max_length=50)]
WebhookName = Annotated[str, StringConstraints(max_length=200)]


class NewWebhook(Body):
    """A webhook. `url` is https; `min_severity` is of approvals."""

    url: WebhookUrl
    events: WebhookEvents
    name: WebhookName = ""
    min_severity: Severity = "low"


class ChangeWebhook(Body):
    """Fields that are left out stay. Nothing is sent, or kept to be sent, while `enabled` is false."""

    url: WebhookUrl | SkipJsonSchema[None] = None
    events: WebhookEvents | SkipJsonSchema[None] = None
    name: WebhookName | SkipJsonSchema[None] = None
    min_severity: Severity | SkipJsonSchema[None] = None
    enabled: bool | SkipJsonSchema[None] = None


class Drain(Body):
    """For how long to wait for running turns."""

    grace_s: Annotated[float, Field(strict=True, description="Seconds; at most 300.")] = 10


class Password(Body):
    """A user's password, of 12 to 1024 characters."""

    password: Annotated[str, StringConstraints(min_length=1, max_length=1024)]


class Secret(Body):
    """A secret that is stored on the service's machine."""

    value: str


def _shown_name(given: str) -> str:
    name = given.strip()
    if not name:
        raise ValueError("is empty; say whose or what it is")
    if not name.isprintable():
        raise ValueError("contains characters that cannot be displayed")
    return name


ShownName = Annotated[str, Field(min_length=1, max_length=100), AfterValidator(_shown_name)]
WorkspaceRole = Literal["viewer", "requester", "approver", "operator"]
RoleName = Literal["viewer", "requester", "approver", "operator", "admin"]
Roles = Annotated[list[WorkspaceRole], Field(max_length=10)]
Email = Annotated[str, StringConstraints(pattern=r"^[^@\s]+@[^@\s]+$", max_length=254)]
Groups = Annotated[list[ShownName], Field(max_length=100)]
RolesByWorkspace = Annotated[dict[str, list[RoleName]], Field(max_length=1000)]


class NewKey(Body):
    """An API key. `name` says whose it is; `principal_id` names a user or service account that there is.

    Without `principal_id` it belongs to the service account of its name, which is made if there is none, with `roles` in
    the workspace (default: requester and approver).
    """

    name: ShownName
    principal_id: str | None = None
    roles: Roles | None = None
    scopes: Annotated[list[Scope], Field(min_length=1, max_length=10)] = Field(
        default_factory=lambda: list(SCOPES)
    )
    expires_at: Annotated[Timestamp, Field(strict=False)] | None = None


class NewWorkspace(Body):
    """A workspace. Its name is shown to its members."""

    name: ShownName


class _Change(Body):
    """Fields that are left out stay. `version` is the one that the change is made to; another one now is an error."""

    version: int | None = None

    def changes(self) -> dict[str, Any]:
        return self.model_dump(exclude_unset=True, exclude={"version"})


class ChangeWorkspace(_Change):
    """A change of a workspace. `separation_of_duties`: who asked for a session may not decide on its
    calls."""

    name: ShownName | SkipJsonSchema[None] = None
    separation_of_duties: bool | SkipJsonSchema[None] = None


class SetMember(Body):
    """The roles of a user or service account in a workspace."""

    roles: Roles
    version: int | None = None


class NewPrincipal(Body):
    """A user or a service account. `roles` is by workspace id; "*" stands for every workspace, and holds admin."""

    kind: Literal["user", "service_account"]
    name: ShownName
    email: Email | None = None
    roles: RolesByWorkspace = Field(default_factory=dict[str, list[RoleName]])
    groups: Groups = Field(default_factory=list[str])

    def fields(self) -> dict[str, Any]:
        return self.model_dump()


class ChangePrincipal(_Change):
    """A change of a user or a service account."""

    name: ShownName | SkipJsonSchema[None] = None
    email: Email | None = None
    roles: RolesByWorkspace | SkipJsonSchema[None] = None
    groups: Groups | SkipJsonSchema[None] = None
    disabled: bool | SkipJsonSchema[None] = None
