"""The settings that are baked into the image: read, checked, merged; and the settings that no one in it can override.

The user level is `template_user/.claude/settings.json`, the project level `template_project/.claude/settings.json`, the
local level `settings.local.json` next to it; a later one wins. What may run without a human is said by an agent's
permission policy alone, so the layers may not.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from claude_hitl_template.domain.policy import is_harmless
from claude_hitl_template.errors import ConfigError

USER_LEVEL, PROJECT_LEVEL = "template_user", "template_project"

_MODES = frozenset({"default", "plan"})
# They run programs to get credentials, or switch the gate's own hooks off.
_REFUSED_KEYS = (
    "apiKeyHelper",
    "awsAuthRefresh",
    "awsCredentialExport",
    "gcpAuthRefresh",
    "otelHeadersHelper",
    "proxyAuthHelper",
    "disableAllHooks",
)
# The model's URL and key belong to the service; a secret in an image is readable by everyone who has the image.
_REFUSED_VARIABLES = re.compile(
    r"(ANTHROPIC|HITL|RAY)_.*|CLAUDE_CONFIG_DIR|CLAUDE_CODE_USE_.*|(.*_)?(KEY|TOKEN|SECRET|PASSWORD|CREDENTIALS?)(_.*)?",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class SettingsFile:
    """One settings file of a level. `level` is the folder that relative paths in it start from."""

    path: Path
    level: Path
    values: Mapping[str, Any]

    def mapping(self, key: str) -> dict[str, Any]:
        """An object in the settings; {} where there is none. Raises ConfigError for anything else."""
        value = self.values.get(key, {})
        if not isinstance(value, dict):
            raise ConfigError(
                f"{self.path}: `{key}` is no JSON object", f"make `{key}` an object, or remove it"
            )
        return value


def read_levels(checkout: Path) -> list[SettingsFile]:
    """The settings of all levels that there are, the one that wins last.

    Raises ConfigError, which names file and key, for what must not be baked into an image.
    """
    user, project = checkout / USER_LEVEL, checkout / PROJECT_LEVEL
    places = [(user, "settings.json"), (project, "settings.json"), (project, "settings.local.json")]
    found = [
        SettingsFile(level / ".claude" / name, level, read_object(level / ".claude" / name))
        for level, name in places
        if (level / ".claude" / name).exists()
    ]
    for file in found:
        for key, why in _refusals(file):
            raise ConfigError(f"{file.path}: `{key}` {why}", f"remove `{key}` from {file.path.name}")
    return found


def read_object(path: Path) -> dict[str, Any]:
    """A file that holds a JSON object. Raises ConfigError that names it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no JSON: {error}", f"correct {path.name}") from error
    if not isinstance(value, dict):
        raise ConfigError(
            f"{path} holds no JSON object",
            f'write an object into {path.name}, for instance {{"model": "opus"}}',
        )
    return value


def merged(files: list[SettingsFile], key: str) -> dict[str, tuple[SettingsFile, Any]]:
    """The entries of one object over all levels, each with the file that it came from."""
    return {name: (file, value) for file in files for name, value in file.mapping(key).items()}


def managed_settings(
    files: list[SettingsFile], plugin_hooks: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Managed settings of the image: no other level can override them.

    An agent may write files, so no hook may come from where it writes: only the hooks of the levels and plugins that
    the image was built with run, from here. `plugin_hooks` are those of each plugin, by its folder in the image.
    Likewise no command or skill runs a shell while its text is read: no human is asked then.
    """
    sources = [file.mapping("hooks") for file in files]
    sources += [_at(folder, hooks) for folder, hooks in plugin_hooks.items()]
    hooks: dict[str, list[Any]] = {}
    for source in sources:
        for event, matchers in source.items():
            if not isinstance(matchers, list):
                raise ConfigError(
                    f"the hooks for {event} are no list", "write them as Claude Code's documentation has it"
                )
            hooks.setdefault(event, []).extend(matchers)
    return {
        "allowManagedHooksOnly": True,
        "disableSkillShellExecution": True,
        "permissions": {"disableBypassPermissionsMode": "disable", "disableAutoMode": "disable"},
        "sandbox": {"autoAllowBashIfSandboxed": False},
        "hooks": hooks,
    }


def _at(folder: str, value: Any) -> Any:
    """A plugin's hooks with the plugin's own folder filled in, which only the CLI's loader of plugins would tell them."""
    if isinstance(value, dict):
        filled = {key: _at(folder, item) for key, item in value.items()}
        if isinstance(filled.get("command"), str) and "args" not in filled:
            filled["command"] = f"export CLAUDE_PLUGIN_ROOT={folder}; {filled['command']}"
        return filled
    if isinstance(value, list):
        return [_at(folder, item) for item in value]
    return value.replace("${CLAUDE_PLUGIN_ROOT}", folder) if isinstance(value, str) else value


def _refusals(file: SettingsFile) -> Iterator[tuple[str, str]]:
    """Keys that must not be baked, each with the reason."""
    for key in _REFUSED_KEYS:
        if key in file.values:
            yield key, "must not be baked into the image"
    permissions = file.mapping("permissions")
    mode = permissions.get("defaultMode", "default")
    if mode not in _MODES:
        yield "permissions.defaultMode", f"is {mode!r}; gated tools would run without a human's decision"
    allowed = permissions.get("allow", [])
    for rule in allowed if isinstance(allowed, list) else [allowed]:
        if not isinstance(rule, str) or not is_harmless(rule.partition("(")[0].strip()):
            yield (
                "permissions.allow",
                f"holds {rule!r}; what runs without asking is said by an agent's policy alone",
            )
    if file.mapping("sandbox").get("autoAllowBashIfSandboxed", False) is not False:
        yield "sandbox.autoAllowBashIfSandboxed", "lets commands run without a human's decision"
    for name in file.mapping("env"):
        if _REFUSED_VARIABLES.fullmatch(name):
            yield f"env.{name}", "must not be baked: it belongs to the service, or may be a secret"
