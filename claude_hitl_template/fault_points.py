"""Fault points: named places at which a test lets a process die, stand still, wait or fail. Nothing in production.

Only code can install something at them, and only tests have such code (tests/faults.py).
"""

from collections.abc import Awaitable, Callable

type Fault = Callable[[str], Awaitable[None]]

# The Store's writes, each in one transaction: reached in it, with its locks held, and when it is durable.
WRITES = (
    "add_key",
    "create_session",
    "update_session",
    "archive_session",
    "delete_session",
    "send_events",
    "commit",
    "open_calls",
    "ask_network",
    "begin_turn",
    "claim",
    "hold",
    "defer",
    "remind",
    "end_turn",
    "release",
    "renew",
    "append_transcript",
    "delete_transcripts",
    "acquire",
    "drop_lease",
    "give_up",
    "expire",
    "retire",
    "tell_waiting",
    "save_workspace",
    "add_files",
    "begin_export",
    "distribute",
    "take",
    "settle",
)
# Steps outside of the Store: reached before and after each.
STEPS = (
    "notify",  # a message to the other ledgers
    "spawn",  # the CLI, in its owner
    "resume",  # ... with a transcript
    "flush",  # what was heard, to the log
    "park",  # giving the lease up, the CLI gone
    "run",  # a claimed call's permission, to the CLI
    "send",  # a notice, to its target
    "own",  # handing a session with its new epoch to an owner
)
POINTS = (
    *(f"{write}.{when}_commit" for write in WRITES for when in ("before", "after")),
    *(f"{step}.{when}" for step in STEPS for when in ("before", "after")),
)

_fault: Fault | None = None


def install(fault: Fault | None) -> None:
    """`fault` is awaited with the name of each point that is reached in this process; None: nothing is."""
    global _fault  # noqa: PLW0603 - one for the process
    _fault = fault


async def reach(point: str) -> None:
    if _fault is not None:
        await _fault(point)
