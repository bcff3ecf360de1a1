"""Models of the responses, for the API document only. wire.py and agents.py build the responses, which are not validated
against these models when they are sent; tests compare them with the document."""

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from claude_hitl_template.api.event_resources import Event, StopReason
from claude_hitl_template.domain.models import (
    ApprovalKind,
    ApprovalState,
    Assignee,
    Decision,
    Reviewer,
    SessionStatus,
    Vote,
)
from claude_hitl_template.domain.notices import ChannelKind, DeliveryState, NoticeKind
from claude_hitl_template.domain.people import Role, Scope
from claude_hitl_template.domain.policy import Verdict
from claude_hitl_template.domain.policy.tiers import Requirement, RuleAction, Severity, WorkspaceRule

_JSON = "application/json"
REFERENCE = "#/components/schemas/{model}"


def reference(name: str) -> dict[str, Any]:
    """A JSON schema that refers to a model of the document."""
    return {"$ref": REFERENCE.format(model=name)}


class _Resource(BaseModel):
    """Base of resources. Clients must expect fields that are not listed here."""

    model_config = ConfigDict(extra="allow")


class Error(_Resource):
    """What went wrong; `message` names the field of an invalid request, and how to fix it."""

    type: str
    message: str


class Problem(_Resource):
    """An error. `request_id` is also the header `request-id` of the response, and in the service's log."""

    type: Literal["error"]
    error: Error
    request_id: str | None


class SessionStats(_Resource):
    """How long a session has worked, and existed."""

    active_seconds: float
    duration_seconds: float


class SessionAgent(_Resource):
    """The agent of a session, with its overrides. `permission_rules` and `permission_mode` extend the protocol."""

    type: Literal["agent"]
    id: str
    version: int
    name: str
    description: str | None
    model: dict[str, Any]
    system: str | None
    tools: list[dict[str, Any]]
    mcp_servers: list[dict[str, Any]]
    permission_rules: list[dict[str, Any]]
    permission_mode: Literal["default", "plan"]


class Agent(SessionAgent):
    """An agent that sessions may use."""

    created_at: datetime
    updated_at: datetime
    archived_at: datetime | None


class Session(_Resource):
    """A conversation. `stop_reason`, `parked`, `waiting_for_room`, `first_words`, `workspace_id` and `created_by`, the id of
    whom it is for, extend the protocol."""

    type: Literal["session"]
    id: str
    agent: SessionAgent
    environment_id: str
    title: str | None
    metadata: dict[str, str]
    status: SessionStatus
    stop_reason: StopReason | None
    parked: bool
    waiting_for_room: bool
    first_words: str | None
    workspace_id: str
    created_by: str | None
    created_at: datetime
    updated_at: datetime
    archived_at: datetime | None
    stats: SessionStats
    usage: dict[str, Any]


class SessionDeleted(_Resource):
    """Confirms that a session was deleted."""

    type: Literal["session_deleted"]
    id: str


class Preview(_Resource):
    """A part of an event that is not committed yet."""

    type: Literal["event_start", "event_delta"]


class Ping(BaseModel):
    """Keeps the connection open."""

    model_config = ConfigDict(extra="forbid")


class StreamFrame(_Resource):
    """One message of an event stream. `id` is the cursor of a committed event; previews and pings have none."""

    event: str
    id: Annotated[str, Field(pattern="^[0-9]+$")] = ""
    data: Annotated[
        str,
        Field(
            json_schema_extra={
                "contentMediaType": _JSON,
                "contentSchema": {"anyOf": [reference("Event"), reference("Preview"), reference("Ping")]},
            }
        ),
    ]


class SentEvents(_Resource):
    """The events as they were committed."""

    data: list[Event]


class Segment(_Resource):
    """One command of a command line: its place in code points, how it was judged, and the rule that decided."""

    text: str
    start: int
    end: int
    verdict: Verdict
    source: str


