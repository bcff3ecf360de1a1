"""The verification of an image: each possible problem in it is a check with its own name."""

import json
import os
import subprocess
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from claude_hitl_template import code_version
from claude_hitl_template.config.build_info import python_minor
from claude_hitl_template.image import labels, verify

SYSTEM_PYTHON = Path("/usr/bin/python3")
LOCK = {"ray": "2.60.0", "httpx": "0.28.1"}
MANIFEST = {"version": "0.1.0", "python": ["ray==2.60.0"]}
GOOD: dict[str, Any] = {
    "python": python_minor(),
    "versions": {"ray": "2.60.0", "HTTPX": "0.28.1", "more": "1"},
    "code": code_version(),
    "cli": "2.1.330 (Claude Code)",
    "uid": 2000,
    "becomes_root": [],
    "not_writable": [],
    "missing": [],
    "changeable": [],
    "manifest": json.dumps(MANIFEST, indent=2),
}
CONFIG: dict[str, Any] = {"User": "ray", "Labels": {labels.MANIFEST: json.dumps(MANIFEST)}}


def levels(found: dict[str, Any], config: dict[str, Any] = CONFIG) -> dict[str, str]:
    return {check.name: check.level for check in verify.inside_checks({**GOOD, **found}, config, LOCK)}


def test_an_image_as_it_should_be_passes_every_check():
    assert set(levels({}).values()) == {"ok"}


@pytest.mark.parametrize(
    ("found", "name"),
    [
        ({"python": "3.9"}, "Python"),
        ({"versions": {"ray": "2.59.0", "httpx": "0.28.1"}}, "Packages"),
        ({"versions": {"ray": "2.60.0"}}, "Packages"),
        ({"code": None}, "Package"),
        ({"cli": "it does not run: Exec format error"}, "Claude Code CLI"),
        ({"cli": ""}, "Claude Code CLI"),
        ({"uid": 0}, "User"),
        ({"becomes_root": ["sudo"]}, "User"),
        ({"not_writable": ["/tmp"]}, "Writable places"),
        ({"missing": [f"{labels.HOME}/.claude"]}, "Settings layers"),
        ({"changeable": [f"{labels.WORKSPACE}/.claude"]}, "Fixed places"),
        ({"manifest": None}, "Manifest"),
        ({"manifest": "no json"}, "Manifest"),
        ({"manifest": "{}"}, "Manifest"),
    ],
)
def test_each_fault_is_named_alone(found: dict[str, Any], name: str):
    assert {each for each, level in levels(found).items() if level == "wrong"} == {name}


@pytest.mark.parametrize("user", ["", "0", "root", "0:0", "root:root"])
def test_an_image_whose_user_is_root_is_wrong(user: str):
    assert levels({}, {**CONFIG, "User": user})["User"] == "wrong"


def test_other_code_is_no_fault_for_the_clusters_own_runs():
    assert levels({"code": "000000000000"})["Package"] == "warning"


def test_a_wrong_ray_is_named_first_and_a_long_list_is_cut():
    check = verify.package_check({"ray": "1.0"}, {f"p{n}": "1" for n in range(9)} | {"ray": "2.60.0"})
    assert check.found.startswith("ray 1.0 (locked: 2.60.0); ")
    assert check.found.endswith(" and 5 others")


@pytest.fixture
def public() -> Generator[Path]:
    """A folder that other users can read, unlike pytest's."""
    with tempfile.TemporaryDirectory() as made:
        Path(made).chmod(0o755)
        yield Path(made)


@pytest.mark.skipif(
    os.getuid() != 0 or not SYSTEM_PYTHON.exists(),
    reason="takes root, to make what others cannot change, and a Python that others can run",
)
def test_the_probe_finds_what_can_be_changed_and_what_cannot(public: Path):
    open_folder, closed, loose = public / "open", public / "closed", public / "loose"
    for folder, mode in ((open_folder, 0o1777), (closed, 0o755), (loose, 0o755)):
        folder.mkdir()
        folder.chmod(mode)
    (open_folder / "kept").write_text("x")
    (loose / "file").write_text("x")
    (loose / "file").chmod(0o666)
    asked = {
        "cli_folder": "_bundled",
        "manifest": str(open_folder / "kept"),
        "writable": [str(open_folder), str(closed)],
        "expected": [str(closed), str(public / "gone")],
        "owned": [str(open_folder / "kept"), str(closed), str(loose), str(public / "gone")],
    }
    script = (Path(verify.__file__).parent / "probe.py").read_text()
    done = subprocess.run(
        [SYSTEM_PYTHON, "-", json.dumps(asked)],
        input=script, capture_output=True, text=True, check=True, user=12345, group=12345, extra_groups=[], cwd="/",
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert found["not_writable"] == [str(closed)]
    assert found["missing"] == [str(public / "gone")]
    assert found["changeable"] == [str(loose)]
    assert (found["manifest"], found["uid"]) == ("x", 12345)
