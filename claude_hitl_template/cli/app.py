"""The commands. Each is imported when it is used: what others import would double the time that it takes."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from claude_hitl_template import __version__, code_version
from claude_hitl_template.cli import completion

_DAILY, _OPERATE, _DEVELOP = "Every day", "Operating the service", "Working on the project"
_PASS_ON: Mapping[str, Any] = {"allow_extra_args": True, "ignore_unknown_options": True}


@dataclass(frozen=True)
class Entry:
    """A command before it is imported.

    `target`: MODULE:NAME of a function or a Typer app, below this package. `help`: the first paragraph of its own help.
    `epilog`: the name of a text in the module. `context`: settings of the command's Click context.
    """

    panel: str
    target: str
    help: str
    epilog: str | None = None
    context: Mapping[str, Any] | None = None
    hidden: bool = False


ENTRIES = {
    "demo": Entry(
        _DAILY,
        "terminal.chat:demo",
        "Shows the product: starts the service if needed, gives an agent a task, and asks you before a gated call runs.",
        epilog="DEMO_EPILOG",
    ),
    "chat": Entry(
        _DAILY,
        "terminal.chat:chat",
        "Chats with an agent: messages, and decisions on what it wants to do.",
        epilog="STATUSES",
    ),
    "approvals": Entry(_DAILY, "terminal.approvals:app", "Lists, shows and decides approvals."),
    "sessions": Entry(_DAILY, "terminal.sessions:app", "Lists, shows and ends sessions."),
    "status": Entry(
        _DAILY,
        "commands.status:status",
        "Shows what runs, where, and whether it is healthy. Exit status: 0 healthy, 1 not.",
    ),
    "up": Entry(
        _DAILY,
        "commands.starting:up",
        "Starts Ray and the service where they do not run yet, and restarts them when settings or code changed.",
    ),
    "down": Entry(
        _DAILY,
        "commands.starting:down",
        "Ends everything that `up` started; nothing that was committed is lost.",
    ),
    "doctor": Entry(
        _OPERATE,
        "commands.doctor:doctor",
        "Checks everything the service needs and names the fix for each problem. Exit status 1 if there is one.",
    ),
    "logs": Entry(_OPERATE, "commands.logs:logs", "Shows the service's log with secrets masked."),
    "keys": Entry(_OPERATE, "commands.keys:app", "API keys of REST clients."),
    "audit": Entry(_OPERATE, "commands.audit:app", "The audit log, and proofs from it."),
    "users": Entry(_OPERATE, "commands.users:app", "People who sign in to the pages of the service."),
    "workspaces": Entry(
        _OPERATE, "commands.workspaces:app", "Workspaces, which own sessions, and who belongs to them."
    ),
    "rules": Entry(
        _OPERATE,
        "commands.rules:app",
        "Rules of a workspace: which calls are denied or asked for, and who decides.",
    ),
    "notifications": Entry(
        _OPERATE,
        "commands.notifications:app",
        "Notifications: what was sent, over which channels, and what came out of it.",
    ),
    "secrets": Entry(_OPERATE, "commands.secrets:app", "Secrets of the service, kept on the cluster."),
    "deploy": Entry(
        _OPERATE,
        "deploy.rollout:deploy",
        "Uploads this working tree to the cluster and waits until Serve runs it.",
    ),
    "image": Entry(_OPERATE, "commands.image:app", "The image that each session runs in."),
    "backup": Entry(
        _OPERATE,
        "commands.backup:backup",
        "Writes a consistent copy of the database to a file, whether the service runs or not.",
    ),
    "restore": Entry(
        _OPERATE,
        "commands.backup:restore",
        "Restores the database from a backup, of SQLite or Postgres into either.",
    ),
    "upgrade": Entry(
        _OPERATE,
        "commands.upgrade:upgrade",
        "Compares this version with the data folder and the service; without --check, then does what `up` does.",
    ),
    "vm": Entry(_OPERATE, "host.vm:app", "The Linux machine that the cluster runs on, on a Mac."),
    "bootstrap-host": Entry(
        _OPERATE,
        "commands.development:bootstrap_host",
        "As root on Debian or Ubuntu: installs what the service and its containers need, and creates the user ray.",
    ),
    "configuration": Entry(
        _OPERATE,
        "commands.configuration:configuration",
        "Prints every setting, with its default and what it is for, as Markdown.",
    ),
    "shell": Entry(
        _OPERATE,
        "commands.shell:shell",
        "A Python prompt on the cluster, through Ray Client: `ray`, `store`, `settings`.",
    ),
    "test": Entry(
        _DEVELOP,
        "commands.development:run_tests",
        "Runs the fast tests. Other arguments are passed on to pytest; tests that they name run in any tier.",
        context=_PASS_ON,
    ),
    "check": Entry(
        _DEVELOP,
        "commands.development:check",
        "The first part of CI: format, lint, types, import rules, fast tests; stops at the first that fails.",
    ),
    "openapi": Entry(
        _DEVELOP,
        "commands.development:openapi",
        "Writes docs/openapi.json, the API document that the routes make. Commit it with an intended change of the API.",
        hidden=True,
    ),
    "bench": Entry(
        _DEVELOP,
        "commands.bench:bench",
        "Compares turns, decisions and parking with the plain SDK. Needs a checkout; `--help` lists the options.",
        context=_PASS_ON | {"help_option_names": []},
    ),
    "soak": Entry(
        _DEVELOP,
        "commands.bench:soak",
        "Works for some minutes and prints what grows. Needs a checkout; `--help` lists the options.",
        context=_PASS_ON | {"help_option_names": []},
    ),
    "chaos": Entry(
        _DEVELOP,
        "commands.chaos:chaos",
        "Kills, stops and disconnects parts of its own service under load; exits 1 if a guarantee was broken.",
    ),
    "clean": Entry(
        _DEVELOP,
        "commands.development:clean",
        "Deletes caches, Ray's old logs and, after confirmation, the data folder: all sessions, approvals, files and keys.",
    ),
}


def load(name: str) -> TyperCommand | TyperGroup:
    """Imports a command of the table."""
    entry = ENTRIES[name]
    path, _, attribute = entry.target.partition(":")
    module = import_module(f"claude_hitl_template.cli.{path}")
    found: Any = getattr(module, attribute)
    if not isinstance(found, typer.Typer):
        epilog = entry.epilog and getattr(module, entry.epilog)
        alone = typer.Typer(add_completion=False)
        alone.command(name, epilog=epilog, context_settings=dict(entry.context or {}), hidden=entry.hidden)(
            found
        )
        found = alone
    command: Any = get_command(found)
    command.name = name
    return command


class CommandTable(TyperGroup):
    """Lists the table's commands by what it says of them, and imports the one that is called."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands = {
            name: TyperCommand(name, help=entry.help, rich_help_panel=entry.panel, hidden=entry.hidden)
            for name, entry in ENTRIES.items()
        }

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, found, rest = super().resolve_command(ctx, args)
        return name, found and load(str(found.name)), rest


app = typer.Typer(
    cls=CommandTable,
    help="Human-approved Claude sessions on your own Ray cluster.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


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
