"""`hitl keys`: creates, lists, rotates and revokes API keys of the service on this machine."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Annotated, Any
from urllib.parse import quote

import typer

from claude_hitl_template.cli.client import Client
from claude_hitl_template.cli.common import table_width
from claude_hitl_template.cli.terminal.ids import by_prefix
from claude_hitl_template.cli.terminal.render import table_lines
from claude_hitl_template.config.secret_files import operator_key
from claude_hitl_template.config.settings import Settings
from claude_hitl_template.errors import ConfigError, InvalidInput
from claude_hitl_template.presentation.text import one_line, visible

app = typer.Typer(help="API keys of REST clients.", no_args_is_help=True)
PATH = "/v1/internal/keys"
HEADS = ("ID", "BEGINS WITH", "STATE", "NAME")
NAME_CHARS = 100

KeyId = Annotated[str, typer.Argument(metavar="ID", help="As ./hitl keys list shows it, or its beginning.")]


@app.command("create")
def create(
    name: Annotated[
        str, typer.Argument(help="Name of its holder; decisions made with the key are recorded under it.")
    ],
) -> None:
    """Creates a key and shows it once: only its hash is stored."""
    if not name.strip():
        raise InvalidInput("is empty; give the name of the key's holder", "NAME")
    with _client() as client:
        _show(
            client.post(PATH, {"name": name}),
            "shown this once; its holder sees the sessions made with it",
        )


@app.command("list")
def list_keys() -> None:
    """Every key by its id, name and first characters; none is shown whole."""
    with _client() as client:
        rows = [_row(key) for key in client.get(PATH)["data"]]
    typer.echo("\n".join(table_lines(rows, HEADS, table_width())))


def _row(key: dict[str, Any]) -> tuple[str, ...]:
    begins = f"{key['prefix']}..." if key["prefix"] else "(chosen)"
    use = "first key" if key["first"] else "in use"
    return (
        key["id"],
        begins,
        f"revoked {key['revoked_at'][:10]}" if key["revoked_at"] else use,
        one_line(key["name"], NAME_CHARS),
    )


@app.command()
def revoke(key_id: KeyId) -> None:
    """Revokes a key at once and permanently. Its sessions stay and can be decided in the panel."""
    with _client() as client:
        key = client.delete(_of(client, key_id))
    typer.echo(f"{key['id']} ({visible(key['name'])}) is revoked")


@app.command()
def rotate(
    key_id: Annotated[str | None, typer.Argument(metavar="ID", help="Default: the first key.")] = None,
) -> None:
    """Replaces a key's secret. The old one stops working at once; the sessions stay with the key."""
    settings = Settings.load()
    with _client() as client:
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


@contextmanager
def _client() -> Generator[Client]:
    """Yields a client with the operator key, which only the service's own machine has. Raises ConfigError elsewhere."""
    settings = Settings.load()
    if settings.serve_url is not None:
        raise ConfigError(
            f"keys are made and revoked on the service's own machine, and HITL_SERVE_URL names {settings.serve_url}",
            "run ./hitl keys there, in the folder of its ./hitl up",
        )
    client = Client(settings.base_url, operator_key(settings))
    try:
        yield client
    finally:
        client.close()
