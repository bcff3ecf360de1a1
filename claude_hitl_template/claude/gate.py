"""Where every tool call of a session ends up before it runs: the CLI's hook and its permission callback both ask here.

The life of a gated call is told in docs/architecture.md. What this module adds to the Store's rules:

- A call is answered only when its whole batch is committed (`register`), so humans see all of it at once.
- A waiting call keeps the CLI for the hot window; then the first of a batch is deferred (the CLI will ask again when the
  transcript is resumed), its siblings are held (denied, with the advice to issue them again): the CLI loses all but one of
  several deferred calls.
- A subagent's call cannot be deferred, it would vanish with the subagent: it is held.
- Only `permit` says yes, and only after the claim: one claim, one run.
"""

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import structlog

from claude_hitl_template import faults
from claude_hitl_template.canonical import digest
from claude_hitl_template.claude.engine import ToolUse
from claude_hitl_template.errors import NotWaiting
from claude_hitl_template.models import Approval, ApprovalState, Session
from claude_hitl_template.policy import Evaluation, PermissionPolicy, Rule, Verdict, evaluate
from claude_hitl_template.store.protocol import Call, Store
from claude_hitl_template.store.unit import OUTCOME_UNKNOWN

log = structlog.get_logger()

HELD = "held: another call of this batch waits for a human; issue this call again afterwards"
HELD_ALONE = (
    "waiting: this call needs a human's decision, which has not come yet. Do not try it again and do not work around it; "
    "end your turn and say that it waits. You will be told when it is decided."
)
REGISTER_TIMEOUT_S = (
    5.0  # a message that never ends (no streaming, a cut stream) is taken as complete after this
)


@dataclass(frozen=True)
class Answer:
    """To the CLI's question whether a call may run. `run_input` None: as the CLI has it."""

    behavior: Literal["allow", "ask", "deny", "defer"]
    message: str = ""
    run_input: dict[str, Any] | None = None


