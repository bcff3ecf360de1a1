"""A deployed package says where it is from, and what this machine lacks for it."""

import json
from importlib.metadata import version
from pathlib import Path

import pytest

from claude_hitl_template.config import build_info
from claude_hitl_template.config.build_info import Origin
from claude_hitl_template.errors import ConfigError

HERE = Origin(
    "c" * 40, True, "0123456789ab", build_info.python_minor(), {"Ray": version("ray"), "httpx": "0.0.1"}
)


def test_code_that_was_not_deployed_has_no_origin(tmp_path: Path) -> None:
    assert build_info.origin(tmp_path) is None
    assert build_info.origin() is None


def test_the_origin_is_read_as_it_was_written(tmp_path: Path) -> None:
    (tmp_path / build_info.FILE).write_text(HERE.as_json())
    assert build_info.origin(tmp_path) == HERE


@pytest.mark.parametrize("text", ["", "[]", "{", json.dumps({"commit": "x"}), json.dumps({"more": 1}), "3"])
def test_another_file_of_that_name_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / build_info.FILE).write_text(text)
    with pytest.raises(ConfigError, match=r"code\.json cannot be read"):
        build_info.origin(tmp_path)


def test_a_machine_that_has_it_all_passes_whatever_version_of_what_is_no_wire() -> None:
    build_info.check_machine(HERE)


@pytest.mark.parametrize(
    ("locked", "named"),
    [
        ({"ray": "1.0.0"}, f"ray 1.0.0 (it has {version('ray')})"),
        ({"claude_agent_sdk": "0.0.1"}, "claude-agent-sdk 0.0.1"),
        ({"no-such-thing": "3"}, "no-such-thing 3 (missing)"),
        ({f"no-such-{n}": "1" for n in range(7)}, "and 2 more"),
    ],
)
def test_what_is_missing_or_of_another_version_is_named(locked: dict[str, str], named: str) -> None:
    with pytest.raises(ConfigError) as raised:
        build_info.check_machine(Origin("c", False, "p", build_info.python_minor(), locked))
    assert named in str(raised.value)
    assert "on the cluster" in raised.value.fix


def test_another_python_is_told_with_both_sides() -> None:
    with pytest.raises(ConfigError, match=r"from Python 3\.1, and the cluster runs"):
        build_info.check_machine(Origin("c", False, "p", "3.1", {}))


def test_the_line_for_humans_says_commit_changes_and_package() -> None:
    assert build_info.describe_origin(HERE.facts()) == (
        "commit cccccccccccc, with changes that are not committed, package 0123456789ab"
    )
    assert (
        build_info.describe_origin({**HERE.facts(), "dirty": False})
        == "commit cccccccccccc, package 0123456789ab"
    )
    assert build_info.describe_origin({"package": None}) == ""
