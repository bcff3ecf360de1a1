"""`hitl keys`: creates, lists, rotates and revokes API keys."""

from datetime import timedelta
from enum import StrEnum
from typing import Annotated, Any
from urllib.parse import quote

import typer

from claude_hitl_template.cli.client import Client
from claude_hitl_template.cli.commands.workspaces import Workspace, administration
from claude_hitl_template.cli.terminal.ids import by_prefix
from claude_hitl_template.cli.terminal.tables import print_table
from claude_hitl_template.config.settings import Settings
from claude_hitl_template.domain.models import utcnow
from claude_hitl_template.domain.people import SCOPES
from claude_hitl_template.errors import ConfigError, InvalidInput
from claude_hitl_template.presentation.text import one_line, visible

app = typer.Typer(help="API keys of REST clients.", no_args_is_help=True)
PATH = "/v1/admin/keys"
HEADS = ("ID", "BEGINS WITH", "STATE", "LAST USED", "NAME")
NAME_CHARS = 100

KeyId = Annotated[str, typer.Argument(metavar="ID", help="As ./hitl keys list shows it, or its beginning.")]


class Part(StrEnum):
    """The roles that a key's service account may have in a workspace."""

    viewer = "viewer"
    requester = "requester"
    approver = "approver"
    operator = "operator"


class KeyScope(StrEnum):
    sessions = "sessions"
    approvals = "approvals"
    read = "read"
    admin = "admin"


@app.command("create")
def create(
    name: Annotated[
        str, typer.Argument(help="Name of its holder; decisions made with the key are recorded under it.")
    ],
    workspace: Workspace = None,
    role: Annotated[
        list[Part] | None,
        typer.Option(help="Role of its holder there; may be repeated. Default: requester and approver."),
    ] = None,
    scope: Annotated[
        list[KeyScope] | None,
        typer.Option(help="What the key may be used for; may be repeated. Default: what its holder may do."),
    ] = None,
    days: Annotated[int | None, typer.Option(min=1, max=3650, help="Days until it expires.")] = None,
) -> None:
    """Creates a key and shows it once: only its hash is stored.

    The holder is the service account of that name, which is made if there is none.
    """
    if not name.strip():
        raise InvalidInput("is empty; give the name of the key's holder", "NAME")
    body: dict[str, Any] = {"name": name}
    if role:
        body["roles"] = [one.value for one in role]
    if scope:
        body["scopes"] = [one.value for one in scope]
    if days is not None:
        body["expires_at"] = (utcnow() + timedelta(days=days)).isoformat()
    with administration(workspace) as client:
        _show(
            client.post(PATH, body),
            "shown this once; its holder sees the sessions of the workspace",
        )


@app.command("list")
def list_keys() -> None:
    """Every key by its id, name and first characters; none is shown whole."""
    with administration() as client:
        rows = [_row(key) for key in client.get(PATH)["data"]]
    print_table(rows, HEADS, optional=("BEGINS WITH",), folded=2)


def _row(key: dict[str, Any]) -> tuple[str, ...]:
    return (
        key["id"],
        f"{key['prefix']}..." if key["prefix"] else "(chosen)",
        _state(key),
        (key["last_used_at"] or "never")[:10],
        one_line(key["name"], NAME_CHARS),
    )


def _state(key: dict[str, Any]) -> str:
    if key["revoked_at"]:
        return f"revoked {key['revoked_at'][:10]}"
    use = (
        "first key" if key["first"] else f"until {key['expires_at'][:10]}" if key["expires_at"] else "in use"
    )
    limited = len(key["scopes"]) < len(SCOPES)
    return f"{use}, only {' and '.join(key['scopes'])}" if limited else use


@app.command()
def revoke(key_id: KeyId) -> None:
    """Revokes a key at once and permanently. Its sessions stay and can be decided in the panel."""
    with administration() as client:
        key = client.delete(_of(client, key_id))
    typer.echo(f"{key['id']} ({visible(key['name'])}) is revoked")


@app.command()
def rotate(
    key_id: Annotated[str | None, typer.Argument(metavar="ID", help="Default: the first key.")] = None,
) -> None:
    """Replaces a key's secret. The old one stops working at once; the sessions stay with the key."""
    settings = Settings.load()
    with administration() as client:
        first = next((key["id"] for key in client.get(PATH)["data"] if key["first"]), None)
        chosen = first if key_id is None else _id(client, key_id)
        if chosen is None:
            raise ConfigError("the service has no first key yet", "./hitl up")
        if chosen == first and settings.api_key is not None:
            raise ConfigError(
                "HITL_API_KEY sets the first key",
                "set it to another, or remove it and its file in secrets/, then ./hitl up: the one before stops working",
            )
        kept = f"; ./hitl reads it from {settings.secrets_dir / 'api-key'}" if chosen == first else ""
        _show(
            client.post(f"{_of(client, chosen)}/rotate"),
            f"shown this once{kept}; the one before stopped working",
        )


def _show(key: dict[str, Any], note: str) -> None:
    typer.echo(f"{key['secret']}   ({note})")
    typer.echo(f"id {key['id']}, name {visible(key['name'])}")


def _id(client: Client, given: str) -> str:
    def known() -> list[str]:
        return [str(key["id"]) for key in client.get(PATH)["data"]]

    return by_prefix(given, "key", "key", known, "keys list")


def _of(client: Client, key_id: str) -> str:
    return f"{PATH}/{quote(_id(client, key_id), safe='')}"
