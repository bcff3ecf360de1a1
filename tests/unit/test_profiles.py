"""A profile overrides .env and is overridden by the environment; an invalid one is named."""

from pathlib import Path

import pytest

from claude_hitl_template.config.settings import Settings, variable
from claude_hitl_template.errors import ConfigError

SHIPPED = Path(__file__).parents[2] / "profiles"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a .env file and a profile."""
    for name in Settings.model_fields:
        monkeypatch.delenv(variable(name), raising=False)
    monkeypatch.setenv("HITL_HOME", str(tmp_path))
    (tmp_path / ".env").write_text("HITL_MODEL=from-env-file\nHITL_DASHBOARD_URL=http://env-file:1\n")
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "vm.env").write_text(
        "HITL_DASHBOARD_URL=http://vm:2/\nHITL_SERVE_URL=https://vm:3\n"
    )
    return tmp_path


@pytest.mark.usefixtures("home")
def test_the_profile_wins_over_the_file_and_the_environment_over_both(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert Settings.load().dashboard == "http://env-file:1"
    found = Settings.load("vm")
    assert (found.dashboard, found.service_url, found.model) == (
        "http://vm:2",
        "https://vm:3/claude-hitl",
        "from-env-file",
    )
    monkeypatch.setenv("HITL_DASHBOARD_URL", "http://environment:4")
    assert Settings.load("vm").dashboard == "http://environment:4"


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("name", ["other", "../.env", "", "vm.env", "/etc/passwd", "vm\0"])
def test_a_profile_that_is_not_there_is_named_with_those_that_are(name: str) -> None:
    with pytest.raises(ConfigError, match=r"there is no profile .*there are: vm"):
        Settings.load(name)


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("HITL_DASHBOARD_URL", "localhost:8265"),
        ("HITL_DASHBOARD_URL", "ray://localhost:10001"),
        ("HITL_DASHBOARD_URL", "http://user:password@host:1"),
        ("HITL_SERVE_URL", "http://host:8001/claude-hitl"),
        ("HITL_SERVE_URL", "http://host:port"),
        ("HITL_SERVE_URL", "http://"),
        ("HITL_RAY_ADDRESS", "http://localhost:10001"),
        ("HITL_RAY_ADDRESS", "auto"),
    ],
)
def test_an_address_that_is_none_is_named(monkeypatch: pytest.MonkeyPatch, field: str, value: str) -> None:
    monkeypatch.setenv(field, value)
    with pytest.raises(ConfigError, match=f"{field} is not usable") as raised:
        Settings.load()
    assert "password" not in str(raised.value)


def test_with_nothing_set_the_usual_ports_of_this_machine_are_meant(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / ".env").unlink()
    found = Settings.load()
    assert (found.dashboard, found.ray_client, found.service_url) == (
        "http://127.0.0.1:8265",
        "ray://127.0.0.1:10001",
        "http://127.0.0.1:8001/claude-hitl",
    )


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize(
    ("variables", "panel"),
    [
        ({"HITL_SERVE_URL": ""}, "http://127.0.0.1:3370"),
        ({"HITL_SERVE_URL": "http://localhost:8001", "HITL_PANEL_PORT": "3371"}, "http://localhost:3371"),
        ({"HITL_SERVE_URL": "http://[fd00::1]:8001"}, "http://[fd00::1]:3370"),
        ({"HITL_SERVE_URL": "", "HITL_HOST": "10.0.0.5"}, "http://10.0.0.5:3370"),
    ],
)
def test_the_panel_is_where_the_service_is(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], panel: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert Settings.load().panel_at == panel


@pytest.mark.parametrize("example", sorted(SHIPPED.glob("*.example")), ids=lambda path: path.name)
def test_the_examples_are_usable_as_they_are(home: Path, example: Path) -> None:
    (home / "profiles" / "copy.env").write_text(example.read_text())
    found = Settings.load("copy")
    assert found.dashboard == "http://localhost:8265"
    assert (found.api_key, found.anthropic_api_key) == (None, None)
