"""A marker says what is certain, or nothing."""

from pathlib import Path

import pytest

from claude_hitl_template.files.manifest import Manifest, SavedFile, blob_name
from claude_hitl_template.workspace import base_state
from claude_hitl_template.workspace.base_state import SavedState
from claude_hitl_template.workspace.scan import Stamp

MADE = Manifest.of([SavedFile("a\udce9", 0o644, 1, 5, (blob_name(b"x"),))])
KNOWN = SavedState(blob_name(MADE.encode()[-1]), MADE, {"a\udce9": Stamp(1, 5, 6, 7)})


def test_what_was_written_is_read(tmp_path: Path) -> None:
    place = tmp_path / "saved" / "m"
    base_state.write(place, KNOWN)
    assert base_state.read(place) == KNOWN
    base_state.write(place, SavedState(None, Manifest(), {}))
    assert base_state.read(place) == SavedState(None, Manifest(), {})


def test_a_folder_that_was_begun_is_not_known(tmp_path: Path) -> None:
    base_state.write(tmp_path / "m", KNOWN)
    base_state.mark_unfinished(tmp_path / "m")
    assert base_state.read(tmp_path / "m") is None


@pytest.mark.parametrize(
    "content", [b"", b"\n\n", b"{}\n{}\n{}", b"[1]\n[2]\n[3]", b"\xff", b'{"base": 5}\n{}\n5']
)
def test_a_damaged_marker_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m").write_bytes(content)
    assert base_state.read(tmp_path / "m") is None


def test_a_marker_whose_manifest_is_another_is_none(tmp_path: Path) -> None:
    base_state.write(tmp_path / "m", SavedState("0" * 64, MADE, {}))
    assert base_state.read(tmp_path / "m") is None
    assert base_state.read(tmp_path / "not there") is None


def test_a_link_in_its_place_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "m").symlink_to(tmp_path / "precious")
    base_state.write(tmp_path / "m", KNOWN)
    assert (tmp_path / "precious").read_text() == "mine"
    assert base_state.read(tmp_path / "m") == KNOWN
