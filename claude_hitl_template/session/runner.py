"""Drives one session: a state machine over a Store and an Engine, independent of Ray.

The runner reads the session's state from the store, gives the engine its work and commits the engine's events. When no
work is left it releases the lease and returns: the session is parked.
"""

import asyncio
import contextlib
import uuid
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import structlog

from claude_hitl_template import fault_points
from claude_hitl_template.domain import events
from claude_hitl_template.domain.events import Draft
from claude_hitl_template.domain.models import (
    Approval,
    ApprovalState,
    PermissionMode,
    Session,
    Snapshot,
    utcnow,
)
from claude_hitl_template.domain.policy.floor import BUILT_IN, Floor
from claude_hitl_template.errors import EngineError, HitlError, StaleOwner, TooManyAsks
from claude_hitl_template.session.autosave import Autosave
from claude_hitl_template.session.engine import (
    Conversation,
    Engine,
    EngineEvent,
    Preview,
    RequestEnd,
    RequestStart,
    Retrying,
    ServerDown,
    Text,
    Thinking,
    ToolResult,
    ToolUse,
    TurnEnd,
)
from claude_hitl_template.session.gate import Gate
from claude_hitl_template.session.lost_calls import deferral, is_deferred, unanswered
from claude_hitl_template.session.previews import PreviewSender
from claude_hitl_template.session.tasks import cancel
from claude_hitl_template.session.turn import Turn, message_uuid, request_end, request_start, result_draft
from claude_hitl_template.store.protocol import Owners, TranscriptKey, TurnEnding
from claude_hitl_template.workspace.sync import Workspace, WorkspaceLocation

log = structlog.get_logger()

RENEW_S = 4.0  # timeout of one wait for changes; each wait renews the lease, so it must be well under LEASE_S
REPLAY_TIMEOUT_S = 20.0  # a resumed CLI asks for its deferred call within half a second, or not at all
INTERRUPT_S = 30.0  # a CLI ends an interrupted turn within a second, unless a running tool delays it
HEARD_AT_ONCE = 10_000  # events not processed yet; the CLI's output is not read beyond this
UNAVAILABLE_PAUSE_S = 0.5
SAVE_AGAIN_S = 30.0  # pause between attempts to save, if only the unsaved workspace keeps the owner
PLAN_MODES: dict[str, PermissionMode] = {"EnterPlanMode": "plan", "ExitPlanMode": "default"}


@dataclass(frozen=True)
class Limits:
    """Times in seconds."""

    hot_window_s: float = 60.0
    idle_timeout_s: float = 600.0
    approval_ttl_s: float | None = None


type EngineFactory = Callable[[Session, Gate], Engine]
type _Heard = asyncio.Queue[EngineEvent | EngineError]


