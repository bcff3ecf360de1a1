"""Commands for developers of the project: `hitl clean`, `check`, `openapi`, `test`; `hitl bootstrap-host` for a new host."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import click
import psutil
import typer

from claude_hitl_template.cli.commands.status import folder_bytes
from claude_hitl_template.cli.host import postgres, run_record
from claude_hitl_template.cli.host.processes import intruder, private_dir
from claude_hitl_template.cli.program import IN_CHECKOUT, ROOT, need_checkout
from claude_hitl_template.config.settings import Settings
from claude_hitl_template.errors import ConfigError
from claude_hitl_template.presentation.text import size

CACHES = (".pytest_cache", ".ruff_cache", ".hypothesis", ".import_linter_cache", ".coverage", "htmlcov")
CHECKS = {
    "format": ["ruff", "format", "--check"],
    "lint": ["ruff", "check"],
    "types": ["pyright"],
    "imports": ["lint-imports"],
    "tests": [],
}
TOLD = ["--cov=claude_hitl_template", "--cov-report=term:skip-covered"]
MOST_WORKERS = 6
WORKER_BYTES = 2 * 2**30  # of memory for each, with the services of its own


def clean(
    yes: Annotated[bool, typer.Option("--yes", help="Delete the data folder without asking.")] = False,
) -> None:
    """Deletes caches, Ray's old logs and, after confirmation, the data folder: all sessions, approvals, files and keys."""
    settings = Settings.load()
    refusal = "nothing was deleted"
    run_record.check_idle(settings, refusal)
    if settings.secrets_dir.is_dir():
        with run_record.alone(settings):
            run_record.check_idle(settings, refusal)
            _delete_caches()
            _clean_data(settings, yes=yes)
        return
    _delete_caches()
    _delete_ray_folder(settings)
    if settings.data_dir.exists():
        raise ConfigError(
            f"{settings.data_dir} does not look like a data folder of this service; it was not deleted",
            "check HITL_DATA_DIR",
        )


def _delete_caches() -> None:
    for path in (ROOT / name for name in CACHES if IN_CHECKOUT):
        if path.exists():
            _delete(path)


def _clean_data(settings: Settings, *, yes: bool) -> None:
    postgres.local(settings).stop("immediate")
    _delete_ray_folder(settings)
    data = settings.data_dir
    question = (
        f"delete {data} ({size(folder_bytes(data))}), with all sessions, approvals, files and keys in it?"
    )
    if yes or (sys.stdin.isatty() and click.confirm(question)):
        _delete(data)
    else:
        typer.echo(f"kept {data} (--yes deletes it)")


def _delete_ray_folder(settings: Settings) -> None:
    """Unless the cluster of another data folder, which names the same one, works in it."""
    folder = private_dir(settings)
    if folder.exists() and intruder(settings) is None:
        _delete(folder)


def bootstrap_host() -> None:
    """As root on Debian or Ubuntu: installs what the service and its containers need, and creates the user ray."""
    raise typer.Exit(subprocess.call([ROOT / "claude_hitl_template/bin/bootstrap-host"]))  # noqa: S603


def check() -> None:
    """The first part of CI: format, lint, types, import rules, fast tests; stops at the first that fails."""
    need_checkout("check")
    for name, command in CHECKS.items():
        typer.echo(f"== {name}")
        status = _tool(command) if command else fast(TOLD)
        if status != 0:
            typer.echo(f"failed: {name}", err=True)
            raise typer.Exit(1)
    typer.echo("all checks passed")


def openapi() -> None:
    """Writes docs/openapi.json, the API document that the routes make. Commit it with an intended change of the API."""
    need_checkout("openapi")
    from claude_hitl_template.api.app import document  # noqa: PLC0415  (slow to import)

    path = ROOT / "docs/openapi.json"
    path.write_text(document())
    typer.echo(f"wrote {path}")


def run_tests(
    context: typer.Context,
    slow: Annotated[bool, typer.Option("--slow", help="The slow tests, suite by suite.")] = False,
    every: Annotated[bool, typer.Option("--all", help="The fast tests, then the slow ones.")] = False,
    budget: Annotated[
        float | None,
        typer.Option(
            min=0.0, metavar="MINUTES", help="With --slow or --all: starts only suites that fit into it."
        ),
    ] = None,
    record: Annotated[
        bool,
        typer.Option("--record", help="With --slow or --all: notes in tests/green.json which suites passed."),
    ] = False,
) -> None:
    """Runs the fast tests. Other arguments are passed on to pytest; tests that they name run in any tier."""
    need_checkout("test")
    if (budget is not None or record) and not (slow or every):
        raise typer.BadParameter("--budget and --record need --slow or --all")
    given = context.args
    if given and (slow or every):
        raise typer.Exit(pytest([f"--tier={'all' if every else 'slow'}", *given]))
    named = any((ROOT / argument.partition("::")[0]).exists() for argument in given)
    status = 0 if slow else pytest(given) if named else fast(given)
    if slow or every:
        chosen = [
            *(["--budget", str(budget)] if budget is not None else []),
            *(["--record"] if record else []),
        ]
        status = _module("tests.suites", chosen) or status
    raise typer.Exit(status)


def fast(arguments: list[str]) -> int:
    """Runs the fast tests, a file at a time in each worker process."""
    fitting = psutil.virtual_memory().total // WORKER_BYTES
    # Two for each CPU and one more: tests wait more than half of the time.
    workers = max(1, min(MOST_WORKERS, 2 * (os.cpu_count() or 1) + 1, fitting))
    side_by_side = ["-n", str(workers), "--dist=loadfile", "--no-loadscope-reorder"]
    return pytest(["--tier=fast", "-q", *side_by_side, *arguments])


def pytest(arguments: list[str]) -> int:
    return _module("pytest", arguments)


def _module(name: str, arguments: list[str]) -> int:
    return subprocess.call([sys.executable, "-m", name, *arguments], cwd=ROOT)  # noqa: S603


def _tool(command: list[str]) -> int:
    program = Path(sys.executable).parent / command[0]
    if not program.exists():
        raise ConfigError(
            f"{command[0]} is not installed", "run it as ./hitl check, which installs requirements-dev.lock"
        )
    return subprocess.call([program, *command[1:]], cwd=ROOT)  # noqa: S603


def _delete(path: Path) -> None:
    typer.echo(f"deleting {path}")
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be deleted: {error.strerror}", "end what writes to it, or correct its permissions"
        ) from error
