"""The inbox: every call that waits, the card of each, and decisions on them."""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

from fastapi import APIRouter, Request
from starlette.responses import RedirectResponse, Response

from claude_hitl_template.domain.models import Approval, Page, utcnow
from claude_hitl_template.domain.people import Action
from claude_hitl_template.domain.policy.tiers import SEVERITIES, Severity
from claude_hitl_template.errors import NotFound
from claude_hitl_template.inbox import pages
from claude_hitl_template.inbox.card import Card, Change, load
from claude_hitl_template.inbox.forms import (
    Form,
    PagesDep,
    UserDep,
    approval_for,
    failing_channels,
    names_of,
    readable,
)
from claude_hitl_template.inbox.live import Batch, Listening
from claude_hitl_template.inbox.services import Pages, User
from claude_hitl_template.inbox.streams import frame, stream_of
from claude_hitl_template.store.protocol import ApprovalChange, WaitingCall

router = APIRouter()
LINES = 50
MAX_TEXT = 200
QUICK_REASONS = ("Not needed", "Too broad", "Wrong file or place", "Explain first", "Too risky")
_MAX_ROWS = 14  # of the text area in which an input is edited


@dataclass(frozen=True)
class Filters:
    """What a list is limited to."""

    workspace: str = ""
    session: str = ""
    tool: str = ""
    severity: Severity | None = None
    text: str = ""

    @classmethod
    def of(cls, request: Request) -> "Filters":
        given = request.query_params
        return cls(
            given.get("workspace", ""),
            given.get("session", ""),
            given.get("tool", ""),
            next((one for one in SEVERITIES if one == given.get("severity")), None),
            given.get("q", "")[:MAX_TEXT],
        )

    @property
    def is_set(self) -> bool:
        return any((self.workspace, self.session, self.tool, self.severity, self.text))

    @property
    def query(self) -> str:
        given = {
            "workspace": self.workspace,
            "session": self.session,
            "tool": self.tool,
            "severity": self.severity,
            "q": self.text,
        }
        return urlencode({name: value for name, value in given.items() if value})


# -- the list


@router.get("/inbox")
async def show_inbox(request: Request, services: PagesDep, user: UserDep) -> Response:
    """The page of the list."""
    filters = Filters.of(request)
    found = await _waiting(services, user, filters, request.query_params.get("page"))
    tools = sorted({call.tool_name for call in found.data} | ({filters.tool} if filters.tool else set()))
    return _list(
        request,
        user,
        "inbox.html.j2",
        filters,
        found,
        tools=tools,
        failing=await failing_channels(services, user, readable(user, Action.MANAGE)),
        workspaces=await names_of(services, readable(user)),
    )


@router.get("/inbox/list")
async def show_list(request: Request, services: PagesDep, user: UserDep) -> Response:
    """The list alone, from its beginning."""
    filters = Filters.of(request)
    return _list(request, user, "list.html.j2", filters, await _waiting(services, user, filters, None))


@router.get("/inbox/more")
async def show_more(request: Request, services: PagesDep, user: UserDep) -> Response:
    """The next lines."""
    filters = Filters.of(request)
    found = await _waiting(services, user, filters, request.query_params.get("page"))
    return _list(request, user, "rows.html.j2", filters, found)


@router.get("/inbox/next")
async def show_next(request: Request, services: PagesDep, user: UserDep) -> Response:
    """Leads to the card of the call that has waited longest, or to the empty list."""
    found = await services.store.list_waiting(readable(user, Action.DECIDE), limit=1)
    base = request.scope.get("root_path", "")
    return RedirectResponse(f"{base}/inbox/a/{found.data[0].id}" if found.data else f"{base}/inbox", 303)


async def _waiting(services: Pages, user: User, filters: Filters, page: str | None) -> Page[WaitingCall]:
    return await services.store.list_waiting(
        _chosen(user, filters),
        limit=LINES,
        page=page or None,
        session_id=filters.session or None,
        tool_name=filters.tool or None,
        severity=filters.severity,
        text=filters.text,
    )


def _chosen(user: User, filters: Filters) -> list[str]:
    return [name for name in readable(user) if filters.workspace in ("", name)]


def _matches(call: WaitingCall, filters: Filters) -> bool:
    return (
        filters.workspace in ("", call.workspace_id)
        and filters.session in ("", call.session_id)
        and filters.tool in ("", call.tool_name)
        and filters.severity in (None, call.severity)
        and call.mentions(filters.text)
    )


def _list(
    request: Request, user: User, template: str, filters: Filters, found: Page[WaitingCall], **more: Any
) -> Response:
    return pages.page(
        request,
        template,
        user=user.principal,
        reader=user,
        nav="inbox",
        filters=filters,
        calls=found.data,
        more=found.next_page,
        may_decide=bool(readable(user, Action.DECIDE)),
        nonce=secrets.token_hex(16),
        severities=tuple(reversed(SEVERITIES)),
        **more,
    )


@router.get("/inbox/seen")
async def note_seen(request: Request, services: PagesDep, user: UserDep) -> Response:
    """Says that the inbox is visible: the reader's own channels are quiet for a while. For scripts of our pages alone."""
    if not pages.is_partial(request):
        raise NotFound("there is no such page")
    await services.store.note_reader(user.principal.id)
    return Response(status_code=204)


# -- the stream


