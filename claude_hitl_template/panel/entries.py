"""The panel's entries (start a conversation, continue one, approve) and the forms of a flow's locks.

Kodosumi's own `ServeAPI.enter` takes one fixed form and returns its values unescaped. So each entry is a pair of routes:
GET answers `{"elements": ...}` as `enter` does, for this user and this moment; POST answers `{"result": flow id}`, which
leads to the flow, or `{"errors": ..., "elements": ...}`, the form to continue with.

Decisions go to the entry *Approvals*, also from the forms of locks: a lock's own address is gone once its flow has ended.
"""

import asyncio
import hashlib
import re
import secrets
import tempfile
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastapi import Request
from kodosumi.const import KODOSUMI_LAUNCH
from kodosumi.core import InputsError, Launch, ServeAPI, forms

from claude_hitl_template.config import network
from claude_hitl_template.domain.models import Approval, ApprovalState, Session, new_id, utcnow
from claude_hitl_template.errors import HitlError, InvalidInput, NotFound
from claude_hitl_template.panel import decide, uploads
from claude_hitl_template.panel.decide import FormErrors, Inputs, said
from claude_hitl_template.panel.flow import DECIDE, SAY
from claude_hitl_template.panel.forms import (
    CallGroup,
    Elements,
    Filled,
    approvals_list,
    decision_form,
    fate,
    message,
    message_form,
    sessions_list,
    start_form,
    state_of,
)
from claude_hitl_template.panel.markup import inert, text
from claude_hitl_template.panel.services import PanelServices
from claude_hitl_template.panel.users import COOKIE, HEADER, PanelUser, entries_path, panel_user
from claude_hitl_template.presentation.text import texts
from claude_hitl_template.workspace.sync import put_files

LISTED = 100
HISTORY = 300  # events that a window on an old conversation begins with
_FLOW_ID = re.compile(r"[0-9a-f]{24}")

type Services = Callable[[], PanelServices]
type Answer = dict[str, Any]
NOT_YOURS = (
    "You may not decide in this conversation: it is another user's. An operator of the panel may, or a role named in "
    "HITL_PANEL_APPROVERS."
)


def register(app: ServeAPI, services: Services) -> None:
    """Adds the entries to `app`. `services` is called when a request comes."""
    for entry in (_Start(services), _Continue(services), _Approvals(services)):
        facts = {"summary": entry.summary, "description": entry.description, "tags": ["claude-hitl"]}
        app.get(entry.path, entry=True, **facts)(_shown(entry))
        app.post(entry.path, include_in_schema=False, **facts)(_filled_in(entry))
    _Locks(services).register(app)


class _Entry:
    path = summary = description = ""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def show(self, request: Request) -> Elements:
        raise NotImplementedError

    async def take(self, request: Request, inputs: Inputs) -> Answer:
        """Raises FormErrors, HitlError; `again` shows them."""
        raise NotImplementedError

    async def again(self, request: Request, inputs: Inputs, errors: Mapping[str, str]) -> Elements:
        raise NotImplementedError

    @property
    def _given(self) -> PanelServices:
        return self._services()


def _shown(entry: _Entry) -> Callable[[Request], Awaitable[Answer]]:
    async def show(request: Request) -> Answer:
        return {"elements": await entry.show(request)}

    return show


def _filled_in(entry: _Entry) -> Callable[[Request], Awaitable[Answer]]:
    async def take(request: Request) -> Answer:
        inputs = await _inputs(request)
        request.state.entry = take  # what Kodosumi notes a flow's tags by
        try:
            return await entry.take(request, inputs)
        except FormErrors as error:
            errors = error.errors
        except InvalidInput as error:
            errors = {error.field: error.message}
        except HitlError as error:
            errors = {"": str(error)}
        return {
            "errors": {name: [text(said)] for name, said in errors.items()},
            "elements": await entry.again(request, inputs, errors),
        }

    return take


async def _inputs(request: Request) -> Inputs:
    try:
        found = await request.json()
    except ValueError:
        found = {}
    return found if isinstance(found, dict) else {}


# -- the entries


