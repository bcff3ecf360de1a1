"""Plugins are pinned and come from the configured sources; one that is missing or points elsewhere fails with its name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from claude_hitl_template.errors import ConfigError
from claude_hitl_template.image.plugins import Plugin, resolve_plugins
from claude_hitl_template.image.settings_layers import read_levels
from tests.unit.image.checkouts import Write, committed

SETTINGS = "template_project/.claude/settings.json"
type Resolve = Callable[..., list[Plugin]]


@pytest.fixture
def resolve(checkout: Path, write: Write, tmp_path: Path) -> Resolve:
    def run(source: Any, *enabled: str, market: str = "acme") -> list[Plugin]:
        known = {market: {"source": source}}
        write(SETTINGS, {"extraKnownMarketplaces": known, "enabledPlugins": dict.fromkeys(enabled, True)})
        scratch = tmp_path / "scratch"
        scratch.mkdir()
        try:
            return resolve_plugins(read_levels(checkout), tmp_path / "plugins", scratch)
        finally:
            shutil.rmtree(scratch)

    return run


def folder(path: Path) -> dict[str, str]:
    return {"source": "directory", "path": str(path)}


def repository(path: Path, **more: str) -> dict[str, str]:
    return {"source": "git", "url": path.as_uri(), **more}


def relist(marketplace: Path, **entry: Any) -> None:
    listed = {"name": "acme", "plugins": [{"name": "formatter", **entry}]}
    (marketplace / ".claude-plugin" / "marketplace.json").write_text(json.dumps(listed))


def test_a_plugin_of_a_folder_is_taken_and_known_by_its_content(
    resolve: Resolve, marketplace: Path, tmp_path: Path
):
    (plugin,) = resolve(folder(marketplace), "formatter@acme")
    placed = tmp_path / "plugins" / "acme" / "plugins" / "formatter"
    assert (placed / "commands" / "format.md").read_text() == "Format it."
    assert plugin.path == "/app/plugins/acme/plugins/formatter"
    assert plugin.commit.startswith("sha256:")
    (marketplace / "plugins" / "formatter" / "commands" / "format.md").write_text("Changed.")
    shutil.rmtree(tmp_path / "plugins")
    assert resolve(folder(marketplace), "formatter@acme")[0].commit != plugin.commit


def test_a_relative_folder_starts_from_its_level(resolve: Resolve, checkout: Path, marketplace: Path):
    shutil.copytree(marketplace, checkout / "template_project" / "plugins-of-ours")
    assert resolve(folder(Path("plugins-of-ours")), "formatter@acme")


def test_what_was_taken_from_a_repository_is_recorded(resolve: Resolve, marketplace: Path):
    commit = committed(marketplace)
    (plugin,) = resolve(repository(marketplace), "formatter@acme")
    assert plugin.as_json() == {
        "name": "formatter",
        "marketplace": "acme",
        "commit": commit,
        "path": "/app/plugins/acme/plugins/formatter",
    }


def test_a_pinned_commit_or_ref_is_taken_whatever_came_later(
    resolve: Resolve, marketplace: Path, tmp_path: Path
):
    first = committed(marketplace)
    command = marketplace / "plugins" / "formatter" / "commands" / "format.md"
    command.write_text("A later version.")
    second = committed(marketplace)
    for pin, commit, text in (
        ({"commit": first}, first, "Format it."),
        ({"ref": "main"}, second, "A later version."),
    ):
        (plugin,) = resolve(repository(marketplace, **pin), "formatter@acme")
        placed = tmp_path / "plugins" / "acme" / "plugins" / "formatter"
        assert (plugin.commit, (placed / "commands" / "format.md").read_text()) == (commit, text)
        assert not (placed / ".git").exists()
        shutil.rmtree(tmp_path / "plugins")


def test_a_plugin_may_be_a_repository_of_its_own(resolve: Resolve, marketplace: Path, tmp_path: Path):
    own = tmp_path / "own"
    shutil.move(marketplace / "plugins" / "formatter", own)
    commit = committed(own)
    relist(marketplace, source={"source": "url", "url": own.as_uri(), "sha": commit})
    assert resolve(folder(marketplace), "formatter@acme")[0].commit == commit


def test_a_plugin_described_by_its_marketplace_alone_gets_that_description(
    resolve: Resolve, marketplace: Path, tmp_path: Path
):
    shutil.rmtree(marketplace / "plugins" / "formatter" / ".claude-plugin")
    relist(marketplace, source="./plugins/formatter", version="2.0.0", strict=False)
    resolve(folder(marketplace), "formatter@acme")
    made = tmp_path / "plugins" / "acme" / "plugins" / "formatter" / ".claude-plugin" / "plugin.json"
    assert json.loads(made.read_text()) == {"name": "formatter", "version": "2.0.0"}


def test_hooks_are_found_wherever_a_plugin_declares_them(resolve: Resolve, marketplace: Path):
    plugin = marketplace / "plugins" / "formatter"
    (plugin / "hooks").mkdir()
    (plugin / "hooks" / "hooks.json").write_text('{"description": "x", "hooks": {"Stop": [{"a": 1}]}}')
    (plugin / "more.json").write_text('{"hooks": {"Stop": [{"b": 2}]}}')
    (plugin / ".claude-plugin" / "plugin.json").write_text('{"name": "formatter", "hooks": "./more.json"}')
    assert resolve(folder(marketplace), "formatter@acme")[0].hooks == {"Stop": [{"a": 1}, {"b": 2}]}


def test_a_plugin_that_is_switched_off_is_not_even_looked_for(checkout: Path, write: Write, tmp_path: Path):
    write(SETTINGS, {"enabledPlugins": {"gone@nowhere": False}})
    assert resolve_plugins(read_levels(checkout), tmp_path / "plugins", tmp_path) == []


@pytest.mark.parametrize("enabled", ["missing@acme", "formatter@elsewhere"])
def test_an_enabled_plugin_that_is_missing_fails_with_its_name_and_file(
    resolve: Resolve, marketplace: Path, enabled: str
):
    with pytest.raises(ConfigError) as error:
        resolve(folder(marketplace), enabled)
    assert f"the plugin {enabled}, enabled in" in str(error.value)
    assert SETTINGS in str(error.value)


@pytest.mark.parametrize(
    "name",
    [
        "formatter",
        "@acme",
        "formatter@",
        "../formatter@acme",
        "formatter@..",
        "a/b@acme",
        "f'$(id)@acme",
        "a..@b",
        "f\n@acme",
    ],
)
def test_hostile_names_of_plugins_are_refused(resolve: Resolve, marketplace: Path, tmp_path: Path, name: str):
    with pytest.raises(ConfigError, match="enabledPlugins"):
        resolve(folder(marketplace), name)
    assert not (tmp_path / "plugins").exists()


@pytest.mark.parametrize("source", ["../secret", "plugins/../../secret", "{tmp}/secret", "./linked"])
def test_a_plugin_that_points_outside_of_its_marketplace_is_refused(
    resolve: Resolve, marketplace: Path, tmp_path: Path, source: str
):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key").write_text("a secret")
    (marketplace / "linked").symlink_to(tmp_path / "secret")
    relist(marketplace, source=source.format(tmp=tmp_path))
    with pytest.raises(ConfigError, match=r"formatter@acme.*points outside"):
        resolve(folder(marketplace), "formatter@acme")
    assert not list((tmp_path / "plugins").rglob("key"))


@pytest.mark.parametrize("link", ["{tmp}/secret", "../../../secret", "../formatter/commands", "/etc"])
def test_a_link_that_leads_out_of_a_plugin_is_refused(
    resolve: Resolve, marketplace: Path, tmp_path: Path, link: str
):
    (tmp_path / "secret").write_text("a secret")
    (marketplace / "plugins" / "formatter" / "link").symlink_to(link.format(tmp=tmp_path))
    with pytest.raises(ConfigError, match="leads out of"):
        resolve(folder(marketplace), "formatter@acme")


def test_a_link_inside_of_a_plugin_stays_one(resolve: Resolve, marketplace: Path, tmp_path: Path):
    (marketplace / "plugins" / "formatter" / "link.md").symlink_to("commands/format.md")
    resolve(folder(marketplace), "formatter@acme")
    placed = tmp_path / "plugins" / "acme" / "plugins" / "formatter" / "link.md"
    assert placed.is_symlink()
    assert placed.read_text() == "Format it."


@pytest.mark.parametrize(
    "named", [{"commands": "../x"}, {"hooks": "/etc/passwd"}, {"skills": ["./ok", "a/../../x"]}]
)
def test_a_description_that_points_outside_of_its_plugin_is_refused(
    resolve: Resolve, marketplace: Path, named: dict[str, Any]
):
    path = marketplace / "plugins" / "formatter" / ".claude-plugin" / "plugin.json"
    path.write_text(json.dumps({"name": "formatter", **named}))
    with pytest.raises(ConfigError, match="points outside"):
        resolve(folder(marketplace), "formatter@acme")


@pytest.mark.parametrize(
    "source",
    [
        None,
        "https://example.org/x.git",
        {"source": "npm", "package": "x"},
        {"source": "github", "repo": "../../x"},
        {"source": "github", "repo": "--upload-pack=touch/x"},
        {"source": "git", "url": "--upload-pack=touch /tmp/x"},
        {"source": "git", "url": "ext::sh -c touch% /tmp/x"},
        {"source": "git", "url": "https://user:password@example.org/x.git"},
        {"source": "git", "url": "https://example.org/$(id)"},
        {"source": "git", "url": "https://example.org/x'"},
        {"source": "directory", "path": "nowhere"},
        {"source": "directory"},
    ],
)
def test_a_marketplace_that_cannot_be_used_fails_with_the_plugins_name(resolve: Resolve, source: Any):
    with pytest.raises(ConfigError, match="formatter@acme"):
        resolve(source, "formatter@acme")


@pytest.mark.parametrize(
    "pin",
    [
        {"commit": "abc"},
        {"commit": "0a" * 20},
        {"ref": "--exec=x"},
        {"ref": "gone"},
        {"ref": "a..b"},
        {"ref": "$(id)"},
    ],
)
def test_a_pin_that_is_none_or_is_not_there_fails_with_the_plugins_name(
    resolve: Resolve, marketplace: Path, pin: dict[str, str]
):
    committed(marketplace)
    with pytest.raises(ConfigError, match="formatter@acme"):
        resolve(repository(marketplace, **pin), "formatter@acme")


def test_a_folder_cannot_be_pinned(resolve: Resolve, marketplace: Path):
    with pytest.raises(ConfigError, match="no `ref` or `commit`"):
        resolve({**folder(marketplace), "commit": "0a" * 20}, "formatter@acme")


@pytest.mark.parametrize("listed", ["", "[]", '{"plugins": {}}', '{"plugins": [1, {"name": 2}]}'])
def test_a_marketplace_that_lists_garbage_fails_with_the_plugins_name(
    resolve: Resolve, marketplace: Path, listed: str
):
    (marketplace / ".claude-plugin" / "marketplace.json").write_text(listed)
    with pytest.raises(ConfigError, match="formatter@acme"):
        resolve(folder(marketplace), "formatter@acme")
