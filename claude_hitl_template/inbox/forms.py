"""What a browser sends: the fields of a form, each once."""

from collections.abc import Mapping, Sequence
from typing import Annotated

from fastapi import Depends, Request

from claude_hitl_template.domain.models import Approval
from claude_hitl_template.domain.notices import Channel
from claude_hitl_template.domain.people import Action
from claude_hitl_template.errors import Forbidden, NotFound, TooLarge
from claude_hitl_template.inbox.services import Pages, User

MAX_FORM_BYTES, MAX_FIELDS = 16 * 1024 * 1024, 1000

type Form = Mapping[str, str]


async def _pages(request: Request) -> Pages:
    return request.app.state.pages


async def _user(request: Request) -> User:
    services: Pages = request.app.state.pages
    return await services.user(request)


PagesDep = Annotated[Pages, Depends(_pages)]
UserDep = Annotated[User, Depends(_user)]


async def read_form(request: Request, services: Pages, user: User) -> Form:
    """The fields of a form that a page of this service sent. Raises TooLarge, and what `check_csrf` does."""
    length = request.headers.get("content-length", "")
    if not length.isdecimal() or int(length) > MAX_FORM_BYTES:
        raise TooLarge(f"a form has at most {MAX_FORM_BYTES} bytes, and says how many")
    form = await request.form(max_files=0, max_fields=MAX_FIELDS, max_part_size=MAX_FORM_BYTES)
    await services.check_csrf(request, user)
    return {name: value for name, value in form.items() if isinstance(value, str)}


async def approval_for(
    services: Pages, user: User, approval_id: str, action: Action = Action.READ
) -> Approval:
    """An approval in a workspace of the user. Raises NotFound, and Forbidden where the role does not permit it."""
    approval = await services.store.get_approval(approval_id, None)
    check(user, approval.workspace_id, action, f"there is no approval {approval_id!r}")
    return approval


def check(user: User, workspace_id: str, action: Action, missing: str) -> None:
    """Raises NotFound for what is in a workspace that the user may not see, Forbidden for what is not permitted."""
    if not user.may(Action.READ, workspace_id):
        raise NotFound(missing)
    if not user.may(action, workspace_id):
        raise Forbidden(
            f"your role in this workspace does not permit to {action.value}; an administrator gives roles"
        )


async def names_of(services: Pages, workspace_ids: Sequence[str]) -> dict[str, str]:
    """The names of these workspaces by id, in the order of their names."""
    if len(workspace_ids) < 2:
        return dict.fromkeys(workspace_ids, "")  # there is nothing to choose
    known = {workspace.id: workspace.name for workspace in await services.store.list_workspaces()}
    found = {workspace_id: known.get(workspace_id, workspace_id) for workspace_id in workspace_ids}
    return dict(sorted(found.items(), key=lambda pair: pair[1].casefold()))


async def failing_channels(services: Pages, user: User, workspace_ids: Sequence[str]) -> list[Channel]:
    """The channels of these workspaces that fail, as far as the user manages them."""
    found: list[Channel] = []
    for workspace_id in workspace_ids:
        if user.may(Action.MANAGE, workspace_id):
            channels = await services.store.list_channels(workspace_id)
            found += [one for one in channels if one.state.status in ("failing", "gone")]
    return found


def readable(user: User, action: Action = Action.READ) -> list[str]:
    """The workspaces in which the user may do this."""
    return [workspace_id for workspace_id in user.workspace_ids if user.may(action, workspace_id)]
