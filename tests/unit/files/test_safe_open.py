"""Files opened below a folder are in that folder: links are not followed."""

import os
from pathlib import Path

import pytest

from claude_hitl_template.files.safe_open import open_file, open_folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "secret").write_text("secret")
    root = tmp_path / "root"
    (root / "a" / "b").mkdir(parents=True)
    (root / "a" / "b" / "file").write_text("text")
    (root / "a" / "up").symlink_to("..")
    (root / "a" / "within").symlink_to("b/file")
    (root / "out").symlink_to(tmp_path)
    os.mkfifo(root / "pipe")
    return root


def test_a_file_is_read(root: Path) -> None:
    with open_file(root, "a/b/file") as file:
        assert file.read() == b"text"


@pytest.mark.parametrize(
    "path",
    [
        *(
            "out/secret",
            "a/up/a/b/file",
            "a/within",
            "../secret",
            "a/../../secret",
            "a/./b/file",
            "a//b/file",
        ),
        *("", "/etc/passwd", "a/b", "a/b/file/x", "pipe", "nothing", "a/nothing/x"),
    ],
)
def test_nothing_else_is(root: Path, path: str) -> None:
    with pytest.raises(FileNotFoundError):
        open_file(root, path)


def test_a_folder_is_opened_and_no_link_to_one(root: Path) -> None:
    for path in ("", "a", "a/b"):
        os.close(open_folder(root, path))
    for path in ("a/up", "out", "a/b/file", ".."):
        with pytest.raises(FileNotFoundError):
            open_folder(root, path)


def test_no_descriptor_stays_open(root: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for path in ("out/secret", "pipe", "a/b", "nothing/x"):
        with pytest.raises(FileNotFoundError):
            open_file(root, path)
    open_file(root, "a/b/file").close()
    assert len(os.listdir("/proc/self/fd")) == before
