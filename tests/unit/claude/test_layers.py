"""The parts of an image's layers that the service reads before the CLI starts."""

import json
from pathlib import Path
from typing import Any

import pytest

from claude_hitl_template.claude.layers import Layers, image_layers
from claude_hitl_template.errors import EngineError


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))


@pytest.fixture
def layers(tmp_path: Path) -> Layers:
    write(tmp_path / ".dependency-manifest.json", {})
    found = image_layers(tmp_path / "workspace", tmp_path, tmp_path / "etc/managed-settings.json")
    assert found is not None
    return found


def denials(layers: Layers, tmp_path: Path) -> list[str]:
    return [r.rule for r in layers.settle(tmp_path / "config") if r.policy == "always_deny"]


def test_an_image_without_any_settings_is_one_too(layers: Layers, tmp_path: Path) -> None:
    assert denials(layers, tmp_path) == []
    assert json.loads((tmp_path / "config/settings.json").read_text()) == {}
    assert layers.plugins == ()


def test_the_cli_is_told_the_user_levels_settings_without_what_the_build_has_resolved(
    layers: Layers, tmp_path: Path
) -> None:
    settings = {"env": {"A": "1"}, "enabledPlugins": {"x@y": True}, "extraKnownMarketplaces": {"y": {}}}
    write(layers.user / "settings.json", settings)
    layers.settle(tmp_path / "config")
    assert json.loads((tmp_path / "config/settings.json").read_text()) == {"env": {"A": "1"}}
    assert (tmp_path / "config").stat().st_mode & 0o077 == 0


def test_what_any_layer_denies_is_known(layers: Layers, tmp_path: Path) -> None:
    write(layers.user / "settings.json", {"permissions": {"deny": ["WebFetch"]}})
    write(layers.workspace / ".claude/settings.json", {"permissions": {"deny": ["Bash(rm:*)"]}})
    write(layers.workspace / ".claude/settings.local.json", {"permissions": {"deny": ["Read(./x)"]}})
    write(layers.managed, {"allowManagedHooksOnly": True, "permissions": {"deny": ["WebSearch"]}})
    assert denials(layers, tmp_path) == ["WebFetch", "Bash(rm:*)", "Read(./x)", "WebSearch"]


@pytest.mark.parametrize(
    "permissions",
    [
        None,
        [],
        "x",
        {"deny": None},
        {"deny": "Bash"},
        {"deny": {"Bash": 1}},
        {"deny": [5, None, ["Bash"], "", "bash", "("]},
    ],
)
def test_denials_that_say_nothing_usable_are_left_to_the_cli(
    layers: Layers, tmp_path: Path, permissions: Any
) -> None:
    write(layers.workspace / ".claude/settings.json", {"permissions": permissions})
    assert denials(layers, tmp_path) == []


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"', "[" * 100_000, "\udcff"])
def test_a_settings_file_that_the_cli_could_not_read_is_named(
    layers: Layers, tmp_path: Path, text: str
) -> None:
    path = layers.workspace / ".claude/settings.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(EngineError, match="image build") as caught:
        layers.settle(tmp_path / "config")
    assert str(path) in str(caught.value)
    assert not caught.value.retryable


def test_a_folder_in_a_settings_files_place_is_named(layers: Layers, tmp_path: Path) -> None:
    (layers.user / "settings.json").mkdir(parents=True)
    with pytest.raises(EngineError, match=r"settings\.json"):
        layers.settle(tmp_path / "config")


def test_managed_settings_in_other_files_only_are_refused(layers: Layers, tmp_path: Path) -> None:
    """They would replace the service's own, and may permit hooks."""
    write(layers.managed.parent / "managed-settings.d/10-more.json", {"allowManagedHooksOnly": False})
    with pytest.raises(EngineError, match="hooks"):
        layers.settle(tmp_path / "config")
