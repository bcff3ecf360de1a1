"""`hitl sessions`: lists, shows and ends sessions."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from claude_hitl_template.cli.client import Client
from claude_hitl_template.cli.common import console, print_json, service_client
from claude_hitl_template.cli.program import NAME
from claude_hitl_template.cli.terminal import ids
from claude_hitl_template.cli.terminal.conversation import Terminal
from claude_hitl_template.cli.terminal.render import event_lines
from claude_hitl_template.cli.terminal.tables import print_table
from claude_hitl_template.presentation.text import age, one_line

app = typer.Typer(help="Lists, shows and ends sessions.")
Id = Annotated[str, typer.Argument(help="A session's id, as `./hitl sessions` shows it, or its beginning.")]
AsJson = Annotated[bool, typer.Option("--json", help="As JSON.")]
HEADS = ("ID", "STATE", "AGE", "WAITS FOR", "TITLE")
TITLE_CHARS = 60


@app.callback(invoke_without_command=True)
def main(context: typer.Context, as_json: AsJson = False) -> None:
    """Lists the sessions that are not archived; a command shows or ends one."""
    if context.invoked_subcommand is None:
        listing(as_json)


@app.command("list")
def listing(as_json: AsJson = False) -> None:
    """Lists the sessions that are not archived, newest first."""
    with service_client() as client:
        found = list(client.pages("/v1/sessions"))
        if as_json:
            print_json(found)
        elif not found:
            typer.echo(f"no sessions; {NAME} demo starts one")
        else:
            rows = [row(s, _title(s)) for s in found]
            print_table(rows, HEADS, optional=("WAITS FOR",))


@app.command()
def show(session_id: Id, as_json: AsJson = False) -> None:
    """Shows a session's events."""
    with _chosen(session_id) as (client, found):
        session = client.get(f"/v1/sessions/{found}")
        events = list(client.pages(f"/v1/sessions/{found}/events"))
    if as_json:
        print_json(events)
        return
    terminal = Terminal(console())
    for view in map(event_lines, events):
        if view is not None:
            terminal.show(view)
    typer.echo(f"state  {state(session)}")


@app.command()
def archive(session_id: Id) -> None:
    """Archives a session for good: calls that wait are superseded, its events stay readable."""
    with _chosen(session_id) as (client, found):
        client.post(f"/v1/sessions/{found}/archive")
    typer.echo(f"archived {found}")


@app.command()
def delete(session_id: Id) -> None:
    """Deletes a session with all its events."""
    with _chosen(session_id) as (client, found):
        client.delete(f"/v1/sessions/{found}")
    typer.echo(f"deleted {found}")


@app.command()
def interrupt(session_id: Id) -> None:
    """Interrupts a session's turn: calls that wait are superseded and never run."""
    with _chosen(session_id) as (client, found):
        client.post(f"/v1/sessions/{found}/events", {"events": [{"type": "user.interrupt"}]})
    typer.echo(f"interrupted {found}")


@contextmanager
def _chosen(given: str) -> Generator[tuple[Client, str]]:
    """A client, and the id of the session that `given` is, or begins."""
    with service_client() as client:
        yield client, ids.session_id(client, given)


def state(session: dict[str, Any]) -> str:
    """running | waiting for room | waiting hot (its process is alive) | waiting parked (no process) | idle | ..."""
    if session.get("waiting_for_room"):
        return "waiting for room"
    waits = (session.get("stop_reason") or {}).get("type") == "requires_action"
    if session["status"] == "idle" and waits:
        return "waiting parked" if session["parked"] else "waiting hot"
    return str(session["status"])


def row(session: dict[str, Any], title: str) -> tuple[str, ...]:
    """One line of the list, with hidden characters escaped."""
    waiting = (
        len((session.get("stop_reason") or {}).get("event_ids", ())) if session["status"] == "idle" else 0
    )
    waits_for = f"{waiting} decision{'s' if waiting > 1 else ''}" if waiting else "-"
    return (
        session["id"],
        state(session),
        age(session["created_at"]),
        waits_for,
        one_line(title, TITLE_CHARS),
    )


def _title(session: dict[str, Any]) -> str:
    """The title, or the beginning of the first message."""
    return str(session["title"] or session.get("first_words") or "")
