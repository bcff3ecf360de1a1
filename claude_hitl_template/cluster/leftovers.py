"""Removes what sessions leave on the service's machine: folders of deleted sessions and of killed owners."""

import contextlib
import shutil
import time
from collections.abc import Collection
from pathlib import Path

from claude_hitl_template.config.settings import Settings

# An owner's folder may be made while the owner starts, before its lease; a killed owner's folder is older than this and the
# time that a start may take.
RUN_KEPT_S = 60.0


class Leftovers:
    """Finds folders by the names that `Supervisor` gives them. All methods are blocking."""

    def __init__(self, settings: Settings) -> None:
        self._of_workspaces = settings.workspaces
        self._of_sessions = settings.workspaces, settings.markers
        self._of_owners = settings.data_dir / "run"
        self._run_kept_s = settings.start_timeout_s + RUN_KEPT_S

    def sessions(self) -> set[str]:
        """Returns the ids of sessions that have a folder, or a record of its saved state, on this machine."""
        of_owners = {_session_of(path) for path in _in(self._of_owners)}
        return of_owners | {path.name for folder in self._of_sessions for path in _in(folder)}

    def remove(self, session_ids: Collection[str]) -> None:
        """Removes all folders and files of these sessions from this machine."""
        for session_id in session_ids:
            for folder in self._of_sessions:
                _remove(folder / session_id)
        for path in _in(self._of_owners):
            if _session_of(path) in session_ids:
                _remove(path)

    def remove_owners(self, leased: Collection[str]) -> set[str]:
        """Removes the folders of owners, named SESSION-EPOCH, that have no lease: they hold the transcript. Returns the ids
        of their sessions."""
        removed = set[str]()
        for path in _in(self._of_owners):
            with contextlib.suppress(OSError):  # already removed
                if path.name not in leased and time.time() - path.stat().st_mtime > self._run_kept_s:
                    _remove(path)
                    removed.add(_session_of(path))
        return removed

    def remove_empty(self, session_ids: Collection[str]) -> None:
        """Removes the working folders of sessions that never existed, whose CLI was started and had no work."""
        for session_id in session_ids:
            with contextlib.suppress(OSError):  # not there, or not empty
                (self._of_workspaces / session_id).rmdir()


def _in(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if not path.name.startswith(".")] if folder.is_dir() else []


def _session_of(path: Path) -> str:
    """The session of an owner's folder."""
    return path.name.rpartition("-")[0]


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
