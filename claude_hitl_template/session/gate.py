"""The gate that every tool call of a session passes: the CLI's hook and its permission callback both ask it.

docs/architecture.md describes the life of a gated call. This module adds to the Store's rules:

- A call is answered only after its whole batch is committed (`register`), so that humans see the batch at once.
- A waiting call keeps the CLI for the hot window; then the first of a batch is deferred (the CLI will ask again when the
  transcript is resumed), its siblings are held (denied, with the advice to issue them again): the CLI loses all but one of
  several deferred calls.
- A subagent's call is held: deferred, it would be lost with the subagent.
- Only `permit` allows a call, and only after the claim: one claim, one run.
"""

import asyncio
import json
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import structlog

from claude_hitl_template import fault_points
from claude_hitl_template.domain.canonical_json import call_digest
from claude_hitl_template.domain.models import Approval, ApprovalState, PermissionMode, Session
from claude_hitl_template.domain.policy import Evaluation, Rule, Verdict, from_folder
from claude_hitl_template.domain.policy.floor import BUILT_IN, Floor
from claude_hitl_template.domain.policy.tiers import NO_POLICY, WorkspacePolicy
from claude_hitl_template.domain.tool_inputs import flaw
from claude_hitl_template.errors import Forbidden, NotWaiting
from claude_hitl_template.session.calls import IssuedCalls, Step
from claude_hitl_template.session.engine import ToolResult, ToolUse
from claude_hitl_template.session.hosts import HostGate
from claude_hitl_template.session.judge import Judge, recordable
from claude_hitl_template.store.protocol import Call, Owners
from claude_hitl_template.store.session_aggregate import OUTCOME_UNKNOWN, denial

log = structlog.get_logger()

HELD = "held: another call of this batch waits for a human; issue this call again afterwards"
HELD_ALONE = (
    "waiting: this call needs a human's decision, which has not come yet. Do not try it again and do not work around it; "
    "end your turn and say that it waits. You will be told when it is decided."
)
CHANGED = (
    "Not run: things have changed since this call was judged. It {why}. "
    "Issue this call again, exactly as given, to have it judged as they are now."
)
TWIN = (
    "the same call waits for a human already, and one decision and one result are for both; issue it again after that "
    "if it must run twice"
)
AMBIGUOUS = "several calls came with one id, and cannot be told apart: issue them again, one at a time"
REGISTER_TIMEOUT_S = (
    5.0  # a message that never ends (no streaming, a cut stream) is taken as complete after this
)


@dataclass(frozen=True)
class Answer:
    """The answer to the CLI's question whether a call may run. `run_input` None: with the CLI's own input."""

    behavior: Literal["allow", "ask", "deny", "defer"]
    message: str = ""
    run_input: dict[str, Any] | None = None


