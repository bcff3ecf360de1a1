"""The protocol between the supervisor and the host of owners: Ray in production (`ray_host.py`), tasks of one process in
tests (`testing/local_host.py`). Does not use Ray."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from claude_hitl_template.claude.sandbox import SandboxConfig
from claude_hitl_template.domain.models import Environment, Session
from claude_hitl_template.domain.policy.floor import Floor
from claude_hitl_template.errors import HitlError
from claude_hitl_template.session.runner import Limits
from claude_hitl_template.workspace.sync import WorkspaceLocation

PARKED = "parked"  # an owner's result when its session has parked; the owner can drive another one


@dataclass(frozen=True)
class Share:
    """What an awake session may use. The host reserves CPUs and memory; memory, processes and disk are watched, and the
    session's sandbox has hard limits above them (`claude/limits.py`)."""

    cpus: float
    memory_bytes: int
    processes: int
    disk_bytes: int


@dataclass(frozen=True)
class Capacity:
    """CPUs and bytes of memory of a host: the unreserved part (`free_`), and the total."""

    free_cpus: float
    free_memory_bytes: int
    cpus: float
    memory_bytes: int


@dataclass(frozen=True)
class Assignment:
    """The session that an owner drives, and what the owner needs for it.

    It is sent as an argument of a call, because every client of a Ray cluster can read a runtime_env.

    Attributes:
        token: For the model endpoint; valid for this session and this lease only.
        capability: For the ledger; valid for this session and this lease only.
        sandbox: None if the operator disabled sandboxes.
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

    @property
    def home(self) -> Path:
        """The owner's folder for this session, which is removed with the owner."""
        return self.run_dir / f"{self.session.id}-{self.session.epoch}"


class CannotStart(HitlError):
    """No owner can be started for a session; the message says why, and how to fix it."""


class OwnerLost(HitlError):
    """An owner ended, or does not answer; the message says what the host knows about it."""


class OwnerHost(Protocol):
    """Starts, finds and ends owners by their unique names. A cancelled call may or may not have taken effect: call `end`
    after it."""

    def contains(self, environment: Environment) -> bool:
        """Whether owners in this environment run in a container of their own."""
        ...

    async def check(self, environment: Environment) -> None:
        """Checks what can be checked before a start.

        Raises:
            CannotStart: No owner can start in this environment; for instance, its image is missing.
        """
        ...

    async def start(
        self, name: str, environment: Environment, share: Share, early: Assignment | None = None
    ) -> None:
        """Starts an owner without a session; returns when it answers.

        Args:
            name: The owner's, which is unique.
            environment: Of its sessions.
            share: What the host reserves for it.
            early: As for `prepare`; a host may start this session's CLI while the owner starts.

        Raises:
            CannotStart: It could not be started.
            TimeoutError: It did not answer in time, perhaps for lack of room; it was ended.
        """
        ...

    async def why_late(self, environment: Environment, limit: str) -> str:
        """Explains to a person why a start that has room took longer than `limit`."""
        ...

    async def answers(self, name: str) -> bool:
        """Returns True if the owner is alive and ready for a session."""
        ...

    async def prepare(self, name: str, assignment: Assignment | None) -> bool:
        """Has an idle owner start the CLI of a session that may be assigned to it later, or end that CLI.

        Args:
            name: The owner's.
            assignment: Of a session that does not exist yet, without token and capability. None ends the CLI.

        Returns:
            Whether the owner has such a CLI now.
        """
        ...

    async def drive(self, name: str, assignment: Assignment) -> str:
        """Assigns a session to the owner, and returns how it ended: "parked", "taken over" or "died: <why>".

        Raises:
            OwnerLost: The owner ended without a result.
        """
        ...

    async def driving(self, name: str) -> tuple[str, int] | None:
        """Returns the session and epoch that an owner drives; None if it is idle, has ended, or does not answer."""
        ...

    async def code(self, name: str) -> str | None:
        """Returns the version of the code that the owner runs, as `code_version` does; None if it is unknown."""
        ...

    async def make_room(self, name: str) -> None:
        """Asks the owner to park as soon as no call runs. Does not wait, and does nothing if the owner has ended."""
        ...

    async def end(self, name: str) -> None:
        """Ends an owner even if it is busy; does nothing if there is none with this name."""
        ...

    async def names(self) -> set[str]:
        """Returns the names of the owners that are alive, including those without a session."""
        ...

    async def capacity(self) -> Capacity: ...

    async def tidy(self) -> None:
        """Removes what ended owners left behind on this machine. Never raises."""
        ...
