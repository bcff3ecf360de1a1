"""Reads the store of a chaos run from a backup, so that the data that a restore would bring back is judged."""

import json
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from claude_hitl_template.domain.models import Approval, Event, Session
from tests.chaos.oracle import Record, Run


def read_dump(backup: Path, **more: Any) -> Record:
    """Returns the record with the sessions, approvals, events and audit logs of a backup; `more` are its other fields."""
    with zipfile.ZipFile(backup) as archive:
        events: dict[str, list[Event]] = defaultdict(list)
        for row in _rows(archive, "events"):
            known = {name: row[name] for name in Event.model_fields}
            events[row["session_id"]].append(Event.model_validate(known))
        audit: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for row in sorted(_rows(archive, "audit_entries"), key=lambda row: row["seq"]):
            audit[row["workspace_id"]].append(row["doc"])
        return Record(
            sessions=[Session.model_validate(row["doc"]) for row in _rows(archive, "sessions")],
            approvals=[Approval.model_validate(row["doc"]) for row in _rows(archive, "approvals")],
            events={session_id: sorted(log, key=lambda e: e.seq) for session_id, log in events.items()},
            audit=audit,
            **more,
        )


def make_journal(root: Path) -> Path:
    """Creates the folder of the journal, into which calls write when they run, and returns the journal's path."""
    folder = root / "journal"
    folder.mkdir()
    folder.chmod(0o777)  # the agent is another user where the service is root
    return folder / "runs.txt"


def read_journal(path: Path) -> list[Run]:
    """Parses the journal's lines: a token, seconds since 1970, and a folder below `<session>-<epoch>`. Raises for a line
    of another form."""
    return [_run(line) for line in path.read_text().splitlines()] if path.exists() else []


def _run(line: str) -> Run:
    token, seconds, folder = line.split(" ", 2)
    owner = next(part for part in Path(folder).parts if part.startswith("sesn_"))
    session_id, _, epoch = owner.rpartition("-")
    return Run(token, datetime.fromtimestamp(float(seconds), UTC), session_id, int(epoch))


def _rows(archive: zipfile.ZipFile, table: str) -> Iterator[dict[str, Any]]:
    with archive.open(f"{table}.jsonl") as lines:
        yield from map(json.loads, lines)
