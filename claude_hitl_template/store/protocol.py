"""The Store protocol: every durable fact of the service passes through these methods.

Each kind of caller has its own protocol, and its capability permits exactly the methods of that protocol
(`store.access`).

- *Clients* (REST, panel, terminal) name the workspace they act in; another workspace's session is NotFound. `workspace_id`
  None stands for every workspace: the service itself, which checks permissions on its own. Those that change something also
  name the actor. Their methods that administer are in `store.administration`.
- *Owners* (one per awake session) name their lease epoch; a stale one gets StaleOwner and must stop.
- *The supervisor* grants leases and handles expiry.
- *Couriers* send notices (`store.notifying`).
- *Windows* (flows of the panel) read one session.

Every method is one transaction. Every write may be repeated with the same arguments, for instance after a lost answer,
and then has no further effect. Arguments and results can be pickled, because the Store is called over Ray.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Literal, Protocol, TypedDict

from pydantic import BaseModel, ConfigDict

from claude_hitl_template.domain.events import Draft, UserInterrupt, UserMessage, UserToolConfirmation
from claude_hitl_template.domain.models import (
    Agent,
    Approval,
    ApprovalKind,
    ApprovalState,
    Environment,
    Event,
    Frozen,
    KeptDecision,
    Page,
    PermissionMode,
    Session,
    SessionStatus,
    Snapshot,
    Supervised,
    Usage,
    new_id,
)
from claude_hitl_template.domain.people import SERVICE, Actor
from claude_hitl_template.domain.policy.command_segments import JudgedSegment
from claude_hitl_template.domain.policy.tiers import Severity
from claude_hitl_template.files.manifest import SavedFile
from claude_hitl_template.store.administration import Administration
from claude_hitl_template.store.filters import Order, TimeRange
from claude_hitl_template.store.notifying import Channels, Couriers

type TurnEnding = Literal["over", "dropped", "parked", "broken off"]
NOW = -1  # position after the newest preview
OWN_KEY = "\n"  # prefix of generated keys; a client's header cannot begin with it
type Inbound = UserMessage | UserInterrupt | UserToolConfirmation


def own_key() -> str:
    """An idempotency key for a call without one, so that it may be repeated for a few minutes."""
    return OWN_KEY + new_id("call")


class Call(BaseModel):
    """One tool call as the model issued it, with the policy's verdict.

    `cwd` is the folder it runs in; None means that of its batch. `folder` and `targets`: see Approval. Without `folder`,
    `digest` is of the input alone. `model_call_id` is the id that the model's server gave the call. `rules` are the patterns
    of the workspace's rules that ask for it where it runs (BY_DEFAULT: none, but its default does), by the policy of version
    `policy_version`; None: of an unknown one. `segments` are the commands of a command line.
    """

    model_config = ConfigDict(frozen=True)
    call_id: str
    tool_name: str
    input: dict[str, Any]
    digest: str
    cwd: str | None = None
    folder: str | None = None
    targets: tuple[str, ...] | None = None
    agent_id: str | None = None
    verdict: Literal["allow", "ask", "deny"]
    model_call_id: str | None = None
    standing_rule: str | None = None  # text of the remembered rule that allows the call, if one does
    rules: tuple[str, ...] = ()
    policy_version: int | None = None
    segments: tuple[JudgedSegment, ...] = ()


class WaitingCall(Frozen):
    """A line of the inbox: an approval that waits, without its input.

    `effect` is the call on one line with hidden characters as escapes; `is_whole`: it says all of the input. `title` is of
    the session, in one line. `requester`: who created the session. `votes`: how many people allowed it; at least
    `quorum` must. `reviewer`: who said that they look at it; `assignee`: whom it was handed over to.
    """

    id: str
    workspace_id: str
    session_id: str
    title: str
    requester: str
    tool_name: str
    kind: ApprovalKind
    effect: str
    is_whole: bool
    digest: str
    severity: Severity
    quorum: int
    votes: int
    reviewer: str | None
    assignee: str | None
    by_subagent: bool
    created_at: datetime
    expires_at: datetime | None

    def mentions(self, text: str) -> bool:
        """Whether every word of a search is in the line."""
        said = " ".join(
            (self.effect, self.title, self.requester, self.tool_name, self.id, self.session_id)
        ).casefold()
        return all(word in said for word in text.casefold().split())


class EarlierDecision(Frozen):
    """A decision on a call with the same digest. `id` is the approval's."""

    id: str
    result: Literal["allow", "deny"]
    deny_message: str | None
    decided_by: str
    decided_at: datetime


class ApprovalChange(Frozen):
    """An approval was recorded, or changed. `decided_by`: who decided; `votes`: how many people agreed so far;
    `reviewer`: who said last that they look at it."""

    id: str
    workspace_id: str
    session_id: str
    state: ApprovalState
    decided_by: str | None
    votes: int
    reviewer: str | None


class Changes(Frozen):
    """Changes of approvals. Without `complete` some may be missing, and the reader must look at the store again."""

    changes: tuple[ApprovalChange, ...]
    position: int
    complete: bool


class TranscriptKey(TypedDict):
    """One transcript file of the CLI. `subpath` is "" for the main one."""

    scope: str
    project_key: str
    session_id: str
    subpath: str


type TranscriptPart = tuple[TranscriptKey, Sequence[Mapping[str, Any]]]
"""Entries to append to one transcript."""


class Reachable(Protocol):
    async def ping(self, *, write: bool = True) -> None:
        """Raises if the store cannot be written or, without `write`, cannot be read. Reading waits for no writer."""
        ...


class Sessions(Protocol):
    async def get_session(self, session_id: str, workspace_id: str | None = None) -> Session:
        """Raises NotFound."""
        ...


class Blobs(Protocol):
    """A blob is bytes, named by their SHA-256 in hexadecimal (files/manifest.py)."""

    async def get_blobs(
        self, names: Sequence[str], *, session_id: str | None = None, epoch: int | None = None
    ) -> list[bytes]:
        """The blobs with these names, in order.

        Args:
            names: blob names.
            session_id: if set, only blobs that this session's saved workspace and uploads name are found.
            epoch: the owner's lease epoch, for a call by an owner.

        Raises:
            NotFound: a blob is missing or damaged.
        """
        ...


class SavedBlobs(Blobs, Protocol):
    async def missing_blobs(
        self, names: Sequence[str], *, session_id: str | None = None, epoch: int | None = None
    ) -> list[str]:
        """The `names` whose blobs are missing and must be put. Every blob is kept for a day, and for as long as a
        session's manifest names it. An owner passes its session and its epoch."""
        ...

    async def put_blobs(
        self, blobs: Sequence[bytes], *, session_id: str | None = None, epoch: int | None = None
    ) -> None:
        """Stores blobs durably. Raises TooLarge for one of more than manifest.CHUNK_BYTES, which is also the limit of
        one call over Ray. An owner passes its session and its epoch."""
        ...


class Windows(Reachable, Sessions, Blobs, Protocol):
    """Methods for a flow of the panel, which shows one session."""

    async def wait_events(
        self,
        session_id: str,
        workspace_id: str | None,
        after: int,
        *,
        timeout_s: float,
        previews: int | None = None,
    ) -> tuple[list[Event], list[dict[str, Any]], int]:
        """Events with seq > `after`, as soon as there are any; none after `timeout_s`.

        With `previews`, also as soon as there are deltas of unfinished events after that position: pass NOW first,
        then the returned position. Raises NotFound if the session is deleted meanwhile.
        """
        ...

    async def list_approvals(
        self,
        workspace_id: str | None,
        *,
        limit: int,
        page: str | None = None,
        states: Sequence[ApprovalState] = (),
        session_id: str | None = None,
    ) -> Page[Approval]:
        """Oldest first."""
        ...

    async def list_workspace(
        self,
        session_id: str,
        workspace_id: str | None,
        *,
        limit: int,
        page: str | None = None,
        changed_since_ns: int | None = None,
    ) -> Page[SavedFile]:
        """The saved files by path, with uploads. If the workspace is saved between two pages, they may not match."""
        ...


