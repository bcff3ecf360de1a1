"""Keeps the CLI of one new session ready before the session exists. Does not use Ray.

A CLI takes its session's id, folder and agent when it starts, so the next session is expected to be of the same kind as the
last one, and an id is reserved for it. A session of another kind gets an owner as if nothing were prepared.
"""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import structlog

from claude_hitl_template.cluster.owner_host import Assignment, OwnerHost
from claude_hitl_template.cluster.owner_pool import Owner, OwnerPool
from claude_hitl_template.domain.models import Agent, Environment, Session, new_id, utcnow
from claude_hitl_template.errors import HitlError
from claude_hitl_template.store.protocol import Supervision

log = structlog.get_logger()
KEPT_S = 300.0  # without a new session; a CLI that waits uses 130 MB
FIRST_EPOCH = 1

type Assign = Callable[[Session, Environment], Assignment]


@dataclass(frozen=True)
class _Kind:
    """What a session's CLI is started with, except for its id."""

    workspace_id: str
    agent: Agent
    environment: Environment


class PreparedSessions:
    """Expects the next session. `assign(session, environment)` returns an assignment without token and capability."""

    def __init__(
        self,
        store: Supervision,
        host: OwnerHost,
        pool: OwnerPool,
        assign: Assign,
        *,
        kept_s: float = KEPT_S,
    ) -> None:
        self._store, self._host, self._pool, self._assign = store, host, pool, assign
        self._kept_s = kept_s
        self._last: _Kind | None = None
        self._expected: _Kind | None = None
        self._noted_at = 0.0
        self._preparing: asyncio.Task[None] | None = None

    def note(self, session: Session) -> None:
        """Notes a session that gets its first owner. Sessions of alternating kinds are not expected: a CLI that is
        prepared for one workspace would keep the spare owner from the others."""
        kind = _Kind(session.workspace_id, session.agent, session.environment)
        self._expected = kind if self._last in (None, kind) and self._is_possible(kind) else None
        self._last, self._noted_at = kind, _now()

    async def tend(self) -> None:
        """Prepares a session once nothing else starts, or ends a CLI that no session took for long."""
        since_s = _now() - self._noted_at
        if since_s > self._kept_s:
            self._last = self._expected = None
            if self._pool.prepared() and not self._busy:
                self._begin(self._pool.end_prepared())
        elif self._expected is not None and not self._busy:
            session = _session(self._expected)
            owner = self._pool.prepare(session)
            if owner is not None:
                self._expected = None  # until the next new session, also if it fails
                self._begin(self._prepare(owner, session))

    async def close(self) -> None:
        """Cancels a preparation; a prepared CLI stays."""
        if self._preparing is not None:
            self._preparing.cancel()
            await asyncio.wait({self._preparing})

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        self._preparing = asyncio.create_task(work)
        self._preparing.add_done_callback(_report)

    @property
    def _busy(self) -> bool:
        return self._preparing is not None and not self._preparing.done()

    def early(self, session: Session) -> Assignment | None:
        """What a CLI of a session that never had an owner may be started with before it has one; None if it may not."""
        kind = _Kind(session.workspace_id, session.agent, session.environment)
        if session.epoch >= FIRST_EPOCH or session.manifests or not self._is_possible(kind):
            return None
        return self._assign(session.but(epoch=FIRST_EPOCH), session.environment)

    def _is_possible(self, kind: _Kind) -> bool:
        """A CLI connects to MCP servers as soon as it starts, which only a session's owner may let it do."""
        return not kind.agent.mcp_servers and not self._host.contains(kind.environment)

    async def _prepare(self, owner: Owner, session: Session) -> None:
        """The id is reserved last: a session that takes it finds the CLI ready."""
        try:
            if await self._host.prepare(owner.name, self._assign(session, session.environment)):
                left_s = self._kept_s - (_now() - self._noted_at)
                await self._store.reserve(session, lasts_s=left_s)
        except HitlError as error:
            log.info("no session was prepared", why=str(error))


def _session(kind: _Kind) -> Session:
    """A session that does not exist, under its first lease."""
    now = utcnow()
    return Session(
        id=new_id("sesn"),
        workspace_id=kind.workspace_id,
        agent=kind.agent,
        environment=kind.environment,
        epoch=FIRST_EPOCH,
        created_at=now,
        updated_at=now,
    )


def _report(ended: asyncio.Task[None]) -> None:
    error = None if ended.cancelled() else ended.exception()
    if error is not None:  # a defect
        log.error("no session was prepared", exc_info=error)


def _now() -> float:
    return asyncio.get_running_loop().time()
