"""Where owners run: the protocol between the supervisor and what hosts owners, which is Ray in production and tasks of one
process in tests (`testing/local_host.py`). Knows no Ray."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from claude_hitl_template.claude.sandbox import SandboxConfig
from claude_hitl_template.domain.models import Environment, Session
from claude_hitl_template.domain.policy.floor import Floor
from claude_hitl_template.errors import HitlError
from claude_hitl_template.session.runner import Limits
from claude_hitl_template.workspace.sync import WorkspaceLocation

PARKED = "parked"  # how an owner says that its session rests, and that it can drive another


@dataclass(frozen=True)
class Share:
    """What an awake session may use. The host reserves CPUs and memory; memory and processes are watched, and the session's
    sandbox has hard limits above them (`claude/limits.py`)."""

    cpus: float
    memory_bytes: int
    processes: int


@dataclass(frozen=True)
class Capacity:
    """CPUs and bytes of memory of a host: what is not reserved, and all of it."""

    free_cpus: float
    free_memory_bytes: int
    cpus: float
    memory_bytes: int


@dataclass(frozen=True)
class Assignment:
    """The session that an owner drives, and what it needs for that.

    Sent as an argument of a call, because everyone on a Ray cluster can read a runtime_env.
    `token` opens the model endpoint, `capability` the ledger: both for this session and this lease alone.
    `sandbox` is None where the operator wants none.
    """

    session: Session
    workspace: WorkspaceLocation
    run_dir: Path
    model_url: str
    token: str = field(repr=False)
    capability: str = field(repr=False)
    cli_path: Path | None
    limits: Limits
    share: Share
    sandbox: SandboxConfig | None
    floor: Floor


class CannotStart(HitlError):
    """No owner can be started for a session; the message says why, and how to fix it."""


class OwnerLost(HitlError):
    """An owner ended, or does not answer; the message says what the host knows of it."""


class OwnerHost(Protocol):
    """Starts, finds and ends owners, each by a name that no other has. A cancelled call may or may not have taken effect:
    `end` the owner then."""

    def contains(self, environment: Environment) -> bool:
        """Whether owners in this environment run in a container of their own."""
        ...

    async def check(self, environment: Environment) -> None:
        """Checks what can be checked before a start.

        Raises:
            CannotStart: Nothing can start in this environment; for instance, its image is missing.
        """
        ...

    async def start(self, name: str, environment: Environment, share: Share) -> None:
        """Starts an owner without a session; returns when it answers.

        Raises:
            CannotStart: It could not be started.
            TimeoutError: It did not answer in time, perhaps for lack of room; it was ended.
        """
        ...

    async def why_late(self, environment: Environment, limit: str) -> str:
        """Explains to a person why a start that has room took longer than `limit`."""
        ...

    async def answers(self, name: str) -> bool:
        """Whether the owner is alive and ready for a session."""
        ...

    async def drive(self, name: str, assignment: Assignment) -> str:
        """Gives the owner its session; returns how it ended: "parked", "taken over" or "died: <why>".

        Raises:
            OwnerLost: The owner ended without saying so.
        """
        ...

    async def driving(self, name: str) -> tuple[str, int] | None:
        """The session and epoch that an owner drives. None: it drives nothing, is gone, or does not answer."""
        ...

    async def code(self, name: str) -> str | None:
        """The version of the code that the owner runs, as `code_version` gives it; None where it cannot be known."""
        ...

    async def make_room(self, name: str) -> None:
        """Asks the owner to park as soon as nothing runs. Does not wait, and does nothing where it is gone."""
        ...

    async def end(self, name: str) -> None:
        """Ends an owner whatever it is doing; does nothing where there is none of that name."""
        ...

    async def names(self) -> set[str]:
        """The owners that are alive, those without a session included."""
        ...

    async def capacity(self) -> Capacity: ...

    async def tidy(self) -> None:
        """Removes what ended owners left behind on this machine. Raises nothing."""
        ...
