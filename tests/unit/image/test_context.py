"""The build context: the staged files, the image's labels, and the assumptions of the Dockerfile."""

import json
import re
from hashlib import sha256
from pathlib import Path

import pytest

from claude_hitl_template import __version__, code_version
from claude_hitl_template.errors import ConfigError
from claude_hitl_template.image import labels
from claude_hitl_template.image.context import Staged, read_checkout, stage
from claude_hitl_template.image.dependencies import locked_versions
from tests.unit.image.checkouts import Write, committed

ROOT = Path(__file__).parents[3]


def staged(checkout: Path, folder: Path) -> Staged:
    folder.mkdir()
    return stage(read_checkout(checkout), folder, base="base:1", offline=True)


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_the_levels_go_where_home_and_workspace_are(checkout: Path, write: Write, tmp_path: Path):
    write("template_user/.claude/CLAUDE.md", "user")
    write("template_user/.claude/skills/s/SKILL.md", "skill")
    write("template_project/.claude/settings.local.json", {})
    write("template_project/CLAUDE.md", "project")
    write("template_project/notes-of-developers.md", "not for agents")
    staged(checkout, tmp_path / "context")
    assert files(tmp_path / "context" / "app") == {
        "template_user/.claude/CLAUDE.md",
        "template_user/.claude/skills/s/SKILL.md",
        "workspace/.claude/settings.local.json",
        "workspace/CLAUDE.md",
        ".dependency-manifest.json",
    }


def test_the_context_is_small_and_holds_no_leftovers(checkout: Path, write: Write, tmp_path: Path):
    write(".env", "ANTHROPIC_API_KEY=secret")
    write(".venv/bin/python", "")
    write("claude_hitl_template/__pycache__/x.pyc", "")
    write("claude_hitl_template/claude/launch.sh", "#!/bin/sh").chmod(0o700)
    found = staged(checkout, tmp_path / "context")
    assert files(found.folder) == {
        "Dockerfile",
        "requirements.lock",
        "app/.dependency-manifest.json",
        "code/claude_hitl_template/__init__.py",
        "code/claude_hitl_template/claude/launch.sh",
        "declared/constraints.txt",
        "declared/requirements.txt",
        "declared/system-packages.txt",
        "etc/managed-settings.json",
    }
    assert (found.folder / "code/claude_hitl_template/claude/launch.sh").stat().st_mode & 0o777 == 0o755


def test_the_manifest_says_what_is_in_the_image_and_the_label_repeats_it(
    checkout: Path, write: Write, marketplace: Path, tmp_path: Path
):
    source = {"source": "directory", "path": str(marketplace)}
    write(
        "template_user/.claude/settings.json",
        {
            "extraKnownMarketplaces": {"acme": {"source": source}},
            "enabledPlugins": {"formatter@acme": True},
        },
    )
    write("template_project/dependencies/system-packages.txt", "jq\n")
    found = staged(checkout, tmp_path / "context")
    written = json.loads((found.folder / "app" / ".dependency-manifest.json").read_text())
    assert written == found.manifest == json.loads(found.labels[labels.MANIFEST])
    assert written["system"] == ["jq"]
    assert written["python"] == ["claude-agent-sdk==0.2.187", "httpx==0.28.1", "ray==2.60.0"]
    assert [plugin["path"] for plugin in written["plugins"]] == ["/app/plugins/acme/plugins/formatter"]
    assert (written["base"], written["ray"], written["version"]) == ("base:1", "2.60.0", __version__)
    assert (found.folder / "app/plugins/acme/plugins/formatter/commands/format.md").exists()


def test_the_labels_say_which_code_lock_and_versions(checkout: Path, tmp_path: Path):
    found = staged(checkout, tmp_path / "context").labels
    assert found[labels.CODE] == code_version()
    assert found[labels.LOCK] == sha256((checkout / "requirements.lock").read_bytes()).hexdigest()
    assert (found[labels.RAY], found[labels.COMMIT]) == ("2.60.0", "unknown")
    assert re.fullmatch(r"3\.\d+", found[labels.PYTHON])


def test_the_tag_says_version_commit_and_whether_it_was_changed_since(checkout: Path, write: Write):
    assert read_checkout(checkout).tag == __version__
    commit = committed(checkout)
    assert read_checkout(checkout).tag == f"{__version__}-{commit[:7]}"
    write("notes.md", "not part of the image")
    assert read_checkout(checkout).tag == f"{__version__}-{commit[:7]}"
    write("template_user/.claude/CLAUDE.md", "part of it")
    assert read_checkout(checkout).tag == f"{__version__}-{commit[:7]}-dirty"


def test_a_layer_with_a_link_to_elsewhere_is_refused(checkout: Path, tmp_path: Path):
    (tmp_path / "secret").write_text("a secret")
    (checkout / "template_user" / ".claude").mkdir(parents=True)
    (checkout / "template_user" / ".claude" / "CLAUDE.md").symlink_to(tmp_path / "secret")
    with pytest.raises(ConfigError, match="leads out of"):
        staged(checkout, tmp_path / "context")


def test_a_lock_without_ray_is_refused(checkout: Path):
    (checkout / "requirements.lock").write_text("httpx==0.28.1\n")
    with pytest.raises(ConfigError, match="does not pin ray"):
        read_checkout(checkout)


def test_what_this_repository_ships_can_be_staged(tmp_path: Path):
    (tmp_path / "context").mkdir()
    found = stage(read_checkout(ROOT), tmp_path / "context", base="base:1", offline=False)
    assert {"app/template_user/.claude/CLAUDE.md", "app/workspace/CLAUDE.md"} <= files(found.folder)
    assert found.manifest["plugins"] == []


def test_the_dockerfiles_default_base_is_what_the_lock_pins():
    default = re.search(
        r"^ARG RAY_BASE=rayproject/ray:(.+)-py312$", (ROOT / "Dockerfile").read_text(), re.MULTILINE
    )
    assert default is not None
    assert default[1] == locked_versions(ROOT / "requirements.lock")["ray"]


def test_the_dockerfile_leaves_nobody_root_and_nothing_in_front_of_python():
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    assert [line for line in lines if line.startswith("USER ")][-1] == "USER ray"
    assert "ENTRYPOINT []" in lines
    assert not any(line.startswith(("CMD", "# syntax")) or "--mount" in line for line in lines)
