"""`hitl users`: people who sign in to the pages of the service."""

import sys
from typing import Annotated, Any
from urllib.parse import quote

import click
import typer

from claude_hitl_template.cli.client import Client
from claude_hitl_template.cli.commands.secrets import check_way
from claude_hitl_template.cli.commands.workspaces import (
    PRINCIPALS,
    Workspace,
    administration,
    chosen,
    principal,
)
from claude_hitl_template.cli.terminal.tables import print_table
from claude_hitl_template.config.passwords import check_length
from claude_hitl_template.config.settings import Settings
from claude_hitl_template.domain.people import EVERYWHERE, WORKSPACE_ROLES, Role
from claude_hitl_template.errors import InvalidInput
from claude_hitl_template.presentation.text import one_line, visible

app = typer.Typer(help="People who sign in to the pages of the service.", no_args_is_help=True)
NAME_CHARS = 60

Name = Annotated[str, typer.Argument(help="Name or id of the user.")]
Roles = Annotated[
    list[Role] | None,
    typer.Option("--role", help="Role in the workspace; admin is one of the whole service. May be repeated."),
]


@app.command("list")
def list_users() -> None:
    """Every user, with the roles by workspace."""
    with administration() as client:
        names = {one["id"]: one["name"] for one in client.get("/v1/admin/workspaces")["data"]}
        users = [one for one in client.get(PRINCIPALS)["data"] if one["kind"] == "user"]
    rows = [(one["id"], _state(one), _roles(one, names), one_line(one["name"], NAME_CHARS)) for one in users]
    print_table(rows, ("ID", "STATE", "ROLES", "NAME"))


@app.command()
def add(
    name: Annotated[str, typer.Argument(help="The name to sign in with; decisions are recorded under it.")],
    role: Roles = None,
    workspace: Workspace = None,
    email: Annotated[
        str | None, typer.Option(help="Address, by which a sign-in provider's user is recognised.")
    ] = None,
    password: Annotated[
        bool, typer.Option(help="Whether to set a password; without one the user signs in with the provider.")
    ] = True,
) -> None:
    """Makes a user. The password is asked for, or read from standard input: one line."""
    check_way(Settings.load().service_url)
    given = read_password() if password else None
    with administration() as client:
        place = chosen(client, workspace)
        roles = [one.value for one in role or ()]
        by_place = {
            place["id"]: [one for one in roles if one in WORKSPACE_ROLES],
            EVERYWHERE: [one for one in roles if one not in WORKSPACE_ROLES],
        }
        body = {
            "kind": "user",
            "name": name,
            "email": email,
            "roles": {where: there for where, there in by_place.items() if there},
        }
        made = client.post(PRINCIPALS, body)
        if given is not None:
            client.put(_of(made, "password"), {"password": given})
    has = (
        f"{', '.join(roles)} in {visible(place['name'])}"
        if roles
        else "without a role: ./hitl workspaces roles"
    )
    typer.echo(f"{made['id']}   {visible(made['name'])}, {has}")


@app.command("set-password")
def set_password(name: Name) -> None:
    """Sets a user's password, which is asked for, or read from standard input: one line. Signs the user out everywhere."""
    check_way(Settings.load().service_url)
    given = read_password()
    with administration() as client:
        user = _user(client, name)
        client.put(_of(user, "password"), {"password": given})
    typer.echo(f"{visible(user['name'])} has a new password, and is signed out everywhere")


@app.command("sign-out")
def sign_out(name: Name) -> None:
    """Signs a user's browsers out."""
    with administration() as client:
        user = _user(client, name)
        ended = client.delete(_of(user, "browser_sessions"))["browsers"]
    typer.echo(f"{visible(user['name'])} is signed out of {ended} browsers")


@app.command()
def disable(name: Name) -> None:
    """Shuts a user out at once: of the pages, and of what the user's keys open."""
    _set_disabled(name, disabled=True)


@app.command()
def enable(name: Name) -> None:
    """Lets a disabled user in again."""
    _set_disabled(name, disabled=False)


def _set_disabled(name: str, *, disabled: bool) -> None:
    with administration() as client:
        user = _user(client, name)
        changed = client.post(_of(user), {"disabled": disabled, "version": user["version"]})
    typer.echo(f"{visible(changed['name'])} is {'disabled' if changed['disabled_at'] else 'enabled'}")


def read_password() -> str:
    """A new password from the terminal, typed twice, or the first line of standard input. Raises InvalidInput."""
    if sys.stdin.isatty():
        given = str(click.prompt("Password", hide_input=True, confirmation_prompt="Again"))
    else:
        given = sys.stdin.readline().removesuffix("\n").removesuffix("\r")
    check_length(given)
    return given


def _user(client: Client, name: str) -> dict[str, Any]:
    found = principal(client, name)
    if found["kind"] != "user":
        raise InvalidInput(f"{name!r} is a service account: ./hitl keys manages its keys", "NAME")
    return found


def _of(user: dict[str, Any], part: str = "") -> str:
    path = f"{PRINCIPALS}/{quote(user['id'], safe='')}"
    return f"{path}/{part}" if part else path


def _state(user: dict[str, Any]) -> str:
    if user["disabled_at"]:
        return f"disabled {user['disabled_at'][:10]}"
    external = user["external_id"] or ""
    return "of the panel" if external.startswith("panel:") else "of the provider" if external else "local"


def _roles(user: dict[str, Any], names: dict[str, str]) -> str:
    places = {**names, EVERYWHERE: "everywhere"}
    listed = (
        f"{visible(str(places.get(where, where)))}: {' '.join(roles)}"
        for where, roles in user["roles"].items()
        if roles
    )
    return "; ".join(listed) or "none"
