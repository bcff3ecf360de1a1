"""`python -m claude_hitl_template.cli`, which `./hitl` runs."""

import subprocess
import sys

import typer

app = typer.Typer(help="Human-approved Claude sessions on your own Ray cluster.", no_args_is_help=True)


@app.callback()
def main() -> None:
    """Human-approved Claude sessions on your own Ray cluster."""


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def test(context: typer.Context) -> None:
    """Runs the tests; arguments are passed on to pytest."""
    sys.exit(subprocess.call([sys.executable, "-m", "pytest", *context.args]))  # noqa: S603


@app.command()
def deploy() -> None:
    """Deploys the service to the Ray cluster at RAY_ADDRESS."""
    sys.exit(subprocess.call([sys.executable, "-m", "claude_hitl_template.query"]))  # noqa: S603


if __name__ == "__main__":
    app()
