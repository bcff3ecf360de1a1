"""Decisions in Slack: presses of the buttons of a message, and the page that connects a user of Slack with a person.

A press decides through the same method of the Store as a form of the inbox, as the person who connected the user of Slack.
It is acknowledged once the decision is committed; messages in Slack follow.
"""

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import structlog
from fastapi import APIRouter, Request
from starlette.background import BackgroundTask
from starlette.responses import PlainTextResponse, RedirectResponse, Response

from claude_hitl_template.api.strict_json import loads, read_body
from claude_hitl_template.domain.events import UserToolConfirmation
from claude_hitl_template.domain.models import Approval, ApprovalState
from claude_hitl_template.domain.notices import EVERY_WORKSPACE, Channel
from claude_hitl_template.domain.people import Action, Actor
from claude_hitl_template.domain.rate_limit import network_of
from claude_hitl_template.errors import (
    Conflict,
    Forbidden,
    HitlError,
    InvalidInput,
    NotFound,
    NotWaiting,
    TooLarge,
    Unauthorized,
)
from claude_hitl_template.inbox import pages
from claude_hitl_template.inbox.forms import PagesDep, UserDep, check, read_form
from claude_hitl_template.inbox.services import Pages, User
from claude_hitl_template.notify.sender import Sent
from claude_hitl_template.notify.slack import escaped, may_allow, message_of
from claude_hitl_template.notify.slack_presses import (
    MAX_BYTES,
    Press,
    SlackUser,
    check_signature,
    claimed_channel,
    payload_in,
    press_of,
)
from claude_hitl_template.presentation.sessions import card_url, fate
from claude_hitl_template.presentation.text import visible
from claude_hitl_template.store.outbox import outcome_notice
from claude_hitl_template.store.waiting import shown_call

log = structlog.get_logger()
router = APIRouter()
LINK = "inbox/notifications/slack/link"
_REFUSALS: tuple[tuple[type[HitlError], int], ...] = (
    (TooLarge, 413),
    (InvalidInput, 400),
    (Unauthorized, 401),
    (NotFound, 404),
)
_CHANGED = "This call is not the one that was shown here any more, so nothing was decided. Open it."
_UNSEEN = "This message does not show all of the call, so nothing was decided. Open it to allow it."
_MISSING = "This call does not exist any more, or you may not see it."
_USED = (
    "This link was used, or was made before a later change. Press the button in Slack again for a new one."
)


@dataclass(frozen=True)
class _Answer:
    """What only the person who pressed sees, in Slack's markup ("": nothing), and the call whose message is replaced."""

    text: str = ""
    decided: Approval | None = None


# -- presses


@router.post("/slack/interactions")
async def take_press(request: Request, services: PagesDep) -> Response:
    """What Slack sends when a button is pressed. Nothing in it is believed before its signature is verified."""
    failures, network = services.slack.failures, network_of(request.client.host if request.client else "")
    wait_s = failures.wait_s(network)
    if wait_s:
        return PlainTextResponse("too many refused requests", 429, {"retry-after": str(int(wait_s) + 1)})
    failures.take(network)  # counted as refused until it is not, so that concurrent ones count
    try:
        channel, press = await _verified(request, services)
    except (InvalidInput, Unauthorized, NotFound) as error:
        status = next(status for kind, status in _REFUSALS if isinstance(error, kind))
        log.warning("a press in Slack was refused", why=str(error), network=network)
        return PlainTextResponse(str(error), status)
    failures.give_back(network)
    try:
        async with asyncio.timeout(services.slack.answer_s):
            answer = await _answer(services, channel, press)
    except TimeoutError:
        return PlainTextResponse("the decision is not confirmed; press again", 503)
    return Response(status_code=200, background=BackgroundTask(_post, services, channel, press, answer))


async def _verified(request: Request, services: Pages) -> tuple[Channel, Press]:
    """The channel and the press that Slack signed. Raises InvalidInput, NotFound, Unauthorized."""
    body = await read_body(request, MAX_BYTES)
    payload = loads(payload_in(body))
    channel_id = claimed_channel(payload)
    channel = await services.store.get_channel(channel_id, None)
    secret = (await services.store.channel_secret(channel_id)).get("signing_secret")
    if channel.kind != "slack" or not secret:
        raise NotFound(f"there is no channel {channel_id!r} that takes presses")
    timestamp, signature = (
        request.headers.get(f"x-slack-{name}", "") for name in ("request-timestamp", "signature")
    )
    check_signature(secret, body, timestamp, signature, services.slack.clock())
    return channel, press_of(payload, services.slack.targets)


async def _answer(services: Pages, channel: Channel, press: Press) -> _Answer:
    """Decides, as far as the press does and its person may."""
    if press.action == "open":
        return _Answer()
    link = await _find(services, press.by.link_id)
    if link is None or not link.enabled or link.principal_id is None:
        return _Answer(_ask_to_connect(services, press.by))
    try:
        person = await services.store.get_principal(link.principal_id)
        approval = await services.store.get_approval(press.approval_id, channel.workspace_id)
    except NotFound:
        return _Answer(_MISSING)
    if not person.may(Action.READ, approval.workspace_id):
        return _Answer(_MISSING)
    by = Actor(name=person.name, principal_id=person.id, key_id=link.id)
    said = await _decide(services, channel, approval, press, by)
    now = await services.store.get_approval(approval.id, channel.workspace_id)
    return _Answer(escaped(visible(said)), now if now.state is not ApprovalState.PENDING else None)


