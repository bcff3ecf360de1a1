"""The saved state that a workspace's folder is based on, kept in a file next to the folder. Blocking.

It is an optimisation: if the file is lost or damaged, the folder is restored from the saved workspace.
"""

import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from claude_hitl_template.errors import InvalidInput
from claude_hitl_template.files.manifest import Manifest, blob_name
from claude_hitl_template.workspace.scan import Stamp


@dataclass(frozen=True)
class SavedState:
    """The saved state that the folder is based on, and the stamps of those of its files that are as they were saved."""

    name: str | None
    manifest: Manifest
    stamps: Mapping[str, Stamp]


def read(marker: Path) -> SavedState | None:
    """Reads a marker. Returns None if the folder was not finished, or its state is not certain."""
    try:
        head, text, stamps = marker.read_bytes().split(b"\n")
        name = json.loads(head)["base"]
        manifest = Manifest.read(text)
        if name is not None and blob_name(manifest.encode()[-1]) != name:
            return None
        found = cast(dict[str, Any], json.loads(stamps))
        return SavedState(name, manifest, {path: Stamp(*row) for path, row in found.items()})
    except (OSError, ValueError, TypeError, KeyError, AttributeError, InvalidInput):
        return None


def write(marker: Path, known: SavedState) -> None:
    lines = (json.dumps({"base": known.name}), known.manifest.text().decode(), json.dumps(known.stamps))
    _replace(marker, "\n".join(lines).encode())


def mark_unfinished(marker: Path) -> None:
    """The folder is not what was saved until `write` says so."""
    _replace(marker, b"unfinished")


def _replace(marker: Path, content: bytes) -> None:
    marker.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    unfinished = marker.with_name(f".{marker.name}.{secrets.token_hex(4)}")
    try:
        with os.fdopen(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(content)
        unfinished.replace(marker)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise
