"""The Store protocol: every durable fact of the service passes through these methods.

Each kind of caller has its protocol, and its rule. What a caller's capability opens is that protocol, and no more
(`store.access`).

- *Clients* (REST, panel, terminal) name the API key they act for; another key's session is NotFound. Where a method
  takes `key_id` None, that is the service itself: it sees all keys' sessions, and says itself who may what.
- *Owners* (one per awake session) name their lease epoch; a stale one gets StaleOwner and must stop.
- *The supervisor* hands out leases and looks after time.
- *Windows* (flows of the panel) look at one session.

Every method is one transaction: it happened or it did not. Every write may be repeated with the same arguments
(the caller could not know whether the first try got through) and has then no further effect.
Every argument and result can be pickled, for the Store is reached over Ray.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Literal, Protocol, TypedDict

from pydantic import BaseModel, ConfigDict

from claude_hitl_template.domain.events import Draft, UserInterrupt, UserMessage, UserToolConfirmation
from claude_hitl_template.domain.models import (
    Agent,
    ApiKey,
    Approval,
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
from claude_hitl_template.files.manifest import SavedFile

type Order = Literal["asc", "desc"]
type TurnEnding = Literal["over", "parked", "broken off"]
NOW = -1  # the position of previews that are still to come
OWN_KEY = "\n"  # what keys of our own begin with: no header of a client's request can
type Inbound = UserMessage | UserInterrupt | UserToolConfirmation


def own_key() -> str:
    """An idempotency key for a call that its caller gave none: it may be repeated for a few minutes."""
    return OWN_KEY + new_id("call")


class TimeRange(Frozen):
    """Bounds on a creation time; the names are the wire protocol's."""

    gt: datetime | None = None
    gte: datetime | None = None
    lt: datetime | None = None
    lte: datetime | None = None


class Call(BaseModel):
    """One tool call as the model issued it, with the policy's verdict.

    `cwd` is the folder it runs in, None: that of its batch. `folder` and `targets`: see Approval. Without `folder`,
    `digest` is of the input alone. `model_call_id` is the id that the model's server gave the call.
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


class TranscriptKey(TypedDict):
    """One transcript file of the CLI. `subpath` is "" for the main one."""

    scope: str
    project_key: str
    session_id: str
    subpath: str


class Reachable(Protocol):
    async def ping(self, *, write: bool = True) -> None:
        """Raises if the store cannot be written or, without `write`, cannot be read. Reading waits for no writer."""
        ...


class Sessions(Protocol):
    async def get_session(self, session_id: str, key_id: str | None = None) -> Session:
        """Raises NotFound."""
        ...


class Blobs(Protocol):
    """A blob is bytes, named by their SHA-256 in hexadecimal (files/manifest.py)."""

    async def get_blobs(
        self, names: Sequence[str], *, session_id: str | None = None, epoch: int | None = None
    ) -> list[bytes]:
        """In order. Raises NotFound for one that is not there, or damaged.

        For a session, only what its saved workspace and its uploads name; `epoch`: that of its owner.
        """
        ...


class SavedBlobs(Blobs, Protocol):
    async def missing_blobs(
        self, names: Sequence[str], *, session_id: str | None = None, epoch: int | None = None
    ) -> list[str]:
        """Those of `names` that must be put. Both others and those that were put stay for a day, and for as long as a
        session's manifest names them. An owner names its session and its epoch."""
        ...

    async def put_blobs(
        self, blobs: Sequence[bytes], *, session_id: str | None = None, epoch: int | None = None
    ) -> None:
        """Durable when it returns. Raises TooLarge for one of more than manifest.CHUNK_BYTES. A call over Ray carries
        no more than that, either. An owner names its session and its epoch."""
        ...


class Windows(Reachable, Sessions, Blobs, Protocol):
    """What a flow of the panel sees: one session."""

    async def wait_events(
        self,
        session_id: str,
        key_id: str | None,
        after: int,
        *,
        timeout_s: float,
        previews: int | None = None,
    ) -> tuple[list[Event], list[dict[str, Any]], int]:
        """Events with seq > `after`, as soon as there are any; none after `timeout_s`.

        With `previews`, also as soon as there are deltas of events in the making behind that position: NOW at first,
        then the position that came back. Raises NotFound when the session is deleted meanwhile.
        """
        ...

    async def list_approvals(
        self,
        key_id: str | None,
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
        key_id: str | None,
        *,
        limit: int,
        page: str | None = None,
        changed_since_ns: int | None = None,
    ) -> Page[SavedFile]:
        """The saved files by path, uploads included; of a workspace that is saved meanwhile, the pages may not fit."""
        ...


class Clients(Windows, SavedBlobs, Protocol):
    """What the ingress does for its clients, who are known by then: API, panel and inbox."""

    async def add_key(self, name: str, secret_hash: str, prefix: str = "") -> ApiKey:
        """Records a key; the same hash again returns the key that is there, which may be revoked."""
        ...

    async def find_key(self, secret_hash: str) -> ApiKey | None:
        """None for an unknown one, and for one that was revoked or replaced."""
        ...

    async def list_keys(self) -> list[ApiKey]:
        """The oldest first, those that were revoked or replaced too; not those of the panel's roles."""
        ...

    async def revoke_key(self, key_id: str) -> ApiKey:
        """Its secret opens nothing any more; its sessions stay. Raises NotFound, and Conflict for the first key."""
        ...

    async def rotate_key(self, key_id: str, secret_hash: str, prefix: str = "") -> ApiKey:
        """Gives a key another secret: the one before opens nothing any more, and its sessions stay the key's.

        Raises NotFound, and Conflict for a key that was revoked or a secret that another key has, or had.
        """
        ...

    async def set_first_key(self, secret_hash: str, prefix: str = "") -> ApiKey:
        """Makes the first key the one with this secret: rotated where it had another. A secret that was revoked or
        replaced stays so; the key that comes back says it."""
        ...

    async def get_key(self, key_id: str) -> ApiKey:
        """Whose sessions those of `key_id` are. Raises NotFound."""
        ...

    async def create_session(
        self,
        key_id: str,
        *,
        agent: Agent,
        environment: Environment,
        title: str | None,
        metadata: Mapping[str, str],
        initial: Sequence[UserMessage],
        idempotency_key: str | None = None,
    ) -> Session:
        """Raises Conflict when the idempotency key came before with another request."""
        ...

    async def list_sessions(
        self,
        key_id: str | None,
        *,
        limit: int,
        page: str | None = None,
        order: Order = "desc",
        statuses: Sequence[SessionStatus] = (),
        agent_id: str | None = None,
        created: TimeRange | None = None,
        include_archived: bool = False,
    ) -> Page[Session]:
        """Raises InvalidInput for a page cursor that was not handed out."""
        ...

    async def update_session(
        self,
        session_id: str,
        key_id: str,
        *,
        changes: Mapping[str, Any],
        idempotency_key: str | None = None,
    ) -> Session:
        """`changes` may hold `title` (str or None) and `metadata` (patch: None deletes a key)."""
        ...

    async def archive_session(self, session_id: str, key_id: str) -> Session:
        """Supersedes what waits. Raises Conflict while the session runs."""
        ...

    async def delete_session(self, session_id: str, key_id: str) -> None:
        """Raises Conflict while the session runs. A `KeptDecision` of each decision stays."""
        ...

    async def list_kept_decisions(self, *, limit: int, page: str | None = None) -> Page[KeptDecision]:
        """Decisions of sessions that were deleted, of all keys, the oldest first."""
        ...

    async def send_events(
        self,
        session_id: str,
        key_id: str | None,
        inbound: Sequence[Inbound],
        *,
        decided_by: str,
        idempotency_key: str | None = None,
    ) -> list[Event]:
        """Commits what a client sends, all or nothing. A confirmation is a decision; a message never is.

        The service itself (`key_id` None) says whom it acts for with `decided_by`; its idempotency keys are its own.
        With an idempotency key, the same request again is answered as the first one was, for two days.
        Raises NotWaiting (no such call waits), AlreadyDecided, Superseded, Conflict (archived), InvalidInput.
        """
        ...

    async def list_events(
        self,
        session_id: str,
        key_id: str | None,
        *,
        limit: int,
        page: str | None = None,
        order: Order = "asc",
        types: Sequence[str] = (),
        created: TimeRange | None = None,
    ) -> Page[Event]: ...

    async def last_seq(self, session_id: str, key_id: str | None) -> int:
        """The seq of the session's newest event."""
        ...

    async def get_approval(self, approval_id: str, key_id: str | None) -> Approval: ...

    async def decide(
        self,
        approval_id: str,
        key_id: str | None,
        confirmation: UserToolConfirmation,
        *,
        decided_by: str,
        idempotency_key: str | None = None,
    ) -> Approval:
        """Decides on the call of an approval, whichever call `confirmation` names; returns the updated approval.

        Raises as send_events does, and NotFound.
        """
        ...

    async def add_files(
        self, session_id: str, key_id: str | None, manifest: str, *, idempotency_key: str | None = None
    ) -> None:
        """Has the files of a manifest put into the session's workspace before its next turn begins.

        Raises NotFound, Conflict (archived), InvalidInput.
        """
        ...

    async def workspace_file(self, session_id: str, key_id: str | None, path: str) -> SavedFile:
        """One saved file, by its path as `manifest.shown` has it. Raises NotFound."""
        ...


class Owners(Reachable, SavedBlobs, Protocol):
    """What the owner of a session does under its lease. Every method but `ping` names the session, and the epoch."""

    async def snapshot(self, session_id: str, epoch: int) -> Snapshot: ...

    async def find_approval(self, session_id: str, epoch: int, call_id: str) -> Approval | None:
        """The approval of a call, in whatever state."""
        ...

    async def lost_calls(self, session_id: str, epoch: int) -> list[Approval]:
        """What was asked in the turn that was begun, was not claimed, and has no result: undecided, allowed or refused. In a
        turn that no message began: undecided or allowed."""
        ...

    async def wait_session(self, session_id: str, epoch: int, revision: int, *, timeout_s: float) -> Snapshot:
        """The session as soon as its `revision` is another, or after `timeout_s`. Renews the lease."""
        ...

    async def commit(
        self,
        session_id: str,
        epoch: int,
        drafts: Sequence[Draft],
        *,
        permission_mode: PermissionMode | None = None,
        conversation: str | None = None,
    ) -> None:
        """Appends events, and closes the approvals whose results are among them. One that was not claimed, and was not
        held either, is superseded: the engine answered the call without running it. Raises InvalidInput for what only
        a client may say.

        `permission_mode` is what the CLI is in from now on, to be set again when the session is resumed; `conversation`
        the id of the transcript that is to be resumed.
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
        """Commits the batch's events and an approval for each call that asks; all of them at once, before anyone sees.

        A call that was held before and is issued again, identically and in the same folder, takes over the approval
        given for it, and is not shown again: `event_id` of its approval is the event that was decided on.
        Returns the approvals of `calls`, in order, for those that ask.
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

        Returns what speaks for this host and port: the approval that was opened now (with an event `call_id`), one that
        waits or is allowed, or one that was refused in this turn. Raises Conflict when HOSTS_AT_ONCE wait already,
        NotWaiting when the turn was interrupted.
        """
        ...

    async def begin_turn(self, session_id: str, epoch: int, event_id: str) -> None:
        """Takes the queued user.message `event_id` up."""
        ...

    async def claim(
        self, session_id: str, epoch: int, call_id: str, run_digest: str, *, claim_id: str
    ) -> Approval:
        """The one permission to run a call. Raises NotWaiting unless it is allowed, unclaimed, and of this digest.

        `claim_id` is new for each attempt to run; repeating it repeats the answer.
        """
        ...

    async def hold(self, session_id: str, epoch: int, call_id: str) -> None:
        """Records that the model must issue this call again later."""
        ...

    async def defer(self, session_id: str, epoch: int, call_id: str | None) -> None:
        """The CLI will ask for this call again when its transcript is resumed; None: for no call."""
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
    ) -> Session:
        """The engine stopped working on the turn, with a `stop_reason` for the case that nothing is left to do.

        "over": the engine finished it. After `retries_exhausted` the session rests, and what is queued or was decided
        waits for the next message. "parked": it goes on once a human decided; only usage is recorded. "broken off":
        the engine cannot work, and nothing of the turn is lost: the next message takes it up where it was.
        `end_id` is new for each end; repeating it has no effect.
        """
        ...

    async def remind(self, session_id: str, epoch: int, approval_ids: Sequence[str]) -> None:
        """The model was reminded of these decided calls; at the next turn's end they are superseded, and hosts that
        were allowed are closed."""
        ...

    async def release(self, session_id: str, epoch: int) -> bool:
        """Gives the lease up, unless there is work: then False, and the owner goes on."""
        ...

    async def preview(self, session_id: str, epoch: int, deltas: Sequence[Mapping[str, Any]]) -> None:
        """Passes deltas of an unfinished event to open streams; nothing is stored."""
        ...

    async def save_workspace(
        self, session_id: str, epoch: int, manifest: str | None, *, taken: Sequence[str] = ()
    ) -> None:
        """The session's workspace is what `manifest` names from now on; the uploads `taken` are in it.

        Raises NotFound when the manifest was not put, InvalidInput when it is none.
        """
        ...

    async def append_transcript(
        self, key: TranscriptKey, entries: Sequence[Mapping[str, Any]], *, epoch: int | None = None
    ) -> None:
        """`epoch`: that of the owner of session `scope`; None for a scope that is no session, and for the service itself."""
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
    """Hands out leases, and looks after time."""

    async def acquire(self, session_id: str, holder: str, *, lease_s: float) -> Session:
        """A new lease with a raised epoch, replacing the old one. Claimed calls without a result become unknown.

        A holder is one process: while its lease lasts, it gets the same one again.
        """
        ...

    async def give_up(self, session_id: str, message: str) -> None:
        """Breaks off the turn of a session that cannot be driven, and says why in its log. Nothing is lost: the next
        message takes the turn up where it was, with the decisions that were given; an interrupt drops it."""
        ...

    async def tell_waiting(self, session_id: str, epoch: int, message: str) -> None:
        """Logs once what a session without an owner since `epoch` waits for, however often it is called."""
        ...

    async def drop_lease(self, session_id: str, epoch: int) -> None:
        """The owner with this epoch is known to be gone."""
        ...

    async def supervised(self) -> list[Supervised]:
        """Sessions that have an owner or need one: never the parked ones."""
        ...

    async def wait_supervised(self, version: int, *, timeout_s: float) -> int:
        """Returns a new version as soon as `supervised()` may have changed, or after `timeout_s`."""
        ...

    async def expire_due(self) -> int:
        """Denies, as expired, every pending approval whose time has come; returns how many."""
        ...

    async def retire(self, before: datetime) -> list[str]:
        """Deletes, with all that is theirs, up to RETIRED sessions that are archived, at the end of a turn with nothing
        waiting, or never ran, and were last changed `before`. Returns their ids."""
        ...


class Store(Clients, Owners, Supervision, Protocol):
    """All of it, with what the ledger does by itself: what backends are built for."""

    async def sweep_blobs(self) -> int:
        """Removes blobs that no session names and that were put more than a day ago; returns how many."""
        ...

    async def sweep_replies(self) -> int:
        """Forgets what requests with an idempotency key were answered: those of clients after two days, those of keys that
        the service made for its own repetitions after ten minutes. Returns how many."""
        ...