async def _decide(services: Pages, channel: Channel, approval: Approval, press: Press, by: Actor) -> str:
    """Decides as the inbox does; the same press again has the same result. Returns what to say to who pressed."""
    if press.digest != approval.digest:
        return _CHANGED
    is_shown = channel.settings.get("show_input") is True and may_allow(shown_call(approval))
    if press.action == "allow" and not is_shown:
        return _UNSEEN
    confirmation = UserToolConfirmation.model_validate({
        "type": "user.tool_confirmation",
        "tool_use_id": approval.event_id,
        "result": press.action,
    })  # fmt: skip
    try:
        decided = await services.store.decide(approval.id, channel.workspace_id, confirmation, by=by)
    except (Conflict, NotWaiting) as error:
        now = await services.store.get_approval(approval.id, channel.workspace_id)
        return fate(now) if now.state is not ApprovalState.PENDING else str(error)
    except Forbidden as error:
        return str(error)
    log.info("decided in Slack", approval=approval.id, channel=channel.id, principal_id=by.principal_id)
    waits = decided.state is ApprovalState.PENDING
    return "Your agreement is recorded. Others must allow it, too." if waits else ""


def _ask_to_connect(services: Pages, who: SlackUser) -> str:
    token = services.slack.links.token(who)
    return (
        "Nothing was decided: you are not connected with a user of claude-hitl yet. "
        f"<{services.slack.pages_url}/{LINK}?token={token}|Connect>, then press again. "
        "The link is for you alone and works once, for 10 minutes."
    )


async def _post(services: Pages, channel: Channel, press: Press, answer: _Answer) -> None:
    """Sends an answer to Slack. What fails here is in the log; the message follows the call by its notices, too."""
    bodies: list[Mapping[str, Any]] = []
    if answer.decided is not None:
        link = card_url(services.slack.pages_url, answer.decided.id)
        notice = outcome_notice(answer.decided, services.slack.clock())
        bodies.append({"replace_original": True, **message_of(notice, link, channel_id=channel.id)})
    if answer.text:
        bodies.append({"response_type": "ephemeral", "replace_original": False, "text": answer.text})
    for body in bodies:
        sent = json.dumps(body).encode()
        outcome = await services.slack.poster.post(
            press.response_url, sent, {"content-type": "application/json"}
        )
        if not isinstance(outcome, Sent):
            log.warning("an answer did not reach Slack", channel=channel.id, why=outcome.why)


# -- connecting a user of Slack with a person


@router.get(f"/{LINK}")
async def show_link(request: Request, services: PagesDep, user: UserDep) -> Response:
    """Asks whether to connect. It changes nothing."""
    token = request.query_params.get("token", "")
    who, made_at = services.slack.links.read(token)
    channel = await _channel(services, user, who)
    await _unused(services, who, made_at)
    return pages.page(
        request,
        "slack_link.html.j2",
        user=user.principal,
        reader=user,
        token=token,
        who=who,
        channel=channel,
    )


@router.post(f"/{LINK}")
async def connect(request: Request, services: PagesDep, user: UserDep) -> Response:
    """Connects the user of Slack that a link is of with the person who sends the form."""
    form = await read_form(request, services, user)
    who, made_at = services.slack.links.read(form.get("token", ""))
    channel = await _channel(services, user, who)
    await _unused(services, who, made_at)
    await _keep(services, user, who, channel)
    return _done(request, "connected")


@router.post("/inbox/notifications/slack/{link_id}/disconnect")
async def disconnect(link_id: str, request: Request, services: PagesDep, user: UserDep) -> Response:
    """Ends a connection of the reader's own. Its record stays, so that no earlier link connects again."""
    await read_form(request, services, user)
    link = await _find(services, link_id)
    if link is None or link.kind != "slack" or link.principal_id != user.principal.id:
        raise NotFound("there is no such connection")
    settings = {**link.settings, "changed_at": services.slack.clock().isoformat()}
    changes = {"enabled": False, "settings": settings}
    await services.store.change_channel(link.id, None, changes, by=user.actor)
    return _done(request, "disconnected")


async def _channel(services: Pages, user: User, who: SlackUser) -> Channel:
    """The channel of a link, in a workspace that the user may see. Raises NotFound."""
    missing = "the channel of this link does not exist any more, or you may not see its workspace"
    channel = await services.store.get_channel(who.channel_id, None)
    check(user, channel.workspace_id, Action.READ, missing)
    return channel


async def _find(services: Pages, link_id: str) -> Channel | None:
    try:
        return await services.store.get_channel(link_id, None)
    except NotFound:
        return None


async def _unused(services: Pages, who: SlackUser, made_at: datetime) -> None:
    """Raises Conflict for a link that was used, or made before its connection was ended, and while there is one."""
    known = await _find(services, who.link_id)
    if known is not None and (
        known.enabled or datetime.fromisoformat(known.settings["changed_at"]) >= made_at
    ):
        raise Conflict(_USED)


async def _keep(services: Pages, user: User, who: SlackUser, channel: Channel) -> None:
    """Stores the connection, as a channel of the person that gets no notices, in place of one that ended. Raises Conflict if
    another person was first."""
    now = services.slack.clock()
    link = Channel(
        id=who.link_id,
        kind="slack",
        workspace_id=EVERY_WORKSPACE,
        principal_id=user.principal.id,
        name=f"{who.name or who.user} in {channel.name}"[:200],
        settings={"channel": channel.id, "team": who.team, "user": who.user, "changed_at": now.isoformat()},
        kinds=(),
        created_at=now,
    )
    if await _find(services, link.id) is not None:
        await services.store.remove_channel(link.id, None, by=user.actor)
    kept = await services.store.add_channel(link, {}, by=user.actor)
    if kept.principal_id != user.principal.id:
        raise Conflict(_USED)
    log.info("a user of Slack is connected", channel=channel.id, principal_id=user.principal.id)


def _done(request: Request, what: str) -> Response:
    return RedirectResponse(f"{request.scope.get('root_path', '')}/inbox/notifications?done={what}", 303)