class Clients(Windows, SavedBlobs, Administration, Channels, Protocol):
    """Methods for the ingress on behalf of authenticated clients: API, panel and inbox."""

    async def create_session(
        self,
        workspace_id: str,
        *,
        agent: Agent,
        environment: Environment,
        title: str | None,
        metadata: Mapping[str, str],
        initial: Sequence[UserMessage],
        by: Actor = SERVICE,
        idempotency_key: str | None = None,
    ) -> Session:
        """Raises Conflict when the idempotency key came before with another request."""
        ...

    async def list_sessions(
        self,
        workspace_id: str | None,
        *,
        limit: int,
        page: str | None = None,
        order: Order = "desc",
        statuses: Sequence[SessionStatus] = (),
        agent_id: str | None = None,
        created: TimeRange | None = None,
        include_archived: bool = False,
    ) -> Page[Session]:
        """Raises InvalidInput for a page cursor that this listing did not return."""
        ...

    async def update_session(
        self,
        session_id: str,
        workspace_id: str,
        *,
        changes: Mapping[str, Any],
        by: Actor = SERVICE,
        idempotency_key: str | None = None,
    ) -> Session:
        """`changes` may hold `title` (str or None) and `metadata` (patch: None deletes a key)."""
        ...

    async def archive_session(self, session_id: str, workspace_id: str, *, by: Actor = SERVICE) -> Session:
        """Archives the session and supersedes its pending approvals. Raises Conflict while it runs."""
        ...

    async def delete_session(self, session_id: str, workspace_id: str, *, by: Actor = SERVICE) -> None:
        """Deletes the session; a `KeptDecision` of each decision stays. Raises Conflict while it runs."""
        ...

    async def list_kept_decisions(self, *, limit: int, page: str | None = None) -> Page[KeptDecision]:
        """Decisions of sessions that were deleted, of all workspaces, the oldest first."""
        ...

    async def send_events(
        self,
        session_id: str,
        workspace_id: str | None,
        inbound: Sequence[Inbound],
        *,
        by: Actor,
        idempotency_key: str | None = None,
    ) -> list[Event]:
        """Commits a client's events, all or none. Only a confirmation is a decision.

        Args:
            session_id: the session.
            workspace_id: the workspace that the client acts in; None for every one.
            inbound: the events.
            by: whom the decisions are recorded under; a known principal must be permitted to decide there.
            idempotency_key: for two days, the same request with this key gets the answer of the first one.

        Raises:
            NotWaiting: no such call waits.
            AlreadyDecided, Superseded: the call no longer waits.
            Forbidden: `by` may not decide.
            Conflict: the session is archived, or the key was used for another request.
            InvalidInput: an event does not fit its call.
        """
        ...

    async def list_events(
        self,
        session_id: str,
        workspace_id: str | None,
        *,
        limit: int,
        page: str | None = None,
        order: Order = "asc",
        types: Sequence[str] = (),
        created: TimeRange | None = None,
    ) -> Page[Event]: ...

    async def last_seq(self, session_id: str, workspace_id: str | None) -> int:
        """The seq of the session's newest event."""
        ...

    async def get_approval(self, approval_id: str, workspace_id: str | None) -> Approval: ...

    async def decide(
        self,
        approval_id: str,
        workspace_id: str | None,
        confirmation: UserToolConfirmation,
        *,
        by: Actor,
        idempotency_key: str | None = None,
    ) -> Approval:
        """Decides on the call of an approval, whichever call `confirmation` names; returns the updated approval.

        Raises as send_events does, and NotFound.
        """
        ...

    async def claim_approval(
        self,
        approval_id: str,
        workspace_id: str | None,
        *,
        seconds: int,
        by: Actor,
        idempotency_key: str | None = None,
    ) -> Approval:
        """Tells others that `by` is looking at a call, for so many seconds (0: no longer). They may decide all the same.

        Raises NotFound, Forbidden (`by` may not decide on it), AlreadyDecided, Superseded, InvalidInput, and Conflict while
        another person is looking at it.
        """
        ...

    async def delegate_approval(
        self,
        approval_id: str,
        workspace_id: str | None,
        *,
        principal_id: str | None = None,
        group: str | None = None,
        note: str = "",
        by: Actor,
        idempotency_key: str | None = None,
    ) -> Approval:
        """Hands a call over to a person or a group that may decide on it. It gives no one the right to decide.

        Raises NotFound, Forbidden (`by` may not decide on it), AlreadyDecided, Superseded, InvalidInput.
        """
        ...

    async def add_files(
        self,
        session_id: str,
        workspace_id: str | None,
        manifest: str,
        *,
        by: Actor = SERVICE,
        idempotency_key: str | None = None,
    ) -> None:
        """Registers the files of a manifest, which are written into the session's workspace before its next turn.

        Raises NotFound, Conflict (archived), InvalidInput.
        """
        ...

    async def workspace_file(self, session_id: str, workspace_id: str | None, path: str) -> SavedFile:
        """One saved file, by its path as `manifest.shown` has it. Raises NotFound."""
        ...

    async def list_waiting(
        self,
        workspace_ids: Sequence[str] | None,
        *,
        limit: int,
        page: str | None = None,
        session_id: str | None = None,
        tool_name: str | None = None,
        severity: Severity | None = None,
        text: str = "",
    ) -> Page[WaitingCall]:
        """The calls that wait in these workspaces (None: in all): the most severe first, and of these the oldest.

        `text`: every word of it is in the line. A page may have fewer lines than `limit`, even none, and a next page: a
        search looks at a limited number of calls. Raises InvalidInput for a cursor of another listing.
        """
        ...

    async def get_waiting(
        self, approval_ids: Sequence[str], workspace_ids: Sequence[str] | None
    ) -> list[WaitingCall]:
        """Those of these approvals that wait in these workspaces, in the order of the ids."""
        ...

    async def list_same_calls(self, approval_id: str, workspace_id: str | None) -> list[EarlierDecision]:
        """The last decisions on calls of the same session with the same digest, the newest first. Raises NotFound."""
        ...

    async def wait_approvals(self, after: int, *, timeout_s: float) -> Changes:
        """Changes of approvals in all workspaces behind a position, as soon as there are any; none after `timeout_s`.

        Pass 0 first: that returns the position of now at once, not `complete`.
        """
        ...


