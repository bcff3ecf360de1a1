"""The commands, put together."""

from typing import Annotated

import typer

from claude_hitl_template import __version__, code_version
from claude_hitl_template.cli import completion
from claude_hitl_template.cli.commands import (
    audit,
    backup,
    bench,
    chaos,
    configuration,
    development,
    doctor,
    image,
    keys,
    logs,
    notifications,
    rules,
    secrets,
    status,
    users,
    workspaces,
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
    context_settings={"help_option_names": ["-h", "--help"]},
)
_DAILY, _OPERATE, _DEVELOP = "Every day", "Operating the service", "Working on the project"
_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"claude-hitl {__version__}, code {code_version()}")
        raise typer.Exit


@app.callback()
def main(
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Shows which version this is."),
    ] = False,
    _install: Annotated[
        bool,
        typer.Option(
            "--install-completion",
            callback=completion.install,
            is_eager=True,
            help="Has the Tab key complete commands and options in your shell (bash, zsh, fish).",
        ),
    ] = False,
) -> None:
    """Human-approved Claude sessions on your own Ray cluster."""


app.command(epilog=f"{chat.OFFLINE_PROMPTS}\n\n{chat.STATUSES}", rich_help_panel=_DAILY)(chat.demo)
app.command(epilog=chat.STATUSES, rich_help_panel=_DAILY)(chat.chat)
app.add_typer(approvals.app, name="approvals", rich_help_panel=_DAILY)
app.add_typer(sessions.app, name="sessions", rich_help_panel=_DAILY)
app.command(rich_help_panel=_DAILY)(status.status)


@app.command(rich_help_panel=_DAILY)
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
    typer.echo(chat.pages_line(settings))
    if panel := chat.panel_line(settings):
        typer.echo(panel)
    typer.echo(
        f"Dashboard  {settings.own_dashboard}   (asks for Ray's token; ./hitl status --show-secrets shows it)"
    )
    typer.echo(f"Data       {settings.data_dir}")
    if made:
        typer.echo(f"API key    {made}   (shown this once; kept in {settings.secrets_dir / 'api-key'})")
    else:
        typer.echo(f"API key    in {settings.secrets_dir / 'api-key'}")
    typer.echo(chat.export_line(settings))
    typer.echo("Next       ./hitl demo")


@app.command(rich_help_panel=_DAILY)
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


app.command(rich_help_panel=_OPERATE)(doctor.doctor)
app.command(rich_help_panel=_OPERATE)(logs.logs)
app.add_typer(keys.app, name="keys", rich_help_panel=_OPERATE)
app.add_typer(audit.app, name="audit", rich_help_panel=_OPERATE)
app.add_typer(users.app, name="users", rich_help_panel=_OPERATE)
app.add_typer(workspaces.app, name="workspaces", rich_help_panel=_OPERATE)
app.add_typer(rules.app, name="rules", rich_help_panel=_OPERATE)
app.add_typer(notifications.app, name="notifications", rich_help_panel=_OPERATE)
app.add_typer(secrets.app, name="secrets", rich_help_panel=_OPERATE)
app.command(rich_help_panel=_OPERATE)(rollout.deploy)
app.add_typer(image.app, name="image", rich_help_panel=_OPERATE)
app.command(rich_help_panel=_OPERATE)(backup.backup)
app.command(rich_help_panel=_OPERATE)(backup.restore)
app.add_typer(vm.app, name="vm", rich_help_panel=_OPERATE)
app.command(rich_help_panel=_OPERATE)(development.bootstrap_host)
app.command(rich_help_panel=_OPERATE)(configuration.configuration)


@app.command(rich_help_panel=_OPERATE)
def shell(profile: rollout.Profile = None) -> None:
    """A Python prompt on the cluster, through Ray Client: `ray`, `store`, `settings`."""
    settings = Settings.load(profile)
    authenticate(settings)  # before Ray is imported, which reads it once
    from claude_hitl_template.cli.commands.shell import open_shell  # noqa: PLC0415  (slow to import)

    open_shell(settings)


app.command("test", context_settings=_PASS_ON, rich_help_panel=_DEVELOP)(development.run_tests)
app.command(rich_help_panel=_DEVELOP)(development.check)
app.command(hidden=True)(development.openapi)
app.command(context_settings=_PASS_ON | {"help_option_names": []}, rich_help_panel=_DEVELOP)(bench.bench)
app.command(rich_help_panel=_DEVELOP)(chaos.chaos)
app.command(rich_help_panel=_DEVELOP)(development.clean)
