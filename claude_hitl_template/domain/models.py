"""The domain's records: Session, Agent, Environment, Approval, Decision. All are frozen; this module also has the tables
of legal state changes.

Times are timezone-aware UTC datetimes. Identifiers sort by creation time.
"""

import re
import secrets
import time
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from claude_hitl_template.domain.canonical_json import call_digest, digest, shown_host
from claude_hitl_template.domain.frozen import Frozen
from claude_hitl_template.domain.people import SCOPES, Principal, Scope, Workspace
from claude_hitl_template.domain.policy import PermissionPolicy, Rule
from claude_hitl_template.domain.policy.command_segments import JudgedSegment
from claude_hitl_template.domain.policy.tiers import (
    NO_POLICY,
    Requirement,
    Severity,
    WorkspacePolicy,
    severity_of,
)
from claude_hitl_template.domain.policy.web import check_entry, covers
from claude_hitl_template.errors import IllegalTransition

_BASE32 = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's: no i, l, o, u
_last_id = 0
_ID_BITS = 130  # 48 bits of milliseconds, 82 of chance


def transcript_id(session_id: str) -> str:
    """The CLI's own id of a session: it insists on a UUID, so ours is derived."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"claude-hitl:{session_id}"))


def new_id(prefix: str) -> str:
    """`prefix_` and 26 characters: milliseconds since the epoch, then 82 bits. Later ids of a process sort later."""
    global _last_id  # noqa: PLW0603
    value = max((int(time.time() * 1000) << 82) | secrets.randbits(82), _last_id + 1 + secrets.randbits(40))
    _last_id = value
    digits = [_BASE32[(value >> shift) & 31] for shift in range(_ID_BITS - 5, -1, -5)]
    return f"{prefix}_{''.join(digits)}"


def utcnow() -> datetime:
    return datetime.now(UTC)


PermissionMode = Literal["default", "plan"]


class Agent(Frozen):
    """Instructions and permissions of a session's model: a snapshot, taken when the session is created."""

    id: str = "default"
    version: int = 1
    name: str = "Claude Code"
    description: str | None = (
        "The built-in agent: Claude Code's tools, asking before it writes, runs or goes out."
    )
    model: str = "default"  # "default" leaves the choice to the Claude Code CLI
    system: str | None = None
    toolset: dict[str, Any] | None = None  # agent_toolset_20260401 as the wire protocol has it
    policy: PermissionPolicy = PermissionPolicy()
    permission_mode: PermissionMode = "default"
    mcp_servers: dict[str, dict[str, Any]] = Field(default_factory=dict[str, dict[str, Any]])


# host:port/ (or none), name/parts, :tag, @digest. It reaches a shell's command line inside Ray, so nothing else may pass.
IMAGE_REFERENCE = (
    r"^(?=.{1,255}$)(?:[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?(?::[0-9]{1,5})?/)?"
    r"[a-z0-9]+(?:[._-]+[a-z0-9]+)*(?:/[a-z0-9]+(?:[._-]+[a-z0-9]+)*)*"
    r"(?::[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(?:@sha256:[0-9a-f]{64})?$"
)


def check_image_reference(text: str) -> str:
    """Returns the text. Raises ValueError unless it is an image reference and nothing else."""
    if not re.fullmatch(IMAGE_REFERENCE, text):
        raise ValueError(
            "not an image reference: write [host[:port]/]name[:tag][@sha256:digest], "
            "for instance localhost/claude-hitl-worker:latest"
        )
    return text


ImageReference = Annotated[str, AfterValidator(check_image_reference)]


HostEntry = Annotated[str, Field(max_length=300), AfterValidator(check_entry)]
Hosts = Annotated[tuple[HostEntry, ...], Field(max_length=1000)]


class Networking(Frozen):
    """Hosts that sandboxes of an environment reach without a question. Field names follow the wire protocol; `private_hosts`
    is ours.

    `limited`: the hosts of `allowed_hosts`; `unrestricted`: every host. Both at public addresses only. `private_hosts`
    are reached wherever they are, on this machine or in a private network. Every other host is asked for, except the agent's
    MCP servers at public addresses.
    """

    type: Literal["limited", "unrestricted"] = "limited"
    allowed_hosts: Hosts = ()
    private_hosts: Hosts = ()
    allow_mcp_servers: bool = True

    def allows(self, host: str, port: int) -> bool:
        """Whether the host may be reached at its public addresses."""
        return self.type == "unrestricted" or any(covers(e, host, port) for e in self.allowed_hosts)

    def declares(self, host: str, port: int) -> bool:
        """Whether the host may be reached at any address."""
        return any(covers(entry, host, port) for entry in self.private_hosts)