class Owners(Reachable, SavedBlobs, Protocol):
    """Methods for the owner of a session under its lease. Every method but `ping` takes the session and the epoch."""

    async def snapshot(self, session_id: str, epoch: int) -> Snapshot: ...

    async def find_approval(self, session_id: str, epoch: int, call_id: str) -> Approval | None:
        """The approval of a call, in any state."""
        ...

    async def lost_calls(self, session_id: str, epoch: int) -> list[Approval]:
        """Approvals of the current turn that were not claimed and have no result: pending, allowed or refused; in a
        turn that began without a message, pending or allowed."""
        ...

    async def wait_session(self, session_id: str, epoch: int, revision: int, *, timeout_s: float) -> Snapshot:
        """The session as soon as its `revision` differs, or after `timeout_s`. Renews the lease."""
        ...

    async def commit(
        self,
        session_id: str,
        epoch: int,
        drafts: Sequence[Draft],
        *,
        permission_mode: PermissionMode | None = None,
        conversation: str | None = None,
        transcript: Sequence[TranscriptPart] = (),
    ) -> None:
        """Appends events, and closes the approvals whose results are among them. An approval that was neither claimed
        nor held is superseded: the engine answered the call without running it. Raises InvalidInput for an event
        that only a client may send.

        `permission_mode` is the CLI's new mode, which is set again when the session is resumed; `conversation` is the
        id of the transcript to resume; `transcript` is appended to the session's own transcripts.
        """
        ...

    async def open_calls(
        self,
        session_id: str,
        epoch: int,
        drafts: Sequence[Draft],
        calls: Sequence[Call],
        *,
        cwd: str,
        expires_at: datetime | None,
    ) -> list[Approval]:
        """Commits the batch's events, and an approval for each call that asks, in one transaction.

        The workspace's policy holds as it is now. Where the owner judged by another version of it, a call that it would have
        allowed may be asked for, or be denied.
        If an identical call in the same folder was held, the new one takes its approval over and is not shown again:
        `event_id` of the approval stays the event that was decided on.
        Returns the approvals of `calls`, in order, for those that ask. Raises TooManyAsks, and then commits nothing.
        """
        ...

    async def ask_network(
        self,
        session_id: str,
        epoch: int,
        call_id: str,
        given: Mapping[str, Any],
        *,
        cwd: str,
        expires_at: datetime | None,
    ) -> Approval:
        """Asks a human whether the session may reach a host; the turn goes on meanwhile. `given`: host, port, because.

        Returns the approval for this host and port: a new one (with an event `call_id`), one that is pending or
        allowed, or one that was refused in this turn. Raises Conflict if HOSTS_AT_ONCE are pending already, and
        NotWaiting if the turn was interrupted.
        """
        ...

    async def begin_turn(self, session_id: str, epoch: int, event_id: str) -> None:
        """Starts the turn of the queued user.message `event_id`."""
        ...

    async def claim(
        self, session_id: str, epoch: int, call_id: str, run_digest: str, *, claim_id: str
    ) -> Approval:
        """Claims the right to run a call, once. Raises NotWaiting unless it is allowed, unclaimed and has this digest, and
        Forbidden if the workspace's policy, by now, denies it or asks for more than was decided.

        `claim_id` is new for each attempt to run; the same id gets the same answer.
        """
        ...

    async def hold(self, session_id: str, epoch: int, call_id: str) -> None:
        """Records that the model must issue this call again later."""
        ...

    async def defer(self, session_id: str, epoch: int, call_id: str | None) -> None:
        """Records the call that the CLI asks for again when its transcript is resumed; None for none."""
        ...

    async def end_turn(
        self,
        session_id: str,
        epoch: int,
        drafts: Sequence[Draft],
        *,
        end_id: str,
        usage: Usage,
        stop_reason: Mapping[str, Any],
        how: TurnEnding = "over",
        transcript: Sequence[TranscriptPart] = (),
    ) -> Snapshot:
        """Ends the engine's work on the turn. `stop_reason` applies if no work is left.

        "over": the engine finished it. After `retries_exhausted` the session rests; queued messages and decisions
        wait for the next message. "dropped": the same for a turn that no engine worked on since its call was parked:
        the engine still asks for that call when it resumes. "parked": the turn continues after a decision; only usage
        is recorded. "broken off": the engine cannot work; the next message resumes the turn.
        `end_id` is new for each end; repeating it has no effect. `transcript`: as in `commit`.
        """
        ...

    async def remind(self, session_id: str, epoch: int, approval_ids: Sequence[str]) -> None:
        """The model was reminded of these decided calls; at the next turn's end they are superseded, and hosts that
        were allowed are closed."""
        ...

    async def release(self, session_id: str, epoch: int) -> bool:
        """Releases the lease and returns True; False if there is work and the owner must continue."""
        ...

    async def preview(self, session_id: str, epoch: int, deltas: Sequence[Mapping[str, Any]]) -> bool:
        """Passes deltas of an unfinished event to open streams; nothing is stored. Returns whether a stream wants some."""
        ...

    async def save_workspace(
        self, session_id: str, epoch: int, manifest: str | None, *, taken: Sequence[str] = ()
    ) -> None:
        """Records `manifest` as the session's saved workspace, which includes the uploads `taken`.

        Raises NotFound if the manifest was not put, and InvalidInput if it is not one.
        """
        ...

    async def append_transcript(
        self, key: TranscriptKey, entries: Sequence[Mapping[str, Any]], *, epoch: int | None = None
    ) -> None:
        """`epoch` is that of the owner of session `scope`; None for another scope and for the service itself."""
        ...

    async def load_transcript(
        self, key: TranscriptKey, *, epoch: int | None = None
    ) -> list[dict[str, Any]] | None:
        """`epoch`: as in `append_transcript`."""
        ...

    async def list_transcripts(
        self, scope: str, project_key: str, *, epoch: int | None = None
    ) -> list[tuple[TranscriptKey, int]]:
        """Every transcript of the project with the time of its last write, in milliseconds."""
        ...

    async def delete_transcripts(self, key: TranscriptKey, *, epoch: int | None = None) -> None:
        """Removes one transcript; with subpath "" its subagents' too."""
        ...


