"""Edits a transcript so that the CLI asks again for a call that waited when the CLI died.

A call that the CLI defers leaves an attachment in the transcript, and is asked for again on resume. A CLI that was
killed left none, and on resume it tells the model that the outcome is unknown, though nothing ran. This module adds
the attachment. Its shape is that of CLI 2.1.330; tests/contract/test_session.py checks it against the pinned CLI.
"""

import uuid
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

DEFERRED = "hook_deferred_tool"
_COPIED = ("userType", "entrypoint", "cwd", "sessionId", "version", "gitBranch", "isSidechain")


def unanswered(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """The tool_use_ids of the main conversation that have no result, in the order they were issued."""
    asked: dict[str, None] = {}
    for entry in entries:
        for block in _blocks(entry):
            if block.get("type") == "tool_use":
                asked[str(block.get("id"))] = None
            elif block.get("type") == "tool_result":
                asked.pop(str(block.get("tool_use_id")), None)
    return list(asked)


def is_deferred(entries: Sequence[Mapping[str, Any]], call_id: str) -> bool:
    """Whether the CLI will ask for `call_id` again by itself."""
    for entry in reversed(entries):
        attachment = entry.get("attachment")
        if isinstance(attachment, Mapping) and attachment.get("type") == DEFERRED:
            if attachment.get("toolUseID") == call_id:
                return True
        elif any(b.get("type") == "tool_use" and b.get("id") == call_id for b in _blocks(entry)):
            return False  # what was deferred before had the same id
    return False


def deferral(entries: Sequence[Mapping[str, Any]], call_id: str, now: datetime) -> dict[str, Any]:
    """The entry to append, so that the CLI asks for `call_id`, which is among the entries, again."""
    for entry in reversed(entries):
        for block in _blocks(entry):
            if block.get("type") == "tool_use" and block.get("id") == call_id:
                return _attachment(entry, block, now)
    raise KeyError(call_id)


def _attachment(entry: Mapping[str, Any], block: Mapping[str, Any], now: datetime) -> dict[str, Any]:
    attachment = {
        "type": DEFERRED,
        "toolUseID": block["id"],
        "toolName": block["name"],
        "toolInput": block["input"],
        "hookName": "settings",
        "hookEvent": "PreToolUse",
        "permissionMode": "default",
    }
    return {
        **{name: entry[name] for name in _COPIED if name in entry},
        "parentUuid": entry.get("uuid"),
        "type": "attachment",
        "attachment": attachment,
        "uuid": str(uuid.uuid5(uuid.NAMESPACE_URL, f"claude-hitl:deferred:{entry.get('uuid')}")),
        "timestamp": now.strftime("%Y-%m-%dT%H:%M:%S.") + f"{now.microsecond // 1000:03d}Z",
    }


def _blocks(entry: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    message = entry.get("message")
    content = message.get("content") if isinstance(message, Mapping) else None
    if entry.get("isSidechain") or not isinstance(content, list):
        return []
    return [block for block in content if isinstance(block, Mapping)]
