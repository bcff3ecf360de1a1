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
from claude_hitl_template.domain.models import Approval, ApprovalState, Page, Session, new_id, utcnow
from claude_hitl_template.errors import HitlError, InvalidInput, NotFound
from claude_hitl_template.panel import uploads
from claude_hitl_template.panel.flow import DECIDE_LOCK, MESSAGE_LOCK
from claude_hitl_template.panel.forms import (
    CallGroup,
    Elements,
    Filled,
    Waiting,
    approvals_list,
    decision_form,
    message,
    message_form,
    sessions_list,
    start_form,
)
from claude_hitl_template.panel.markup import inert
from claude_hitl_template.panel.services import PanelServices
from claude_hitl_template.panel.users import COOKIE, HEADER, PanelUser, entries_path, panel_user
from claude_hitl_template.presentation import submissions
from claude_hitl_template.presentation.html import text
from claude_hitl_template.presentation.sessions import fate, state_of
from claude_hitl_template.presentation.submissions import FormErrors, Inputs, field_text
from claude_hitl_template.presentation.text import texts
from claude_hitl_template.workspace.sync import put_files

MAX_LISTED = 100
HISTORY_EVENTS = 300  # that a window shows of an old conversation
_FLOW_ID = re.compile(r"[0-9a-f]{24}")

type Services = Callable[[], PanelServices]
type Answer = dict[str, Any]
NOT_YOURS = (
    "You may not decide in this conversation: it is another user's. An operator of the panel may, or a role named in "
    "HITL_PANEL_APPROVERS."
)


def register(app: ServeAPI, services: Services) -> None:
    """Adds the entries and the forms of locks to `app`. `services` is called for every request."""
    for entry in (_Start(services), _Continue(services), _Approvals(services)):
        facts = {"summary": entry.summary, "description": entry.description, "tags": ["claude-hitl"]}
        app.get(entry.path, entry=True, **facts)(_get_handler(entry))
        app.post(entry.path, include_in_schema=False, **facts)(_post_handler(entry))
    _Locks(services).register(app)


class _Entry:
    """One entry of the panel. Subclasses set path, summary and description."""

    path = summary = description = ""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def form(self, request: Request) -> Elements:
        """The form for the user of this request."""
        raise NotImplementedError

    async def submit(self, request: Request, inputs: Inputs) -> Answer:
        """Does what the submitted form asks for. Raises FormErrors, HitlError, which `error_form` shows."""
        raise NotImplementedError

    async def error_form(self, request: Request, inputs: Inputs, errors: Mapping[str, str]) -> Elements:
        """The form again, with what was typed and the errors by field."""
        raise NotImplementedError

    @property
    def _panel(self) -> PanelServices:
        return self._services()


def _get_handler(entry: _Entry) -> Callable[[Request], Awaitable[Answer]]:
    async def show_form(request: Request) -> Answer:
        return {"elements": await entry.form(request)}

    return show_form


def _post_handler(entry: _Entry) -> Callable[[Request], Awaitable[Answer]]:
    async def submit(request: Request) -> Answer:
        inputs = await _inputs(request)
        request.state.entry = submit  # Kodosumi finds the tags of a flow by it
        try:
            return await entry.submit(request, inputs)
        except FormErrors as error:
            errors = error.errors
        except InvalidInput as error:
            errors = {error.field: error.message}
        except HitlError as error:
            errors = {"": str(error)}
        return {
            "errors": {name: [text(message)] for name, message in errors.items()},
            "elements": await entry.error_form(request, inputs, errors),
        }

    return submit


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

    async def form(self, request: Request) -> Elements:
        return await self._form(request, Filled())

    async def error_form(self, request: Request, inputs: Inputs, errors: Mapping[str, str]) -> Elements:
        return await self._form(request, Filled(inputs, errors))

    async def _form(self, request: Request, filled: Filled) -> Elements:
        services = self._panel
        return start_form(
            services.agent,
            services.environments,
            services.max_upload_bytes,
            _nonce(filled),
            filled,
            sandbox=services.sandbox,
            ray_is_open=services.ray_is_open,
            waiting=await _waiting(services, request),
        )

    async def submit(self, request: Request, inputs: Inputs) -> Answer:
        user, services = panel_user(request), self._panel
        start = submissions.start(inputs, services.agent, services.environments)
        with tempfile.TemporaryDirectory(prefix="hitl-in-") as folder:
            names = await _receive_uploads(services, request, inputs, Path(folder))
            key = _idempotency_key(
                inputs,
                "start",
                start.message.model_dump_json(),
                start.agent.model_dump_json(),
                start.environment.id,
                start.title,
            )
            session = await services.store.create_session(
                user.workspace_id,
                agent=start.agent,
                environment=start.environment,
                title=start.title,
                metadata={},
                initial=[],
                by=user.actor,
                idempotency_key=key,
            )
            if names:
                await _add_files(services, session.id, Path(folder), f"{key}-files")
        await services.store.send_events(
            session.id, user.workspace_id, [start.message], by=user.actor, idempotency_key=f"{key}-message"
        )
        return _launch(request, services, session, 0, names)


