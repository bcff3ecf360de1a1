"""A flow: a window on a session in the panel's timeline. It has no state of its own and may end at any time."""

import asyncio
import contextlib
import functools
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import structlog
from kodosumi import response
from kodosumi.const import EVENT_LEASE, EVENT_LOCK
from kodosumi.core import Tracer
from kodosumi.helper import now, serialize

from claude_hitl_template.domain.models import Approval, ApprovalState, Event, Session
from claude_hitl_template.errors import NotFound, Unavailable
from claude_hitl_template.panel import timeline
from claude_hitl_template.panel.services import Locks, WindowServices
from claude_hitl_template.panel.uploads import collect
from claude_hitl_template.panel.users import HEADER
from claude_hitl_template.presentation.sessions import state_of

log = structlog.get_logger()
DECIDE_LOCK, MESSAGE_LOCK = "decide", "say"  # names that Kodosumi knows the locks by
WAIT_EVENTS_S = 20.0  # the longest single wait for new events
RETRY_S = 1.0  # after the store was unreachable
MAX_PENDING = 100
MAX_CHANGED = 1000  # files of a turn that are considered for download
CHUNK_BYTES = 1 << 20  # the most that the panel accepts at once; Kodosumi's own default is more
CLOCK_SKEW_S = 0.02  # how far a file's time may lag behind the clock


async def mirror(inputs: Mapping[str, Any], tracer: Tracer, services: WindowServices, locks: Locks) -> Any:
    """Shows the events of a session as they are committed.

    Args:
        inputs: `session`, `after` (the number of the event to begin after), `entries` (the path of our entries in the
            panel), `files` (names that were uploaded). The panel shows them without escaping, so they contain no text
            from others.
        tracer: Kodosumi's tracer of this flow.
        services: What a flow may use.
        locks: The locks of this flow.

    Returns:
        The final page. The flow never ends with an error.
    """
    window = _Window(inputs, tracer, services, locks)
    try:
        page = await window.run()
    except Exception as error:  # Kodosumi would show the traceback as HTML; it goes to the log instead
        log.exception("a window of the panel failed", session=inputs["session"])
        page = window.last_page(
            f"This window failed ({type(error).__name__}). The session is not affected.", None
        )
    finally:
        window.close()
    return response.HTML(page)


@dataclass
class _Lock:
    """A form that waits for an answer. `calls`: the approvals to decide; () for the next message."""

    id: str
    name: str
    calls: tuple[str, ...]


