"""`hitl up` and `hitl down`."""

import signal
from typing import Annotated, NoReturn

import typer

from claude_hitl_template.cli.common import step
from claude_hitl_template.cli.host import run_record, service
from claude_hitl_template.cli.program import NAME
from claude_hitl_template.cli.terminal import chat
from claude_hitl_template.config.settings import Settings
from claude_hitl_template.errors import ConfigError


def up(
    postgres: Annotated[
        bool,
        typer.Option(
            "--postgres",
            help="Keep everything in a Postgres of our own, made in the data folder; from then on every start uses it.",
        ),
    ] = False,
    wait: Annotated[
        bool,
        typer.Option(
            "--wait",
            help="Stays until the service ends, and ends it when this command is ended: for containers and systemd.",
        ),
    ] = False,
) -> None:
    """Starts Ray and the service where they do not run yet, and restarts them when settings or code changed."""
    settings = Settings.load()
    made = chat.ensure_up(settings, make_postgres=postgres)
    facts = service.healthy(settings) or {}
    typer.echo(f"REST       {settings.base_url}/v1   (model: {facts.get('model')})")
    typer.echo(chat.pages_line(settings))
    if panel := chat.panel_line(settings):
        typer.echo(panel)
    typer.echo(
        f"Dashboard  {settings.own_dashboard}   (asks for Ray's token; {NAME} status --show-secrets shows it)"
    )
    typer.echo(f"Data       {settings.data_dir}")
    if made and not wait:
        typer.echo(f"API key    {made}   (shown this once; kept in {settings.secrets_dir / 'api-key'})")
    else:
        typer.echo(f"API key    in {settings.secrets_dir / 'api-key'}")
    typer.echo(chat.export_line(settings))
    if wait:
        _stay(settings)
    typer.echo(f"Next       {NAME} demo")


def _stay(settings: Settings) -> NoReturn:
    """Waits until Ray ends; SIGTERM and Ctrl-C do what `down` does. Exit status 1 if Ray ended by itself."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    head = service.ray_process(settings)
    try:
        if head is not None:
            head.wait()
    except KeyboardInterrupt:
        with step("Letting running turns come to rest, then stopping"):
            service.stop(settings)
        raise typer.Exit from None
    raise ConfigError(f"Ray ended: {settings.logs_dir / 'ray.log'} says why", f"{NAME} up starts it again")


def down() -> None:
    """Ends everything that `up` started; nothing that was committed is lost."""
    settings = Settings.load()
    run_record.check_ours(settings)
    with step("Letting running turns come to rest, then stopping"):
        stopped = service.stop(settings)
    if not stopped.processes:
        typer.echo("nothing ran")
        return
    typer.echo(f"stopped: {stopped.processes} processes ended; sessions, approvals and files are kept")
    if stopped.unfinished:
        typer.echo(f"{stopped.unfinished} turns were cut off; they are taken up again at the next {NAME} up")
