"""A Python prompt on the cluster, through Ray Client."""

import asyncio
import code
import logging
from collections.abc import Callable
from typing import Any

import ray
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential

from claude_hitl_template.cli.common import say, step
from claude_hitl_template.cli.deploy.cluster import Cluster
from claude_hitl_template.cli.deploy.rollout import check_versions, working_dir
from claude_hitl_template.cluster.ledger_line import Line, reach
from claude_hitl_template.config.secret_files import read_signing_key
from claude_hitl_template.config.settings import Settings
from claude_hitl_template.errors import HitlError, Unavailable
from claude_hitl_template.store.access import OPENED, Authority
from claude_hitl_template.store.protocol import Clients, Supervision

ATTEMPTS = 4
_METHODS = OPENED["ingress"] | OPENED["supervisor"]
BANNER = """ray: connected to {address}. store: the sessions, as in store.supervised().
settings: those of this machine. Ctrl-D ends the prompt."""


class StoreOnCluster:
    """The store for the prompt, synchronous: methods of ingress and supervisor run on the cluster's head, which has the
    signing key."""

    def __getattr__(self, method: str) -> Callable[..., Any]:
        if method not in _METHODS:
            raise AttributeError(method)

        def call(*args: Any, **kwargs: Any) -> Any:
            task: Any = ray.remote(_call_store).options(
                num_cpus=0, resources={"node:__internal_head__": 0.001}
            )
            ok, result = ray.get(task.remote(method, args, kwargs))
            if not ok:
                raise result
            return result

        return call


def open_shell(settings: Settings) -> None:
    """Returns when the prompt is ended. Raises Unavailable, ConfigError."""
    cluster = Cluster.open(settings)
    try:
        check_versions(cluster.versions())
        env = working_dir(cluster.serve())
    finally:
        cluster.close()
    with step(f"Connecting to {settings.ray_client}"):
        connect_patiently(lambda: _connect(settings.ray_client, env), settings.ray_client)
    try:
        names = {"ray": ray, "store": StoreOnCluster(), "settings": settings}
        code.interact(BANNER.format(address=settings.ray_client), local=names, exitmsg="")
    finally:
        ray.shutdown()


def connect_patiently(connect_once: Callable[[], None], address: str) -> None:
    """Ray Client's first connection fails now and then, and the next one works. Raises Unavailable."""
    retrying = Retrying(
        retry=retry_if_exception_type((ConnectionError, RuntimeError, TimeoutError)),
        stop=stop_after_attempt(ATTEMPTS),
        wait=wait_exponential(multiplier=0.5, max=4),
        before_sleep=_tell,
        reraise=True,
    )
    try:
        retrying(connect_once)
    except (ConnectionError, RuntimeError, TimeoutError) as error:
        raise Unavailable(
            f"Ray Client does not answer at {address} ({_first_line(error)})\n"
            "  Fix: is the VM, or the tunnel, up? ./hitl doctor --remote checks it; HITL_RAY_ADDRESS is its address"
        ) from error


def _connect(address: str, env: dict[str, str]) -> None:
    ray.shutdown()  # what a failed attempt left
    ray.init(address, runtime_env=env, log_to_driver=False, logging_level=logging.ERROR)


def _call_store(method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[bool, Any]:
    try:
        authority = Authority(read_signing_key(Settings.load()))
        if method in OPENED["ingress"]:
            store: Any = reach(Clients, Line(), authority.ingress())
        else:
            store = reach(Supervision, Line(), authority.supervisor())
        return True, asyncio.run(getattr(store, method)(*args, **kwargs))
    except HitlError as error:
        return False, error


def _tell(state: RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    say(f"{_first_line(error)}; trying again (attempt {state.attempt_number + 1} of {ATTEMPTS})")


def _first_line(error: BaseException | None) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