class SessionRunner:
    """Drives one session under one lease. `run` returns when the session is parked.

    Raises StaleOwner if the lease was taken over, and EngineError if the engine died; the supervisor then decides
    how to continue.
    """

    def __init__(
        self,
        store: Owners,
        session: Session,
        *,
        make_engine: EngineFactory,
        workspace: WorkspaceLocation,
        is_plan_folder: Callable[[Path], bool] = lambda _folder: False,
        limits: Limits = Limits(),
        floor: Floor = BUILT_IN,
    ) -> None:
        self._store, self._id, self._epoch = store, session.id, session.epoch
        self._make_engine, self._limits, self._floor = make_engine, limits, floor
        self._workspace = Workspace(workspace, store, session)
        self._autosave = Autosave(self._workspace, session.id, self._in_background, self._note_unsaved)
        self._is_plan_folder = is_plan_folder
        self._snapshot: Snapshot | None = None
        self._behind = timedelta()  # how far this host's clock is behind the ledger's
        self._woken = asyncio.Event()
        self._engine: Engine | None = None
        self._heard = _queue()
        self._works = False  # whether an event is being processed
        self._releasing = False
        self._stopped: EngineError | None = None
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._hearing: asyncio.Task[None] | None = None
        self._turn = Turn()
        self._registering = asyncio.Lock()
        self._previews = PreviewSender(store, session.id, session.epoch, self._in_background)
        self._gate = self._new_gate(session)

    async def run(self) -> None:
        self._snapshot = await self._store.snapshot(self._id, self._epoch)
        self._behind = self._snapshot.at - utcnow()
        watching = asyncio.create_task(self._watch())
        driving = asyncio.create_task(self._drive())
        try:
            await asyncio.wait({watching, driving, self._failed}, return_when=asyncio.FIRST_COMPLETED)
            for task in (driving, watching, self._failed):
                if task.done():
                    task.result()
        finally:
            for task in (driving, watching):
                await cancel(task)
            await self._autosave.stop()
            await self._stop_engine()

    def make_room(self) -> None:
        """Parks as soon as nothing runs, without hot window or idle time: other sessions need the capacity."""
        self._limits = replace(self._limits, hot_window_s=0.0, idle_timeout_s=0.0)
        self._gate.end_hot_window()
        self._woken.set()

    @property
    def workspace_ready(self) -> asyncio.Event:
        """Set once the session's folder has what was saved of it: what changes from then on is the session's work."""
        return self._workspace.ready

    def stop_for(self, reason: str) -> None:
        """Breaks the turn off with this reason and loses none of its events. The process must not be used again."""
        self.make_room()
        self._stopped = EngineError(reason, retryable=False)
        self._hear_of(self._stopped)

    # -- what the store says

    async def _watch(self) -> None:
        """Renews the lease and receives changes from outside: messages, decisions, interrupts, expiry."""
        while True:
            try:
                found = await self._store.wait_session(
                    self._id, self._epoch, self._now.session.revision, timeout_s=RENEW_S
                )
            except StaleOwner:
                if self._releasing:  # we released it ourselves: the result of `release` counts
                    await asyncio.Event().wait()
                raise
            except HitlError as error:  # the ledger restarts: the lease decides, not one failed call
                log.warning("store not reached", session=self._id, why=str(error))
                await asyncio.sleep(UNAVAILABLE_PAUSE_S)
                continue
            await self._look_at(found)

    async def _refresh(self) -> None:
        await self._look_at(await self._store.snapshot(self._id, self._epoch))

    async def _look_at(self, found: Snapshot) -> None:
        seen, now = found.session, self._now.session
        if seen.revision < now.revision or seen.next_seq < now.next_seq:
            return  # a concurrent read returned a newer state
        changed = seen.revision != now.revision
        self._snapshot, self._behind = found, found.at - utcnow()
        approvals = await self._with_closed(found.approvals)
        self._gate.update(found.session, approvals, found.policy, found.policy_version)
        if changed:
            self._woken.set()

    async def _with_closed(self, open_approvals: Sequence[Approval]) -> list[Approval]:
        """The open approvals, and those that have been closed since the last update."""
        still = {a.id for a in open_approvals}
        gone = [a.call_id for a in self._gate.waiting() if a.id not in still]
        found = [await self._store.find_approval(self._id, self._epoch, call_id) for call_id in gone]
        return [*open_approvals, *[a for a in found if a]]

    @property
    def _now(self) -> Snapshot:
        if self._snapshot is None:
            raise AssertionError("run() takes a snapshot first")
        return self._snapshot

    # -- what to do next

    async def _drive(self) -> None:
        while True:
            self._woken.clear()
            session = self._now.session
            if session.status == "running":
                await self._take_turn()
            elif await self._wait_idle(session):
                if await self._release():
                    return
                await self._refresh()

    async def _wait_idle(self, session: Session) -> bool:
        """Waits for a change. True if none came and the session is to be parked; one that waits for a human has had its hot
        window already."""
        waits = (session.stop_reason or {}).get("type") == "requires_action" or session.status == "terminated"
        patience = 0.0 if waits or self._engine is None else self._limits.idle_timeout_s
        if self._workspace.must_stay:
            patience = max(patience, SAVE_AGAIN_S)
        try:
            await asyncio.wait_for(self._woken.wait(), patience)
        except TimeoutError:
            return True
        return False

    async def _release(self) -> bool:
        """Parks the session. False if new work arrived or unsaved work would be lost: the owner continues."""
        await self._stop_engine()
        await self._save()
        await self._flush()
        if self._workspace.must_stay:
            return False
        await fault_points.reach("park.before")
        self._releasing = True
        self._releasing = parked = await self._store.release(self._id, self._epoch)
        await fault_points.reach("park.after")
        return parked

    async def _take_turn(self) -> None:
        session = self._now.session
        if session.interrupted:
            # A transcript that still has a parked call: a resumed CLI asks for it again, and the gate must deny it.
            await self._end_turn(TurnEnd(interrupted=True), how="dropped" if self._engine is None else "over")
            return
        try:
            await self._begin_turn()
            await self._hear_turn()
        except EngineError as why:
            error = self._stopped or why  # its processes were ended for it, in the middle of a start as well
            await self._stop_engine()
            if error.retryable:
                await self._save()
                raise
            await self._end_turn(TurnEnd(error=(error.kind, str(error))), how="broken off")

    async def _begin_turn(self) -> None:
        """Starts the turn: replay a deferred call, continue, remind, or send the next queued message."""
        self._gate.new_turn()
        self._turn, self._stopped = Turn(), None
        fresh = self._engine is None
        self._note_unsaved(await self._workspace.restore(self._now.session, self._show_progress))
        resumed = await self._start_engine() if fresh else False
        now, session = self._now, self._now.session
        engine = self._running_engine()
        decided = [a for a in now.approvals if a.held and a.state is ApprovalState.ALLOWED and not a.reminded]
        if fresh and resumed and session.deferred:
            return  # the CLI asks for the deferred call by itself
        if now.turn_event is not None:
            await self._go_on_with(engine, resumed, now.turn_event.id, now.turn_event.payload["content"])
        elif decided or now.unreported_refusals:
            await self._store.remind(
                self._id, self._epoch, [a.id for a in (*decided, *now.unreported_refusals)]
            )
            await engine.say(
                str(uuid.uuid4()), events.text_blocks(events.reminder(decided, now.unreported_refusals))
            )
        elif now.queued:
            event = now.queued[0]
            beginning = self._store.begin_turn(self._id, self._epoch, event.id)
            if fresh:  # an owner that died between the two steps may have sent it
                await beginning
                await self._go_on_with(engine, resumed, event.id, event.payload["content"])
            else:
                await asyncio.gather(beginning, engine.say(message_uuid(event.id), event.payload["content"]))
        else:
            self._hear_of(TurnEnd())

    async def _go_on_with(
        self, engine: Engine, resumed: bool, event_id: str, content: list[dict[str, Any]]
    ) -> None:
        """Resumes the turn of a dead owner: sends its message again unless the transcript has it, else continues."""
        entries = (
            await self._store.load_transcript(self._transcript_key(), epoch=self._epoch) if resumed else None
        )
        if any(e.get("uuid") == message_uuid(event_id) for e in entries or ()):
            await engine.say(str(uuid.uuid4()), events.text_blocks(events.CONTINUE))
        else:
            await engine.say(message_uuid(event_id), content)

    # -- the engine

    def _new_gate(self, session: Session) -> Gate:
        return Gate(
            self._store,
            session,
            workspace=self._workspace.folder,
            is_plan_folder=self._is_plan_folder,
            hot_window_s=self._limits.hot_window_s,
            on_overdue=self._register_overdue,
            on_changed=self._register_again,
            is_behind=self._is_behind,
            expiry=self._expiry,
            floor=self._floor,
        )

    async def _start_engine(self) -> bool:
        """Starts the engine. Returns whether it resumed a transcript."""
        transcript = await self._store.load_transcript(self._transcript_key(), epoch=self._epoch)
        resume = transcript is not None
        if resume or self._now.session.turn is not None:
            await self._take_up_calls(transcript or [])
        session = self._now.session
        self._gate = self._new_gate(session)
        now = self._now
        self._gate.update(session, now.approvals, now.policy, now.policy_version)
        if session.deferred is not None:
            deferred = await self._store.find_approval(self._id, self._epoch, session.deferred)
            self._gate.register([deferred] if deferred else [])
        engine = self._make_engine(session, self._gate)
        self._engine = engine
        step = "resume" if resume else "spawn"
        await fault_points.reach(f"{step}.before")
        await engine.start(resume=resume, plan_mode=session.agent.permission_mode == "plan")
        await fault_points.reach(f"{step}.after")
        if self._stopped is not None:
            raise self._stopped
        self._heard = _queue()
        self._hearing = self._in_background(self._hear(engine, self._heard))
        return resume

    async def _take_up_calls(self, transcript: Sequence[Mapping[str, Any]]) -> None:
        """Restores the calls that waited when the last owner ended.

        The CLI asks again for the call that it was parked with, or for the first one that a dead owner left waiting. The
        others become held calls: the model is reminded of each once it is decided.
        """
        deferred, waiting = self._now.session.deferred, unanswered(transcript)
        lost = await self._store.lost_calls(self._id, self._epoch)
        parked = await self._store.find_approval(self._id, self._epoch, deferred) if deferred else None
        candidates = [a for a in (parked, *lost) if a is not None and a.model_id in waiting]
        first = min(candidates, key=lambda a: (a is not parked, waiting.index(a.model_id)), default=None)
        again = first.call_id if first else None
        others = [a.call_id for a in lost if a.call_id != again]
        for call_id in others:
            await self._store.hold(self._id, self._epoch, call_id)
        if first is not None:
            await self._see_to_deferral(transcript, first.model_id)
        if again != deferred:
            await self._store.defer(self._id, self._epoch, again)
        if others or again != deferred:
            await self._refresh()

    async def _see_to_deferral(self, transcript: Sequence[Mapping[str, Any]], model_id: str) -> None:
        """Adds the CLI's record of a deferral if the last owner died before the store had it."""
        if not is_deferred(transcript, model_id):
            entry = deferral(transcript, model_id, utcnow())
            await self._store.append_transcript(self._transcript_key(), [entry], epoch=self._epoch)

    async def _hear(self, engine: Engine, heard: "_Heard") -> None:
        try:
            async for event in engine.events():
                await heard.put(event)
        except EngineError as error:
            await heard.put(error)
        except Exception as error:  # a message of an unexpected shape: the turn ends with this reason
            log.exception("message not read", session=self._id)
            why = f"a message of the Claude Code CLI could not be read ({type(error).__name__}: {error})"
            await heard.put(EngineError(why, retryable=False))

    def _hear_of(self, event: "EngineEvent | EngineError") -> None:
        """Queues an event as if the engine had just sent it."""
        if self._heard.full():  # no turn reads the queue; its oldest event is obsolete
            self._heard.get_nowait()
        self._heard.put_nowait(event)

    def _in_background(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """A task whose failure ends `run`, with its error."""
        task = asyncio.create_task(work)
        task.add_done_callback(self._report)
        return task

    def _report(self, task: "asyncio.Task[None]") -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None and not self._failed.done():
            self._failed.set_exception(error)

    async def _stop_engine(self) -> None:
        engine, self._engine = self._engine, None
        hearing, self._hearing = self._hearing, None
        await cancel(hearing)
        await self._previews.stop()
        if engine is not None:
            await engine.stop()

    def _running_engine(self) -> Engine:
        if self._engine is None:
            raise EngineError("the engine is not running")
        return self._engine

    def _transcript_key(self) -> TranscriptKey:
        transcript_id = self._now.session.transcript_id
        return {"scope": self._id, "project_key": "-", "session_id": transcript_id, "subpath": ""}

    # -- one turn

    async def _hear_turn(self) -> None:
        replaying = self._now.session.deferred is not None
        interrupting = self._in_background(self._forward_interrupt())
        try:
            while True:
                event = await self._next(REPLAY_TIMEOUT_S if replaying else None)
                replaying = False
                if isinstance(event, TurnEnd):
                    if self._turn.stuck:
                        await self._stop_engine()
                    await self._end_turn(event)
                    return
                await self._working_on(self._note(event))
        finally:
            await cancel(interrupting)

    async def _next(self, timeout_s: float | None) -> EngineEvent:
        if self._turn.drafts:
            with contextlib.suppress(TimeoutError):
                event = await asyncio.wait_for(self._heard.get(), self._turn.until_flush_s())
                if isinstance(event, Exception):
                    raise event
                return event
            await self._working_on(self._flush())
        try:
            event = await asyncio.wait_for(self._heard.get(), timeout_s)
        except TimeoutError:
            await self._running_engine().say(str(uuid.uuid4()), events.text_blocks(events.CONTINUE))
            event = await self._heard.get()
        if isinstance(event, Exception):
            raise event
        return event

    async def _forward_interrupt(self) -> None:
        while not self._now.session.interrupted:
            await self._woken.wait()
            self._woken.clear()
        self._turn.interrupted = True
        try:
            await self._running_engine().interrupt()
            await asyncio.sleep(INTERRUPT_S)  # the turn's end cancels this
            why = f"its turn did not end within {INTERRUPT_S:g} s"
        except EngineError as error:
            why = str(error)
        log.warning("interrupt not taken: the process is ended", session=self._id, why=why)
        self._turn.stuck = True
        self._hear_of(TurnEnd(interrupted=True))

    async def _note(self, event: EngineEvent) -> None:
        turn = self._turn
        match event:
            case RequestStart():
                await (
                    self._register_batch()
                )  # the CLI also runs the complete calls of an answer that was cut off
                turn.drafts.append(request_start(event.message_id))
            case RequestEnd():
                await self._register_batch()
                turn.drafts.append(request_end(event))
            case Preview():
                self._previews.add(event)
            case Text():
                self._previews.hurry()
                thread = self._gate.thread(event.thread)
                turn.drafts.append(events.agent_message(event.event_id, event.text, thread))
            case Thinking():
                turn.drafts.append(events.agent_thinking(event.event_id, self._gate.thread(event.thread)))
            case ToolUse():
                await self._note_use(event)
            case ToolResult():
                result = self._gate.ended(event)
                if result is not None:
                    await self._note_result(result)
            case Retrying():
                turn.drafts.append(events.session_error(event.message, event.kind, "retrying"))
            case ServerDown():
                url = str(self._now.session.agent.mcp_servers.get(event.name, {}).get("url"))
                turn.drafts.append(events.server_down(event.name, url, event.why))
            case Conversation():
                await self._store.commit(self._id, self._epoch, [], conversation=event.transcript_id)
                await self._refresh()
            case TurnEnd():
                raise AssertionError("the caller handles the turn's end")

    async def _working_on(self, work: Awaitable[None]) -> None:
        self._works = True
        try:
            await work
        finally:
            self._works = False

    def _is_behind(self) -> bool:
        return self._works or not self._heard.empty()

    async def _note_use(self, use: ToolUse, *, unheard: bool = False) -> None:
        issued = self._gate.issue(use, unheard=unheard)
        if issued is None:
            return
        use = self._gate.received(issued)
        self._turn.names[use.call_id] = use.name
        self._turn.batch.append(use)

    async def _note_result(self, result: ToolResult) -> None:
        early = [use for use in self._turn.batch if use.call_id == result.call_id]
        if early:
            self._turn.early_results.append(result)
            if early[0].thread is not None:
                await self._register_batch()
            return
        name = self._tool_name(result.call_id)
        self._tell_postponed(result.call_id)
        cut_short = self._turn.interrupted and result.is_error and self._gate.began(result.call_id)
        self._turn.drafts.append(self._result(result, cut_short=cut_short))
        self._turn.hurry()
        self._autosave.save_soon()
        if not result.is_error and name in PLAN_MODES:
            self._gate.enter(PLAN_MODES[name])
            await self._flush(PLAN_MODES[name])

    async def _register_batch(self) -> None:
        """Commits the calls received so far with the events before them, and lets the gate answer for them."""
        async with self._registering:
            turn = self._turn
            batch, turn.batch = turn.batch, []
            for use in batch[1:]:
                if use.name == "ExitPlanMode":  # the calls before it may write the plan
                    turn.postponed[use.call_id] = use
                    self._gate.postpone(use.call_id)
            batch = [use for use in batch if use.call_id not in turn.postponed]
            if not batch:
                return
            refused = {r.call_id for r in turn.early_results}  # nothing has run: the gate has not answered
            await self._open(batch, refused)
            early, turn.early_results = turn.early_results, []
            turn.drafts += map(self._result, early)

    def _result(self, result: ToolResult, *, cut_short: bool = False) -> Draft:
        mcp = self._tool_name(result.call_id).startswith("mcp__")
        return result_draft(self._gate.event_id(result.call_id), result, mcp=mcp, cut_short=cut_short)

    async def _open(self, batch: Sequence[ToolUse], refused: Collection[str] = ()) -> None:
        calls = [self._gate.classify(use, refused=use.call_id in refused) for use in batch]
        before = self._turn.take_drafts()
        drafts = [*before]
        drafts += [events.tool_use(c.call_id, c.tool_name, c.input, c.verdict, c.agent_id) for c in calls]
        try:
            opened = await self._store.open_calls(
                self._id,
                self._epoch,
                drafts,
                calls,
                cwd=str(self._workspace.folder),
                expires_at=self._expiry(),
            )
        except TooManyAsks as error:
            # The CLI still waits for an answer about these calls, and is stopped without one.
            self._turn.drafts = [*before, *self._turn.drafts]
            self._hear_of(EngineError(str(error), retryable=False))
            return
        self._gate.register(opened, calls)

    async def _register_again(self, use: ToolUse) -> None:
        """Opens an approval for a call that the log shows as allowed. Its event stays the same."""
        async with self._registering:
            await self._open([use])

    def _tell_postponed(self, call_id: str) -> None:
        """Logs a postponed call together with its result: the CLI never asked for it, so there is no approval."""
        use = self._turn.postponed.pop(call_id, None)
        if use is not None:
            thread = self._gate.thread(use.thread)
            self._turn.drafts.append(events.tool_use(use.call_id, use.name, use.input, "ask", thread))

    def _tool_name(self, call_id: str) -> str:
        """The tool of a call. A call of an earlier turn is known to the gate by its approval."""
        return self._turn.names.get(call_id) or self._gate.tool_name(call_id)

    async def _register_overdue(self, use: ToolUse | None) -> None:
        """Registers a call that the CLI asks about before its message has ended or was seen, or that was postponed."""
        if use is not None and self._turn.postponed.pop(use.call_id, None) is not None:
            async with self._registering:
                await self._open([self._gate.received(use)])
            return
        if use is not None:
            await self._note_use(use, unheard=True)
        await self._register_batch()

    def _expiry(self) -> datetime | None:
        """Expiry of a new approval by the ledger's clock, which may be another host's."""
        ttl = self._limits.approval_ttl_s
        return None if ttl is None else utcnow() + self._behind + timedelta(seconds=ttl)

    async def _flush(self, permission_mode: PermissionMode | None = None) -> None:
        drafts = self._turn.take_drafts()
        if drafts or permission_mode:
            await fault_points.reach("flush.before")
            await self._store.commit(self._id, self._epoch, drafts, permission_mode=permission_mode)
            await fault_points.reach("flush.after")

    async def _end_turn(self, end: TurnEnd, how: TurnEnding = "over") -> None:
        stop_reason = events.END_TURN
        if end.deferred is not None:
            how = "parked"
            await self._store.defer(self._id, self._epoch, self._gate.deferred)
            await self._stop_engine()
        await self._save()
        for call_id in tuple(self._turn.postponed):
            self._tell_postponed(call_id)
        drafts = self._turn.take_drafts()
        if end.error is not None:
            drafts.append(events.session_error(end.error[1], end.error[0]))
            stop_reason = events.RETRIES_EXHAUSTED
        ended = await self._store.end_turn(
            self._id,
            self._epoch,
            drafts,
            end_id=str(uuid.uuid4()),
            usage=end.usage,
            stop_reason=stop_reason,
            how=how,
        )
        await self._look_at(ended)

    # -- the workspace

    async def _save(self) -> None:
        """Saves what changed. What could not be saved is in the next drafts; the turn goes on."""
        await self._autosave.save(self._show_progress)

    def _note_unsaved(self, problems: Sequence[str]) -> None:
        self._turn.drafts += [events.workspace_unsaved(problem) for problem in problems]

    async def _show_progress(self, doing: str, done_bytes: int, of_bytes: int) -> None:
        self._turn.drafts.append(events.workspace_progress(doing, done_bytes, of_bytes))
        await self._flush()


def _queue() -> _Heard:
    return asyncio.Queue(HEARD_AT_ONCE)