class Environment(Frozen):
    """Where a session runs: a local process, or (with `image`) a container."""

    id: str = "default"
    name: str = "Local process"
    description: str | None = "A process on the service's machine, in a sandbox unless sandboxes are off."
    image: ImageReference | None = None
    networking: Networking = Networking()

    def refuses_server(self, host: str, port: int) -> str:
        """Why an MCP server at a private address is refused unless this environment lists its host, with the fix."""
        entry = shown_host(host, port)
        change = (
            f"put HITL_PRIVATE_HOSTS={entry} into the service's .env (separate several by commas)"
            if self.id == "default"
            else f"add {entry} to networking.private_hosts of the environment {self.id!r} in HITL_ENVIRONMENTS"
        )
        return (
            f"{host} is an address of this machine or of a private network, where MCP servers need the operator's "
            f"permission. Fix: {change}, run ./hitl up (for a remote cluster: ./hitl deploy), and create a new session"
        )


class ImageFacts(Frozen):
    """An image as it is on the machine that runs it. `digest` is the one its registry knows; None for one made here.

    `manifest` is the image's list of what is installed in it: version, commit, base, python, npm, system, plugins.
    """

    reference: str
    digest: str | None = None
    version: str = ""
    commit: str = ""
    ray: str = ""
    python: str = ""
    manifest: dict[str, Any] = Field(default_factory=dict[str, Any])


SessionStatus = Literal["idle", "running", "rescheduling", "terminated"]


class Usage(Frozen):
    """Tokens and list cost, summed over a session's turns. Cost is in US dollars, as the CLI reports it."""

    input_tokens: int = 0
    output_tokens: int = 0
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int = 0
    cost_usd: float = 0.0

    def plus(self, other: "Usage") -> "Usage":
        ours, theirs = self.model_dump(), other.model_dump()
        return Usage(**{name: value + theirs[name] for name, value in ours.items()})


class Lease(Frozen):
    """The current owner of a session. A write with another epoch is refused."""

    epoch: int
    holder: str
    expires_at: datetime


class Session(Frozen):
    """One conversation.

    `turn` is the id of the user.message being worked on; `deferred` the tool_use_id that the CLI will ask for again
    when the transcript is resumed; `recoveries` how often in a row an owner died without finishing a turn; `revision`
    counts the changes from outside that an owner must see; `unreported_refusals` lists the refused approvals that the
    model has not been informed of. Three fields keep the keys of earlier releases in the stored document.
    """

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True, serialize_by_alias=True)

    id: str
    workspace_id: str = Field(
        validation_alias="key_id", serialization_alias="key_id"
    )  # stored as "key_id", whose sessions they were before
    created_by: str | None = None  # a principal's id; None: the service, or before this was kept
    last_sender: str | None = None  # the principal who sent the last message
    title: str | None = None
    metadata: dict[str, str] = Field(default_factory=dict[str, str])
    agent: Agent = Agent()
    environment: Environment = Environment()
    status: SessionStatus = "idle"
    stop_reason: dict[str, Any] | None = None
    created_at: datetime
    updated_at: datetime
    archived_at: datetime | None = None
    epoch: int = 0
    lease: Lease | None = None
    next_seq: int = 1
    turn: str | None = None
    deferred: str | None = None
    interrupted: bool = False
    recoveries: int = 0
    waits_for_room: bool = False  # until an owner starts, or the session no longer needs one
    first_words: str | None = (
        None  # the beginning of what was said first; None: nothing, or before this was kept
    )
    revision: int = Field(default=0, alias="wakes")  # stored as "wakes"
    unreported_refusals: tuple[str, ...] = Field(
        default=(), alias="untold"
    )  # held approvals that were refused; stored as "untold"
    refused_hosts: tuple[
        str, ...
    ] = ()  # ids of approvals of hosts that were refused, and stay so in this turn
    conversation: str | None = (
        None  # the CLI's id of what was said since the last /clear; None: nothing was cleared
    )
    last_end: str | None = None  # id of the last end_turn, which may be repeated
    asked: int = 0  # calls that asked since the last user.message
    asked_at: tuple[datetime, ...] = ()  # when the last of them did, within a minute
    rules: tuple[Rule, ...] = ()
    workspace: str | None = None  # the manifest of what was saved last; None: nothing yet
    uploads: tuple[str, ...] = ()  # manifests of files that the owner has yet to put into the workspace
    turn_base: tuple[str, ...] | None = (
        None  # `manifests` as the last turn began; None: none began, or not kept yet
    )
    usage: Usage = Usage()
    active_seconds: float = 0.0
    running_since: datetime | None = None

    @property
    def transcript_id(self) -> str:
        return self.conversation or transcript_id(self.id)

    @property
    def manifests(self) -> tuple[str, ...]:
        """What its files are: the manifest that was saved last, and those of later uploads."""
        return (*([self.workspace] if self.workspace is not None else []), *self.uploads)

    @property
    def parked(self) -> bool:
        return self.lease is None

    def effective_policy(self) -> PermissionPolicy:
        """The agent's policy with the rules that humans asked to be remembered."""
        return self.agent.policy.model_copy(update={"rules": (*self.agent.policy.rules, *self.rules)})


