"""`hitl audit`: shows and exports a workspace's audit log, and verifies exports and receipts on any machine."""

import sys
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

import typer

from claude_hitl_template.cli.common import service_client
from claude_hitl_template.cli.terminal.tables import print_table
from claude_hitl_template.errors import ConfigError
from claude_hitl_template.presentation.text import one_line, visible

app = typer.Typer(help="The audit log, and proofs from it.", no_args_is_help=True)
PATH = "/v1/audit"
HEADS = ("SEQ", "TIME", "ACTOR", "ACTION", "TARGET")
ACTOR_CHARS = 40
SHOWN_PROBLEMS = 20

Workspace = Annotated[
    str | None,
    typer.Option("--workspace", metavar="ID", help="Default: the key's own, or the default workspace."),
]
File = Annotated[Path, typer.Argument(help="The file; - reads standard input.", allow_dash=True)]
Service = Annotated[
    bool, typer.Option("--service", help="What concerns no single workspace, such as sign-ins; for admins.")
]
Keys = Annotated[
    list[Path] | None,
    typer.Option(
        "--key",
        metavar="FILE",
        help="A public key of the service, as GET /v1/audit/keys answers it, or PEM. May be repeated.",
    ),
]


@app.command("list")
def list_entries(
    *,
    workspace: Workspace = None,
    service: Service = False,
    action: Annotated[str | None, typer.Option(help="Only this action, such as approval.decided.")] = None,
    actor: Annotated[str | None, typer.Option(help="Only of this principal, by its id.")] = None,
    target: Annotated[str | None, typer.Option(help="Only on this target, such as an approval's id.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="How many, the newest first.")] = 50,
) -> None:
    """The newest entries of a workspace."""
    filters = {"action": action, "actor": actor, "target": target}
    given = _chain(service) | {name: value for name, value in filters.items() if value is not None}
    with service_client(workspace=workspace) as client:
        found = client.get(PATH, limit=limit, **given)["data"]
    print_table([_row(entry) for entry in found], HEADS)


@app.command()
def export(
    workspace: Workspace = None,
    service: Service = False,
    form: Annotated[
        Literal["jsonl", "ocsf"],
        typer.Option("--format", help="jsonl can be verified; ocsf is for a SIEM and cannot."),
    ] = "jsonl",
    from_seq: Annotated[
        int, typer.Option(min=1, help="The first entry; a part can be verified by itself.")
    ] = 1,
) -> None:
    """Writes a workspace's log to standard output, up to now, with its signed end."""
    with (
        service_client(workspace=workspace) as client,
        client.lines(f"{PATH}/export", format=form, from_seq=from_seq, **_chain(service)) as lines,
    ):
        for line in lines:
            sys.stdout.buffer.write(line + b"\n")


@app.command()
def verify(
    file: File,
    key: Keys = None,
    earlier: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="An earlier export of the same log, which this one must continue."),
    ] = None,
) -> None:
    """Verifies an export, without the service. Exit status 1, and which entries, if anything is wrong."""
    from claude_hitl_template.domain.audit import verification  # noqa: PLC0415 - slow to import

    with _opened(file) as stream, _opened(earlier) if earlier else nullcontext(()) as before:
        report = verification.verify(_lines(stream), _read_keys(key), earlier=_lines(before))
    if report.problems:
        _fail(report.problems)
    what = f"entries {report.from_seq} to {report.to_seq} of workspace {visible(str(report.workspace_id))}"
    typer.echo(f"whole: {what}, {report.checkpoints} signatures")
    _say_signed(str(report.signed_at), str(report.key_id), known=bool(key))


@app.command("verify-receipt")
def verify_receipt(file: File, key: Keys = None) -> None:
    """Verifies the receipt of an approval, without the service. Exit status 1 if anything is wrong."""
    from claude_hitl_template.domain.audit import canonical, receipts  # noqa: PLC0415 - slow to import

    with _opened(file) as stream:
        try:
            document: Any = canonical.parse(stream.read())
        except (ValueError, RecursionError):
            document = None
    problems = receipts.verify_receipt(document, _read_keys(key))
    if problems:
        _fail(problems)
    decision = document["decision"]
    details = decision["details"]
    by = f"{decision['actor']['name']} ({decision['actor']['id'] or 'no principal'})"
    said = f"{decision['action']}: {details.get('result', 'no decision')} by {by} at {decision['time']}"
    typer.echo(visible(f"whole: {document['approval_id']}, {said}"))
    typer.echo(visible(f"call   {details.get('tool_name')}, digest {details.get('digest')}"))
    _say_signed(document["time"], document["key_id"], known=bool(key))


def _fail(problems: Any) -> None:
    for problem in problems[:SHOWN_PROBLEMS]:
        typer.echo(visible(str(problem)))
    if len(problems) > SHOWN_PROBLEMS:
        typer.echo(f"... and {len(problems) - SHOWN_PROBLEMS} more")
    raise typer.Exit(1)


def _say_signed(at: str, key_id: str, *, known: bool) -> None:
    typer.echo(visible(f"signed {at} by key {key_id}"))
    if not known:
        typer.echo(
            "No --key was given: compare this key with the one that the service publishes (GET /v1/audit/keys)."
        )


def _read_keys(files: list[Path] | None) -> Any:
    """None without files. Raises ConfigError, InvalidInput."""
    from claude_hitl_template.domain.audit.signing import read_keys  # noqa: PLC0415 - slow to import

    if not files:
        return None
    found = dict[str, Any]()
    for file in files:
        with _opened(file) as stream:
            found |= read_keys(stream.read().decode("utf-8", "replace"))
    return found


def _lines(stream: Iterable[bytes]) -> Iterator[bytes]:
    return (line.rstrip(b"\r\n") for line in stream)


@contextmanager
def _opened(file: Path) -> Generator[BinaryIO]:
    if str(file) == "-":
        yield sys.stdin.buffer
        return
    try:
        with file.open("rb") as stream:
            yield stream
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}", "name a file that exists") from error


def _chain(service: bool) -> dict[str, Any]:
    return {"chain": "service"} if service else {}


def _row(entry: dict[str, Any]) -> tuple[str, ...]:
    return (
        str(entry["seq"]),
        entry["time"][:19],
        one_line(entry["actor"]["name"], ACTOR_CHARS),
        entry["action"],
        entry["target"],
    )
