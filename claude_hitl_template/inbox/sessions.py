"""The pages of sessions: all of them, a new one, and the conversation of each with its files and its cost."""

import json
import secrets
from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import RedirectResponse, Response

from claude_hitl_template.api.files import download
from claude_hitl_template.api.followers import Message
from claude_hitl_template.domain.events import UserInterrupt
from claude_hitl_template.domain.models import Approval, ApprovalState, Event, Session
from claude_hitl_template.domain.notices import Delivery
from claude_hitl_template.domain.people import Action
from claude_hitl_template.errors import Conflict, NotFound
from claude_hitl_template.files.manifest import SavedFile, shown
from claude_hitl_template.inbox import pages
from claude_hitl_template.inbox.forms import (
    PagesDep,
    UserDep,
    check,
    failing_channels,
    names_of,
    read_form,
    readable,
)
from claude_hitl_template.inbox.services import Pages, User
from claude_hitl_template.inbox.streams import stream_of
from claude_hitl_template.presentation import submissions
from claude_hitl_template.presentation.events import event_view
from claude_hitl_template.presentation.sessions import POLICIES, state_of
from claude_hitl_template.presentation.submissions import FormErrors, field_text
from claude_hitl_template.presentation.text import size, visible
from claude_hitl_template.presentation.views import EventView

router = APIRouter()
LISTED = 50
EVENTS = 200  # of the log, the last ones
FILES = 100
NOTIFICATIONS = 20
_NOT_SHOWN = frozenset({"session.usage", "session.status_running"})


async def session_for(services: Pages, user: User, session_id: str, action: Action = Action.READ) -> Session:
    """A session in a workspace of the user. Raises NotFound, and Forbidden where the role does not permit it."""
    session = await services.store.get_session(session_id, None)
    check(user, session.workspace_id, action, f"there is no session {session_id!r}")
    return session


# -- all sessions, and a new one


@router.get("/sessions")
async def show_sessions(request: Request, services: PagesDep, user: UserDep) -> Response:
    """Sessions of a workspace, the newest first."""
    mine = readable(user)
    if not mine:
        raise NotFound("you have no role in any workspace; an administrator gives roles")
    workspace = request.query_params.get("workspace") or mine[0]
    if workspace not in mine:
        raise NotFound("there is no such workspace, or you may not see it")
    found = await services.store.list_sessions(
        workspace, limit=LISTED, page=request.query_params.get("page") or None, include_archived=True
    )
    return pages.page(
        request,
        "sessions.html.j2",
        user=user.principal,
        reader=user,
        nav="sessions",
        workspace=workspace,
        workspaces=await names_of(services, mine),
        sessions=[(session, state_of(session)) for session in found.data],
        more=found.next_page,
        may_start=bool(readable(user, Action.REQUEST)),
    )


@router.get("/sessions/new")
async def show_new(request: Request, services: PagesDep, user: UserDep) -> Response:
    """The form that starts a session."""
    return await _new(request, services, user, {}, {})


@router.post("/sessions/new")
async def start(request: Request, services: PagesDep, user: UserDep) -> Response:
    """Starts a session with its first message."""
    form = await read_form(request, services, user)
    workspace = field_text(form, "workspace") or next(iter(readable(user, Action.REQUEST)), "")
    check(user, workspace, Action.REQUEST, "there is no such workspace, or you may not see it")
    try:
        found = submissions.start(form, services.agent, services.environments)
    except FormErrors as error:
        return await _new(request, services, user, form, error.errors, status=400)
    session = await services.store.create_session(
        workspace,
        agent=found.agent,
        environment=found.environment,
        title=found.title,
        metadata={},
        initial=[found.message],
        by=user.actor,
        idempotency_key=f"inbox-{field_text(form, 'nonce')}" if field_text(form, "nonce") else None,
    )
    return RedirectResponse(f"{request.scope.get('root_path', '')}/sessions/{session.id}", 303)


async def _new(
    request: Request,
    services: Pages,
    user: User,
    typed: Mapping[str, str],
    errors: Mapping[str, str],
    *,
    status: int = 200,
) -> Response:
    return pages.page(
        request,
        "new_session.html.j2",
        status=status,
        user=user.principal,
        reader=user,
        nav="sessions",
        workspaces=await names_of(services, readable(user, Action.REQUEST)),
        agent=services.agent,
        environments=services.environments,
        policies=POLICIES,
        typed=typed,
        errors=errors,
        nonce=typed.get("nonce") or secrets.token_hex(16),
    )


# -- one session


@router.get("/sessions/{session_id}")
async def show_session(session_id: str, request: Request, services: PagesDep, user: UserDep) -> Response:
    """The conversation; `part=state` is the part that changes with it."""
    session = await session_for(services, user, session_id)
    return await _session(request, services, user, session, part=request.query_params.get("part") == "state")