class Supervision(Reachable, Sessions, Protocol):
    """Methods for the supervisor: leases, recovery and expiry."""

    async def acquire(self, session_id: str, holder: str, *, lease_s: float) -> Session:
        """A new lease with a raised epoch, replacing the old one. Claimed calls without a result become unknown.

        A holder is one process; while its lease lasts, it gets the same lease again.
        """
        ...

    async def reserve(self, session: Session, *, lasts_s: float) -> None:
        """Makes this the id of the next session with the same workspace, agent and environment, unless `lasts_s` pass."""
        ...

    async def give_up(self, session_id: str, message: str) -> None:
        """Breaks off the turn of a session that no owner can drive, and logs the reason. The next message resumes the
        turn with its decisions; an interrupt drops it."""
        ...

    async def tell_waiting(self, session_id: str, epoch: int, message: str) -> None:
        """Logs once what a session without an owner since `epoch` waits for, however often it is called."""
        ...

    async def drop_lease(self, session_id: str, epoch: int) -> None:
        """Ends the lease of an owner that has died."""
        ...

    async def supervised(self) -> list[Supervised]:
        """Sessions that have an owner or need one: never the parked ones."""
        ...

    async def existing(self, session_ids: Sequence[str]) -> list[str]:
        """Returns which of these sessions, at most EXISTING, exist."""
        ...

    async def wait_supervised(self, version: int, *, timeout_s: float) -> int:
        """Returns a new version as soon as `supervised()` may have changed, or after `timeout_s`."""
        ...

    async def expire_due(self) -> int:
        """Denies every pending approval that has expired; returns their number."""
        ...

    async def retire(self, before: datetime) -> list[str]:
        """Deletes up to RETIRED sessions with all their data: archived ones, idle ones with nothing pending and ones that
        never ran, if their last change was earlier than `before`. Returns their ids."""
        ...


class Store(Clients, Owners, Supervision, Couriers, Protocol):
    """The whole protocol, with the ledger's own maintenance."""

    async def sweep_deliveries(self) -> int:
        """Deletes deliveries from more than two weeks ago that are not pending; returns their number."""
        ...

    async def sweep_blobs(self) -> int:
        """Removes blobs that no session names and that were put more than a day ago; returns how many."""
        ...

    async def sweep_replies(self) -> int:
        """Deletes stored answers to requests with an idempotency key: clients' after two days, those with generated keys
        after ten minutes. Returns their number."""
        ...
