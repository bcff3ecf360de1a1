"""Receipts: one approval's entries of the audit log, signed, so that they can be shown to an outsider by themselves."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from pydantic import ValidationError

from claude_hitl_template.domain.audit import signing
from claude_hitl_template.domain.audit.entries import Entry, hash_of
from claude_hitl_template.domain.audit.verification import Problem

RECEIPT = "approval_receipt"
CLOSING = ("approval.decided", "approval.expired")  # the actions that end an approval's waiting


def receipt(signer: signing.Signer, entries: Sequence[Entry], at: datetime) -> dict[str, Any]:
    """The receipt of the approval that these entries are about, in order; one of them is of CLOSING."""
    wires = [entry.wire() for entry in entries]
    return signer.sign({
        "type": RECEIPT,
        "workspace_id": entries[0].workspace_id,
        "approval_id": entries[0].target,
        "decision": _decision(wires),
        "entries": wires,
        "time": at.astimezone(UTC).isoformat().replace("+00:00", "Z"),
        "public_key": signer.jwk,
    })  # fmt: skip


def verify_receipt(document: Any, keys: signing.Keys | None) -> tuple[Problem, ...]:
    """The problems of a receipt; () if there are none.

    Args:
        document: The receipt as `GET /v1/approvals/{id}/receipt` answers.
        keys: The keys that may have signed it. None: the one that it names itself, which proves that nothing was changed
            since it was signed, and not who signed it.
    """
    if not isinstance(document, dict) or document.get("type") != RECEIPT:
        return (Problem("malformed", None, "this is not a receipt of an approval"),)
    try:
        signing.check(document, signing.keys_of_jwks(document.get("public_key")) if keys is None else keys)
    except signing.UnknownKey as error:
        return (Problem("other_key", None, f"the receipt does not count: {error}"),)
    except ValueError as error:
        return (Problem("bad_signature", None, f"the receipt is forged or was changed: {error}"),)
    try:
        entries = [Entry.model_validate(entry) for entry in document.get("entries") or ()]
    except (ValidationError, TypeError):
        entries = []
    decision = _decision([entry.wire() for entry in entries])
    if decision is None:
        return (Problem("malformed", None, "the receipt has no entry with a decision"),)
    wrong = [problem for entry in entries for problem in _wrong_with(entry, document)]
    if not wrong and document.get("decision") != decision:
        wrong.append(Problem("changed", None, "what the receipt says is not what its entries say"))
    return tuple(wrong)


def _wrong_with(entry: Entry, document: Mapping[str, Any]) -> list[Problem]:
    if hash_of(entry.wire()) != entry.hash:
        return [Problem("changed", entry.seq, "was changed: its content does not have its hash")]
    if (entry.workspace_id, entry.target) != (document.get("workspace_id"), document.get("approval_id")):
        return [Problem("other_workspace", entry.seq, "is about another approval")]
    return []


def _decision(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Who decided what, and when, as the closing entry has it; its `details` say on what, and by which rule and votes."""
    closing = next((entry for entry in entries if entry.get("action") in CLOSING), None)
    if closing is None:
        return None
    same = {name: closing[name] for name in ("time", "actor", "details", "seq", "hash")}
    return {"action": closing["action"], **same}