class Gate:
    """One engine's gate. `on_overdue` is called when a call was asked about whose message does not end."""

    def __init__(
        self,
        store: Store,
        session: Session,
        *,
        workspace: Path,
        is_plan_folder: Callable[[Path], bool],
        hot_window_s: float,
        on_overdue: Callable[[ToolUse], Awaitable[None]],
    ) -> None:
        self._store, self._session, self._workspace = store, session, workspace
        self._is_plan_folder = is_plan_folder
        self._hot_window_s, self._on_overdue = hot_window_s, on_overdue
        self._verdicts: dict[str, Evaluation] = {}
        self._committed: set[str] = set()
        self._approvals: dict[str, Approval] = {}
        self._asked_at: dict[str, float] = {}
        self._changed = asyncio.Event()
        self._interrupted = False
        self._plan_file: Path | None = None
        self._image_rules: tuple[Rule, ...] = ()
        self.deferred: str | None = None

    # -- what the engine and the session tell the gate

    def hold_to(self, rules: Sequence[Rule]) -> None:
        """What holds in an image besides the agent's policy: denials always, the rest where that has no default."""
        self._image_rules = tuple(rules)

    def classify(self, use: ToolUse) -> Call:
        """The policy's word on a call: a remembered rule counts as the human's recorded decision."""
        own, effective = self._evaluations(use)
        standing = (
            effective.source if (own.verdict, effective.verdict) == (Verdict.ask, Verdict.allow) else None
        )
        self._verdicts[use.call_id] = effective
        return Call(
            call_id=use.call_id,
            tool_name=use.name,
            input=use.input,
            digest=digest(use.input),
            agent_id=use.thread,
            verdict=effective.verdict.value,
            standing_rule=standing,
        )

    def register(self, approvals: Iterable[Approval], calls: Iterable[Call] = ()) -> None:
        """These calls are committed, with their approvals, and may be answered: not before."""
        now = time.monotonic()
        self._committed.update(call.call_id for call in calls)
        for approval in approvals:
            self._approvals[approval.call_id] = approval
            self._asked_at.setdefault(approval.call_id, now)
        self._wake()

    def update(self, session: Session, approvals: Sequence[Approval]) -> None:
        """What the store says now. An approval that is no longer open was denied, expired, superseded or closed."""
        self._session = session
        self._interrupted = self._interrupted or session.interrupted
        for approval in approvals:
            if approval.call_id in self._approvals or approval.call_id == session.deferred:
                self.register([approval])
        self._wake()

    def knows(self, call_id: str) -> bool:
        return call_id in self._committed or call_id in self._approvals

    def tool_name(self, call_id: str) -> str:
        """ "" for a call that has no approval."""
        approval = self._approvals.get(call_id)
        return approval.tool_name if approval else ""

    def waiting(self) -> list[Approval]:
        """Those that had not begun when last looked at."""
        return [
            a for a in self._approvals.values() if a.state in (ApprovalState.PENDING, ApprovalState.ALLOWED)
        ]

    def new_turn(self) -> None:
        self.deferred, self._interrupted = None, False

    def end_hot_window(self) -> None:
        """What waits, and what will be asked from now on, does not keep the process."""
        self._hot_window_s = 0.0
        self._wake()

    # -- what the CLI asks the gate

    async def before(self, use: ToolUse) -> Answer:
        """The hook: never a final yes. `ask` sends the CLI on to `permit`."""
        await self._registered(use)
        if self._is_plan_file(use):
            return Answer("allow")
        if self.deferred is not None and self.deferred != use.call_id:
            return await self._hold(use, HELD)
        approval = self._approvals.get(use.call_id)
        if approval is None:
            return self._by_policy(use)
        if await self._decided(approval):
            return self._by_decision(use)
        if use.thread is not None:
            return await self._hold(use, HELD_ALONE)
        self.deferred = use.call_id
        return Answer("defer")

    async def permit(self, use: ToolUse) -> Answer:
        """The permission callback: the only place that lets a gated call run, after its claim."""
        await self._registered(use)
        if self._is_plan_file(use):
            return Answer("allow")
        approval = self._approvals.get(use.call_id)
        if approval is None:
            return self._by_policy(use)
        if not await self._decided(approval):
            return await self._hold(use, HELD_ALONE)
        answer = self._by_decision(use)
        return answer if answer.behavior == "deny" else await self._claim(use)

    def with_plan(self, use: ToolUse) -> ToolUse:
        """ExitPlanMode names no plan: it is in the file the model wrote, and a human must see it."""
        if use.name != "ExitPlanMode" or use.input.get("plan") or self._plan_file is None:
            return use
        try:
            return replace(use, input={**use.input, "plan": self._plan_file.read_text()})
        except (OSError, UnicodeError) as error:
            log.warning("plan not readable", session=self._session.id, why=str(error))
            return use

    # -- how it decides

    def _evaluations(self, use: ToolUse) -> tuple[Evaluation, Evaluation]:
        """By the agent's policy alone, and with what humans asked to be remembered."""
        if self._is_plan_file(use):
            draft = Evaluation(Verdict.allow, "the draft of a plan")
            return draft, draft
        policies = self._session.agent.policy, self._session.effective_policy()
        own, effective = (evaluate(self._in_image(p), use.name, use.input, self._workspace) for p in policies)
        return own, effective

    def _in_image(self, policy: PermissionPolicy) -> PermissionPolicy:
        held = [rule for rule in self._image_rules if rule.policy == "always_deny" or policy.default is None]
        return policy.model_copy(update={"rules": (*policy.rules, *held)}) if held else policy

    def _is_plan_file(self, use: ToolUse) -> bool:
        """Plan mode keeps its draft in the CLI's own folder, outside the workspace; the plan itself is asked about."""
        path = use.input.get("file_path")
        if use.name not in ("Write", "Edit", "Read") or not isinstance(path, str):
            return False
        resolved = Path(path).resolve()
        if resolved.suffix != ".md" or not self._is_plan_folder(resolved.parent):
            return False
        self._plan_file = resolved
        return True

    async def _registered(self, use: ToolUse) -> None:
        """Waits until the call's message is committed; a message that does not end is committed as it is."""
        deadline = time.monotonic() + REGISTER_TIMEOUT_S
        while not self.knows(use.call_id):
            if not await self._change_before(deadline):
                await self._on_overdue(use)
                deadline = time.monotonic() + REGISTER_TIMEOUT_S

    async def _decided(self, approval: Approval) -> bool:
        """True as soon as nothing of the call's batch is pending; False when the hot window is over."""
        while self._batch_pending(approval) and not self._interrupted:
            if not await self._change_before(self._asked_at[approval.call_id] + self._hot_window_s):
                return not self._batch_pending(approval)
        return True

    def _batch_pending(self, approval: Approval) -> bool:
        together = {*approval.batch, approval.event_id}
        return any(
            a.state is ApprovalState.PENDING for a in self._approvals.values() if a.event_id in together
        )

    async def _change_before(self, deadline: float) -> bool:
        changed = self._changed
        try:
            await asyncio.wait_for(changed.wait(), max(deadline - time.monotonic(), 0))
        except TimeoutError:
            return False
        return True

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _by_policy(self, use: ToolUse) -> Answer:
        verdict = self._verdicts[use.call_id]
        if verdict.verdict is Verdict.allow:
            return Answer("allow")
        return Answer("deny", f"Not permitted by this session's policy ({verdict.source}).")

    def _by_decision(self, use: ToolUse) -> Answer:
        approval = self._approvals[use.call_id]
        match approval.state:
            case ApprovalState.ALLOWED if not self._interrupted:
                return Answer("ask")
            case ApprovalState.DENIED:
                return Answer("deny", _denial(approval))
            case ApprovalState.EXPIRED:
                return Answer("deny", "Denied: nobody decided on this call in time.")
            case (
                ApprovalState.CLAIMED | ApprovalState.SUCCEEDED | ApprovalState.FAILED | ApprovalState.UNKNOWN
            ):
                return Answer("deny", OUTCOME_UNKNOWN)
            case _:
                return Answer("deny", "Not run: the user interrupted before it was decided.")

    async def _hold(self, use: ToolUse, message: str) -> Answer:
        await self._store.hold(self._session.id, self._epoch, use.call_id)
        return Answer("deny", message)

    async def _claim(self, use: ToolUse) -> Answer:
        approval = self._approvals[use.call_id]
        await faults.reach("run.before")
        try:
            claimed = await self._store.claim(
                self._session.id,
                self._epoch,
                use.call_id,
                approval.run_digest or "",
                claim_id=str(uuid.uuid4()),
            )
        except NotWaiting as error:
            log.warning("claim refused", session=self._session.id, call=use.call_id, why=str(error))
            return Answer("deny", OUTCOME_UNKNOWN)
        self._approvals[use.call_id] = claimed
        await faults.reach("run.after")
        return Answer("allow", run_input=claimed.run_input)

    @property
    def _epoch(self) -> int:
        return self._session.epoch


def _denial(approval: Approval) -> str:
    said = approval.decision.deny_message if approval.decision else None
    return f"Denied by a human: {said}" if said else "Denied by a human. No reason was given."