class Approval(_Resource):
    """A call that waits, or waited, for a decision: what would run, where, and its outcome.

    `requirements` are what the workspace's rules ask for, none for one approver; `severity` is the highest of them,
    `quorum` the largest. `votes` are of people who allowed the call, `reviewer` is who is looking at it, `assignee` whom it
    was handed over to. `segments` are the commands of a command line.
    """

    type: Literal["approval"]
    id: str
    session_id: str
    workspace_id: str
    event_id: str
    batch: list[str]
    kind: ApprovalKind
    tool_name: str
    input: dict[str, Any]
    digest: str
    cwd: str
    targets: list[str] | None
    agent_id: str | None
    state: ApprovalState
    held: bool
    severity: Severity
    reason: str
    quorum: int
    requirements: list[Requirement]
    votes: list[Vote]
    reviewer: Reviewer | None
    assignee: Assignee | None
    segments: list[Segment]
    created_at: datetime
    expires_at: datetime | None
    decision: Decision | None
    run_input: dict[str, Any] | None
    run_digest: str | None
    closed_at: datetime | None


class WorkspaceFile(_Resource):
    """A saved file. `mode` is octal; `modified_at` is null for a time outside of the calendar."""

    type: Literal["workspace_file"]
    path: str
    size_bytes: int
    mode: str = Field(pattern="^[0-7]{3,}$")
    modified_at: datetime | None


class Environment(_Resource):
    """Where sessions run. `image`, `image_digest`, `image_facts` and `dependencies` extend the protocol."""

    type: Literal["environment"]
    id: str
    name: str
    description: str | None
    config: dict[str, Any]
    image: str | None
    image_digest: str | None
    image_facts: dict[str, Any] | None
    dependencies: dict[str, Any] | None
    created_at: datetime
    updated_at: datetime
    archived_at: datetime | None


class Version(_Resource):
    """Which code and which model answer."""

    version: str
    model: str


class Health(Version):
    """Whether the service works. `GET /v1/version`, which needs a key, says more."""

    status: Literal["ok"]


class DrainState(_Resource):
    """For how many more seconds no turn is started; 0 if the service is not drained."""

    drained_s: float


class Drained(_Resource):
    """How many sessions still run after the wait."""

    still_running: int


class SecretState(_Resource):
    """Whether a secret is set. Its value is never shown."""

    name: str
    set: bool


class SecretStates(_Resource):
    """All secrets that can be sent."""

    data: list[SecretState]


class Workspace(_Resource):
    """Owns sessions, agents and rules. The `default` one is that of the service's first key."""

    type: Literal["workspace"]
    id: str
    name: str
    created_at: datetime
    default: bool
    separation_of_duties: bool
    version: int


class Workspaces(_Resource):
    """Workspaces by name, the default one first."""

    data: list[Workspace]


class Principal(_Resource):
    """A user or a service account. `roles` is by workspace id; "*" stands for every workspace."""

    type: Literal["principal"]
    id: str
    kind: Literal["user", "service_account"]
    name: str
    email: str | None
    external_id: str | None
    roles: dict[str, list[Role]]
    groups: list[str]
    created_at: datetime
    disabled_at: datetime | None
    version: int


class Principals(_Resource):
    """Users and service accounts by name."""

    data: list[Principal]


class PasswordSet(_Resource):
    """A user has a new password."""

    type: Literal["password"]
    principal_id: str


class SignedOut(_Resource):
    """A user was signed out of so many browsers."""

    type: Literal["signed_out"]
    principal_id: str
    browsers: int


class Member(_Resource):
    """The roles of a user or service account in a workspace. `version` is that of the user or service account."""

    type: Literal["member"]
    principal_id: str
    kind: Literal["user", "service_account"]
    name: str
    roles: list[Role]
    version: int


class Members(_Resource):
    """Who belongs to a workspace."""

    data: list[Member]


class Key(_Resource):
    """An API key without its secret. `last_used_at` is right to within a minute."""

    type: Literal["api_key"]
    id: str
    name: str
    prefix: str
    first: bool
    principal_id: str | None
    scopes: list[Scope]
    created_at: datetime
    expires_at: datetime | None
    last_used_at: datetime | None
    revoked_at: datetime | None


class Keys(_Resource):
    """API keys, oldest first."""

    data: list[Key]


class KeyWithSecret(Key):
    """An API key with its secret, which is shown only here."""

    secret: str


class KeptDecision(_Resource):
    """What remains of a decision when its session is deleted."""

    approval_id: str
    session_id: str
    workspace_id: str
    tool_name: str
    digest: str
    run_digest: str | None
    result: Literal["allow", "deny"]
    decided_by: str
    decided_at: datetime


class KeptDecisions(_Resource):
    """One page of a listing."""

    data: list[KeptDecision]
    next_page: str | None


