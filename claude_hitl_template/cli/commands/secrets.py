"""`hitl secrets`: sends a secret to the service. It is never written to a file, an argument or a log here."""

import sys
from typing import Annotated
from urllib.parse import urlsplit

import click
import typer

from claude_hitl_template.cli.client import Client
from claude_hitl_template.cli.deploy.rollout import Profile
from claude_hitl_template.config.secret_files import SENT, operator_key
from claude_hitl_template.config.settings import Settings
from claude_hitl_template.errors import ConfigError, InvalidInput

app = typer.Typer(help="Secrets of the service, kept on the cluster.", no_args_is_help=True)
PATH = "/v1/internal/secrets"
_LOOPBACK = ("localhost", "127.0.0.1", "::1")

Name = Annotated[str, typer.Argument(help=f"One of: {', '.join(SENT)}.")]


@app.command("set")
def set_secret(name: Name, profile: Profile = None) -> None:
    """Sends a secret from standard input, or from a prompt on a terminal. It is used at once."""
    settings = Settings.load(profile)
    check_way(settings.service_url)
    _check_name(name)
    value = read_value(name)
    client = _client(settings)
    try:
        client.put(f"{PATH}/{name}", {"value": value})
        model = client.get("/v1/version").get("model")
    finally:
        client.close()
    typer.echo(f"{name} is kept on the cluster; model: {model}")


@app.command("list")
def list_secrets(profile: Profile = None) -> None:
    """Lists the secrets that were sent, without their values."""
    client = _client(Settings.load(profile))
    try:
        for secret in client.get(PATH)["data"]:
            typer.echo(f"{secret['name']}   {'set' if secret['set'] else 'not set'}")
    finally:
        client.close()


@app.command()
def remove(name: Name, profile: Profile = None) -> None:
    """Removes a secret that was sent."""
    _check_name(name)
    client = _client(Settings.load(profile))
    try:
        removed = client.delete(f"{PATH}/{name}")["removed"]
    finally:
        client.close()
    typer.echo(f"removed {name}" if removed else f"{name} was not set")


def check_way(url: str) -> None:
    """Raises ConfigError where a secret would cross a network in the clear."""
    found = urlsplit(url)
    if found.scheme != "https" and found.hostname not in _LOOPBACK:
        raise ConfigError(
            f"{url} is reached without TLS, so the secret could be read on the way; it was not sent",
            f"ssh -N -L 8001:localhost:8001 {found.hostname}, and HITL_SERVE_URL=http://localhost:8001",
        )


def read_value(name: str) -> str:
    """Raises InvalidInput when there is none."""
    if sys.stdin.isatty():
        value = str(click.prompt(name, hide_input=True, default="", show_default=False))
    else:
        value = sys.stdin.read()
    if not value.strip():
        raise InvalidInput(f"no value for {name} came on standard input")
    return value.strip()


def _check_name(name: str) -> None:
    if name not in SENT:
        raise InvalidInput(f"there is no secret {name!r}; there are: {', '.join(SENT)}")


def _client(settings: Settings) -> Client:
    """On the service's own machine, with the operator's key; from elsewhere, with the first API key."""
    if settings.serve_url is None and settings.api_key is None:
        return Client(settings.base_url, operator_key(settings))
    return Client.open(settings)