class _Start(_Entry):
    path = "/start"
    summary = "Start a conversation"
    description = "Claude works in a folder of its own, and asks before it does what the policy says."

    async def show(self, request: Request) -> Elements:
        return self._form(Filled())

    async def again(self, request: Request, inputs: Inputs, errors: Mapping[str, str]) -> Elements:
        return self._form(Filled(inputs, errors))

    def _form(self, filled: Filled) -> Elements:
        given = self._given
        return start_form(
            given.agent,
            given.environments,
            given.max_upload_bytes,
            _nonce(filled),
            filled,
            sandbox=given.sandbox,
        )

    async def take(self, request: Request, inputs: Inputs) -> Answer:
        user, given = panel_user(request), self._given
        start = decide.start(inputs, given.agent, given.environments)
        with tempfile.TemporaryDirectory(prefix="hitl-in-") as folder:
            names = await _receive(given, request, inputs, Path(folder))
            once = _once(
                inputs,
                "start",
                start.message.model_dump_json(),
                start.agent.model_dump_json(),
                start.environment.id,
                start.title,
            )
            session = await given.store.create_session(
                user.key_id,
                agent=start.agent,
                environment=start.environment,
                title=start.title,
                metadata={},
                initial=[],
                idempotency_key=once,
            )
            if names:
                await _add(given, session.id, Path(folder), f"{once}-files")
        await given.store.send_events(
            session.id, user.key_id, [start.message], decided_by=user.name, idempotency_key=f"{once}-message"
        )
        return _launch(request, given, session, 0, names)


class _Continue(_Entry):
    path = "/continue"
    summary = "Continue a conversation"
    description = "Your conversations, parked ones too: see where each stands, and go on."

    async def show(self, request: Request) -> Elements:
        return await self._list(request, Filled())

    async def _list(self, request: Request, filled: Filled) -> Elements:
        found = await self._given.store.list_sessions(panel_user(request).key_id, limit=LISTED)
        return sessions_list(found.data, utcnow(), filled)

    async def again(self, request: Request, inputs: Inputs, errors: Mapping[str, str]) -> Elements:
        filled = Filled(inputs, errors)
        try:
            session = await self._session(request, inputs)
        except HitlError:
            return await self._list(request, filled)
        if state_of(session) == "ended":
            return await self._list(request, filled)
        return await self._form(session, _back(inputs), filled)

    async def _form(self, session: Session, back: str, filled: Filled) -> Elements:
        hidden = {"nonce": _nonce(filled), "back": back}
        last = await _last_message(self._given, session.id)
        limit = self._given.max_upload_bytes
        return message_form(session, last, hidden, filled=filled, max_bytes=limit, may_watch=True)

    async def take(self, request: Request, inputs: Inputs) -> Answer:
        session = await self._session(request, inputs)
        if said(inputs, "do") in ("send", "end"):
            if said(inputs, "do") == "send":
                await self._upload(request, inputs, session)
            await _say(self._given, panel_user(request), session, inputs)
        elif said(inputs, "do") != "watch":
            if state_of(session) == "ended":
                raise InvalidInput("This conversation has ended.")
            return {"elements": await self._form(session, "", Filled())}
        return await _to_window(request, inputs, self._given, session)

    async def _upload(self, request: Request, inputs: Inputs, session: Session) -> None:
        """Before the message, so that what it is about is there."""
        decide.next_message(inputs)
        with tempfile.TemporaryDirectory(prefix="hitl-in-") as folder:
            if await _receive(self._given, request, inputs, Path(folder)):
                await _add(self._given, session.id, Path(folder), _once(inputs, "files", session.id))

    async def _session(self, request: Request, inputs: Inputs) -> Session:
        wanted = said(inputs, "open") or said(inputs, "session")
        if not wanted:
            raise InvalidInput("Choose a conversation.")
        session = await self._given.store.get_session(wanted)
        if not panel_user(request).may_decide(session.key_id):
            raise NotFound("There is no such conversation of yours.")
        return session


