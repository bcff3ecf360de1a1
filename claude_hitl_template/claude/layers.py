"""The settings layers of an image, and how the CLI gets them.

The user level is in the image's HOME, the project level and the local one are in the workspace, plugins in a folder of
their own; none of them can be written by the agent. The CLI looks for the user level in its config folder, of which the
SDK makes an empty one whenever it resumes from a store: so `launch.sh` puts links to the layer into whichever it is.
"""

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from claude_hitl_template.domain.policy import PolicyName, Rule
from claude_hitl_template.errors import ConfigError, EngineError
from claude_hitl_template.image import labels
from claude_hitl_template.image.settings_layers import read_object

# The build has resolved them; the CLI would look for them in its own, empty, folder and on the network.
_PLUGIN_DECLARATIONS = ("enabledPlugins", "extraKnownMarketplaces")
_FIX = "correct it in the checkout that the image is built from, then rebuild it: ./hitl image build"

# Hooks run without a question, and an agent could write one into a skill of a subfolder or the CLI's config folder. So only
# hooks of the image's managed settings run, and the SDK's own, which are the gate. POLICY applies if an image has no
# managed settings; an image's own replace it and must contain the same.
POLICY: dict[str, Any] = {"allowManagedHooksOnly": True, "disableSkillShellExecution": True}


@dataclass(frozen=True)
class Layers:
    """Where an image has its layers. `managed` is the file of settings that nothing overrides; it may be missing.

    `readable` are the places that were built to be read: nothing in them is a secret, and none can be written.
    """

    user: Path
    workspace: Path
    plugins: tuple[Path, ...]
    managed: Path
    readable: tuple[Path, ...]

    def settle(self, config_dir: Path) -> list[Rule]:
        """Makes the CLI's config folder, with the user level's settings in it: the SDK takes them along. Blocking.

        Returns the layers' deny rules, which the CLI enforces itself without asking a human, and rules that let the
        image's own manifest, skills and plugins be read. Raises EngineError that names the file and the fix for
        settings that the CLI could not read: it would go on without them.
        """
        user = _read(self.user / "settings.json")
        project, local, managed = map(_read, (*self._of_project(), self.managed))
        # Files next to it may be settings as well (managed-settings.d) and would replace ours.
        if self.managed.parent.exists() and managed.get("allowManagedHooksOnly") is not True:
            raise EngineError(
                f"{self.managed} lets hooks run that the image was not built with; {_FIX}", retryable=False
            )
        config_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        kept = {name: value for name, value in user.items() if name not in _PLUGIN_DECLARATIONS}
        (config_dir / "settings.json").write_text(json.dumps(kept))
        texts = [text for settings in (user, project, local, managed) for text in _denied(settings)]
        return [*_rules(texts, "always_deny"), *_rules(map(_reading, self.readable), "always_allow")]

    def _of_project(self) -> tuple[Path, Path]:
        folder = self.workspace / ".claude"
        return folder / "settings.json", folder / "settings.local.json"


def image_layers(
    workspace: Path, root: Path = Path(labels.ROOT), managed: Path = Path(labels.MANAGED_SETTINGS)
) -> Layers | None:
    """The layers of the image that this process runs in; None unless `workspace` is that image's own."""
    own = root / _below(labels.WORKSPACE)
    manifest = root / _below(labels.MANIFEST_PATH)
    if workspace != own or not manifest.is_file():
        return None
    user, plugins = root / _below(labels.HOME) / ".claude", root / _below(labels.PLUGINS)
    return Layers(
        user=user,
        workspace=own,
        plugins=tuple(sorted(plugins.glob("*/plugins/*/"))),
        managed=managed,
        readable=(manifest, user, plugins),
    )


def _read(path: Path) -> dict[str, Any]:
    """{} for a file that is not there."""
    if not path.exists():
        return {}
    try:
        return read_object(path)
    except ConfigError as error:
        raise EngineError(f"{error.message}; {_FIX}", retryable=False) from error


def _denied(settings: Mapping[str, Any]) -> list[Any]:
    permissions = settings.get("permissions")
    denied = permissions.get("deny") if isinstance(permissions, dict) else None
    return denied if isinstance(denied, list) else []


def _reading(place: Path) -> str:
    return f"Read(/{place}/**)" if place.is_dir() else f"Read(/{place})"


def _rules(texts: Iterable[Any], policy: PolicyName) -> Iterator[Rule]:
    """Yields the texts that our notation of rules can express, as rules."""
    for text in texts:
        with contextlib.suppress(ValueError):
            yield Rule(rule=text, policy=policy)


def _below(path: str) -> Path:
    return Path(path).relative_to(labels.ROOT)
