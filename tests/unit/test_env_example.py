""".env.example and settings.py name the same settings, with the same defaults and explanations."""

import re
from pathlib import Path

import pytest

from claude_hitl_template.config.settings import Settings, variable

EXAMPLE = Path(__file__).parents[2] / ".env.example"


def example_lines() -> dict[str, str]:
    found = re.findall(r"^#([A-Z_]+)=(.*)$", EXAMPLE.read_text(), re.MULTILINE)
    assert len(dict(found)) == len(found), "a variable is named twice"
    return dict(found)


def test_every_setting_is_in_the_example_and_the_other_way_round() -> None:
    assert set(example_lines()) == {variable(name) for name in Settings.model_fields}


@pytest.mark.parametrize("name", Settings.model_fields)
def test_the_example_shows_default_and_description(name: str) -> None:
    field = Settings.model_fields[name]
    default = field.get_default(call_default_factory=True)
    assert example_lines()[variable(name)] == ("" if default is None else str(default))
    prose = " ".join(line.removeprefix("# ") for line in EXAMPLE.read_text().splitlines())
    assert field.description
    assert field.description in prose


def test_nothing_in_the_example_is_set() -> None:
    assert all(line.startswith("#") or not line for line in EXAMPLE.read_text().splitlines())


def test_the_defaults_of_the_example_are_usable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(variable(name), raising=False)
    monkeypatch.chdir(tmp_path)
    taken_up = [
        line.removeprefix("#") for line in EXAMPLE.read_text().splitlines() if re.match("#[A-Z]", line)
    ]
    (tmp_path / ".env").write_text("\n".join(taken_up))
    with_example = Settings.load()
    (tmp_path / ".env").unlink()
    assert with_example == Settings.load()


def test_env_file_and_data_folder_are_found_from_home(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(variable(name), raising=False)
    (tmp_path / ".env").write_text("HITL_DATA_DIR=state\nHITL_MODEL=from-home\n")
    monkeypatch.setenv("HITL_HOME", str(tmp_path))
    found = Settings.load()
    assert (found.data_dir, found.model) == (tmp_path / "state", "from-home")
