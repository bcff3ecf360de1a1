"""Decisions of the inbox's forms: on one call as its card shows it, or on several that are ticked."""

import functools
import hashlib
import json
import secrets
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import RedirectResponse, Response

from claude_hitl_template.domain.events import UserToolConfirmation
from claude_hitl_template.domain.models import CLAIM_S, Approval, ApprovalState
from claude_hitl_template.domain.people import Action
from claude_hitl_template.errors import Conflict, Forbidden, HitlError, InvalidInput, NotFound
from claude_hitl_template.inbox import pages
from claude_hitl_template.inbox.approvals import Preview, card_page
from claude_hitl_template.inbox.card import Change, Edit, changed_input, edit_of, is_long, offers_for
from claude_hitl_template.inbox.forms import Form, PagesDep, UserDep, approval_for, read_form
from claude_hitl_template.inbox.services import Pages, User
from claude_hitl_template.presentation import submissions
from claude_hitl_template.presentation.diff import diff
from claude_hitl_template.presentation.sessions import fate
from claude_hitl_template.presentation.submissions import FormErrors, field_text
from claude_hitl_template.presentation.text import parse_input, summary
from claude_hitl_template.store.waiting import is_whole

router = APIRouter()
MAX_BATCH = 200
_DONE = {"allow": "Allowed.", "deny": "Denied."}
_MIXED = "Calls of different severity were ticked: decide on those of one severity at a time."
_CRITICAL = "A critical call is decided on its own: open it."

type Show = Callable[..., Awaitable[Response]]


# -- one call


@router.post("/inbox/a/{approval_id}/decide")
async def decide(approval_id: str, request: Request, services: PagesDep, user: UserDep) -> Response:
    """Decides on a call as it was shown, shows an edit once more, or shows the form again with what is wrong."""
    approval = await approval_for(services, user, approval_id, Action.DECIDE)
    form = await read_form(request, services, user)
    show: Show = functools.partial(card_page, request, services, user)
    if field_text(form, "digest") != approval.digest:
        said = (
            "This call is not the one that was shown to you any more, so nothing was decided. Read it again."
        )
        return await show(approval, status=409, said=said, tone="bad")
    try:
        if field_text(form, "do") == "preview" and approval.state is ApprovalState.PENDING:
            return await show(approval, typed=form, preview=_preview(approval, form))
        decided = await _decide(services, user, approval, form)
    except (FormErrors, Forbidden, Conflict) as error:
        return await _refused(show, await services.store.get_approval(approval_id, None), form, error)
    if pages.is_partial(request):
        waits = decided.state is ApprovalState.PENDING
        said = "Your agreement is recorded. Others must allow it, too." if waits else ""
        return await show(decided, said=said, just_decided=True)
    return RedirectResponse(f"{request.scope.get('root_path', '')}/inbox/a/{approval_id}", 303)


@router.post("/inbox/a/{approval_id}/claim")
async def claim(approval_id: str, request: Request, services: PagesDep, user: UserDep) -> Response:
    """Tells others that the reader looks at a call, or no longer does."""
    approval = await approval_for(services, user, approval_id, Action.DECIDE)
    form = await read_form(request, services, user)
    seconds = CLAIM_S if field_text(form, "do") == "claim" else 0
    show: Show = functools.partial(card_page, request, services, user)
    try:
        now = await services.store.claim_approval(
            approval_id, approval.workspace_id, seconds=seconds, by=user.actor
        )
    except (Forbidden, Conflict) as error:
        now = await services.store.get_approval(approval_id, None)
        return await show(now, status=409, said=str(error), tone="warn")
    if pages.is_partial(request):
        return await show(now)
    return RedirectResponse(f"{request.scope.get('root_path', '')}/inbox/a/{approval_id}", 303)


async def _refused(show: Show, now: Approval, form: Form, error: Exception) -> Response:
    """The card again, with why nothing was recorded."""
    if isinstance(error, FormErrors):
        return await show(now, status=400, typed=form, errors=error.errors)
    if isinstance(error, Forbidden):
        return await show(now, status=403, said=str(error), tone="bad")
    said = f"Your decision was not recorded: {_first(now) or error}"
    return await show(now, status=409, said=said, tone="warn")


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
    """The rule that was chosen; True for one with a digest, which is the one that "remember" alone records."""
    chosen = field_text(form, "rule")
    found = offers_for(approval)
    if not chosen.isdecimal() or int(chosen) >= len(found):
        raise FormErrors({"rule": "Choose one of the rules. Nothing was decided."})
    rule = found[int(chosen)].rule
    return True if rule.digest is not None else rule.rule


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
    results = await _decide_all(services, user, list(dict.fromkeys(ticked)), fields)
    partly = pages.is_partial(request)
    return pages.page(
        request,
        "results.html.j2" if partly else "results_page.html.j2",
        user=user.principal,
        reader=user,
        nav="inbox",
        results=results,
    )


async def _decide_all(services: Pages, user: User, ticked: list[str], form: Form) -> list[Result]:
    """Decides on each call on its own. Raises InvalidInput for another choice, and for too many calls."""
    if field_text(form, "do") not in _DONE:
        raise InvalidInput("a batch is allowed or denied", "do")
    if len(ticked) > MAX_BATCH:
        raise InvalidInput(f"at most {MAX_BATCH} calls at once", "call")
    found: dict[str, Approval] = {}
    results: dict[str, Result] = {}
    for one in ticked:
        approval_id = one.partition(":")[0]
        try:
            found[one] = await approval_for(services, user, approval_id, Action.DECIDE)
        except (NotFound, Forbidden) as error:
            results[one] = Result(approval_id, approval_id, False, str(error))
    mixed = len({approval.severity for approval in found.values()}) > 1
    for one, approval in found.items():
        why = _MIXED if mixed else _CRITICAL if approval.severity == "critical" and len(found) > 1 else ""
        refused = Result(approval.id, _named(approval), False, why)
        results[one] = (
            refused if why else await _decide_one(services, user, approval, one.partition(":")[2], form)
        )
    return [results[one] for one in ticked]


def _named(approval: Approval) -> str:
    return f"{approval.tool_name} {summary(approval.input)}"


async def _decide_one(services: Pages, user: User, approval: Approval, digest: str, form: Form) -> Result:
    approval_id, name = approval.id, _named(approval)
    if digest != approval.digest:
        return Result(approval_id, name, False, "It is not the call that was shown any more: open it.")
    if field_text(form, "do") == "allow" and not is_whole(approval):
        return Result(
            approval_id, name, False, "Its line does not say all that it does: open it to allow it."
        )
    try:
        decided = await _decide(services, user, approval, form)
    except FormErrors as error:
        return Result(approval_id, name, False, " ".join(error.errors.values()))
    except HitlError as error:
        now = await services.store.get_approval(approval_id, None)
        return Result(approval_id, name, False, _first(now) or str(error))
    if decided.state is ApprovalState.PENDING:
        return Result(approval_id, name, True, "Your agreement is recorded. Others must allow it, too.")
    return Result(approval_id, name, True, _DONE[field_text(form, "do")])
