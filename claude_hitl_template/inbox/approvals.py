"""The inbox: every call that waits, the card of each, and decisions on them."""

import hashlib
import json
import secrets
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

from fastapi import APIRouter, Request
from starlette.responses import RedirectResponse, Response, StreamingResponse

from claude_hitl_template.domain.events import UserToolConfirmation
from claude_hitl_template.domain.models import Approval, ApprovalState, Page
from claude_hitl_template.domain.people import Action
from claude_hitl_template.errors import (
    AlreadyDecided,
    Conflict,
    Forbidden,
    HitlError,
    InvalidInput,
    NotFound,
    Superseded,
)
from claude_hitl_template.inbox import pages
from claude_hitl_template.inbox.card import Change, Edit, changed_input, edit_of, is_long, load, offers_for
from claude_hitl_template.inbox.forms import Form, PagesDep, UserDep, approval_for, read_form, readable
from claude_hitl_template.inbox.services import Pages, User
from claude_hitl_template.presentation import submissions
from claude_hitl_template.presentation.diff import diff
from claude_hitl_template.presentation.sessions import fate
from claude_hitl_template.presentation.submissions import FormErrors, field_text
from claude_hitl_template.presentation.text import parse_input, summary
from claude_hitl_template.store.protocol import ApprovalChange, WaitingCall
from claude_hitl_template.store.waiting import is_whole

router = APIRouter()
LINES = 50
MAX_IDS = 50
MAX_TEXT = 200
PING_S = 10.0  # a page that hears nothing for some of these is offline
QUICK_REASONS = ("Not needed", "Too broad", "Wrong file or place", "Explain first", "Too risky")
_MAX_ROWS = 14  # of the text area in which an input is edited


@dataclass(frozen=True)
class Filters:
    """What a list is limited to."""

    workspace: str = ""
    session: str = ""
    tool: str = ""
    text: str = ""

    @classmethod
    def of(cls, request: Request) -> "Filters":
        given = request.query_params
        return cls(
            given.get("workspace", ""),
            given.get("session", ""),
            given.get("tool", ""),
            given.get("q", "")[:MAX_TEXT],
        )

    @property
    def is_set(self) -> bool:
        return any((self.workspace, self.session, self.tool, self.text))

    @property
    def query(self) -> str:
        given = {"workspace": self.workspace, "session": self.session, "tool": self.tool, "q": self.text}
        return urlencode({name: value for name, value in given.items() if value})


# -- the list


@router.get("/inbox")
async def show_inbox(request: Request, services: PagesDep, user: UserDep) -> Response:
    """The page of the list."""
    filters = Filters.of(request)
    found = await _waiting(services, user, filters, request.query_params.get("page"))
    tools = sorted({call.tool_name for call in found.data} | ({filters.tool} if filters.tool else set()))
    return _list(request, user, "inbox.html.j2", filters, found, tools=tools, workspaces=_workspaces(user))


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


@router.get("/inbox/rows")
async def show_rows(request: Request, services: PagesDep, user: UserDep) -> Response:
    """The lines of these calls, as far as they wait and match."""
    filters = Filters.of(request)
    ids = request.query_params.getlist("id")[:MAX_IDS]
    found = await services.store.get_waiting(ids, _chosen(user, filters))
    matching = [call for call in found if _matches(call, filters)]
    return _list(request, user, "rows.html.j2", filters, Page(data=matching))


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
        text=filters.text,
    )


def _chosen(user: User, filters: Filters) -> list[str]:
    return [name for name in readable(user) if filters.workspace in ("", name)]


def _workspaces(user: User) -> dict[str, str]:
    return {name: name for name in readable(user)}


def _matches(call: WaitingCall, filters: Filters) -> bool:
    return (
        filters.session in ("", call.session_id)
        and filters.tool in ("", call.tool_name)
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
        **more,
    )


# -- the stream


@router.get("/inbox/stream")
async def stream(request: Request, services: PagesDep, user: UserDep) -> Response:
    """Changes of approvals as server-sent events, as long as the user is signed in."""
    return StreamingResponse(
        _changes(request, services, frozenset(readable(user))),
        media_type="text/event-stream",
        headers={"cache-control": "no-store", "x-accel-buffering": "no"},
    )


async def _changes(request: Request, services: Pages, workspaces: frozenset[str]) -> AsyncIterator[str]:
    with services.live.listen() as listening:
        yield frame("hello", {})
        while True:
            notes = await listening.next(PING_S)
            if not notes:
                try:
                    workspaces = frozenset(readable(await services.user(request)))
                except HitlError:
                    yield frame("signed-out", {})
                    return
                yield frame("ping", {})
            for note in notes:
                if note is None:
                    yield frame("refresh", {})
                elif note.workspace_id in workspaces:
                    yield frame("approval", _change(note))


def frame(event: str, data: Mapping[str, Any]) -> str:
    """One server-sent event with JSON."""
    return f"event: {event}\ndata: {json.dumps(data)}\n\n"


def _change(change: ApprovalChange) -> dict[str, Any]:
    return {
        "id": change.id,
        "session": change.session_id,
        "state": change.state.value,
        "by": change.decided_by,
    }


# -- the card


@router.get("/inbox/a/{approval_id}")
async def show_card(approval_id: str, request: Request, services: PagesDep, user: UserDep) -> Response:
    """The card of one call; `part=card` is the card alone."""
    approval = await approval_for(services, user, approval_id)
    template = "card.html.j2" if request.query_params.get("part") == "card" else "card_page.html.j2"
    return await _card(request, services, user, approval, template=template)


async def _card(
    request: Request,
    services: Pages,
    user: User,
    approval: Approval,
    *,
    template: str,
    status: int = 200,
    said: str = "",
    tone: str = "good",
    typed: Form | None = None,
    errors: Mapping[str, str] | None = None,
    preview: "Preview | None" = None,
    just_decided: bool = False,
) -> Response:
    [*line] = await services.store.get_waiting([approval.id], None)
    card = await load(services, approval, requester=line[0].requester if line else "")
    typed = typed or {}
    edited = typed.get("text", card.edit.text if card.edit else "")
    return pages.page(
        request,
        template,
        status=status,
        user=user.principal,
        reader=user,
        nav="inbox",
        card=card,
        title=card.session.title or card.session.first_words or card.session.id,
        may_decide=user.may(Action.DECIDE, approval.workspace_id),
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


# -- decisions


@router.post("/inbox/a/{approval_id}/decide")
async def decide(approval_id: str, request: Request, services: PagesDep, user: UserDep) -> Response:
    """Decides on a call as it was shown, shows an edit once more, or shows the form again with what is wrong."""
    approval = await approval_for(services, user, approval_id, Action.DECIDE)
    form = await read_form(request, services, user)
    partly = request.headers.get("hx-request") == "true"
    template = "card.html.j2" if partly else "card_page.html.j2"
    if field_text(form, "digest") != approval.digest:
        said = (
            "This call is not the one that was shown to you any more, so nothing was decided. Read it again."
        )
        return await _card(
            request, services, user, approval, template=template, status=409, said=said, tone="bad"
        )
    try:
        if field_text(form, "do") == "preview" and approval.state is ApprovalState.PENDING:
            preview = _preview(approval, form)
            return await _card(
                request, services, user, approval, template=template, typed=form, preview=preview
            )
        decided = await _decide(services, user, approval, form)
    except FormErrors as error:
        return await _card(
            request, services, user, approval, template=template, status=400, typed=form, errors=error.errors
        )
    except (AlreadyDecided, Superseded, Conflict) as error:
        now = await approval_for(services, user, approval_id)
        said = f"Your decision was not recorded: {_first(now) or error}"
        return await _card(
            request, services, user, now, template=template, status=409, said=said, tone="warn"
        )
    if not partly:
        return RedirectResponse(f"{request.scope.get('root_path', '')}/inbox/a/{approval_id}", 303)
    return await _card(request, services, user, decided, template=template, just_decided=True)


def _first(approval: Approval) -> str:
    """What another decision was."""
    return fate(approval) if approval.state is not ApprovalState.PENDING else ""


async def _decide(services: Pages, user: User, approval: Approval, form: Form) -> Approval:
    """Records the decision of a form. Raises FormErrors by the names of this form, and HitlError."""
    confirmation = _confirmation(approval, form)
    said = confirmation.model_dump_json()
    nonce = field_text(form, "nonce") or secrets.token_hex(16)
    key = hashlib.sha256("\0".join((nonce, approval.id, said)).encode("utf-8", "surrogatepass")).hexdigest()
    try:
        return await services.store.decide(
            approval.id,
            approval.workspace_id,
            confirmation,
            by=user.actor,
            idempotency_key=f"inbox-{key}",
        )
    except InvalidInput as error:
        field = (
            "edited"
            if error.field.startswith("updated_input")
            else "rule"
            if error.field == "remember"
            else ""
        )
        raise FormErrors({field: f"{error.message}. Nothing was decided."}) from error


def _confirmation(approval: Approval, form: Form) -> UserToolConfirmation:
    """The decision in a form of one card. Raises FormErrors."""
    choice = field_text(form, "do")
    inputs = dict(form)
    inputs[f"{approval.id}.do"] = choice
    if choice == "deny":
        inputs[f"{approval.id}.reason"] = _reason(form)
    elif choice == "edit":
        inputs[f"{approval.id}.input"] = json.dumps(_edited(approval, form))
    elif choice in ("allow", "remember") and is_long(approval) and not field_text(form, "read"):
        raise FormErrors({"": "This call is long: read it to its end, then allow it. Nothing was decided."})
    try:
        [confirmation] = submissions.confirmations([approval], inputs)
    except FormErrors as error:
        raise FormErrors({_own_name(approval, name): said for name, said in error.errors.items()}) from error
    if choice == "remember":
        return confirmation.model_copy(update={"remember": _rule(approval, form)})
    return confirmation


def _own_name(approval: Approval, name: str) -> str:
    """The name that this form has for a field of `submissions`."""
    known = {f"{approval.id}.reason": "reason", f"{approval.id}.input": "edited", f"{approval.id}.do": ""}
    return known.get(name, name if name.startswith(f"{approval.id}.q") else "")


def _reason(form: Form) -> str:
    parts = [field_text(form, name).strip() for name in ("quick", "reason")]
    return ". ".join(part for part in parts if part)


def _rule(approval: Approval, form: Form) -> bool | str:
    """The rule that was chosen; True for the narrowest, which may need a digest."""
    chosen = field_text(form, "rule")
    found = offers_for(approval)
    if not chosen.isdecimal() or int(chosen) >= len(found):
        raise FormErrors({"rule": "Choose one of the rules. Nothing was decided."})
    return True if int(chosen) == 0 else found[int(chosen)].rule.rule


def _edited(approval: Approval, form: Form) -> dict[str, Any]:
    """The input as the form changes it. Raises FormErrors."""
    edit = edit_of(approval)
    if edit.field is not None and field_text(form, "as") != "json":
        return changed_input(approval, edit, field_text(form, "text"))
    try:
        return parse_input(field_text(form, "json"))
    except InvalidInput as error:
        raise FormErrors({"edited": f"{error.message}. Nothing was decided."}) from error


def _preview(approval: Approval, form: Form) -> Preview:
    """Raises FormErrors for an edit that changes nothing or cannot run."""
    changed, edit = _edited(approval, form), edit_of(approval)
    if changed == approval.input:
        raise FormErrors({"edited": "This is the call as it was. Change it, or allow it as it is."})
    submissions_form = {f"{approval.id}.do": "edit", f"{approval.id}.input": json.dumps(changed)}
    try:
        submissions.confirmations([approval], submissions_form)
    except FormErrors as error:
        raise FormErrors({"edited": " ".join(error.errors.values())}) from error
    names = ("text", "as", "json")
    fields = {name: field_text(form, name) for name in names if name in form}
    return Preview(_change_of(approval, edit, changed), fields)


def _change_of(approval: Approval, edit: Edit, changed: Mapping[str, Any]) -> Change:
    if edit.field is not None and {**changed, edit.field: ""} == {**approval.input, edit.field: ""}:
        return Change(
            edit.field, diff(str(approval.input[edit.field]), str(changed[edit.field]), context=None)
        )
    shown = (json.dumps(value, ensure_ascii=False, indent=2) for value in (approval.input, changed))
    return Change("the whole input as JSON", diff(*shown, context=None))


# -- batches


@dataclass(frozen=True)
class Result:
    """What happened to one call of a batch."""

    id: str
    call: str
    done: bool
    said: str


@router.post("/inbox/batch")
async def decide_batch(request: Request, services: PagesDep, user: UserDep) -> Response:
    """Decides on each ticked call on its own; the result says what happened to each."""
    fields = await read_form(request, services, user)
    ticked = [str(value) for value in (await request.form()).getlist("call")]  # it was read already
    results = [await _decide_one(services, user, one, fields) for one in dict.fromkeys(ticked)]
    partly = request.headers.get("hx-request") == "true"
    return pages.page(
        request,
        "results.html.j2" if partly else "results_page.html.j2",
        user=user.principal,
        reader=user,
        nav="inbox",
        results=results,
    )


_DONE = {"allow": "Allowed.", "deny": "Denied."}


async def _decide_one(services: Pages, user: User, ticked: str, form: Form) -> Result:
    approval_id, _, digest = ticked.partition(":")
    if field_text(form, "do") not in _DONE:
        raise InvalidInput("a batch is allowed or denied", "do")
    try:
        approval = await approval_for(services, user, approval_id, Action.DECIDE)
    except (NotFound, Forbidden) as error:
        return Result(approval_id, approval_id, False, str(error))
    name = f"{approval.tool_name} {summary(approval.input)}"
    if digest != approval.digest:
        return Result(approval_id, name, False, "It is not the call that was shown any more: open it.")
    if field_text(form, "do") == "allow" and not is_whole(approval):
        return Result(
            approval_id, name, False, "Its line does not say all that it does: open it to allow it."
        )
    try:
        await _decide(services, user, approval, form)
    except FormErrors as error:
        return Result(approval_id, name, False, " ".join(error.errors.values()))
    except HitlError as error:
        now = await services.store.get_approval(approval_id, None)
        return Result(approval_id, name, False, _first(now) or str(error))
    return Result(approval_id, name, True, _DONE[field_text(form, "do")])
