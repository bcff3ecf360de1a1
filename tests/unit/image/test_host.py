"""The checks of an image of this machine that need no build."""

import os
from importlib.metadata import version
from pathlib import Path

import pytest

from claude_hitl_template.errors import ConfigError
from claude_hitl_template.image import host
from claude_hitl_template.image.build import build
from claude_hitl_template.image.context import read_checkout
from claude_hitl_template.image.tools import Tool

NOTHING = Tool("podman", "/nonexistent")


def test_a_package_that_is_not_as_locked_stops_the_build_with_its_name(checkout: Path, tmp_path: Path):
    (checkout / "requirements.lock").write_text("ray==1.0\nclaude-agent-sdk==0.2.187\n")
    with pytest.raises(ConfigError, match=r"ray is 2.* and requirements.lock has 1.0"):
        host._copy_packages(read_checkout(checkout), tmp_path / "opt")


def test_locked_packages_are_copied_with_commands_that_the_images_python_runs(tmp_path: Path, checkout: Path):
    (checkout / "requirements.lock").write_text(
        f"uvicorn=={version('uvicorn')}\nray==0\nclaude-agent-sdk==0\n"
    )
    read = read_checkout(checkout)
    del read.lock["ray"], read.lock["claude-agent-sdk"]
    host._copy_packages(read, tmp_path)
    command = (tmp_path / "bin" / "uvicorn").read_text()
    assert command.startswith("#!/opt/python/bin/python3\n")
    assert os.access(tmp_path / "bin" / "uvicorn", os.X_OK)
    (site,) = (tmp_path / "lib").glob("python3.*/site-packages")
    assert {path.name.partition("-")[0] for path in site.iterdir()} == {"uvicorn"}
    assert not list(site.rglob("*.pyc"))


@pytest.mark.parametrize("name", ["worker:tag", "worker@sha256:" + "0a" * 32, "$(id)", "a'b", "--help", ""])
def test_a_name_with_a_tag_or_that_is_none_builds_nothing(checkout: Path, name: str):
    with pytest.raises(ConfigError):
        build(checkout, NOTHING, name=name, say=print)


def test_a_user_who_is_not_there_is_said_before_anything_is_built(checkout: Path):
    with pytest.raises(ConfigError, match="no user unknown-user-name"):
        build(checkout, NOTHING, name="worker", for_user="unknown-user-name", say=print)


def test_a_layer_that_is_refused_is_said_before_anything_is_built(checkout: Path):
    settings = checkout / "template_user" / ".claude" / "settings.json"
    settings.parent.mkdir(parents=True)
    settings.write_text('{"permissions": {"allow": ["Bash"]}}')
    with pytest.raises(ConfigError, match=r"permissions\.allow"):
        build(checkout, NOTHING, name="worker", from_host=True, say=print)
