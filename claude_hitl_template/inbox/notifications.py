"""A person's own notifications: the devices that get pushes, and how and when each channel is used."""

import secrets
import zoneinfo
from collections.abc import Mapping
from functools import cache
from typing import Any

from fastapi import APIRouter, Request
from pydantic import ValidationError
from starlette.responses import JSONResponse, RedirectResponse, Response

from claude_hitl_template.domain.models import new_id, utcnow
from claude_hitl_template.domain.notices import APPROVAL_KINDS, EVERY_WORKSPACE, Channel, NoticeKind
from claude_hitl_template.domain.people import Action
from claude_hitl_template.domain.policy.tiers import SEVERITIES
from claude_hitl_template.errors import InvalidInput, NotFound
from claude_hitl_template.inbox import pages
from claude_hitl_template.inbox.forms import Form, PagesDep, UserDep, check, names_of, read_form, readable
from claude_hitl_template.inbox.services import Pages, User
from claude_hitl_template.notify import slack
from claude_hitl_template.notify.email import mail_address
from claude_hitl_template.notify.push_keys import Subscription
from claude_hitl_template.notify.services import service_name
from claude_hitl_template.presentation.browsers import describe

router = APIRouter()
DIGESTS = {"": "At once", "300": "Every 5 minutes", "900": "Every 15 minutes", "3600": "Every hour"}
KINDS = {
    "web_push": "Device",
    "email": "Mail",
    "apprise": "Other service",
    "slack": "Slack, for the workspace",
}
SLACK_KINDS: tuple[NoticeKind, ...] = (*APPROVAL_KINDS, "session.failed")
_SAID = {
    "saved": "Saved.",
    "removed": "Removed.",
    "tested": "A test is on its way.",
    "on": "This device is on.",
    "connected": "Connected. The buttons in Slack decide for you now: press again.",
    "disconnected": "Disconnected.",
}


@router.get("/inbox/notifications")
async def show(request: Request, services: PagesDep, user: UserDep) -> Response:
    """The page of the reader's own channels."""
    return await _page(request, services, user, said=_SAID.get(request.query_params.get("done", ""), ""))


async def _page(
    request: Request,
    services: Pages,
    user: User,
    *,
    said: str = "",
    status: int = 200,
    wrong: str = "",
    typed: Form | None = None,
    errors: Mapping[str, str] | None = None,
) -> Response:
    """`wrong` is the id of the channel whose form is shown again as `typed`, with `errors` by field."""
    return pages.page(
        request,
        "notifications.html.j2",
        status=status,
        user=user.principal,
        reader=user,
        channels=await _channels(services, user),
        kinds=KINDS,
        severities=SEVERITIES,
        digests=DIGESTS,
        zones=_zones(),
        nonce=secrets.token_hex(16),
        said=said,
        has_mail=services.has_mail,
        managed=await names_of(services, readable(user, Action.MANAGE)),
        links=await _links(services, user),
        presses_url=f"{services.slack.pages_url}/slack/interactions",
        wrong=wrong,
        typed=typed or {},
        errors=errors or {},
    )


@cache
def _zones() -> list[str]:
    return sorted(zoneinfo.available_timezones())


async def _channels(services: Pages, user: User) -> list[Channel]:
    """The user's own, and those of Slack in workspaces that the user manages."""
    mine = await services.store.list_channels(None, principal_id=user.principal.id)
    found = [one for one in mine if one.kind != "slack"]
    for workspace_id in readable(user, Action.MANAGE):
        found += [one for one in await services.store.list_channels(workspace_id) if one.kind == "slack"]
    return found


async def _links(services: Pages, user: User) -> list[Channel]:
    """The users of Slack that decide as this user (`inbox/slack.py`)."""
    mine = await services.store.list_channels(None, principal_id=user.principal.id)
    return [one for one in mine if one.kind == "slack" and one.enabled]


async def _channel(services: Pages, user: User, channel_id: str) -> Channel:
    """One that `_channels` has. Raises NotFound."""
    found = next((one for one in await _channels(services, user) if one.id == channel_id), None)
    if found is None:
        raise NotFound(f"there is no channel {channel_id!r}")
    return found


# -- devices


@router.get("/inbox/notifications/device")
async def device(services: PagesDep, user: UserDep) -> Response:
    """What a script needs to subscribe this browser."""
    return JSONResponse({"key": services.push_key, "csrf": user.csrf})


@router.post("/inbox/notifications/devices")
async def add_device(request: Request, services: PagesDep, user: UserDep) -> Response:
    """Keeps the subscription of the browser that asks. It belongs to the person who turned it on last, and takes the place
    and the settings of the one that it `replaces`."""
    form = await read_form(request, services, user)
    subscription = Subscription.of(form)
    services.targets.check(subscription.endpoint)
    replaced = await _forget(services, user, subscription.fingerprint, form.get("replaces", ""))
    channel = _own(user).but(name=describe(request.headers.get("user-agent", "")))
    if replaced is not None:
        kept = ("name", "kinds", "min_severity", "quiet_hours", "digest_s", "enabled")
        channel = channel.but(**{name: getattr(replaced, name) for name in kept})
    channel = channel.but(settings={"device": subscription.fingerprint})
    await services.store.add_channel(channel, subscription.model_dump(), by=user.actor)
    return Response(status_code=204)


