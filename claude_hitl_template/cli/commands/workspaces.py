"""`hitl workspaces`: who belongs to which workspace, with which roles."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Annotated, Any
from urllib.parse import quote

import typer

from claude_hitl_template.cli.client import Client
from claude_hitl_template.cli.terminal.tables import print_table
from claude_hitl_template.config.secret_files import operator_key
from claude_hitl_template.config.settings import Settings
from claude_hitl_template.errors import InvalidInput
from claude_hitl_template.presentation.text import one_line, visible

app = typer.Typer(help="Workspaces, which own sessions, and who belongs to them.", no_args_is_help=True)
PATH = "/v1/admin/workspaces"
PRINCIPALS = "/v1/admin/principals"
NAME_CHARS = 60

Workspace = Annotated[
    str | None,
    typer.Option("--workspace", metavar="NAME", help="Name or id. Default: the default workspace."),
]


@contextmanager
def administration(workspace: str | None = None, *, settings: Settings | None = None) -> Generator[Client]:
    """Yields a client for the routes of administrators, in this workspace.

    On the service's machine it has the operator key; elsewhere the API key, which must be an administrator's.
    """
    settings = settings or Settings.load()
    here = settings.serve_url is None
    client = Client(settings.base_url, operator_key(settings)) if here else Client.open(settings)
    try:
        if workspace is not None:
            client.in_workspace(chosen(client, workspace)["id"])
        yield client
    finally:
        client.close()


def chosen(client: Client, wanted: str | None) -> dict[str, Any]:
    """The workspace with this name or id; the default one for None. Raises InvalidInput."""
    known = client.get(PATH)["data"]
    found = [one for one in known if one["default"]] if wanted is None else []
    found = found or [one for one in known if wanted in (one["name"], one["id"])]
    if not found:
        names = ", ".join(visible(one["name"]) for one in known) or "none"
        raise InvalidInput(f"there is no workspace {wanted!r}; there are: {names}", "--workspace")
    return found[0]


def principal(client: Client, name: str) -> dict[str, Any]:
    """The user or service account with this name or id. Raises InvalidInput."""
    for one in client.get(PRINCIPALS)["data"]:
        if name in (one["name"], one["id"]):
            return one
    raise InvalidInput(f"there is no user or service account {name!r}", "NAME")


@app.command("list")
def list_workspaces() -> None:
    """Every workspace, and whether it separates duties."""
    with administration() as client:
        rows = [
            (one["id"], "yes" if one["separation_of_duties"] else "no", one_line(one["name"], NAME_CHARS))
            for one in client.get(PATH)["data"]
        ]
    print_table(rows, ("ID", "SEPARATES DUTIES", "NAME"))


@app.command()
def create(name: Annotated[str, typer.Argument(help="Its name.")]) -> None:
    """Creates a workspace, which has no members yet."""
    with administration() as client:
        made = client.post(PATH, {"name": name})
    typer.echo(f"{made['id']}   {visible(made['name'])}")


@app.command("set")
def change(
    name: Annotated[str, typer.Argument(help="Name or id of the workspace.")],
    separation_of_duties: Annotated[
        bool | None,
        typer.Option(help="Whether someone who asked for a session may not decide on its calls."),
    ] = None,
    rename: Annotated[str | None, typer.Option(metavar="NAME", help="Its new name.")] = None,
) -> None:
    """Changes a workspace."""
    wanted = {"separation_of_duties": separation_of_duties, "name": rename}
    changes = {field: value for field, value in wanted.items() if value is not None}
    if not changes:
        raise InvalidInput("nothing to change; see ./hitl workspaces set --help")
    with administration() as client:
        found = chosen(client, name)
        changed = client.post(
            f"{PATH}/{quote(found['id'], safe='')}", {**changes, "version": found["version"]}
        )
    duties = "separates duties" if changed["separation_of_duties"] else "does not separate duties"
    typer.echo(f"{visible(changed['name'])} {duties}")


@app.command()
def members(workspace: Workspace = None) -> None:
    """Who belongs to a workspace, and what each may do there."""
    with administration() as client:
        found = chosen(client, workspace)
        data = client.get(f"{PATH}/{quote(found['id'], safe='')}/members")["data"]
    rows = [
        (one_line(one["name"], NAME_CHARS), one["kind"].replace("_", " "), ", ".join(one["roles"]))
        for one in data
    ]
    print_table(rows, ("NAME", "KIND", "ROLES"))


@app.command()
def roles(
    name: Annotated[str, typer.Argument(help="Name or id of a user or service account.")],
    given: Annotated[
        list[str] | None,
        typer.Argument(metavar="[ROLE]...", help="viewer, requester, approver, operator; none removes it."),
    ] = None,
    workspace: Workspace = None,
) -> None:
    """Sets the roles that a user or service account has in a workspace."""
    with administration() as client:
        found, who = chosen(client, workspace), principal(client, name)
        path = f"{PATH}/{quote(found['id'], safe='')}/members/{quote(who['id'], safe='')}"
        member = client.put(path, {"roles": given or [], "version": who["version"]})
    has = f"is {', '.join(member['roles'])} in" if member["roles"] else "does not belong to"
    typer.echo(f"{visible(member['name'])} {has} {visible(found['name'])}")
