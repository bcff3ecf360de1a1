"""`python -m claude_hitl_template.cli`, which `./hitl` runs."""

import subprocess
import sys

import typer

from claude_hitl_template.cli import service
from claude_hitl_template.errors import HitlError
from claude_hitl_template.settings import Settings

app = typer.Typer(help="Human-approved Claude sessions on your own Ray cluster.", no_args_is_help=True)


@app.callback()
def main() -> None:
    """Human-approved Claude sessions on your own Ray cluster."""


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def test(context: typer.Context) -> None:
    """Runs the tests; arguments are passed on to pytest."""
    sys.exit(subprocess.call([sys.executable, "-m", "pytest", *context.args]))  # noqa: S603


@app.command()
def up() -> None:
    """Starts Ray and the service where they do not run yet."""
    settings = Settings.load()
    made = service.prepare(settings)
    service.start(settings)
    facts = service.healthy(settings) or {}
    typer.echo(f"REST       {settings.base_url}/v1   (model: {facts.get('model')})")
    typer.echo(f"Dashboard  http://{settings.host}:{settings.dashboard_port}")
    typer.echo(f"API key    {made or settings.secrets_dir / 'api-key'}")


@app.command()
def down() -> None:
    """Ends everything that `up` started; nothing that was committed is lost."""
    service.stop(Settings.load())


if __name__ == "__main__":
    try:
        app()
    except HitlError as error:
        sys.exit(f"error: {error}")