class _Window:
    def __init__(
        self, inputs: Mapping[str, Any], tracer: Tracer, services: WindowServices, locks: Locks
    ) -> None:
        self._id, self._after = str(inputs["session"]), int(inputs["after"])
        self._entries, self._uploaded = str(inputs["entries"]), tuple(inputs.get("files") or ())
        self._tracer, self._services, self._locks = tracer, services, locks
        self._store = services.store
        self._opened_at = time.time()
        self._lock: _Lock | None = None
        self._lock_tasks: list[asyncio.Task[None]] = []
        self._usage: Mapping[str, Any] | None = None
        self._turn_since: float | None = None

    async def run(self) -> str:
        try:
            session = await self._store.get_session(self._id)
            image = session.environment.image
            facts = await self._services.image_facts(image) if image else None
            await self._tracer.html(timeline.header(session, self._uploaded, facts))
            return await self._follow()
        except NotFound:
            return self.last_page("This conversation was deleted.", None)

    async def _follow(self) -> str:
        quiet_since, silent = time.monotonic(), False
        while True:
            left = self._services.wait_s - (time.monotonic() - quiet_since)
            try:
                found, _, _ = await self._store.wait_events(
                    self._id, None, self._after, timeout_s=min(max(left, 0), WAIT_EVENTS_S)
                )
                session = await self._store.get_session(self._id)
                silent = False
            except Unavailable:
                if not silent:
                    await self._tracer.html(
                        timeline.note("The service does not answer; this window waits for it.")
                    )
                silent = True
                await asyncio.sleep(RETRY_S)
                continue
            for event in found:
                await self._show(event)
            if not await self._is_caught_up(session):
                continue
            if state_of(session) == "ended":
                await self._close_lock()
                return self.last_page("The conversation has ended.", session)
            if found or session.status != "idle":
                quiet_since = time.monotonic()
            elif time.monotonic() - quiet_since >= self._services.wait_s:
                await self._close_lock()
                return self.last_page("Parked: nothing happened for a while. Nothing is lost.", session)

    async def _is_caught_up(self, session: Session) -> bool:
        """Whether every event is shown. If so, opens the form that the session waits for."""
        if self._after < session.next_seq - 1:
            return False
        await self._update_lock(session)
        return True

    def last_page(self, said: str, session: Session | None) -> str:
        pairs = [("session", self._id)]
        links: list[tuple[str, str]] = []
        if session is not None:
            usage = session.usage
            pairs += [
                ("state", state_of(session)),
                ("tokens", f"{usage.input_tokens:,} in, {usage.output_tokens:,} out"),
                ("cost", timeline.FREE if self._services.free else f"${usage.cost_usd:.4f}"),
            ]
        if session is None or state_of(session) != "ended":
            links = [
                (f"{self._entries}/continue", "Continue a conversation"),
                (f"{self._entries}/approvals", "Approvals"),
            ]
        return timeline.final(said, pairs, links)

    # -- events

    async def _show(self, event: Event) -> None:
        self._after = event.seq
        self._note_turn(event)
        if event.type == "session.usage":
            shown = timeline.turn_end(event.payload["usage"], self._usage, free=self._services.free)
            self._usage = event.payload["usage"]
        else:
            shown = timeline.event_html(event.wire())
        if shown:
            await self._tracer.html(shown)
        if event.type == "session.status_idle" and event.payload["stop_reason"]["type"] != "requires_action":
            await self._offer_files(event)
            self._turn_since = None

    def _note_turn(self, event: Event) -> None:
        if event.type == "session.status_running" and self._turn_since is None:
            self._turn_since = event.created_at.timestamp() - CLOCK_SKEW_S

    async def _offer_files(self, event: Event) -> None:
        """Offers the files that the turn changed, if it ended while this window was open."""
        if self._turn_since is None or event.created_at.timestamp() < self._opened_at:
            return
        with tempfile.TemporaryDirectory(prefix="hitl-out-") as folder:
            changed = await self._store.list_workspace(
                self._id, None, limit=MAX_CHANGED, changed_since_ns=int(self._turn_since * 1e9)
            )
            limit = self._services.max_upload_bytes
            own_blobs = functools.partial(self._store.get_blobs, session_id=self._id)
            produced = await collect(changed.data, own_blobs, Path(folder), limit)
            if produced.files and not await self._upload(folder):
                await self._tracer.html(timeline.note("The files of this turn could not be offered here."))
                return
        if produced.files or produced.left_out:
            await self._tracer.html(timeline.downloads(self._tracer.fid, produced.files, produced.left_out))

    async def _upload(self, folder: str) -> bool:
        async with await self._tracer.fs() as files:
            files.chunk_size = CHUNK_BYTES
            # It sends its login as a cookie only, which the panel accepts from its own pages only.
            files._client.headers[HEADER] = files.jwt  # pyright: ignore[reportPrivateUsage]
            try:
                return bool(await files.upload(folder))
            except (httpx.HTTPError, AssertionError, KeyError):
                log.warning("files were not offered", session=self._id, exc_info=True)
                return False

    # -- locks

    async def _update_lock(self, session: Session) -> None:
        """Opens the one form that the session waits for: decisions, the next message, or none."""
        waiting = await self._pending() if session.status == "idle" else []
        calls = tuple(a.id for a in waiting)
        if calls:
            if self._lock is None or not set(calls) <= set(self._lock.calls):
                await self._close_lock()
                await self._open_lock(DECIDE_LOCK, waiting)
        elif session.status == "idle" and state_of(session) != "ended":
            if self._lock is None or self._lock.name != MESSAGE_LOCK:
                await self._close_lock()
                await self._open_lock(MESSAGE_LOCK)
        else:
            await self._close_lock()

    async def _pending(self) -> list[Approval]:
        page = await self._store.list_approvals(
            None, limit=MAX_PENDING, states=[ApprovalState.PENDING], session_id=self._id
        )
        return page.data

    async def _open_lock(self, name: str, waiting: Sequence[Approval] = ()) -> None:
        lock = _Lock(str(uuid.uuid4()), name, tuple(a.id for a in waiting))
        data = {"session": self._id, "calls": list(lock.calls), "entries": self._entries}
        self._lock = lock
        self._lock_tasks.append(asyncio.create_task(self._keep_answerable(lock, data)))
        expires = time.time() + self._services.wait_s
        known = {"name": name, "lid": lock.id, "data": data, "expires": expires}
        await self._send_event(EVENT_LOCK, known)
        path = f"/inputs/lock/{self._tracer.fid}/{lock.id}"
        await self._tracer.html(
            timeline.decide_link(waiting, lock.id, path, self._services.pages_url)
            if waiting
            else timeline.message_link(lock.id, path)
        )

    async def _keep_answerable(self, lock: _Lock, data: Mapping[str, Any]) -> None:
        """Keeps a lock answerable as long as the flow lives, even after the decision.

        To a form that is sent late or twice the store then replies who decided what; Kodosumi would only reply that the
        lock does not exist.
        """
        while True:
            with contextlib.suppress(TimeoutError):
                await self._locks.wait(lock.name, lock.id, data, self._services.wait_s)

    async def _close_lock(self) -> None:
        lock, self._lock = self._lock, None
        if lock is not None:
            await self._send_event(EVENT_LEASE, {"name": lock.name, "lid": lock.id, "result": {}})
            await self._tracer.html(timeline.closed(lock.id))

    async def _send_event(self, kind: str, facts: Mapping[str, Any]) -> None:
        """Sends an event of a lock. Kodosumi's tracer only does so for locks of its own, whose ids it does not reveal."""
        await self._tracer.queue.put_async({"timestamp": now(), "kind": kind, "payload": serialize(facts)})

    def close(self) -> None:
        for task in self._lock_tasks:
            task.cancel()
