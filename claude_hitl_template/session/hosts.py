"""Which hosts a session's sandbox may reach, and how a human is asked about the others.

A host that neither the environment nor a rule names becomes an approval of its own kind. Nothing waits for it: the proxy
refuses the connection, the turn continues, and the model repeats the request after it is informed of the decision.
"""

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Literal

import structlog

from claude_hitl_template.domain.canonical_json import shown_host
from claude_hitl_template.domain.models import Approval, ApprovalState, Session, new_id, utcnow
from claude_hitl_template.domain.policy import NETWORK, Evaluation, Verdict
from claude_hitl_template.domain.policy.tiers import covers
from claude_hitl_template.errors import Conflict, HitlError, NotWaiting, StaleOwner
from claude_hitl_template.session.judge import Judge
from claude_hitl_template.store.protocol import Owners
from claude_hitl_template.store.session_aggregate import denial

log = structlog.get_logger()

type Host = tuple[str, int]
# Whatever address the name leads to, except the service's own; or one of the internet's alone.
type Access = Literal["anywhere", "public"]

BECAUSE_CHARS = 2000
MAY_NOT = "this session may not reach {where}: {why}"
ASKED = (
    "this session may not reach {where} yet: a human was asked. Do not try again and do not work around it; end your turn "
    "and say that it waits. You will be told when it is decided, and repeat the request then."
)


class HostGate:
    """The hosts of one engine. `running` describes the running calls; `expiry` returns the expiry of a new approval."""

    def __init__(
        self,
        store: Owners,
        session: Session,
        judge: Judge,
        *,
        workspace: Path,
        running: Callable[[], str],
        expiry: Callable[[], datetime | None],
    ) -> None:
        self._store, self._session, self._judge, self._workspace = store, session, judge, workspace
        self._running, self._expiry = running, expiry
        self._known: dict[Host, Approval] = {}
        self._told: set[str] = set()
        self._asking = asyncio.Lock()

    def update(self, session: Session, approvals: Sequence[Approval]) -> None:
        """Takes over the store's state. An approval that is missing in it is looked up at the next request to its host."""
        self._session = session
        still = {_host(a): a for a in approvals if a.kind == "network"}
        self._known = {host: a for host, a in self._known.items() if _is_refused(a)} | still

    def new_turn(self) -> None:
        self._known = {host: a for host, a in self._known.items() if not _is_refused(a)}

    def denied(self, host: Host) -> str | None:
        """Why this host cannot be opened; None if it can."""
        found = self._evaluate(host)
        by_rule = found.verdict is Verdict.deny and found.source != "default"
        return (
            MAY_NOT.format(where=shown_host(*host), why=f"a rule denies it ({found.source})")
            if by_rule
            else None
        )

    def standing(self, host: Host) -> Access | None:
        """How the host may be reached without a question; None if it must be asked for."""
        networking = self._session.environment.networking
        if self._judge.tier(NETWORK, _input(host), self._workspace).verdict is Verdict.ask:
            return None
        if networking.declares(*host):
            return "anywhere"
        if networking.allows(*host) or self._evaluate(host).verdict is Verdict.allow:
            return "public"
        return None

    @property
    def allows_mcp_servers(self) -> bool:
        return self._session.environment.networking.allow_mcp_servers

    def of_server(self, host: Host) -> Access:
        """How the host of one of the agent's MCP servers may be reached."""
        return "anywhere" if self._session.environment.networking.declares(*host) else "public"

    def unlisted(self, host: Host) -> str:
        """Why an MCP server at a private address is refused, with the fix."""
        return self._session.environment.refuses_server(*host)

    async def ask(self, host: Host) -> str | None:
        """Asks a human unless the host was asked for already. None if it is allowed, else a message for the agent."""
        where = shown_host(*host)
        if self._evaluate(host).verdict is Verdict.deny:
            return MAY_NOT.format(where=where, why="no rule allows it")
        try:
            async with self._asking:  # the same host asked for many times at once is asked for once
                approval = self._known.get(host) or await self._open(host)
            if approval is None:
                return MAY_NOT.format(where=where, why="no call runs that a human could be asked about")
            if approval.state is ApprovalState.PENDING:
                return ASKED.format(where=where)
            await self._tell(approval)
        except (Conflict, NotWaiting, StaleOwner) as error:
            return MAY_NOT.format(where=where, why=str(error))
        except HitlError as error:
            log.warning("host not asked for", session=self._session.id, host=where, why=str(error))
            return MAY_NOT.format(where=where, why="no human can be asked now; try again in a minute")
        why = self._too_few(approval) if approval.state is ApprovalState.ALLOWED else denial(approval)
        return MAY_NOT.format(where=where, why=why) if why else None

    async def used(self, host: Host) -> None:
        """Notes that a rule opened the host. If the rule was remembered with a decision, the model needs no reminder."""
        approval = self._known.get(host)
        if approval is not None and approval.state is ApprovalState.ALLOWED:
            with contextlib.suppress(HitlError):  # then the model is reminded as usual
                await self._tell(approval)

    async def _open(self, host: Host) -> Approval | None:
        because = self._running()
        if not because:
            return None
        self._known[host] = approval = await self._store.ask_network(
            self._session.id,
            self._session.epoch,
            new_id("sevt"),
            {"host": host[0], "port": host[1], "because": because[:BECAUSE_CHARS]},
            cwd=str(self._workspace),
            expires_at=self._expiry(),
        )
        return approval

    async def _tell(self, approval: Approval) -> None:
        """Records that the model saw the decision and needs no reminder. Raises StaleOwner."""
        if approval.reminded or approval.id in self._told:
            return
        self._told.add(approval.id)
        await self._store.remind(self._session.id, self._session.epoch, [approval.id])

    def _too_few(self, approval: Approval) -> str | None:
        """Why a host that was allowed is not open: the workspace's rules ask for more people by now. None if it is."""
        tier = self._judge.tier(NETWORK, _input(_host(approval)), self._workspace)
        if covers(approval.requirements, tier.requirements(utcnow())):
            return None
        return f"it needs other approvers now ({tier.found.source})"

    def _evaluate(self, host: Host) -> Evaluation:
        return self._judge.evaluate(self._session, NETWORK, _input(host), self._workspace)[1]


def _input(host: Host) -> dict[str, str | int]:
    return {"host": host[0], "port": host[1]}


def _host(approval: Approval) -> Host:
    return approval.input["host"], approval.input["port"]


def _is_refused(approval: Approval) -> bool:
    return approval.state in (ApprovalState.DENIED, ApprovalState.EXPIRED)
