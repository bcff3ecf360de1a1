"""`hitl configuration`: prints docs/configuration.md."""

from collections.abc import Iterator

import typer

from claude_hitl_template.config.settings import Settings, variable

HEAD = """\
# Configuration

Made by `./hitl configuration > docs/configuration.md` from `config/settings.py`, the only reader of the environment.

First wins: the environment, `profiles/NAME.env` where a command was given `--profile NAME`, `.env` next to `./hitl`, a
file with the variable's name in lower case in the folder `CREDENTIALS_DIRECTORY` (systemd, [containers](compose.md)),
the default. Times are in seconds, sizes in bytes. A change counts from the next `./hitl up`, which restarts what it
concerns; for a cluster elsewhere, from the next `./hitl deploy`. Secrets (\N{KEY}) reach no command line, log or Ray
environment; a cluster elsewhere gets them by `./hitl secrets set`.

| Variable | Default | |
|---|---|---|
"""


def configuration() -> None:
    """Prints every setting, with its default and what it is for, as Markdown."""
    typer.echo(page(), nl=False)


def page() -> str:
    return HEAD + "".join(_rows())


def _rows() -> Iterator[str]:
    for name, field in Settings.model_fields.items():
        default = field.get_default(call_default_factory=True)
        shown = "" if default in (None, {}, "") else f"`{default}`"
        sign = " \N{KEY}" if "SecretStr" in str(field.annotation) else ""
        text = str(field.description).replace("|", "\\|")
        yield f"| `{variable(name)}`{sign} | {shown} | {text} |\n"
