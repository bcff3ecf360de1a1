"""Calls Kodosumi's runners, which are Ray actors of another namespace, by their names. Does not import Kodosumi."""

import asyncio
import time
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import RayError

NAMESPACE = "kodosumi"
RUNNER_S = 5.0


class RunnerLocks:
    """The locks of a flow's runner, by the ids that `wait` was called with; a `panel.services.Locks`."""

    def __init__(self, flow_id: str) -> None:
        self._runner: Any = ray.get_actor(flow_id, namespace=NAMESPACE)

    async def wait(self, name: str, lock_id: str, data: Mapping[str, Any], timeout_s: float) -> Any:
        return await self._runner.lock.remote(name, lock_id, time.time() + timeout_s, dict(data))


async def is_open(flow_id: str, role_id: str) -> bool:
    """Whether a flow is alive and belongs to that role: the panel shows a flow only to the role that launched it."""
    return await _ask(flow_id, "get_username") == role_id and bool(await _ask(flow_id, "is_active"))


async def runner_responds(flow_id: str) -> bool:
    """Whether a flow's runner is alive."""
    return await _ask(flow_id, "get_locks") is not None


async def _ask(flow_id: str, method: str) -> Any:
    """Calls a method of the runner; None if the runner has ended, or does not answer within RUNNER_S."""
    try:
        runner: Any = await asyncio.to_thread(ray.get_actor, flow_id, namespace=NAMESPACE)
        return await asyncio.wait_for(getattr(runner, method).remote(), RUNNER_S)
    except (ValueError, RayError, TimeoutError):
        return None
