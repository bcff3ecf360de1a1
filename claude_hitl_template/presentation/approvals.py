"""What an approver must know of a call besides what it does: which of its commands asks, why, and who must agree."""

from collections.abc import Mapping, Sequence
from typing import Any

from claude_hitl_template.presentation.views import Caution, Field, Fields, Part, Table

VERDICTS = {"allow": "runs unasked", "ask": "asks", "deny": "is denied"}
AT_HIGH = ("high", "critical")


def approval_parts(approval: Mapping[str, Any]) -> tuple[Part, ...]:
    """The parts of an approval, as its record has it in JSON, that stand before the call's own."""
    return (*_reasons(approval), *_needed(approval), *segment_parts(approval))


def segment_parts(approval: Mapping[str, Any]) -> tuple[Part, ...]:
    """The commands of a command line, each with how it was judged and by which rule; () for one command."""
    segments, command = approval.get("segments") or (), str(approval["input"].get("command", ""))
    if not segments:
        return ()
    rows = tuple(
        (command[one["start"] : one["end"]], VERDICTS[one["verdict"]], one["source"]) for one in segments
    )
    return (Table("its commands", ("command", "verdict", "by"), rows),)


def votes_text(approval: Mapping[str, Any]) -> str:
    """For instance `1 of 2, by ann`; "" for a call that takes one approver and has no vote."""
    requirements, votes = approval.get("requirements") or (), approval.get("votes") or ()
    quorum = max((one["quorum"] for one in requirements), default=1)
    if quorum == 1 and len(requirements) < 2 and not votes:
        return ""
    by = f", by {', '.join(vote['name'] for vote in votes)}" if votes else ""
    return f"{len(votes)} of {quorum}{by}"


def _reasons(approval: Mapping[str, Any]) -> list[Part]:
    found = [
        f"{one['severity']}: {one['reason'] or one['rule']}"
        for one in approval.get("requirements") or ()
        if one["severity"] in AT_HIGH
    ]
    return [Caution(text) for text in dict.fromkeys(found)]


def _needed(approval: Mapping[str, Any]) -> list[Part]:
    requirements: Sequence[Mapping[str, Any]] = approval.get("requirements") or ()
    fields = [Field("asked for by", _rule_text(one)) for one in requirements]
    if votes := votes_text(approval):
        fields.append(Field("allowed by", votes, strong=True))
    for vote in approval.get("votes") or ():
        if vote["updated_input"]:
            fields.append(
                Field("with input", f"{vote['updated_input']}, as {vote['name']} edited it", strong=True)
            )
    if reviewer := approval.get("reviewer"):
        fields.append(Field("looked at by", f"{reviewer['name']} until {reviewer['until']}"))
    if assignee := approval.get("assignee"):
        note = f": {assignee['note']}" if assignee["note"] else ""
        fields.append(Field("handed to", f"{assignee['name']} by {assignee['by']}{note}"))
    return [Fields(tuple(fields))] if fields else []


def _rule_text(requirement: Mapping[str, Any]) -> str:
    approvers = requirement["approvers"]
    who = " or ".join(
        [
            *(f"the role {role}" for role in approvers["roles"]),
            *(f"the group {one}" for one in approvers["groups"]),
        ]
    )
    reason = f" ({requirement['reason']})" if requirement["reason"] else ""
    other = ", not who asked for the session" if requirement["exclude_requester"] else ""
    return f"{requirement['rule']}{reason}: {requirement['quorum']} of {who}{other}"
