"""The settings that an image may contain, and those that none of its layers can override."""

from pathlib import Path
from typing import Any

import pytest

from claude_hitl_template.errors import ConfigError
from claude_hitl_template.image.settings_layers import managed_settings, merged, read_levels
from tests.unit.image.checkouts import Write

USER, PROJECT = "template_user/.claude/settings.json", "template_project/.claude/settings.json"
LOCAL = "template_project/.claude/settings.local.json"


def test_no_settings_at_all_are_no_error(checkout: Path):
    assert read_levels(checkout) == []


def test_the_project_wins_over_the_user_and_local_over_both(checkout: Path, write: Write):
    write(USER, {"enabledPlugins": {"a@m": True, "b@m": True, "c@m": True}})
    write(PROJECT, {"enabledPlugins": {"a@m": False, "b@m": False}})
    local = write(LOCAL, {"enabledPlugins": {"b@m": True}})
    found = merged(read_levels(checkout), "enabledPlugins")
    assert {name: value for name, (_, value) in found.items()} == {"a@m": False, "b@m": True, "c@m": True}
    assert found["b@m"][0].path == local


@pytest.mark.parametrize(
    "text", ["", "{", "not json", "[]", '"text"', "null", "3", "[" * 100_000, '{"a": 1} x']
)
def test_a_settings_file_that_holds_no_object_is_named(checkout: Path, write: Write, text: str):
    path = write(PROJECT, text)
    with pytest.raises(ConfigError) as error:
        read_levels(checkout)
    assert str(path) in str(error.value)


def test_a_settings_file_that_is_no_text_is_named(checkout: Path, write: Write):
    path = write(USER, "")
    path.write_bytes(b"\xff\xfe\x00{}")
    with pytest.raises(ConfigError, match=r"settings\.json"):
        read_levels(checkout)


@pytest.mark.parametrize("place", [USER, PROJECT, LOCAL])
@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"permissions": {"allow": ["Bash"]}}, "permissions.allow"),
        ({"permissions": {"allow": ["Bash(git status:*)"]}}, "permissions.allow"),
        ({"permissions": {"allow": ["TodoWrite", "Write(//tmp/**)"]}}, "permissions.allow"),
        ({"permissions": {"allow": ["Read"]}}, "permissions.allow"),
        ({"permissions": {"allow": ["mcp__server"]}}, "permissions.allow"),
        ({"permissions": {"allow": ["*"]}}, "permissions.allow"),
        ({"permissions": {"allow": [" Bash"]}}, "permissions.allow"),
        ({"permissions": {"allow": "Bash"}}, "permissions.allow"),
        ({"permissions": {"allow": [{"tool": "Bash"}]}}, "permissions.allow"),
        ({"permissions": {"defaultMode": "bypassPermissions"}}, "permissions.defaultMode"),
        ({"permissions": {"defaultMode": "acceptEdits"}}, "permissions.defaultMode"),
        ({"permissions": {"defaultMode": "a mode of tomorrow"}}, "permissions.defaultMode"),
        ({"permissions": []}, "permissions"),
        ({"apiKeyHelper": "/bin/true"}, "apiKeyHelper"),
        ({"awsAuthRefresh": "x"}, "awsAuthRefresh"),
        ({"disableAllHooks": True}, "disableAllHooks"),
        (
            {"sandbox": {"enabled": True, "autoAllowBashIfSandboxed": True}},
            "sandbox.autoAllowBashIfSandboxed",
        ),
        ({"env": {"ANTHROPIC_BASE_URL": "http://elsewhere"}}, "env.ANTHROPIC_BASE_URL"),
        ({"env": {"GITHUB_TOKEN": "ghp_secret"}}, "env.GITHUB_TOKEN"),
        ({"env": {"db_password": "secret"}}, "env.db_password"),
    ],
)
def test_what_would_get_round_a_human_or_carries_a_secret_is_refused_with_file_and_key(
    checkout: Path, write: Write, place: str, settings: Any, key: str
):
    path = write(place, settings)
    with pytest.raises(ConfigError) as error:
        read_levels(checkout)
    assert str(path) in str(error.value)
    assert f"`{key}`" in str(error.value)
    assert "ghp_secret" not in str(error.value)


def test_what_narrows_or_configures_is_taken(checkout: Path, write: Write):
    settings = {
        "model": "opus",
        "permissions": {
            "deny": ["Bash(rm:*)"],
            "ask": ["Read"],
            "allow": ["TodoWrite"],
            "defaultMode": "plan",
        },
        "env": {"MAX_THINKING_TOKENS": "1", "EDITOR": "true"},
    }
    write(PROJECT, settings)
    assert [file.values for file in read_levels(checkout)] == [settings]


def test_only_the_images_own_hooks_run_and_nothing_of_them_is_lost(checkout: Path, write: Write):
    def hook(command: str) -> dict[str, Any]:
        return {"matcher": "Bash", "hooks": [{"type": "command", "command": command}]}

    write(USER, {"hooks": {"PreToolUse": [hook("user")], "Stop": [hook("stop")]}})
    write(PROJECT, {"hooks": {"PreToolUse": [hook("project")]}})
    plugin = {"PreToolUse": [hook("${CLAUDE_PLUGIN_ROOT}/run.sh")]}
    found = managed_settings(read_levels(checkout), {"/app/plugins/m/plugins/p": plugin})
    commands = [each["command"] for matcher in found["hooks"]["PreToolUse"] for each in matcher["hooks"]]
    root = "/app/plugins/m/plugins/p"
    assert commands == ["user", "project", f"export CLAUDE_PLUGIN_ROOT={root}; {root}/run.sh"]
    assert found["hooks"]["Stop"] == [hook("stop")]
    assert found["allowManagedHooksOnly"] is True
    assert found["permissions"]["disableBypassPermissionsMode"] == "disable"


def test_hooks_that_are_no_list_are_an_error(checkout: Path, write: Write):
    write(USER, {"hooks": {"Stop": "touch x"}})
    with pytest.raises(ConfigError, match="Stop"):
        managed_settings(read_levels(checkout), {})
