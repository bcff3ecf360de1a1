"""Background tasks of a session's owner: a failure is reported, and ending one waits for its end."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from claude_hitl_template.errors import HitlError

type Spawn = Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]
"""Starts a task whose failure ends the session's runner with its error."""


async def cancel(task: "asyncio.Task[Any] | None") -> None:
    """Cancels the task and waits until it has ended.

    Raises:
        Exception: what the task failed with, unless it is a HitlError, which the store or the engine reports itself.
    """
    if task is None:
        return
    task.cancel()
    await asyncio.wait({task})
    error = None if task.cancelled() else task.exception()
    if error is not None and not isinstance(error, HitlError):
        raise error
