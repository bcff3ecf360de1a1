"""Shared parts of all commands: console, progress, errors as exit statuses."""

import json
import os
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

from claude_hitl_template.cli import completion
from claude_hitl_template.cli.client import Client
from claude_hitl_template.config import network
from claude_hitl_template.config.settings import Settings
from claude_hitl_template.errors import HitlError
from claude_hitl_template.presentation.checks import Check, lines
from claude_hitl_template.presentation.terminal import shown
from claude_hitl_template.presentation.text import visible

UNWRAPPED = 1_000_000  # columns
INTERRUPTED = 130  # as shells have it


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
    Console(stderr=True, highlight=False).print(shown(message, "yellow"), soft_wrap=True)


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
            typer.secho("\n".join(lines(check)), fg="red" if check.level == "wrong" else None)
    raise typer.Exit(1 if any(check.level == "wrong" for check in found) else 0)


def run(app: Callable[..., Any]) -> int:
    """Runs the command line. Expected errors become a message and an exit status, never a traceback."""
    network.keep_grpc_direct()
    completion.prepare()
    try:
        app(prog_name="./hitl", complete_var=completion.VARIABLE)
    except HitlError as error:
        print(f"error: {visible(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader is gone; without this, Python says so again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    return 0