async def _session(
    request: Request,
    services: Pages,
    user: User,
    session: Session,
    *,
    part: bool = False,
    status: int = 200,
    typed: str = "",
    said: str = "",
) -> Response:
    entries = [] if part else await _entries(services, session)
    files = await services.store.list_workspace(session.id, session.workspace_id, limit=FILES)
    return pages.page(
        request,
        "session_state.html.j2" if part else "session.html.j2",
        status=status,
        user=user.principal,
        reader=user,
        nav="sessions",
        session=session,
        title=session.title or session.first_words or session.id,
        state=state_of(session),
        is_free=services.is_free(),
        is_over=state_of(session) == "ended",
        waiting=await _waiting(services, session),
        files=[(shown(file.path), size(file.size)) for file in files.data],
        more_files=files.next_page is not None,
        entries=entries,
        after=session.next_seq - 1,
        notifications=await _notifications(services, session),
        failing=await failing_channels(services, user, [session.workspace_id]),
        may_write=user.may(Action.REQUEST, session.workspace_id),
        nonce=secrets.token_hex(16),
        typed=typed,
        said=said,
    )


async def _entries(services: Pages, session: Session) -> list[EventView]:
    page = await services.store.list_events(session.id, session.workspace_id, limit=EVENTS, order="desc")
    views = (_view(event) for event in reversed(page.data) if event.seq < session.next_seq)
    return [view for view in views if view is not None]


def _view(event: Event) -> EventView | None:
    return None if event.type in _NOT_SHOWN else event_view(event.wire())


async def _waiting(services: Pages, session: Session) -> list[Approval]:
    page = await services.store.list_approvals(
        session.workspace_id, limit=LISTED, states=[ApprovalState.PENDING], session_id=session.id
    )
    return page.data


async def _notifications(services: Pages, session: Session) -> list[Delivery]:
    """What was sent about a session, the newest first."""
    page = await services.store.list_deliveries(
        session.workspace_id, limit=NOTIFICATIONS, session_id=session.id
    )
    return page.data


@router.post("/sessions/{session_id}/messages")
async def send(session_id: str, request: Request, services: PagesDep, user: UserDep) -> Response:
    """Sends a message, interrupts the turn, or archives the session."""
    session = await session_for(services, user, session_id, Action.REQUEST)
    form = await read_form(request, services, user)
    try:
        await _send(services, user, session, form)
    except FormErrors as error:
        said = " ".join(error.errors.values())
        typed = field_text(form, "text")
        return await _session(request, services, user, session, status=400, typed=typed, said=said)
    except Conflict as error:
        session = await session_for(services, user, session_id)
        typed = field_text(form, "text")
        return await _session(request, services, user, session, status=409, typed=typed, said=str(error))
    return RedirectResponse(f"{request.scope.get('root_path', '')}/sessions/{session_id}", 303)


async def _send(services: Pages, user: User, session: Session, form: Mapping[str, str]) -> None:
    key = f"inbox-{field_text(form, 'nonce') or secrets.token_hex(16)}"
    match field_text(form, "do"):
        case "archive":
            await services.store.archive_session(session.id, session.workspace_id, by=user.actor)
        case "interrupt":
            await services.store.send_events(
                session.id,
                session.workspace_id,
                [UserInterrupt(type="user.interrupt")],
                by=user.actor,
                idempotency_key=key,
            )
        case _:
            await services.store.send_events(
                session.id,
                session.workspace_id,
                [submissions.next_message(form)],
                by=user.actor,
                idempotency_key=key,
            )


@router.get("/sessions/{session_id}/file")
async def show_file(session_id: str, request: Request, services: PagesDep, user: UserDep) -> Response:
    """Downloads a saved file; a browser never shows it."""
    session = await session_for(services, user, session_id)
    file: SavedFile = await services.store.workspace_file(
        session_id, session.workspace_id, request.query_params.get("path", "")
    )
    return await download(services.store, file)


# -- the stream of one session


@router.get("/sessions/{session_id}/stream")
async def stream(session_id: str, request: Request, services: PagesDep, user: UserDep) -> Response:
    """The entries of a session as they are committed, and the text that the model is writing."""
    session = await session_for(services, user, session_id)
    newest = session.next_seq - 1
    given = request.headers.get("last-event-id") or request.query_params.get("after", "")
    after = min(int(given), newest) if given.isdecimal() and len(given) < 18 else newest
    subscription = services.followers.subscribe(session.id, session.workspace_id, after, previews=True)

    async def frames(timeout_s: float) -> list[str]:
        found = await subscription.next(timeout_s)
        made = [_entry(request, one) if one.event is not None else _typing(one) for one in found]
        return [text for text in made if text]

    async def still_permitted() -> None:
        check(await services.user(request), session.workspace_id, Action.READ, "")

    return stream_of(frames, still_permitted, subscription.close)


def _entry(request: Request, message: Message) -> str:
    event = message.event
    assert event is not None  # noqa: S101  (the caller's case)
    view = _view(event)
    html = pages.render(request, "entry.html.j2", view=view) if view is not None else ""
    lines = "\n".join(f"data: {line}" for line in html.strip().split("\n"))
    return f"id: {event.seq}\nevent: entry\n{lines}\n\n"


def _typing(message: Message) -> str:
    """A piece of unfinished text, with hidden characters as escapes; "" for another kind of message."""
    body: Mapping[str, Any] = message.body
    text = body.get("delta", {}).get("text") or body.get("delta", {}).get("content", {}).get("text")
    if body.get("type") != "event_delta" or not isinstance(text, str):
        return ""
    return f"event: typing\ndata: {json.dumps({'id': body['event_id'], 'text': visible(text)})}\n\n"