class AuditActor(_Resource):
    """Who did something. `id` is a principal's, null for the service and for remembered rules."""

    id: str | None
    name: str
    key_id: str | None


class AuditEntry(_Resource):
    """An entry of an audit log. `hash` is the SHA-256 of the RFC 8785 JSON of everything else in it."""

    type: Literal["audit_entry"]
    workspace_id: str
    seq: int
    time: datetime
    actor: AuditActor
    action: str
    target: str
    details: dict[str, Any]
    previous: str
    hash: str


class AuditEntries(_Resource):
    """One page of a listing."""

    data: list[AuditEntry]
    next_page: str | None


class AuditKey(_Resource):
    """An Ed25519 public key as a JWK (RFC 8037). `kid` is its RFC 7638 thumbprint."""

    kty: Literal["OKP"]
    crv: Literal["Ed25519"]
    x: str
    kid: str


class AuditKeys(_Resource):
    """A JWK set (RFC 7517)."""

    keys: list[AuditKey]


class ReceiptDecision(_Resource):
    """What the closing entry of a receipt says; `details` names the call by digest, and the result."""

    action: str
    time: datetime
    actor: AuditActor
    details: dict[str, Any]
    seq: int
    hash: str


class Receipt(_Resource):
    """A proof of what was decided on a call. `signature` is over the RFC 8785 JSON of everything else in it."""

    type: Literal["approval_receipt"]
    workspace_id: str
    approval_id: str
    decision: ReceiptDecision
    entries: list[AuditEntry]
    time: datetime
    public_key: AuditKey
    key_id: str
    signature: str


class Sessions(_Resource):
    """One page of a listing."""

    data: list[Session]
    next_page: str | None


class Events(_Resource):
    """One page of a listing."""

    data: list[Event]
    next_page: str | None


class Approvals(_Resource):
    """One page of a listing."""

    data: list[Approval]
    next_page: str | None


class WorkspaceFiles(_Resource):
    """One page of a listing."""

    data: list[WorkspaceFile]
    next_page: str | None


class Agents(_Resource):
    """One page of a listing."""

    data: list[Agent]
    next_page: str | None


class Environments(_Resource):
    """One page of a listing."""

    data: list[Environment]
    next_page: str | None


class Policy(_Resource):
    """A workspace's rules. `version` counts changes; 0: there never was a rule."""

    type: Literal["policy"]
    workspace_id: str
    version: int
    rules: list[WorkspaceRule]
    default: RuleAction
    changed_at: datetime | None
    changed_by: str | None


class ChannelState(_Resource):
    """How a channel does: `failing` after several sends in a row that failed."""

    status: Literal["unused", "active", "failing", "gone"]
    last_at: datetime | None
    last_error: str | None
    failures: int
    failing_since: datetime | None


class Webhook(_Resource):
    """Where events of a workspace are posted."""

    type: Literal["webhook"]
    id: str
    workspace_id: str
    name: str
    url: str
    events: list[NoticeKind]
    min_severity: Severity
    enabled: bool
    created_at: datetime
    state: ChannelState


class WebhookWithSecret(Webhook):
    """A webhook with the secret that signs its events, which no other response has."""

    secret: str


class Webhooks(_Resource):
    """A whole listing."""

    data: list[Webhook]


class Channel(_Resource):
    """Where notices are sent: a webhook, or another kind of channel of a workspace or a person."""

    type: Literal["channel"]
    id: str
    kind: ChannelKind
    workspace_id: str
    principal_id: str | None
    name: str
    kinds: list[NoticeKind]
    min_severity: Severity
    enabled: bool
    created_at: datetime
    state: ChannelState


class Channels(_Resource):
    """A whole listing."""

    data: list[Channel]


class Notification(_Resource):
    """A notice on a channel, and what came out of it."""

    type: Literal["notification"]
    id: str
    kind: NoticeKind
    title: str
    workspace_id: str
    session_id: str | None
    approval_id: str | None
    channel_id: str | None
    over: str
    state: DeliveryState
    attempts: int
    created_at: datetime
    next_at: datetime | None
    last_error: str | None
    closed_at: datetime | None


class Notifications(_Resource):
    """One page of a listing."""

    data: list[Notification]
    next_page: str | None


class Removed(_Resource):
    """What was removed."""

    id: str
    type: str


class Document(_Resource):
    """An OpenAPI document."""