@router.get("/inbox/stream")
async def stream(request: Request, services: PagesDep, user: UserDep) -> Response:
    """Changes of approvals as server-sent events. With `rows` they have the line of each call that waits and matches the
    list's filters."""
    filters = Filters.of(request) if "rows" in request.query_params else None
    changes = _Changes(request, services, user, services.live.listen(), filters)
    return stream_of(changes.next, changes.check, changes.listening.close)


@dataclass
class _Changes:
    """The changes that one page hears of."""

    request: Request
    services: Pages
    user: User
    listening: Listening
    filters: Filters | None

    async def check(self) -> None:
        self.user = await self.services.user(self.request)

    async def next(self, timeout_s: float) -> list[str]:
        found = await self.listening.next(timeout_s)
        return [text for batch in found for text in await self._frames(batch)]

    async def _frames(self, batch: Batch | None) -> list[str]:
        if batch is None:
            return [frame("refresh", {})]
        mine = frozenset(readable(self.user))
        changes = [change for change in batch.changes if change.workspace_id in mine]
        if not changes or self.filters is None:
            return [frame("approval", _change(change)) for change in changes]
        calls = await batch.calls()
        rows = {id_: self._row(batch, call) for id_, call in calls.items() if call.workspace_id in mine}
        return [frame("approval", {**_change(change), "row": rows.get(change.id, "")}) for change in changes]

    def _row(self, batch: Batch, call: WaitingCall) -> str:
        """The line of a call, the same for all who may decide on it, and for all others; "" if it does not match."""
        if self.filters is None or not _matches(call, self.filters):
            return ""
        key = call.id, self.user.may(Action.DECIDE, call.workspace_id)
        if key not in batch.rendered:
            batch.rendered[key] = pages.render(
                self.request, "rows.html.j2", calls=[call], more=None, reader=self.user
            )
        return batch.rendered[key]


def _change(change: ApprovalChange) -> dict[str, Any]:
    return {
        "id": change.id,
        "session": change.session_id,
        "state": change.state.value,
        "by": change.decided_by,
        "news": f"{change.votes} {change.reviewer or ''}",
    }


# -- the card


@router.get("/inbox/a/{approval_id}")
async def show_card(approval_id: str, request: Request, services: PagesDep, user: UserDep) -> Response:
    """The card of one call."""
    approval = await approval_for(services, user, approval_id)
    return await card_page(request, services, user, approval)


async def card_page(
    request: Request,
    services: Pages,
    user: User,
    approval: Approval,
    *,
    status: int = 200,
    said: str = "",
    tone: str = "good",
    typed: Form | None = None,
    errors: Mapping[str, str] | None = None,
    preview: "Preview | None" = None,
    just_decided: bool = False,
) -> Response:
    """A card, alone for a script, else as a page.

    Args:
        request: The request that it answers.
        services: The dependencies of the pages.
        user: Who reads it.
        approval: The call.
        status: The response's status.
        said: A message above the call, whose `tone` is good, warn or bad.
        typed: What a form held, to be filled in again.
        errors: Messages by the names of the form's fields; "" is the form itself.
        preview: An edit that is to be decided on, in place of the call.
        just_decided: Whether the reader decided with this request.
    """
    card = await load(services, approval)
    typed = typed or {}
    edited = typed.get("text", card.edit.text if card.edit else "")
    return pages.page(
        request,
        "card.html.j2" if pages.is_partial(request) else "card_page.html.j2",
        status=status,
        user=user.principal,
        reader=user,
        nav="inbox",
        card=card,
        sandboxed=services.sandboxed,
        title=card.session.title or card.session.first_words or card.session.id,
        refusal=await _refusal(services, user, card),
        has_voted=user.principal.id in {vote.principal_id for vote in approval.votes},
        now=utcnow(),
        words=_WORDS[approval.kind],
        quick=QUICK_REASONS,
        rows=min(edited.count("\n") + 2, _MAX_ROWS),
        nonce=typed.get("nonce") or secrets.token_hex(16),
        said=said,
        tone=tone,
        typed=typed,
        errors=errors or {},
        preview=preview,
        just_decided=just_decided,
    )


async def _refusal(services: Pages, user: User, card: Card) -> str:
    """Why this user may not decide on a call; "" if nothing forbids it."""
    workspace_id = card.approval.workspace_id
    if not user.may(Action.DECIDE, workspace_id):
        return "You may look at this call. Deciding on it needs the role approver in its workspace."
    approval, session = card.approval, card.session
    asked = frozenset(one for one in (session.created_by, session.last_sender) if one is not None)
    if approval.requirements and not any(
        one.admits(user.principal, workspace_id, asked) for one in approval.requirements
    ):
        return f"You may look at this call. Deciding on it takes {'; '.join(ask.who.lower() for ask in card.asks)}."
    if user.principal.id in asked and (await services.store.get_workspace(workspace_id)).separation_of_duties:
        return "You asked for this session, or wrote to it last. This workspace separates duties: another approver decides."
    return ""


@dataclass(frozen=True)
class _Words:
    action: str
    allow: str
    deny: str
    why: str


_WHY = "Why not? The agent gets the reason."
_WORDS: Mapping[str, _Words] = {
    "tool": _Words("allow", "Allow", "Deny", _WHY),
    "network": _Words("allow", "Allow for now", "Deny", _WHY),
    "question": _Words("answer", "Answer", "Decline", _WHY),
    "plan": _Words("allow", "Accept the plan", "Send it back", "What should the plan say instead?"),
}


@dataclass(frozen=True)
class Preview:
    """An edit before it is decided on. `fields` send it again."""

    change: Change
    fields: Mapping[str, str]