class _Approvals(_Entry):
    path = "/approvals"
    summary = "Approvals"
    description = "Every call that waits for a decision, of all conversations that you may decide in."

    async def show(self, request: Request) -> Elements:
        return await self._list(request, "")

    async def _list(self, request: Request, done: str) -> Elements:
        user = panel_user(request)
        found = await self._given.store.list_approvals(
            None if user.approver else user.key_id, limit=LISTED, states=[ApprovalState.PENDING]
        )
        waiting = await asyncio.gather(*(_call_group(self._given, a.session_id, [a]) for a in found.data))
        return approvals_list(waiting, utcnow(), done, more=found.next_page is not None)

    async def again(self, request: Request, inputs: Inputs, errors: Mapping[str, str]) -> Elements:
        try:
            group = await self._group(request, inputs)
        except HitlError:
            return [*message(errors.get("", "")), *await self._list(request, "")]
        return decision_form(group, utcnow(), {"back": _back(inputs)}, filled=Filled(inputs, errors))

    async def take(self, request: Request, inputs: Inputs) -> Answer:
        group = await self._group(request, inputs)
        if said(inputs, "open"):
            return {"elements": decision_form(group, utcnow(), {"back": ""})}
        await _decide(self._given, panel_user(request), group, inputs)
        if _back(inputs):
            return await _to_window(request, inputs, self._given, group.session)
        decided = [await self._given.store.get_approval(a.id, None) for a in group.approvals]
        done = " ".join(f"{a.tool_name}: {fate(a)}" for a in decided if a.decision is not None)
        return {"elements": await self._list(request, f"Done. {done}")}

    async def _group(self, request: Request, inputs: Inputs) -> CallGroup:
        """The calls of a form; of one that was chosen, all that wait in its conversation."""
        chosen, store = said(inputs, "open"), self._given.store
        wanted = [chosen] if chosen else [name for name in said(inputs, "calls").split(",") if name]
        if not wanted:
            raise InvalidInput("Choose a call.")
        approvals = [await store.get_approval(name, None) for name in wanted[:LISTED]]
        if not panel_user(request).may_decide(approvals[0].key_id):
            raise InvalidInput(NOT_YOURS)
        session_id = approvals[0].session_id
        if any(approval.session_id != session_id for approval in approvals):
            raise InvalidInput("These calls are of several conversations.")
        if chosen and approvals[0].state is ApprovalState.PENDING:
            approvals = (
                await store.list_approvals(
                    None, limit=LISTED, states=[ApprovalState.PENDING], session_id=session_id
                )
            ).data or approvals
        return await _call_group(self._given, session_id, approvals)


class _Locks:
    """The forms of a flow's locks. Their buttons lead to the entries; answered at the lock's own address (by a
    program, over Kodosumi's API) they do the same."""

    def __init__(self, services: Services) -> None:
        self._services = services

    def register(self, app: ServeAPI) -> None:
        app.lock(DECIDE)(self.show_decide)
        app.lock(SAY)(self.show_say)
        app.lease(DECIDE)(self.decide)
        app.lease(SAY)(self.say)

    async def show_decide(self, data: dict[str, Any], request: Request) -> forms.Model:
        try:
            group = await self._group(data, request)
        except HitlError as error:
            return _model(message(str(error)))
        hidden, action = {"back": request.path_params["fid"]}, f"{data['entries']}/approvals"
        return _model(decision_form(group, utcnow(), hidden, action))

    async def show_say(self, data: dict[str, Any], request: Request) -> forms.Model:
        given = self._services()
        try:
            session = await self._session(data, request)
        except HitlError as error:
            return _model(message(str(error)))
        if state_of(session) != "waits for your next message":
            return _model(message(f"This conversation {state_of(session)}."))
        hidden = {"nonce": _nonce(Filled()), "back": request.path_params["fid"]}
        last = await _last_message(given, session.id)
        action, limit = f"{data['entries']}/continue", given.max_upload_bytes
        return _model(message_form(session, last, hidden, action, max_bytes=limit))

    async def decide(self, data: dict[str, Any], inputs: Inputs, request: Request) -> Answer:
        try:
            group = await self._group(data, request)
            await _decide(self._services(), panel_user(request), group, inputs)
        except (HitlError, FormErrors) as error:
            raise _refused(error) from error
        return {"decided_by": panel_user(request).name}

    async def say(self, data: dict[str, Any], inputs: Inputs, request: Request) -> Answer:
        user = panel_user(request)
        try:
            await _say(self._services(), user, await self._session(data, request), inputs)
        except (HitlError, FormErrors) as error:
            raise _refused(error) from error
        return {"said_by": user.name}

    async def _session(self, data: Mapping[str, Any], request: Request) -> Session:
        session = await self._services().store.get_session(str(data["session"]))
        if not panel_user(request).may_decide(session.key_id):
            raise InvalidInput(NOT_YOURS)
        return session

    async def _group(self, data: Mapping[str, Any], request: Request) -> CallGroup:
        given, session = self._services(), await self._session(data, request)
        approvals = [await given.store.get_approval(str(name), None) for name in data["calls"]]
        return await _call_group(given, session.id, approvals)


# -- what they share


