"""`hitl image`: builds, pushes and verifies the image that sessions run in, and removes ended containers."""

from typing import TYPE_CHECKING, Annotated

import typer

from claude_hitl_template.cli.common import report_checks, say, step
from claude_hitl_template.cli.program import NAME, ROOT, need_checkout
from claude_hitl_template.image import labels, tools
from claude_hitl_template.presentation.text import size

if TYPE_CHECKING:
    from claude_hitl_template.image.build import Built

app = typer.Typer(help="The image that each session runs in.", no_args_is_help=True)

_Tool = Annotated[tools.ToolName | None, typer.Option("--tool", help="Default: the first that is installed.")]
_Name = Annotated[
    str, typer.Option("--name", help="The image's name, with the registry's if it is pushed: HOST/NAME.")
]


@app.command()
def build(
    tool: _Tool = None,
    name: _Name = labels.IMAGE_NAME,
    base: Annotated[
        str | None,
        typer.Option(
            envvar="RAY_BASE",
            help="Base image, best as NAME@sha256:DIGEST. Default: Ray's own, of the locked version.",
        ),
    ] = None,
    from_host: Annotated[
        bool, typer.Option("--from-host", help="Makes the base image from this machine; needs no registry.")
    ] = False,
    for_user: Annotated[
        str | None,
        typer.Option("--for-user", help="As root: also copies the image to this user, who runs Ray."),
    ] = None,
) -> None:
    """Builds the image from this checkout: code, settings layers, plugins, declared dependencies."""
    from claude_hitl_template.image.build import build as build_image  # noqa: PLC0415  (slow to import)

    need_checkout("image build")
    if from_host and base:
        raise typer.BadParameter("--from-host makes the base; leave --base and RAY_BASE out")
    found = tools.find_tool(tool)
    built = build_image(ROOT, found, name=name, base=base, from_host=from_host, for_user=for_user, say=say)
    _report(built)


def _report(built: "Built") -> None:
    size_shown = f", {size(built.size_bytes)}" if built.size_bytes else ""
    typer.echo(f"built {' and '.join(built.tags)} in {built.seconds:.0f} s{size_shown}")
    typer.echo(f"A local image has no digest of a registry; {NAME} image push prints one.")
    typer.echo(f"CONTAINER_IMAGE_URI={local_name(built.tags[0])}")


def local_name(tag: str) -> str:
    """Adds podman's prefix for local images to a tag without a registry."""
    first, slash, _ = tag.partition("/")
    return tag if slash and ("." in first or ":" in first or first == "localhost") else f"localhost/{tag}"


@app.command()
def push(
    image: Annotated[str, typer.Argument(help="HOST/NAME:TAG, as it was built.")], tool: _Tool = None
) -> None:
    """Pushes the image and prints its name with digest for CONTAINER_IMAGE_URI."""
    found = tools.find_tool(tool)
    typer.echo(f"CONTAINER_IMAGE_URI={found.push(image)}")


@app.command()
def verify(
    image: Annotated[
        str, typer.Argument(help="Default: the last one that was built.")
    ] = f"{labels.IMAGE_NAME}:latest",
    tool: _Tool = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Runs the image and checks that sessions of this checkout can run in it. Exit status: 1 if they cannot."""
    need_checkout("image verify")
    from claude_hitl_template.image.verify import verify as verify_image  # noqa: PLC0415  (slow to import)

    found = verify_image(image, tools.find_tool(tool, among=("podman", "docker")), ROOT)
    report_checks(found, as_json=as_json)


@app.command()
def prune() -> None:
    """Removes exited containers of our images; running ones and others stay."""
    with step("Removing exited containers"):
        removed = tools.prune()
    typer.echo(f"removed {removed} exited containers")
