"""`hitl rules`: a workspace's policy, and what a changed one would have decided otherwise."""

from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer

from claude_hitl_template.cli.commands.workspaces import PATH, Workspace, administration, chosen
from claude_hitl_template.cli.common import print_json, service_client
from claude_hitl_template.cli.terminal.tables import print_table
from claude_hitl_template.domain.models import ApprovalState, utcnow
from claude_hitl_template.domain.policy.documents import read_file
from claude_hitl_template.domain.policy.replay import Difference, difference
from claude_hitl_template.domain.policy.tiers import WorkspacePolicy, WorkspaceRule, described
from claude_hitl_template.presentation.text import one_line, summary, visible

app = typer.Typer(
    help="Rules of a workspace: which calls are denied or asked for, and who decides.", no_args_is_help=True
)
HEADS = ("PATTERN", "ACTION", "SEVERITY", "TAKES", "DEADLINE", "REASON")
TEXT_CHARS = 60
_FIX = "correct it; docs/rules.md has an example"

File = Annotated[Path, typer.Argument(metavar="FILE", help="The rules, as YAML or JSON.")]
AsJson = Annotated[bool, typer.Option("--json", help="As JSON, which `rules set` reads again.")]


@app.command("list")
def list_rules(workspace: Workspace = None, as_json: AsJson = False) -> None:
    """The rules of a workspace."""
    with administration() as client:
        found = chosen(client, workspace)
        stored = client.get(_policy(found))
    if as_json:
        print_json({"rules": stored["rules"], "default": stored["default"]})
        return
    by = (
        f", changed by {visible(stored['changed_by'])} at {stored['changed_at']}" if stored["version"] else ""
    )
    typer.echo(f"{visible(found['name'])}: version {stored['version']}{by}")
    rules = [WorkspaceRule.model_validate(rule) for rule in stored["rules"]]
    if rules:
        print_table(map(_row, rules), HEADS, optional=("REASON",))
    typer.echo(f"everything else: {_DEFAULTS[stored['default']]}")


@app.command("set")
def set_rules(
    file: File,
    workspace: Workspace = None,
    version: Annotated[
        int | None,
        typer.Option(min=0, help="The version that you changed; refused if it is no longer current."),
    ] = None,
) -> None:
    """Replaces the rules of a workspace. Stricter ones also hold for calls that wait."""
    policy = _read(file)
    with administration() as client:
        found = chosen(client, workspace)
        path = _policy(found)
        current = client.get(path)["version"] if version is None else version
        stored = client.put(path, {**policy.model_dump(mode="json"), "version": current})
    typer.echo(
        f"{visible(found['name'])} has {_count(len(stored['rules']), 'rule')}, version {stored['version']}"
    )


@app.command("test")
def replay(file: File, workspace: Workspace = None, as_json: AsJson = False) -> None:
    """Lists which recorded calls of a workspace these rules would decide otherwise. Changes nothing."""
    policy, seen, found = _read(file), 0, list[Difference]()
    with service_client() as client:
        if workspace is not None:
            with administration() as admin:
                client.in_workspace(chosen(admin, workspace)["id"])
        for approval in client.pages(
            "/v1/approvals", **{"states[]": [state.value for state in ApprovalState]}
        ):
            seen += 1
            if (one := difference(policy, approval)) is not None:
                found.append(one)
    if as_json:
        print_json([vars(one) for one in found])
        return
    if found:
        rows = [
            (one.approval_id, one.tool_name, visible(one.before), visible(one.after), summary(one.given))
            for one in found
        ]
        print_table(rows, ("ID", "TOOL", "WAS", "WOULD BE", "WHAT"), folded=2)
    typer.echo(f"of {_count(seen, 'recorded call')} {len(found)} would be decided otherwise")


_DEFAULTS = {
    "allow": "left to the agent's policy and the operator's floor",
    "ask": "asks one approver",
    "deny": "is denied",
}


def _policy(workspace: dict[str, Any]) -> str:
    return f"{PATH}/{quote(workspace['id'], safe='')}/policy"


def _read(file: Path) -> WorkspacePolicy:
    return read_file(file, WorkspacePolicy, "FILE", _FIX)


def _row(rule: WorkspaceRule) -> tuple[str, ...]:
    asks = rule.action == "ask"
    then = f", then {rule.escalate_to}" if rule.escalate_to else ""
    deadline = f"{rule.deadline_s} s{then}" if rule.deadline_s is not None else ""
    return (
        visible(rule.pattern),
        rule.action,
        rule.severity if asks else "",
        visible(described(rule.requirement(utcnow()))) if asks else "",
        visible(deadline),
        one_line(rule.reason, TEXT_CHARS),
    )


def _count(number: int, noun: str) -> str:
    return f"1 {noun}" if number == 1 else f"{number} {noun}s"