async def _decide(given: PanelServices, user: PanelUser, group: CallGroup, inputs: Inputs) -> None:
    """Commits what the form says, all of it or nothing. Raises FormErrors, HitlError."""
    if not user.may_decide(group.session.key_id):
        raise InvalidInput(NOT_YOURS)
    found = decide.confirmations(group.approvals, inputs)
    try:
        await given.store.send_events(group.session.id, None, found, decided_by=user.name)
    except InvalidInput as error:
        raise decide.refused(group.approvals, found, error) from error


async def _say(given: PanelServices, user: PanelUser, session: Session, inputs: Inputs) -> None:
    """The next message, or the end. Raises FormErrors, HitlError."""
    if said(inputs, "do") == "end":
        await given.store.archive_session(session.id, session.key_id)
        return
    sent = decide.next_message(inputs)
    once = _once(inputs, "say", sent.model_dump_json())
    await given.store.send_events(session.id, None, [sent], decided_by=user.name, idempotency_key=once)


async def _call_group(given: PanelServices, session_id: str, approvals: Sequence[Approval]) -> CallGroup:
    session = await given.store.get_session(session_id)
    requester = (await given.store.get_key(session.key_id)).name
    return CallGroup(session, requester, tuple(approvals))


async def _last_message(given: PanelServices, session_id: str) -> str:
    """Claude's last message, as Markdown; "" if there is none."""
    page = await given.store.list_events(session_id, None, limit=1, order="desc", types=["agent.message"])
    return texts(page.data[0].payload["content"]) if page.data else ""


async def _to_window(request: Request, inputs: Inputs, given: PanelServices, session: Session) -> Answer:
    """The flow that the form came from, if it is still open; else a new one."""
    back = _back(inputs)
    if back and await given.is_open(back, panel_user(request).id):
        return {"result": back, "elements": []}
    last = await given.store.last_seq(session.id, None)
    return _launch(request, given, session, max(last - HISTORY, 0), [])


def _launch(
    request: Request, given: PanelServices, session: Session, after: int, names: Sequence[str]
) -> Answer:
    """Opens a window on a session. What is handed to Kodosumi holds no text that could be markup: it shows it as it is."""
    answer = Launch(
        request,
        given.window(session.id),
        inputs={
            "session": session.id,
            "after": after,
            "entries": entries_path(request),
            "files": [inert(name, 100) for name in names],
        },
        reference=request.state.entry,
        summary=inert(session.title or session.id, 80),
    )
    return {"result": answer.headers[KODOSUMI_LAUNCH], "elements": []}


def _back(inputs: Inputs) -> str:
    """The flow that a form came from, if it came from one."""
    back = said(inputs, "back")
    return back if _FLOW_ID.fullmatch(back) else ""


def _nonce(filled: Filled) -> str:
    """What tells one form from another: the same one sent twice acts once."""
    return filled.value("nonce") or secrets.token_hex(16)


def _once(inputs: Inputs, *parts: str) -> str:
    """What makes a form that is sent twice act once. A program sends no nonce, and each time what it means to send."""
    nonce = said(inputs, "nonce") or new_id("req")
    shown = hashlib.sha256("\0".join((nonce, *parts)).encode("utf-8", "surrogatepass"))
    return f"panel-{shown.hexdigest()}"


async def _receive(given: PanelServices, request: Request, inputs: Inputs, folder: Path) -> list[str]:
    """Fetches the files of a form from the panel, as the user who sent it; returns their names."""
    upload = uploads.read(said(inputs, uploads.FIELD))
    if upload is None:
        return []
    token = request.headers.get(HEADER) or request.cookies.get(COOKIE) or ""
    async with network.direct_async(
        base_url=given.panel_url, headers={HEADER: token}, timeout=uploads.PATIENCE_S
    ) as panel:
        return await uploads.receive(upload, folder, panel, given.max_upload_bytes)


async def _add(given: PanelServices, session_id: str, folder: Path, once: str) -> None:
    manifest = await put_files(given.store, folder)
    await given.store.add_files(session_id, None, manifest, idempotency_key=once)


def _refused(error: Exception) -> InputsError:
    errors = error.errors if isinstance(error, FormErrors) else {"": str(error)}
    refused = InputsError()
    for name, said_ in errors.items():
        refused.errors.setdefault(name or "_global_", []).append(text(said_))
    return refused


def _model(elements: Elements) -> forms.Model:
    return forms.Model(*(forms.HTML(element["text"]) for element in elements))
