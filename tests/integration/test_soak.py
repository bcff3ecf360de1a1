"""Nothing of a deleted session stays, and owners leave nothing in Ray: by counts, not by times."""

from pathlib import Path

import pytest

from tools.soak import slopes, soak

pytestmark = pytest.mark.slow
OF_SESSIONS = ("sessions", "events", "approvals", "transcripts")


def test_after_deleted_sessions_no_row_file_or_class_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before, after, work = soak(minutes=0)
    assert work.sessions == 1
    found = slopes(before, after, work)
    kept = [f"rows of {table}" for table in OF_SESSIONS]
    for name in (*kept, "files of sessions", "classes and functions in the GCS"):
        assert found[name]["session"] == 0, (name, found[name])