class _Continue(_Entry):
    path = "/continue"
    summary = "Continue a conversation"
    description = "Your conversations, including parked ones: see the state of each, and continue."

    async def form(self, request: Request) -> Elements:
        return await self._list(request, Filled())

    async def _list(self, request: Request, filled: Filled) -> Elements:
        found = await self._panel.store.list_sessions(panel_user(request).workspace_id, limit=MAX_LISTED)
        waiting = await _waiting(self._panel, request)
        return sessions_list(found.data, utcnow(), filled, waiting=waiting)

    async def error_form(self, request: Request, inputs: Inputs, errors: Mapping[str, str]) -> Elements:
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
        last = await _last_message(self._panel, session.id)
        limit = self._panel.max_upload_bytes
        return message_form(session, last, hidden, filled=filled, max_bytes=limit, may_watch=True)

    async def submit(self, request: Request, inputs: Inputs) -> Answer:
        session = await self._session(request, inputs)
        if field_text(inputs, "do") in ("send", "end"):
            if field_text(inputs, "do") == "send":
                await self._upload(request, inputs, session)
            await _send(self._panel, panel_user(request), session, inputs)
        elif field_text(inputs, "do") != "watch":
            if state_of(session) == "ended":
                raise InvalidInput("This conversation has ended.")
            return {"elements": await self._form(session, "", Filled())}
        return await _open_window(request, inputs, self._panel, session)

    async def _upload(self, request: Request, inputs: Inputs, session: Session) -> None:
        """Adds the files before the message is sent, so that the agent finds them."""
        submissions.next_message(inputs)
        with tempfile.TemporaryDirectory(prefix="hitl-in-") as folder:
            if await _receive_uploads(self._panel, request, inputs, Path(folder)):
                await _add_files(
                    self._panel, session.id, Path(folder), _idempotency_key(inputs, "files", session.id)
                )

    async def _session(self, request: Request, inputs: Inputs) -> Session:
        wanted = field_text(inputs, "open") or field_text(inputs, "session")
        if not wanted:
            raise InvalidInput("Choose a conversation.")
        session = await self._panel.store.get_session(wanted)
        if not panel_user(request).may_decide(session.workspace_id):
            raise NotFound("There is no such conversation of yours.")
        return session


class _Approvals(_Entry):
    path = "/approvals"
    summary = "Approvals"
    description = "Every call that waits for a decision, in all conversations in which you may decide."

    async def form(self, request: Request) -> Elements:
        return await self._list(request, "")

    async def _list(self, request: Request, done: str) -> Elements:
        found = await _pending(self._panel, request)
        waiting = await asyncio.gather(*(_call_group(self._panel, a.session_id, [a]) for a in found.data))
        return approvals_list(waiting, utcnow(), done, more=found.next_page is not None)

    async def error_form(self, request: Request, inputs: Inputs, errors: Mapping[str, str]) -> Elements:
        try:
            group = await self._group(request, inputs)
        except HitlError:
            return [*message(errors.get("", "")), *await self._list(request, "")]
        return decision_form(group, utcnow(), {"back": _back(inputs)}, filled=Filled(inputs, errors))

    async def submit(self, request: Request, inputs: Inputs) -> Answer:
        group = await self._group(request, inputs)
        if field_text(inputs, "open"):
            return {"elements": decision_form(group, utcnow(), {"back": ""})}
        await _decide(self._panel, panel_user(request), group, inputs)
        if _back(inputs):
            return await _open_window(request, inputs, self._panel, group.session)
        decided = [await self._panel.store.get_approval(a.id, None) for a in group.approvals]
        done = " ".join(f"{a.tool_name}: {fate(a)}" for a in decided if a.decision is not None)
        return {"elements": await self._list(request, f"Done. {done}")}

    async def _group(self, request: Request, inputs: Inputs) -> CallGroup:
        """The calls of a form. If one was chosen from the list: all that wait in its conversation."""
        chosen, store = field_text(inputs, "open"), self._panel.store
        wanted = [chosen] if chosen else [name for name in field_text(inputs, "calls").split(",") if name]
        if not wanted:
            raise InvalidInput("Choose a call.")
        approvals = [await store.get_approval(name, None) for name in wanted[:MAX_LISTED]]
        if not panel_user(request).may_decide(approvals[0].workspace_id):
            raise InvalidInput(NOT_YOURS)
        session_id = approvals[0].session_id
        if any(approval.session_id != session_id for approval in approvals):
            raise InvalidInput("These calls belong to several conversations.")
        if chosen and approvals[0].state is ApprovalState.PENDING:
            approvals = (
                await store.list_approvals(
                    None, limit=MAX_LISTED, states=[ApprovalState.PENDING], session_id=session_id
                )
            ).data or approvals
        return await _call_group(self._panel, session_id, approvals)


class _Locks:
    """The forms of a flow's locks.

    Their buttons submit to the entries. A program may also answer at the lock's own address, over Kodosumi's API.
    """

    def __init__(self, services: Services) -> None:
        self._services = services

    def register(self, app: ServeAPI) -> None:
        app.lock(DECIDE_LOCK)(self.show_decision_form)
        app.lock(MESSAGE_LOCK)(self.show_message_form)
        app.lease(DECIDE_LOCK)(self.decide)
        app.lease(MESSAGE_LOCK)(self.say)

    async def show_decision_form(self, data: dict[str, Any], request: Request) -> forms.Model:
        try:
            group = await self._group(data, request)
        except HitlError as error:
            return _kodosumi_model(message(str(error)))
        hidden, action = {"back": request.path_params["fid"]}, f"{data['entries']}/approvals"
        return _kodosumi_model(decision_form(group, utcnow(), hidden, action))

    async def show_message_form(self, data: dict[str, Any], request: Request) -> forms.Model:
        services = self._services()
        try:
            session = await self._session(data, request)
        except HitlError as error:
            return _kodosumi_model(message(str(error)))
        if state_of(session) != "waits for your next message":
            return _kodosumi_model(message(f"This conversation {state_of(session)}."))
        hidden = {"nonce": _nonce(Filled()), "back": request.path_params["fid"]}
        last = await _last_message(services, session.id)
        action, limit = f"{data['entries']}/continue", services.max_upload_bytes
        return _kodosumi_model(message_form(session, last, hidden, action, max_bytes=limit))

    async def decide(self, data: dict[str, Any], inputs: Inputs, request: Request) -> Answer:
        try:
            group = await self._group(data, request)
            await _decide(self._services(), panel_user(request), group, inputs)
        except (HitlError, FormErrors) as error:
            raise _inputs_error(error) from error
        return {"decided_by": panel_user(request).name}

    async def say(self, data: dict[str, Any], inputs: Inputs, request: Request) -> Answer:
        user = panel_user(request)
        try:
            await _send(self._services(), user, await self._session(data, request), inputs)
        except (HitlError, FormErrors) as error:
            raise _inputs_error(error) from error
        return {"said_by": user.name}

    async def _session(self, data: Mapping[str, Any], request: Request) -> Session:
        session = await self._services().store.get_session(str(data["session"]))
        if not panel_user(request).may_decide(session.workspace_id):
            raise InvalidInput(NOT_YOURS)
        return session

    async def _group(self, data: Mapping[str, Any], request: Request) -> CallGroup:
        services, session = self._services(), await self._session(data, request)
        approvals = [await services.store.get_approval(str(name), None) for name in data["calls"]]
        return await _call_group(services, session.id, approvals)


# -- shared


async def _decide(services: PanelServices, user: PanelUser, group: CallGroup, inputs: Inputs) -> None:
    """Commits all decisions of a form, or none. Raises FormErrors, HitlError."""
    if not user.may_decide(group.session.workspace_id):
        raise InvalidInput(NOT_YOURS)
    found = submissions.confirmations(group.approvals, inputs)
    try:
        await services.store.send_events(group.session.id, None, found, by=user.actor)
    except InvalidInput as error:
        raise submissions.refusal_errors(group.approvals, found, error) from error


