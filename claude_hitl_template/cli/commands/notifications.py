"""`hitl notifications`: what was sent about approvals and sessions, over which channel, and what came out of it."""

from collections.abc import Iterator
from itertools import islice
from typing import Annotated, Any
from urllib.parse import quote

import typer

from claude_hitl_template.cli.commands.workspaces import Workspace, administration
from claude_hitl_template.cli.common import print_json
from claude_hitl_template.cli.terminal.tables import print_table
from claude_hitl_template.config.settings import Settings
from claude_hitl_template.domain.notices import DeliveryState
from claude_hitl_template.errors import ConfigError, Forbidden, NotFound, Unauthorized
from claude_hitl_template.presentation.text import one_line, visible

app = typer.Typer(help="Notifications: what was sent, over which channels, and what came out of it.")
PATH = "/v1/notifications"
CHARS = 60
FAILING = ("failing", "gone")

AsJson = Annotated[bool, typer.Option("--json", help="As JSON.")]


@app.callback(invoke_without_command=True)
def list_notifications(
    context: typer.Context,
    *,
    state: Annotated[DeliveryState | None, typer.Option(help="Only those in this state.")] = None,
    session: Annotated[str | None, typer.Option(metavar="ID", help="Only those about this session.")] = None,
    channel: Annotated[str | None, typer.Option(metavar="ID", help="Only those of this channel.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many, the newest first.")] = 50,
    workspace: Workspace = None,
    as_json: AsJson = False,
) -> None:
    """Lists notifications of a workspace, the newest first. They are kept for two weeks."""
    if context.invoked_subcommand is not None:
        return
    wanted = {"states[]": state, "session_id": session, "channel_id": channel}
    with administration(workspace) as client:
        filters = {name: value for name, value in wanted.items() if value}
        found = list(islice(client.pages(PATH, **filters), limit))
    if as_json:
        print_json(found)
        return
    heads = ("ID", "STATE", "OVER", "AT", "WHAT", "WHY")
    if found:
        print_table(map(_row, found), heads, optional=("WHY",))
    else:
        typer.echo("no notifications")


@app.command()
def channels(workspace: Workspace = None, as_json: AsJson = False) -> None:
    """Lists channels, and how each does: those of the workspace; for an administrator, all."""
    with administration(workspace) as client:
        found = client.get(f"{PATH}/channels")["data"]
    if as_json:
        print_json(found)
        return
    heads = ("ID", "KIND", "NAME", "STATUS", "LAST", "WHY")
    if found:
        print_table(map(_channel_row, found), heads, optional=("WHY",))
    else:
        typer.echo("no channels; docs/notifications.md says how to add one")


@app.command()
def retry(
    notification_id: Annotated[str, typer.Argument(metavar="ID", help="The id of a notification.")],
    workspace: Workspace = None,
) -> None:
    """Sends a notification again, whatever came out of it before."""
    with administration(workspace) as client:
        again = client.post(f"{PATH}/{quote(notification_id, safe='')}/redeliver")
    typer.echo(f"{again['id']} is sent again over {visible(again['over'])}")


def failing_channels(settings: Settings) -> list[str]:
    """What to know of each channel that fails; [] where no administrator's key is at hand, or the service has no channels
    yet. Raises HitlError if the service does not answer."""
    try:
        with administration(settings=settings) as client:
            found = client.get(f"{PATH}/channels")["data"]
    except (ConfigError, Forbidden, NotFound, Unauthorized):
        return []
    return list(_failures(found))


def _failures(channels: list[dict[str, Any]]) -> Iterator[str]:
    for one in channels:
        if one["state"]["status"] in FAILING and one["enabled"]:
            named = f"{one['kind']} {one['name']}".strip()
            yield visible(f"{named} ({one['id']}): {one['state']['last_error']}")


def _row(one: dict[str, Any]) -> tuple[str, ...]:
    return (
        one["id"],
        one["state"].replace("_", " "),
        one_line(one["over"], CHARS),
        one["created_at"],
        one_line(one["title"], CHARS),
        one_line(one["last_error"] or "", CHARS),
    )


def _channel_row(one: dict[str, Any]) -> tuple[str, ...]:
    state = one["state"]
    return (
        one["id"],
        one["kind"],
        one_line(one["name"], CHARS),
        state["status"] if one["enabled"] else "off",
        state["last_at"] or "",
        one_line(state["last_error"] or "", CHARS),
    )