class Gate:
    """One engine's gate.

    Args:
        on_overdue: called if the CLI asks about a call whose message has not ended; with the call if its message was
            never seen or the call was postponed.
        on_changed: called if a call that needed no human needs one now.
        is_behind: whether earlier events of the engine are still being processed; then no message is overdue.
    """

    def __init__(
        self,
        store: Owners,
        session: Session,
        *,
        workspace: Path,
        is_plan_folder: Callable[[Path], bool],
        hot_window_s: float,
        on_overdue: Callable[[ToolUse | None], Awaitable[None]],
        on_changed: Callable[[ToolUse], Awaitable[None]],
        is_behind: Callable[[], bool],
        expiry: Callable[[], datetime | None] = lambda: None,
        floor: Floor = BUILT_IN,
    ) -> None:
        self._store, self._session, self.floor = store, session, floor
        plan_mode = session.agent.permission_mode == "plan"
        self._judge = Judge(workspace, is_plan_folder, plan_mode=plan_mode, floor=floor)
        self._issued: dict[str, ToolUse] = {}
        self._flaws: dict[str, str] = {}
        self._postponed: set[str] = set()
        self._hot_window_s, self._on_overdue, self._on_changed = hot_window_s, on_overdue, on_changed
        self._is_behind = is_behind
        self._verdicts: dict[str, Evaluation] = {}
        self._committed: set[str] = set()
        self._approvals: dict[str, Approval] = {}
        self._asked_at: dict[str, float] = {}
        self._asking: dict[tuple[str, str], str] = {}  # the latest call that asked with a digest
        self._changed = asyncio.Event()
        self._interrupted = False
        self._calls = IssuedCalls(workspace)
        self.deferred: str | None = None
        self.hosts = HostGate(
            store, session, self._judge, workspace=workspace, running=self._running, expiry=expiry
        )

    # -- what the engine and the session tell the gate

    def hold_to(self, rules: Sequence[Rule]) -> None:
        """Adds an image's rules to the agent's policy: deny rules always, the others if the policy has no default."""
        self._judge.hold_to(rules)

    def enter(self, mode: PermissionMode) -> None:
        """Sets the CLI's new permission mode."""
        self._judge.plan_mode = mode == "plan"

    def received(self, use: ToolUse) -> ToolUse:
        """The call as it is recorded and shown: with an input that is valid JSON, and with the text of a plan."""
        if wrong := flaw(use.name, use.input):
            self._flaws[use.call_id] = wrong
        return self._judge.with_plan(use.with_input(recordable(use.input)))

    def issue(self, use: ToolUse, *, unheard: bool = False) -> ToolUse | None:
        """The call with an id of ours, which all methods but `before` and `permit` expect. None if the call got its id
        earlier, when the CLI asked about it before its message arrived."""
        issued = self._calls.issue(use, unheard=unheard)
        self._wake()
        return issued

    def ended(self, result: ToolResult) -> ToolResult | None:
        """The result of a call under our id. None for the CLI's result of a held call, which gets its result after it is
        issued again, and for an unknown call."""
        issued = self._calls.end(result)
        if issued is None:
            log.warning("result of no call", session=self._session.id)
        if issued is None or issued.held:
            return None
        return replace(result, call_id=issued.use.call_id)

    def began(self, call_id: str) -> bool:
        """Whether the call was allowed to run."""
        issued, approval = self._calls.get(call_id), self._approvals.get(call_id)
        if approval is not None:
            return approval.state is ApprovalState.CLAIMED
        verdict = self._verdicts.get(call_id)
        return (
            issued is not None and issued.permitted and (verdict is None or verdict.verdict is Verdict.allow)
        )

    def _running(self) -> str:
        """The running calls, described for a human; "" if there are none."""
        return "\n".join(
            self._words(issued.use) for issued in self._calls.permitted() if self.began(issued.use.call_id)
        )

    def _words(self, use: ToolUse) -> str:
        approval = self._approvals.get(use.call_id)
        given = approval.run_input if approval and approval.run_input is not None else recordable(use.input)
        command = given.get("command") if use.name == "Bash" else None
        return command if isinstance(command, str) else f"{use.name} {json.dumps(given, ensure_ascii=False)}"

    def event_id(self, call_id: str) -> str:
        """The event that showed the call: an earlier one for a call that was held and issued again."""
        approval = self._approvals.get(call_id)
        return approval.event_id if approval else call_id

    def thread(self, model_id: str | None) -> str | None:
        """A subagent's thread as we name it: the event of the call that started it."""
        call_id = self._calls.spawned_by(model_id) if model_id else None
        return self.event_id(call_id) if call_id else model_id

    def classify(self, use: ToolUse, *, refused: bool = False) -> Call:
        """Evaluates the policy for a call; a remembered rule counts as a human's decision. `refused`: the CLI itself
        refused the call."""
        folder = self._judge.folder(use.thread)
        own, effective = self._judge.evaluate(self._session, use.name, use.input, folder)
        if wrong := self._flaws.get(use.call_id):
            own = effective = Evaluation(Verdict.deny, wrong)
        elif self._is_ambiguous(use):
            own = effective = Evaluation(Verdict.deny, AMBIGUOUS)
        elif refused:
            own = effective = Evaluation(Verdict.deny, "the CLI refused it")
        cwd = self._judge.shown(folder)
        digest = call_digest(use.input, cwd)
        if effective.verdict is Verdict.ask and self._waits_already(use, digest):
            own = effective = Evaluation(Verdict.deny, TWIN)
        standing = (
            effective.source if (own.verdict, effective.verdict) == (Verdict.ask, Verdict.allow) else None
        )
        self._verdicts[use.call_id], self._issued[use.call_id] = effective, use
        asks = effective.verdict is Verdict.ask
        return Call(
            call_id=use.call_id,
            tool_name=use.name,
            input=use.input,
            digest=digest,
            cwd=cwd,
            folder=self._judge.portable(folder),
            targets=self._judge.targets(use.name, use.input, folder),
            agent_id=self.thread(use.thread),
            model_call_id=use.model_id,
            verdict=effective.verdict.value,
            standing_rule=standing,
            rules=tuple(rule.pattern for rule in self._judge.tier(use.name, use.input, folder).asks),
            segments=self._judge.segments(self._session, use.input, folder)
            if asks and use.name == "Bash"
            else (),
        )

    def _waits_already(self, use: ToolUse, digest: str) -> bool:
        """Whether an identical call waits: of several that come at once a human is asked about one. One that is held is
        issued again, and takes its approval over."""
        first = self._asking.get((use.name, digest), use.call_id)
        approval = self._approvals.get(first)
        if first != use.call_id and (
            not self.knows(first)
            or (approval is not None and approval.state is ApprovalState.PENDING and not approval.held)
        ):
            return True
        self._asking[use.name, digest] = use.call_id
        return False

    def postpone(self, call_id: str) -> None:
        """Delays the registration of a call until the CLI asks for it, because its effect is not known before."""
        self._postponed.add(call_id)
        self._wake()

    def register(self, approvals: Iterable[Approval], calls: Iterable[Call] = ()) -> None:
        """Adds committed calls and their approvals; from now on the gate answers for them."""
        now = time.monotonic()
        self._committed.update(call.call_id for call in calls)
        for approval in approvals:
            if approval.call_id == self._session.deferred:
                self._calls.take_up(approval)
            self._approvals[approval.call_id] = approval
            self._asked_at.setdefault(approval.call_id, now)
        self._wake()

    def update(
        self, session: Session, approvals: Sequence[Approval], policy: WorkspacePolicy = NO_POLICY
    ) -> None:
        """Takes over the store's state. An approval that is no longer open was denied, expired, superseded or closed."""
        self._session, self._judge.workspace_policy = session, policy
        self._interrupted = self._interrupted or session.interrupted
        self.hosts.update(session, approvals)
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
        """Approvals of calls that had not begun at the last update."""
        return [
            a for a in self._approvals.values() if a.state in (ApprovalState.PENDING, ApprovalState.ALLOWED)
        ]

    def new_turn(self) -> None:
        self.deferred, self._interrupted = None, False
        self._calls.forget()
        self.hosts.new_turn()

    def end_hot_window(self) -> None:
        """Ends the hot window: pending and future calls no longer keep the process."""
        self._hot_window_s = 0.0
        self._wake()

    # -- what the CLI asks the gate

    async def before(self, use: ToolUse) -> Answer:
        """Answers the hook. It never allows a call: `ask` sends the CLI to `permit`."""
        use = await self._registered(use, "asked")
        self._judge.see(use, self._thread(use))
        if use.call_id not in self._approvals and self._is_plan_file(use):
            return Answer("allow")
        if self.deferred is not None and self.deferred != use.call_id:
            return await self._hold(use, HELD)
        if refusal := await self._judged_again(use):
            return refusal
        approval = self._approvals.get(use.call_id)
        return self._by_policy(use) if approval is None else await self._answer(use, approval)

    async def _answer(self, use: ToolUse, approval: Approval) -> Answer:
        if await self._decided(approval):
            return self._by_decision(use)
        if use.thread is not None:
            return await self._hold(use, HELD_ALONE)
        self.deferred = use.call_id
        return Answer("defer")

    async def permit(self, use: ToolUse) -> Answer:
        """The permission callback: the only place that lets a gated call run, after its claim."""
        use = await self._registered(use, "permitted")
        approval = self._approvals.get(use.call_id)
        if approval is None and self._is_plan_file(use):
            return Answer("allow")
        if approval is None:
            return await self._judged_again(use) or self._by_policy(use)
        if not await self._decided(approval):
            return await self._hold(use, HELD_ALONE)
        answer = self._by_decision(use)
        return answer if answer.behavior == "deny" else self._refusal(use) or await self._claim(use)

    # -- how it decides

    def _is_plan_file(self, use: ToolUse) -> bool:
        folder = self._judge.folder(self._thread(use))
        return self._judge.is_plan_file(use.name, use.input, folder)

    def _thread(self, use: ToolUse) -> str | None:
        """The thread of the call's message: the CLI's question names the subagent differently."""
        issued = self._issued.get(use.call_id)
        return issued.thread if issued else use.thread

    async def _judged_again(self, use: ToolUse) -> Answer | None:
        """Asks a human about a call that was allowed without one and now needs one."""
        if self._refusal(use) and use.call_id not in self._approvals:
            await self._on_changed(self._issued[use.call_id])
        return self._refusal(use)

    def _refusal(self, use: ToolUse) -> Answer | None:
        """A denial if the call would now do something else than was judged, else None. Its result closes the approval."""
        folder, approval = self._judge.folder(self._thread(use)), self._approvals.get(use.call_id)
        if approval is not None:
            # Calls in any other state have been answered.
            judged = approval.state in (ApprovalState.PENDING, ApprovalState.ALLOWED)
            why = self._judge.differs(self._session, approval, use, folder) if judged else None
        else:
            issued, before = self._issued[use.call_id], self._verdicts[use.call_id]
            why = self._judge.stricter(self._session, issued, use, folder, before)
        if why is None:
            return None
        log.info("call changed before it ran", session=self._session.id, call=use.call_id, why=why)
        return Answer("deny", CHANGED.format(why=why))

    async def _registered(self, use: ToolUse, step: Step) -> ToolUse:
        """The call under our id, after its message is committed; an unfinished message is committed as it is."""
        deadline = time.monotonic() + REGISTER_TIMEOUT_S
        while True:
            issued = self._calls.find(use, step)
            if issued is not None and self.knows(issued.use.call_id):
                setattr(issued, step, True)
                return replace(use, call_id=issued.use.call_id)
            if issued is not None and issued.use.call_id in self._postponed:
                self._postponed.remove(issued.use.call_id)
                await self._on_overdue(replace(issued.use, input=use.input, moment=use.moment))
                continue
            if issued is not None and use.thread is not None:
                # A subagent's answers are not streamed: no end of message will come.
                await self._on_overdue(None)
                continue
            if not await self._change_before(deadline) and not self._is_behind():
                again = self._calls.repeated(use)
                if again is not None and self.knows(again.use.call_id):
                    return replace(use, call_id=again.use.call_id)
                if issued is None:
                    self._judge.see(use, use.thread)
                await self._on_overdue(use if issued is None else None)
            if time.monotonic() >= deadline:
                deadline = time.monotonic() + REGISTER_TIMEOUT_S

    def _is_ambiguous(self, use: ToolUse) -> bool:
        issued = self._calls.get(use.call_id)
        return issued is not None and issued.ambiguous

    async def _decided(self, approval: Approval) -> bool:
        """Waits for the batch. True once no call of it is pending; False at the end of the hot window."""
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
        if wrong := self._flaws.get(use.call_id):
            return Answer("deny", f"This call cannot run: {wrong}.")
        if self._is_ambiguous(use):
            return Answer("deny", f"Not run: {AMBIGUOUS}.")
        if verdict.source == TWIN:
            return Answer("deny", f"Not run: {TWIN}.")
        if verdict.verdict is Verdict.allow:
            return Answer("allow")
        return Answer("deny", f"Not permitted by this session's policy ({verdict.source}).")

    def _by_decision(self, use: ToolUse) -> Answer:
        approval = self._approvals[use.call_id]
        match approval.state:
            case ApprovalState.ALLOWED if not self._interrupted:
                return Answer("ask")
            case ApprovalState.DENIED | ApprovalState.EXPIRED:
                return Answer("deny", denial(approval))
            case (
                ApprovalState.CLAIMED | ApprovalState.SUCCEEDED | ApprovalState.FAILED | ApprovalState.UNKNOWN
            ):
                return Answer("deny", OUTCOME_UNKNOWN)
            case _:
                return Answer("deny", "Not run: the user interrupted before it was decided.")

    async def _hold(self, use: ToolUse, message: str) -> Answer:
        await self._store.hold(self._session.id, self._epoch, use.call_id)
        issued = self._calls.get(use.call_id)
        if issued is not None:
            issued.held = use.call_id in self._approvals
        return Answer("deny", message)

    async def _claim(self, use: ToolUse) -> Answer:
        approval = self._approvals[use.call_id]
        run_input = approval.run_input or {}
        await fault_points.reach("run.before")
        try:
            claimed = await self._store.claim(
                self._session.id,
                self._epoch,
                use.call_id,
                approval.digest_of(run_input),
                claim_id=str(uuid.uuid4()),
            )
        except Forbidden as error:
            log.info(
                "call not permitted as it runs", session=self._session.id, call=use.call_id, why=str(error)
            )
            return Answer("deny", CHANGED.format(why=error))
        except NotWaiting as error:
            log.warning("claim refused", session=self._session.id, call=use.call_id, why=str(error))
            return Answer("deny", OUTCOME_UNKNOWN)
        self._approvals[use.call_id] = claimed
        await fault_points.reach("run.after")
        folder = self._judge.folder(self._thread(use))
        return Answer("allow", run_input=from_folder(use.name, run_input, folder))

    @property
    def _epoch(self) -> int:
        return self._session.epoch