class ApprovalState(StrEnum):
    PENDING = "pending"
    ALLOWED = "allowed"
    DENIED = "denied"
    EXPIRED = "expired"
    SUPERSEDED = "superseded"
    CLAIMED = "claimed"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    UNKNOWN = "unknown"


_S = ApprovalState
APPROVAL_TRANSITIONS: Mapping[ApprovalState, frozenset[ApprovalState]] = {
    _S.PENDING: frozenset({_S.ALLOWED, _S.DENIED, _S.EXPIRED, _S.SUPERSEDED}),
    _S.ALLOWED: frozenset({_S.CLAIMED, _S.SUPERSEDED}),
    _S.CLAIMED: frozenset({_S.SUCCEEDED, _S.FAILED, _S.UNKNOWN}),
    _S.DENIED: frozenset(),
    _S.EXPIRED: frozenset(),
    _S.SUPERSEDED: frozenset(),
    _S.SUCCEEDED: frozenset(),
    _S.FAILED: frozenset(),
    _S.UNKNOWN: frozenset(),
}
SESSION_TRANSITIONS: Mapping[SessionStatus, frozenset[SessionStatus]] = {
    "idle": frozenset({"idle", "running", "terminated"}),
    "running": frozenset({"idle", "running", "rescheduling", "terminated"}),
    "rescheduling": frozenset({"running", "idle", "terminated"}),
    "terminated": frozenset(),
}
ApprovalKind = Literal["tool", "question", "plan", "network"]
KINDS: Mapping[str, ApprovalKind] = {"AskUserQuestion": "question", "ExitPlanMode": "plan"}


class Decision(Frozen):
    """A human's decision on one approval.

    `updated_input` is the whole input to run instead of the one that was proposed. For a question it carries the
    answers: `{"answers": {question: label or text}}` merged into the proposed input.
    """

    result: Literal["allow", "deny"]
    deny_message: str | None = None
    updated_input: dict[str, Any] | None = None
    remember: Rule | None = None
    decided_by: str
    decider_id: str | None = None  # the principal; None: a rule, or before this was kept
    decided_at: datetime


class Vote(Frozen):
    """One person's agreement to a call that needs several. `event_id` is its `approval.vote`.

    `updated_input` is the whole input that was agreed to where it is not the proposed one, `run_digest` the digest of what
    would run.
    """

    principal_id: str
    name: str
    at: datetime
    event_id: str
    run_digest: str
    updated_input: dict[str, Any] | None = None


CLAIM_S = 300  # how long a person is shown who looks at a call, unless the person says otherwise
MAX_CLAIM_S = 24 * 3600


class Reviewer(Frozen):
    """Who said that they are looking at a call, and until when that is to be believed."""

    principal_id: str | None
    name: str
    until: datetime


class Assignee(Frozen):
    """Whom a call was handed over to: a person, or a group. `by` is the name of who did that."""

    principal_id: str | None = None
    group: str | None = None
    name: str
    note: str = ""
    by: str
    at: datetime


