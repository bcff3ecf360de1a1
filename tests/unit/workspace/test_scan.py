"""What a folder holds is found without following or changing anything, whatever an agent left in it."""

import os
import shutil
import socket
import threading
from pathlib import Path

import pytest

from claude_hitl_template.errors import TooLarge
from claude_hitl_template.files.manifest import CHUNK_BYTES, SavedLink, blob_name
from claude_hitl_template.workspace.scan import excluded, list_folder, read


@pytest.mark.parametrize(
    ("path", "is_folder", "pattern", "fits"),
    [
        ("a/__pycache__", True, "__pycache__/", True),
        ("a/__pycache__", False, "__pycache__/", False),
        ("a/b.pyc", False, "*.pyc", True),
        ("a/b.pyc", False, "a/*.pyc", True),
        ("x/a/b.pyc", False, "a/*.pyc", False),
        ("build", True, "build", True),
        ("rebuild", True, "build", False),
        ("A.PYC", False, "*.pyc", False),
    ],
)
def test_a_glob_fits_names_or_paths(path: str, is_folder: bool, pattern: str, fits: bool) -> None:
    assert excluded(path, [pattern], is_folder=is_folder) is fits


def test_what_is_excluded_or_baked_is_not_listed(tmp_path: Path) -> None:
    for name in ("a.txt", ".claude/settings.json", "sub/.claude/x", "sub/__pycache__/m.pyc"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    found = list_folder(tmp_path, exclude=["__pycache__/"], baked={".claude"})
    assert sorted(f.path for f in found.files) == ["a.txt", "sub/.claude/x"]


def test_links_are_taken_as_they_are_and_never_followed(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    folder = tmp_path / "w"
    folder.mkdir()
    (folder / "file").symlink_to(tmp_path / "secret")
    (folder / "folder").symlink_to(tmp_path)
    (folder / "loop").symlink_to("loop")
    found = list_folder(folder)
    assert found.files == []
    assert sorted(found.links, key=lambda x: x.path) == [
        SavedLink("file", str(tmp_path / "secret")),
        SavedLink("folder", str(tmp_path)),
        SavedLink("loop", "loop"),
    ]


def test_what_is_no_file_is_left_out_and_said(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        found = list_folder(tmp_path)
    assert sorted(found.left_out) == [("pipe", "a pipe"), ("socket", "a socket")]


def test_setuid_is_dropped_and_the_other_bits_stay(tmp_path: Path) -> None:
    (tmp_path / "tool").write_text("x")
    (tmp_path / "tool").chmod(0o6751)
    assert list_folder(tmp_path).files[0].mode == 0o751


def test_only_folders_with_nothing_in_them_are_listed_as_such(tmp_path: Path) -> None:
    (tmp_path / "a/b/empty").mkdir(parents=True)
    (tmp_path / "c").mkdir()
    (tmp_path / "c/file").write_text("x")
    assert list_folder(tmp_path).empty_folders() == {"a/b/empty"}


def test_a_folder_that_is_gone_is_an_error_and_not_an_empty_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        list_folder(tmp_path / "gone")


def test_a_path_too_long_for_this_system_is_left_out(tmp_path: Path) -> None:
    here = os.open(tmp_path, os.O_RDONLY)
    for _ in range(30):
        os.mkdir("x" * 200, dir_fd=here)
        deeper = os.open("x" * 200, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = deeper
    os.close(here)
    assert [why for _, why in list_folder(tmp_path).left_out if "too long" in why]


def test_too_many_files_are_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    for i in range(5):
        (tmp_path / str(i)).write_text("")
    with pytest.raises(TooLarge, match="HITL_WORKSPACE_EXCLUDE"):
        list_folder(tmp_path, max_files=3)


def test_content_comes_in_batches_that_fit_a_call(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(os.urandom(2 * CHUNK_BYTES + 5))
    for i in range(20):
        (tmp_path / f"small{i}").write_bytes(os.urandom(CHUNK_BYTES // 4))
    files = list_folder(tmp_path).files
    batches = list(read(tmp_path, files, set()))
    assert max(sum(map(len, b.blobs.values())) for b in batches) <= CHUNK_BYTES
    assert {saved.path for b in batches for saved, _ in b.files} == {f.path for f in files}
    blobs = {name: blob for b in batches for name, blob in b.blobs.items()}
    for saved, _ in (entry for b in batches for entry in b.files):
        assert b"".join(blobs[c] for c in saved.chunks) == (tmp_path / saved.path).read_bytes()


def test_known_content_and_content_that_is_there_twice_is_handed_out_once(tmp_path: Path) -> None:
    for name, content in (("a", b"same"), ("b", b"same"), ("c", b"known"), ("d", b"")):
        (tmp_path / name).write_bytes(content)
    (batch,) = read(tmp_path, list_folder(tmp_path).files, {blob_name(b"known")})
    assert batch.blobs == {blob_name(b"same"): b"same"}
    assert {f.path: f.size for f, _ in batch.files} == {"a": 4, "b": 4, "c": 5, "d": 0}


def test_what_changes_while_it_is_read_is_no_error(tmp_path: Path) -> None:
    for name in ("shrinks", "grows", "vanishes", "becomes a link", "becomes a pipe", "stays"):
        (tmp_path / name).write_text("content")
    files = list_folder(tmp_path).files
    (tmp_path / "shrinks").write_text("c")
    (tmp_path / "grows").write_text("content" * 100)
    for name in ("vanishes", "becomes a link", "becomes a pipe"):
        (tmp_path / name).unlink()
    (tmp_path / "becomes a link").symlink_to("/etc/passwd")
    os.mkfifo(tmp_path / "becomes a pipe")
    (batch,) = read(tmp_path, files, set())
    assert {f.path: f.size for f, _ in batch.files} == {"shrinks": 1, "grows": 700, "stays": 7}
    assert b"root" not in b"".join(batch.blobs.values())


def test_a_folder_that_is_swapped_for_a_link_lets_nothing_of_elsewhere_in(tmp_path: Path) -> None:
    """While an agent swaps it as fast as it can, what is listed and read is only ever the workspace's own."""
    secrets, workspace = tmp_path / "secrets", tmp_path / "workspace"
    for folder, text in ((secrets, "the service's"), (workspace / "folder", "the agent's")):
        folder.mkdir(parents=True)
        (folder / "key").write_text(text)
    (workspace / "link").symlink_to(secrets)
    swapping, found = threading.Event(), set[bytes]()

    def swap() -> None:
        while not swapping.is_set():
            os.rename(workspace / "folder", workspace / "aside")
            os.rename(workspace / "link", workspace / "folder")
            os.rename(workspace / "folder", workspace / "link")
            os.rename(workspace / "aside", workspace / "folder")

    agent = threading.Thread(target=swap)
    agent.start()
    try:
        for _ in range(300):
            for batch in read(workspace, list_folder(workspace).files, ()):
                found |= {*batch.blobs.values()}
    finally:
        swapping.set()
        agent.join()
    assert found == {b"the agent's"}


def test_what_became_a_link_after_it_was_listed_is_passed_over(tmp_path: Path) -> None:
    secrets, workspace = tmp_path / "secrets", tmp_path / "workspace"
    secrets.mkdir()
    (secrets / "key").write_text("the service's")
    for name in ("a", "b"):
        (workspace / name).mkdir(parents=True)
        (workspace / name / "key").write_text("the agent's")
    listing = list_folder(workspace)
    shutil.rmtree(workspace / "a")
    (workspace / "a").symlink_to(secrets)
    (workspace / "b" / "key").unlink()
    (workspace / "b" / "key").symlink_to(secrets / "key")
    assert [batch.blobs for batch in read(workspace, listing.files, ())] == [{}]