async def _forget(services: Pages, user: User, fingerprint: str, replaces: str) -> Channel | None:
    """Removes the channels of this subscription, of every person. Returns the own channel whose place the new one takes."""
    old = Subscription(endpoint=replaces, p256dh="", auth="").fingerprint if replaces else ""
    replaced = None
    for channel in await services.store.list_channels(None):
        mine = channel.principal_id == user.principal.id
        found = channel.settings.get("device")
        if channel.kind == "web_push" and (found == fingerprint or (mine and found == old)):
            await services.store.remove_channel(channel.id, None, by=user.actor)
            replaced = channel if mine else replaced
    return replaced


# -- other channels


@router.post("/inbox/notifications/channels")
async def add_channel(request: Request, services: PagesDep, user: UserDep) -> Response:
    """Adds a mail address, another service by its URL, or, for a workspace that the user manages, a channel of Slack."""
    form = await read_form(request, services, user)
    try:
        channel, secret = _new(services, user, form)
    except InvalidInput as error:
        kind, errors = form.get("kind", ""), {error.field: error.message}
        return await _page(request, services, user, status=400, wrong=kind, typed=form, errors=errors)
    await services.store.add_channel(channel, secret, by=user.actor)
    return _done(request, "added")


def _new(services: Pages, user: User, form: Form) -> tuple[Channel, Mapping[str, str]]:
    """The channel that a form adds, and its secrets. Raises InvalidInput that names the form's field."""
    given = form.get("target", "").strip()
    own = _own(user)
    match form.get("kind", ""):
        case "slack":
            workspace = form.get("workspace", "")
            check(user, workspace, Action.MANAGE, "there is no such workspace, or you may not see it")
            settings, secret = slack.checked(
                given,
                form.get("token", "").strip(),
                signing_secret=form.get("signing_secret", "").strip(),
                show_input=form.get("show_input") == "on",
            )
            about = {"kind": "slack", "name": given, "settings": settings, "kinds": SLACK_KINDS}
            return own.but(**about, workspace_id=workspace, principal_id=None), secret
        case "email" if services.has_mail:
            address = mail_address(given)
            return own.but(kind="email", name=address, settings={"address": address}), {}
        case "apprise":
            return own.but(kind="apprise", name=service_name(given, services.targets)), {"url": given}
        case _:
            raise InvalidInput("this service has no such channel", "kind")


def _own(user: User) -> Channel:
    """A channel of the user's own, to a device."""
    return Channel(
        id=new_id("chan"),
        kind="web_push",
        workspace_id=EVERY_WORKSPACE,
        principal_id=user.principal.id,
        created_at=utcnow(),
    )


# -- each channel


@router.post("/inbox/notifications/{channel_id}")
async def change(channel_id: str, request: Request, services: PagesDep, user: UserDep) -> Response:
    """Saves a channel's settings, removes it, or sends a test over it."""
    form = await read_form(request, services, user)
    channel = await _channel(services, user, channel_id)
    if form.get("do") == "remove":
        await services.store.remove_channel(channel.id, None, by=user.actor)
        return _done(request, "removed")
    if form.get("do") == "test":
        notice_id = f"ntce_{form.get('nonce') or secrets.token_hex(16)}"
        await services.store.send_test(channel.id, None, notice_id=notice_id, by=user.actor)
        return _done(request, "tested")
    try:
        changes = changes_of(channel, form)
    except InvalidInput as error:
        errors = {error.field: error.message}
        return await _page(request, services, user, status=400, wrong=channel.id, typed=form, errors=errors)
    await services.store.change_channel(channel.id, None, changes, by=user.actor)
    return _done(request, "saved")


def changes_of(channel: Channel, form: Form) -> dict[str, Any]:
    """The fields that a form changes. Raises InvalidInput that names the form's field."""
    start, end = form.get("quiet_start", ""), form.get("quiet_end", "")
    if bool(start) != bool(end):
        raise InvalidInput("quiet hours need a start and an end", "quiet_start")
    zone = form.get("time_zone", "")
    given: dict[str, Any] = {
        "enabled": form.get("enabled") == "on",
        "min_severity": form.get("min_severity", ""),
        "digest_s": int(form["digest"]) if form.get("digest") in set(DIGESTS) - {""} else None,
        "quiet_hours": {"start": start, "end": end, "time_zone": zone} if start else None,
    }
    try:
        checked = Channel.model_validate({**channel.model_dump(), **given})
    except ValidationError as error:
        first = error.errors()[0]
        place = str(first["loc"][-1])
        field = {"start": "quiet_start", "end": "quiet_end"}.get(place, place)
        raise InvalidInput(first["msg"].removeprefix("Value error, "), field) from error
    return {name: getattr(checked, name) for name in given}


def _done(request: Request, what: str) -> Response:
    return RedirectResponse(f"{request.scope.get('root_path', '')}/inbox/notifications?done={what}", 303)