async def _send(services: PanelServices, user: PanelUser, session: Session, inputs: Inputs) -> None:
    """Sends the next message, or ends the conversation. Raises FormErrors, HitlError."""
    if field_text(inputs, "do") == "end":
        await services.store.archive_session(session.id, session.workspace_id, by=user.actor)
        return
    sent = submissions.next_message(inputs)
    key = _idempotency_key(inputs, "say", sent.model_dump_json())
    await services.store.send_events(session.id, None, [sent], by=user.actor, idempotency_key=key)


async def _call_group(services: PanelServices, session_id: str, approvals: Sequence[Approval]) -> CallGroup:
    session = await services.store.get_session(session_id)
    return CallGroup(session, await _requester(services, session), tuple(approvals), services.pages_url)


async def _requester(services: PanelServices, session: Session) -> str:
    if session.created_by is not None:
        return (await services.store.get_principal(session.created_by)).name
    return (await services.store.get_workspace(session.workspace_id)).name


async def _pending(services: PanelServices, request: Request) -> Page[Approval]:
    """The calls that this user may decide, the oldest first."""
    user = panel_user(request)
    return await services.store.list_approvals(
        None if user.approver else user.workspace_id, limit=MAX_LISTED, states=[ApprovalState.PENDING]
    )


async def _waiting(services: PanelServices, request: Request) -> Waiting:
    found = await _pending(services, request)
    path = f"{entries_path(request)}{_Approvals.path}"
    return Waiting(len(found.data), path, has_more=found.next_page is not None)


async def _last_message(services: PanelServices, session_id: str) -> str:
    """Claude's last message, as Markdown; "" if there is none."""
    page = await services.store.list_events(session_id, None, limit=1, order="desc", types=["agent.message"])
    return texts(page.data[0].payload["content"]) if page.data else ""


async def _open_window(request: Request, inputs: Inputs, services: PanelServices, session: Session) -> Answer:
    """Leads to the flow that the form belongs to, if it is still open; else to a new one."""
    back = _back(inputs)
    if back and await services.is_open(back, panel_user(request).id):
        return {"result": back, "elements": []}
    last = await services.store.last_seq(session.id, None)
    return _launch(request, services, session, max(last - HISTORY_EVENTS, 0), [])


def _launch(
    request: Request, services: PanelServices, session: Session, after: int, names: Sequence[str]
) -> Answer:
    """Starts a flow that shows a session.

    Kodosumi shows a flow's inputs and summary without escaping them, so they contain no text that could be markup.

    Args:
        request: Of the user who submitted the form.
        services: The services of the entries.
        session: The session to show.
        after: The number of the event to begin after.
        names: Of the files that were uploaded.
    """
    answer = Launch(
        request,
        services.window(session.id),
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
    """The flow that a form belongs to; "" for none."""
    back = field_text(inputs, "back")
    return back if _FLOW_ID.fullmatch(back) else ""


def _nonce(filled: Filled) -> str:
    """Identifies a form, so that the same form sent twice acts once."""
    return filled.value("nonce") or secrets.token_hex(16)


def _idempotency_key(inputs: Inputs, *parts: str) -> str:
    """The key with which a form that is sent twice acts once. A program sends no nonce: each of its requests acts."""
    nonce = field_text(inputs, "nonce") or new_id("req")
    shown = hashlib.sha256("\0".join((nonce, *parts)).encode("utf-8", "surrogatepass"))
    return f"panel-{shown.hexdigest()}"


async def _receive_uploads(
    services: PanelServices, request: Request, inputs: Inputs, folder: Path
) -> list[str]:
    """Fetches the uploaded files of a form from the panel, as the user who sent it; returns their names."""
    upload = uploads.parse(field_text(inputs, uploads.FIELD))
    if upload is None:
        return []
    token = request.headers.get(HEADER) or request.cookies.get(COOKIE) or ""
    async with network.direct_async(
        base_url=services.panel_url, headers={HEADER: token}, timeout=uploads.TIMEOUT_S
    ) as panel:
        return await uploads.receive(upload, folder, panel, services.max_upload_bytes)


async def _add_files(services: PanelServices, session_id: str, folder: Path, key: str) -> None:
    manifest = await put_files(services.store, folder)
    await services.store.add_files(session_id, None, manifest, idempotency_key=key)


def _inputs_error(error: Exception) -> InputsError:
    errors = error.errors if isinstance(error, FormErrors) else {"": str(error)}
    refused = InputsError()
    for name, said_ in errors.items():
        refused.errors.setdefault(name or "_global_", []).append(text(said_))
    return refused


def _kodosumi_model(elements: Elements) -> forms.Model:
    return forms.Model(*(forms.HTML(element["text"]) for element in elements))
