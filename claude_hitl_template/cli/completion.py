"""Shell completion of `./hitl`: Typer's own, for a program whose name is a path."""

import os

import typer

VARIABLE = "_HITL_COMPLETE"  # by which the shell asks for completions


def install(wanted: bool) -> None:
    """Installs the completion for the shell that this runs in. Shells look a path up by its last part."""
    if not wanted:
        return
    from typer._completion_shared import install as install_script  # noqa: PLC0415  (rarely needed)

    shell, path = install_script(prog_name="hitl", complete_var=VARIABLE)
    typer.echo(
        f"completion for {shell} is installed in {path}; it works in shells that are started from now on"
    )
    raise typer.Exit


def prepare() -> None:
    """Does what Typer does for an app with its own completion options. Only in a process that the shell asks."""
    if VARIABLE in os.environ:
        from typer._completion_classes import completion_init  # noqa: PLC0415  (rarely needed)

        completion_init()
