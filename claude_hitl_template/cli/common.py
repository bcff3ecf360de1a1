"""Shared parts of all commands: console, progress, checks."""

import json
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

from claude_hitl_template.cli.client import Client
from claude_hitl_template.cli.program import named
from claude_hitl_template.config.settings import Settings
from claude_hitl_template.presentation.checks import Check, lines
from claude_hitl_template.presentation.terminal import shown

UNWRAPPED = 1_000_000  # columns


def console() -> Console:
    """Standard output. Lines for a pipe or a file are left whole."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=UNWRAPPED)


def table_width() -> int | None:
    """The columns that a table may take; None if output is not a terminal, so lines are not shortened."""
    found = console()
    return found.width if found.is_terminal else None


def say(message: str) -> None:
    """Prints a remark to standard error, apart from a command's output."""
    Console(stderr=True, highlight=False).print(shown(named(message), "yellow"), soft_wrap=True)


@contextmanager
def step(message: str) -> Generator[None]:
    """Shows a long step: as a spinner on a terminal, else as a line."""
    errors = Console(stderr=True, highlight=False)
    if errors.is_terminal:
        with errors.status(Text(message)):
            yield
    else:
        errors.print(Text(f"{message} ..."))
        yield


@contextmanager
def service_client(patience_s: float = 0.0, *, workspace: str | None = None) -> Generator[Client]:
    client = Client.open(Settings.load(), patience_s=patience_s, say=say, workspace=workspace)
    try:
        yield client
    finally:
        client.close()


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))  # ASCII: nothing in it can act on a terminal


def report_checks(found: Sequence[Check], *, as_json: bool) -> None:
    """Prints checks, and ends the command: exit status 1 if something is wrong."""
    if as_json:
        print_json([asdict(check) for check in found])
    else:
        for check in found:
            typer.secho(named("\n".join(lines(check))), fg="red" if check.level == "wrong" else None)
    raise typer.Exit(1 if any(check.level == "wrong" for check in found) else 0)
