"""What is uploaded: the working tree as git sees it, no secret, the same name for the same content only."""

import io
import subprocess
import zipfile
from pathlib import Path

import pytest

from claude_hitl_template.cli.deploy import package
from claude_hitl_template.config import build_info
from claude_hitl_template.errors import ConfigError

SECRET = "sk-ant-very-secret"


def git(root: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *identity, *arguments], cwd=root, check=True, capture_output=True)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A small checkout that is committed."""
    root = tmp_path / "tree"
    (root / package.CODE / "bin").mkdir(parents=True)
    (root / package.CODE / "query.py").write_text("x = 1\n")
    (root / package.CODE / "bin" / "tool").write_text("#!/bin/sh\n")
    (root / package.CODE / "bin" / "tool").chmod(0o755)
    (root / "requirements.lock").write_text("ray==2.0.0 \\\n    --hash=sha256:00\n")
    (root / ".gitignore").write_text("ignored/\n*.log\n!kept.log\n")
    (root / "ignored").mkdir()
    (root / "ignored" / "file").write_text("no")
    (root / "a.log").write_text("no")
    (root / "kept.log").write_text("yes")
    git(root, "init", "--quiet")
    git(root, "add", ".")
    git(root, "commit", "--quiet", "-m", "first")
    return root


def build(root: Path, *secrets: str) -> package.Package:
    return package.build(root, data_dir=root / "state", secrets=secrets)


def entries(built: package.Package) -> dict[str, zipfile.ZipInfo]:
    with zipfile.ZipFile(io.BytesIO(built.content)) as content:
        return {entry.filename: entry for entry in content.infolist()}


def test_it_holds_what_git_sees_changes_and_new_files_included(tree: Path) -> None:
    (tree / package.CODE / "query.py").write_text("x = 2\n")
    (tree / "new name.txt").write_text("new")
    (tree / "kept.log").unlink()
    built = build(tree)
    expected = {
        "claude_hitl_template/query.py", "claude_hitl_template/bin/tool", "requirements.lock", ".gitignore", "new name.txt",
        build_info.FILE, package.FIRST,
    }  # fmt: skip
    assert set(entries(built)) == expected
    assert built.files == len(expected)
    with zipfile.ZipFile(io.BytesIO(built.content)) as content:
        assert content.read("claude_hitl_template/query.py") == b"x = 2\n"


def test_what_runs_can_be_run_on_the_other_side(tree: Path) -> None:
    modes = {name: entry.external_attr >> 16 & 0o777 for name, entry in entries(build(tree)).items()}
    assert modes["claude_hitl_template/bin/tool"] == 0o755
    assert modes["claude_hitl_template/query.py"] == 0o644


def test_the_same_content_has_the_same_name_and_bytes_and_another_one_has_not(tree: Path) -> None:
    first, again = build(tree), build(tree)
    assert (first.name, first.content) == (again.name, again.content)
    (tree / package.CODE / "query.py").chmod(0o755)
    mode = build(tree)
    (tree / package.CODE / "query.py").write_text("x = 3\n")
    content = build(tree)
    git(tree, "commit", "--quiet", "-a", "-m", "second")
    commit = build(tree)
    assert len({p.name for p in (first, mode, content, commit)}) == 4


def test_it_says_where_the_code_is_from(tree: Path, tmp_path: Path) -> None:
    built = build(tree)
    with zipfile.ZipFile(io.BytesIO(built.content)) as content:
        content.extract(build_info.FILE, tmp_path)
    said = build_info.origin(tmp_path)
    assert said == built.origin
    assert (said.dirty, len(said.commit), said.locked) == (False, 40, {"ray": "2.0.0"})
    assert built.uri == f"gcs://hitl-{said.package}.zip"
    (tree / "untracked").write_text("x")
    assert build(tree).origin.dirty


def test_a_tree_without_git_follows_its_gitignore_all_the_same(tree: Path) -> None:
    subprocess.run(["rm", "-rf", tree / ".git"], check=True)
    built = build(tree)
    assert "kept.log" in entries(built)
    assert not {"a.log", "ignored/file"} & set(entries(built))
    assert (built.origin.commit, built.origin.dirty) == ("unknown", True)


@pytest.mark.parametrize(
    "path",
    [
        ".env", "sub/.env", ".env.local", "profiles/vm.env", "deep/key.pem", "ID_RSA", "id_ed25519.pub", "secrets/api-key",
        ".netrc", "state/hitl.sqlite3", "state/anything",
    ],
)  # fmt: skip
def test_what_is_secret_by_its_name_stays_here_even_when_it_is_committed(tree: Path, path: str) -> None:
    (tree / path).parent.mkdir(parents=True, exist_ok=True)
    (tree / path).write_text("x")
    git(tree, "add", "--force", path)
    built = build(tree)
    assert built.left_out == (path,)
    assert path not in entries(built)


@pytest.mark.parametrize(
    "path",
    [".env.example", "profiles/vm.env.example", "claude_hitl_template/config/secret_files.py", "keys.py"],
)
def test_what_only_sounds_like_a_secret_goes_along(path: str) -> None:
    assert not package.is_secret(path)


def test_a_file_with_a_secret_of_the_settings_stops_it_and_is_named_without_the_secret(tree: Path) -> None:
    (tree / "notes.md").write_text(f"the key is {SECRET}.")
    with pytest.raises(ConfigError, match=r"notes\.md holds a secret") as raised:
        build(tree, SECRET)
    assert SECRET not in str(raised.value)


@pytest.mark.parametrize("code", ["def f(:\n", "x = '\n", "\0", "if x:\nprint()\n"])
def test_code_that_cannot_be_read_is_not_uploaded(tree: Path, code: str) -> None:
    (tree / package.CODE / "broken.py").write_text(code)
    with pytest.raises(ConfigError, match=r"claude_hitl_template/broken\.py.*nothing was uploaded"):
        build(tree)


def test_a_tree_over_the_limit_names_the_largest_before_anything_is_read(tree: Path) -> None:
    with (tree / "huge.bin").open("wb") as file:
        file.truncate(package.LIMIT_BYTES)
    with pytest.raises(ConfigError, match=r"huge\.bin \(500\.0 MiB\)") as raised:
        build(tree)
    assert ".gitignore" in raised.value.fix


def test_a_link_that_leads_out_is_refused_and_one_inside_becomes_its_file(tree: Path) -> None:
    (tree / "inside").symlink_to("kept.log")
    with zipfile.ZipFile(io.BytesIO(build(tree).content)) as content:
        assert content.read("inside") == b"yes"
    (tree / "outside").symlink_to("/etc/hostname")
    with pytest.raises(ConfigError, match="outside is a link"):
        build(tree)


def test_another_folder_is_no_checkout(tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text("")
    with pytest.raises(ConfigError, match="is no checkout"):
        build(tmp_path)


def test_the_working_tree_of_this_project_can_be_packed() -> None:
    root = Path(__file__).parents[3]
    built = package.build(root, data_dir=root / ".hitl", secrets=[])
    assert "claude_hitl_template/query.py" in entries(built)
    assert "ray" in built.origin.locked