class Approval(Frozen):
    """The durable record of one call that waits, or waited, for a human.

    `event_id` is the agent.tool_use event that clients see and confirm; `call_id` the tool_use_id that may run, which
    differs once the model issued a held call again, `model_call_id` what the model's server calls it (None: the same);
    `cwd` the folder it runs in. `digest` is the SHA-256 of the
    canonical JSON of `{"cwd": cwd, "input": input}`, `run_digest` the same of `run_input`, the input that may run.
    `batch` lists the event ids that were asked together.

    An approval of kind `network` is for a host that the session wants to reach. Its input is `host`, `port` and `because`
    (the calls that ran then). The host is open while the approval is allowed. It is held from the start, because the
    model repeats the request, and becomes succeeded when the host is closed.

    `folder` is `cwd` as seen from the workspace, whose own path may differ on another machine: `.`, `./sub` or, outside,
    an absolute path; None for an approval of an earlier release, which ran in the workspace, and whose digests are of
    the input alone. `targets` is where the paths of `input` led when it was shown, in the same form (`//x` outside);
    None where that was not recorded.

    `requirements` are what the workspace's rules asked for it; () for one approver. `votes` are of people who allowed it,
    which counts while they may. `segments` are the commands of a command line. `expires_at` is the first of all deadlines,
    `timeout_at` the one that the service sets for every call. `policy_version` is of the workspace's policy by which it was
    judged last.
    """

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True, serialize_by_alias=True)

    id: str
    session_id: str
    workspace_id: str = Field(
        validation_alias="key_id", serialization_alias="key_id"
    )  # stored as "key_id", as in a session
    event_id: str
    call_id: str
    model_call_id: str | None = None
    batch: tuple[str, ...]
    kind: ApprovalKind = "tool"
    tool_name: str
    input: dict[str, Any]
    digest: str
    cwd: str
    folder: str | None = None
    targets: tuple[str, ...] | None = None
    agent_id: str | None = None
    state: ApprovalState = ApprovalState.PENDING
    held: bool = False
    reminded: bool = False
    created_at: datetime
    expires_at: datetime | None = None
    timeout_at: datetime | None = None
    requirements: tuple[Requirement, ...] = ()
    policy_version: int = 0
    votes: tuple[Vote, ...] = ()
    reviewer: Reviewer | None = None
    assignee: Assignee | None = None
    segments: tuple[JudgedSegment, ...] = ()
    decision: Decision | None = None
    run_input: dict[str, Any] | None = None
    run_digest: str | None = None
    claimed_epoch: int | None = None
    claim_id: str | None = None
    closed_at: datetime | None = None

    @property
    def workspace(self) -> Path | None:
        """The session's working folder; None where the call runs outside of it."""
        return workspace_of(Path(self.cwd), self.folder)

    @property
    def severity(self) -> Severity:
        return severity_of(self.requirements)

    @property
    def quorum(self) -> int:
        """How many people must allow it at least; rules with different approvers may take more."""
        return max((one.quorum for one in self.requirements), default=1)

    @property
    def reason(self) -> str:
        """The reasons of the rules that asked, one on each line."""
        return "\n".join(dict.fromkeys(one.reason for one in self.requirements if one.reason))

    def asking(self, requirements: tuple[Requirement, ...]) -> Self:
        """This approval with these requirements, and the deadlines that follow."""
        due = [one.due_at for one in requirements if one.due_at is not None]
        timeout_at = self.timeout_at if self.requirements else self.expires_at
        first = min([*due, *([timeout_at] if timeout_at is not None else [])], default=None)
        return self.but(requirements=requirements, timeout_at=timeout_at, expires_at=first)

    def escalated(self, now: datetime) -> Self | None:
        """This approval after its deadlines until `now`; None if one of them denies the call."""
        if not self.requirements or (self.timeout_at is not None and self.timeout_at <= now):
            return None
        due = [one for one in self.requirements if one.due_at is not None and one.due_at <= now]
        handed = {id(one): one.escalated(now) for one in due}
        if not due or None in handed.values():
            return None
        return self.asking(tuple(handed.get(id(one)) or one for one in self.requirements))

    def digest_of(self, given: dict[str, Any]) -> str:
        """Returns the `digest` that this input would have. Raises InvalidInput for input without canonical JSON."""
        return digest(given) if self.folder is None else call_digest(given, self.cwd)

    @property
    def model_id(self) -> str:
        """What the CLI calls it."""
        return self.call_id if self.model_call_id is None else self.model_call_id

    def to(self, state: ApprovalState, **changes: Any) -> "Approval":
        """This approval in another state. Raises IllegalTransition for a change the table does not have."""
        if state not in APPROVAL_TRANSITIONS[self.state]:
            raise IllegalTransition(
                f"approval {self.id} is {self.state.value}, it cannot become {state.value}"
            )
        return self.but(state=state, **changes)


def workspace_of(cwd: Path, folder: str | None) -> Path | None:
    """The working folder of a session of which `cwd` is the folder `folder`, as an approval names it; None outside of it."""
    below = Path(folder or ".")
    if below.is_absolute():
        return None
    return cwd.parents[len(below.parts) - 1] if below.parts else cwd


def check_session_transition(old: SessionStatus, new: SessionStatus) -> None:
    """Raises IllegalTransition for a status change the table does not have."""
    if new not in SESSION_TRANSITIONS[old]:
        raise IllegalTransition(f"a session that is {old} cannot become {new}")


class Supervised(Frozen):
    """What the supervisor needs to know of each session that has an owner or needs one, several times a second: a
    session without what may be large. Fields are those of `Session`."""

    id: str
    status: SessionStatus
    epoch: int
    lease: Lease | None
    updated_at: datetime


class ApiKey(Frozen):
    """A key of a principal. Only the SHA-256 of the secret is stored, and `prefix`, by which its holder recognises it.

    `first`: the one that `./hitl` itself uses, of which there is one at most. `scopes` limit what its principal may do
    with it. From `revoked_at` or `expires_at` on the secret opens nothing. `last_used_at` is right to within a minute.
    `principal_id` is None until a key of an earlier version is used.
    """

    id: str
    name: str
    secret_hash: str
    created_at: datetime
    prefix: str = ""
    first: bool = False
    principal_id: str | None = None
    scopes: tuple[Scope, ...] = SCOPES
    expires_at: datetime | None = None
    last_used_at: datetime | None = None
    revoked_at: datetime | None = None

    def is_valid(self, now: datetime) -> bool:
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)


class Identity(Frozen):
    """Whom an API key admits: the key, its principal, and the workspaces of the principal by name."""

    key: ApiKey
    principal: Principal
    workspaces: tuple[Workspace, ...]


class KeptDecision(Frozen):
    """The part of a decision that outlives its session: who decided what and when, and the call's digest.

    `id` is the approval's; `digest` is of what was shown, `run_digest` of what was allowed to run.
    """

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True, serialize_by_alias=True)

    id: str
    session_id: str
    workspace_id: str = Field(
        validation_alias="key_id", serialization_alias="key_id"
    )  # stored as "key_id", as in a session
    tool_name: str
    digest: str
    run_digest: str | None = None
    result: Literal["allow", "deny"]
    decided_by: str
    decided_at: datetime

    @classmethod
    def of(cls, approval: Approval) -> "KeptDecision | None":
        """Returns the part of an approval that is kept; None if there is no decision."""
        recorded = approval.decision
        if recorded is None:
            return None
        same = ("id", "session_id", "workspace_id", "tool_name", "digest", "run_digest")
        return cls(
            **{name: getattr(approval, name) for name in same},
            result=recorded.result,
            decided_by=recorded.decided_by,
            decided_at=recorded.decided_at,
        )


class StoredPolicy(Frozen):
    """A workspace's policy as it is stored. `version` counts changes; 0: there never was one."""

    workspace_id: str
    version: int = 0
    policy: WorkspacePolicy = NO_POLICY
    changed_at: datetime | None = None
    changed_by: str | None = None


class Page[T](BaseModel):
    """A slice of a listing; `next_page` is the opaque cursor of the next one, None at the end."""

    data: list[T]
    next_page: str | None = None


class Snapshot(Frozen):
    """What a session's owner needs to continue: the session, its queued messages and its open calls.

    `turn_event` is the user.message of a turn that has begun. `unreported_refusals` holds the approvals of
    `session.unreported_refusals`. Pass `session.revision` to `wait_session` to wait for the next change. `at` is the
    ledger's time. `policy` is the workspace's, `policy_version` its version.
    """

    session: Session
    turn_event: "Event | None"
    queued: tuple["Event", ...]
    approvals: tuple[Approval, ...]
    unreported_refusals: tuple[Approval, ...]
    at: datetime
    policy: WorkspacePolicy = NO_POLICY
    policy_version: int = 0


class Event(Frozen):
    """One committed entry of a session's log. `seq` counts from 1 without gaps; `payload` is all but id and times."""

    seq: int
    id: str
    type: str
    payload: dict[str, Any]
    created_at: datetime
    processed_at: datetime | None

    def wire(self) -> dict[str, Any]:
        """The event in the wire protocol's form."""
        processed = self.processed_at.isoformat() if self.processed_at else None
        return {"id": self.id, "type": self.type, "processed_at": processed, **self.payload}


Snapshot.model_rebuild()
