"""`hitl approvals`: the approvals of all sessions, and decisions on them."""

import sys
from pathlib import Path
from typing import Annotated, Any

import click
import typer

from claude_hitl_template.cli.common import console, print_json, service_client
from claude_hitl_template.cli.terminal import ids
from claude_hitl_template.cli.terminal.conversation import Terminal
from claude_hitl_template.cli.terminal.dialogue import Body, denial, edit_input, questions
from claude_hitl_template.cli.terminal.render import approval_view
from claude_hitl_template.cli.terminal.tables import print_table
from claude_hitl_template.domain.models import ApprovalState
from claude_hitl_template.errors import InvalidInput
from claude_hitl_template.presentation.approvals import votes_text
from claude_hitl_template.presentation.sessions import card_url
from claude_hitl_template.presentation.text import age, parse_input, rule_text, summary, visible

app = typer.Typer(help="Lists, shows and decides approvals.", no_args_is_help=False)
Id = Annotated[
    str, typer.Argument(help="An approval's id, as `./hitl approvals` shows it, or its beginning.")
]
Everything = Annotated[bool, typer.Option("--all", help="Decided ones too.")]
OfSession = Annotated[
    str | None, typer.Option("--session", help="Only those of this session: its id, or its beginning.")
]
AsJson = Annotated[bool, typer.Option("--json", help="As JSON.")]
HEADS = ("ID", "SESSION", "STATE", "AGE", "TOOL", "WHAT")


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    everything: Everything = False,
    session: OfSession = None,
    as_json: AsJson = False,
) -> None:
    """Lists the pending approvals; a command shows or decides one."""
    if context.invoked_subcommand is None:
        listing(everything, session, as_json)


@app.command("list")
def listing(everything: Everything = False, session: OfSession = None, as_json: AsJson = False) -> None:
    """Lists the pending approvals."""
    wanted: dict[str, Any] = {
        "states[]": [state.value for state in ApprovalState] if everything else "pending"
    }
    with service_client() as client:
        if session is not None:
            wanted["session_id"] = ids.session_id(client, session)
        found = sorted(client.pages("/v1/approvals", **wanted), key=lambda a: a["id"])
    if as_json:
        print_json(found)
    elif not found:
        typer.echo("no approvals" if everything else "nothing waits for a decision")
    else:
        print_table(map(row, found), HEADS, optional=("SESSION",), folded=2)


@app.command()
def show(approval_id: Id, as_json: AsJson = False) -> None:
    """Shows exactly what would run, or ran."""
    with service_client() as client:
        approval_id = ids.approval_id(client, approval_id)
        approval = client.get(f"/v1/approvals/{approval_id}")
        address = card_url(client.base_url, approval_id)
    if as_json:
        print_json(approval)
        return
    terminal = Terminal(console())
    terminal.show(approval_view(approval, approval["run_input"]))
    for line in [*outcome(approval), f"browser  {address}"]:
        typer.echo(line)


@app.command()
def allow(
    approval_id: Id,
    remember: Annotated[
        bool, typer.Option("--remember", help="Allow such calls without asking from now on, in this session.")
    ] = False,
    answer: Annotated[
        list[str] | None,
        typer.Option(
            help='The answer to a question: "Question=Label" or "Question=your own words"; repeat it for several labels.'
        ),
    ] = None,
) -> None:
    """Allows the call exactly as it was shown."""
    with service_client() as client:
        approval_id = ids.approval_id(client, approval_id)
        body: Body = {"result": "allow", **({"remember": True} if remember else {})}
        if answer:
            asked = client.get(f"/v1/approvals/{approval_id}")["input"]
            body["answers"] = parse_answers(answer, asked)
        _report(client.post(f"/v1/approvals/{approval_id}/decide", body))


@app.command()
def deny(
    approval_id: Id,
    reason: Annotated[str | None, typer.Argument(help="The reason, which the agent gets.")] = None,
    message: Annotated[str | None, typer.Option(help="The same, as an option.")] = None,
) -> None:
    """Denies the call. It never runs."""
    if reason is not None and message is not None:
        raise typer.BadParameter("the reason is given twice", param_hint="--message")
    with service_client() as client:
        approval_id = ids.approval_id(client, approval_id)
        _report(
            client.post(f"/v1/approvals/{approval_id}/decide", denial(message if reason is None else reason))
        )


@app.command()
def edit(
    approval_id: Id,
    source: Annotated[
        str | None, typer.Option("--input", help="File with the new input as JSON; - for standard input.")
    ] = None,
) -> None:
    """Edits the call's input, in your editor or from a file, and allows it."""
    with service_client() as client:
        approval_id = ids.approval_id(client, approval_id)
        approval = client.get(f"/v1/approvals/{approval_id}")
        if source is not None:
            changed = parse_input(_read(source))
        else:
            terminal = Terminal(console())
            changed = edit_input(terminal, approval)
            if changed is None:
                typer.echo(
                    f"nothing was decided: the input is unchanged; ./hitl approvals allow {approval_id} allows it as it is"
                )
                raise typer.Exit(4)
            if not click.confirm("allow this?"):
                typer.echo("nothing was decided")
                raise typer.Exit(4)
        _report(
            client.post(f"/v1/approvals/{approval_id}/decide", {"result": "allow", "updated_input": changed})
        )


def parse_answers(given: list[str], asked: dict[str, Any]) -> dict[str, str | list[str]]:
    """Parses `Question=Label` options into the `answers` of a decision.

    A question may contain `=`, so the options are matched against the questions that were asked.

    Args:
        given: The options.
        asked: The approval's input.

    Raises:
        InvalidInput: An option answers a question that was not asked.
    """
    answers: dict[str, str | list[str]] = {}
    known = questions(asked) if "questions" in asked else {}
    for item in given:
        question = next((q for q in known if item.startswith(f"{q}=")), None)
        if question is None:
            raise InvalidInput(f"{item!r} answers none of the questions {sorted(known)}", "--answer")
        value, before = item.removeprefix(f"{question}="), answers.get(question)
        if before is None:
            answers[question] = value
        else:
            answers[question] = [*([before] if isinstance(before, str) else before), value]
    return answers


def row(approval: dict[str, Any]) -> tuple[str, ...]:
    """One line of the list, with hidden characters escaped."""
    return (
        approval["id"],
        approval["session_id"],
        approval["state"],
        age(approval["created_at"]),
        visible(approval["tool_name"]),
        summary(approval["input"]),
    )


def outcome(approval: dict[str, Any]) -> list[str]:
    """The state of an approval, and who decided what."""
    lines = [f"session  {approval['session_id']}", f"state    {approval['state']}"]
    decision = approval["decision"]
    if decision is None and (votes := votes_text(approval)):
        lines.append(f"allowed  {visible(votes)}")
    if decision is not None:
        changed = "answers" if approval["kind"] == "question" else "an edited input"
        edited = f", with {changed}" if decision["updated_input"] else ""
        said = f": {decision['deny_message']}" if decision["deny_message"] else ""
        by = f"{decision['result']} by {decision['decided_by']} at {decision['decided_at']}{edited}{said}"
        lines.append(f"decided  {visible(by)}")
        if decision["remember"]:
            lines.append(f"rule     {visible(rule_text(decision['remember']))}")
    return lines


def _read(source: str) -> str:
    try:
        return sys.stdin.read() if source == "-" else Path(source).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{source} cannot be read: {error}", "--input") from error


def _report(approval: dict[str, Any]) -> None:
    typer.echo("\n".join([f"approval {approval['id']}", *outcome(approval)]))
