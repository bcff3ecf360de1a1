"""The commands, put together."""

from typing import Annotated

import typer

from claude_hitl_template.cli.commands import (
    backup,
    bench,
    chaos,
    configuration,
    development,
    doctor,
    image,
    keys,
    logs,
    secrets,
    status,
)
from claude_hitl_template.cli.common import step
from claude_hitl_template.cli.deploy import rollout
from claude_hitl_template.cli.host import run_record, service, vm
from claude_hitl_template.cli.host.processes import authenticate
from claude_hitl_template.cli.terminal import approvals, chat, sessions
from claude_hitl_template.config.settings import Settings

app = typer.Typer(
    help="Human-approved Claude sessions on your own Ray cluster.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


@app.callback()
def main() -> None:
    """Human-approved Claude sessions on your own Ray cluster."""


app.command(epilog=chat.STATUSES)(chat.demo)
app.command(epilog=chat.STATUSES)(chat.chat)
app.command()(status.status)
app.add_typer(approvals.app, name="approvals")
app.add_typer(sessions.app, name="sessions")
app.add_typer(image.app, name="image")
app.command()(rollout.deploy)
app.add_typer(secrets.app, name="secrets")
app.add_typer(keys.app, name="keys")
app.command()(logs.logs)
app.command()(doctor.doctor)
app.add_typer(vm.app, name="vm")
app.command()(development.bootstrap_host)
app.command()(configuration.configuration)
app.command(context_settings=_PASS_ON | {"help_option_names": []})(bench.bench)
app.command()(backup.backup)
app.command()(backup.restore)
app.command()(chaos.chaos)
app.command()(development.clean)
app.command()(development.check)
app.command(hidden=True)(development.openapi)
app.command("test", context_settings=_PASS_ON)(development.run_tests)


@app.command()
def up(
    postgres: Annotated[
        bool,
        typer.Option(
            "--postgres",
            help="Keep everything in a Postgres of our own, made in the data folder; from then on every start uses it.",
        ),
    ] = False,
) -> None:
    """Starts Ray and the service where they do not run yet, and restarts them when settings or code changed."""
    settings = Settings.load()
    made = chat.ensure_up(settings, make_postgres=postgres)
    facts = service.healthy(settings) or {}
    typer.echo(f"REST       {settings.base_url}/v1   (model: {facts.get('model')})")
    if settings.panel:
        typer.echo(
            f"Panel      {settings.panel_url}   (admin; ./hitl status --show-secrets shows the password)"
        )
    typer.echo(
        f"Dashboard  {settings.own_dashboard}   (asks for Ray's token; ./hitl status --show-secrets shows it)"
    )
    typer.echo(f"Data       {settings.data_dir}")
    if made:
        typer.echo(f"API key    {made}   (shown this once; kept in {settings.secrets_dir / 'api-key'})")
    else:
        typer.echo(f"API key    in {settings.secrets_dir / 'api-key'}")
    typer.echo("Next       ./hitl demo")


@app.command()
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
        typer.echo(f"{stopped.unfinished} turns were cut off; they are taken up again at the next ./hitl up")


@app.command()
def shell(profile: rollout.Profile = None) -> None:
    """A Python prompt on the cluster, through Ray Client: `ray`, `store`, `settings`."""
    settings = Settings.load(profile)
    authenticate(settings)  # before Ray is imported, which reads it once
    from claude_hitl_template.cli.commands.shell import open_shell  # noqa: PLC0415  (slow to import)

    open_shell(settings)
