"""Plugins, from `extraKnownMarketplaces` and `enabledPlugins` to folders of the build context.

A marketplace is a git repository (`github`, `git`) or a folder (`directory`) with `.claude-plugin/marketplace.json`; a
plugin is a folder in it, or a git repository that it names. `ref` and `commit` of a source choose the version; what was
taken is recorded.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from claude_hitl_template.errors import ConfigError
from claude_hitl_template.image.labels import PLUGINS
from claude_hitl_template.image.run import run
from claude_hitl_template.image.settings_layers import SettingsFile, merged, read_object
from claude_hitl_template.image.trees import copy_tree, digest_tree

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*")
_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]*/[A-Za-z0-9_.-]+")
# No user or password: settings are no place for either, and an image would carry them.
_URL = re.compile(
    r"(https|file)://[^\s@'\"$`\\]+|(ssh://)?[A-Za-z0-9._-]+@[A-Za-z0-9][A-Za-z0-9.-]*[:/][^\s@'\"$`\\]+"
)
_REF = re.compile(r"(?!.*\.\.)[A-Za-z0-9][A-Za-z0-9._/-]{0,199}")
_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_OTHER_REPOSITORY = frozenset({"GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY"})
_GITHUB = "https://github.com/{}.git"
_DESCRIBED_BY_MARKETPLACE = (
    "name",
    "version",
    "description",
    "author",
    "commands",
    "agents",
    "skills",
    "hooks",
    "mcpServers",
    "lspServers",
)


@dataclass(frozen=True)
class Plugin:
    """One plugin in the context. `commit` is a git commit, or `sha256:...` over the content of a folder."""

    name: str
    marketplace: str
    commit: str
    path: str  # in the image
    hooks: Mapping[str, list[Any]] = field(default_factory=dict[str, list[Any]])

    def as_json(self) -> dict[str, str]:
        return {"name": self.name, "marketplace": self.marketplace, "commit": self.commit, "path": self.path}


def resolve_plugins(files: list[SettingsFile], target: Path, scratch: Path) -> list[Plugin]:
    """Puts every enabled plugin at `target/<marketplace>/plugins/<plugin>`; `scratch` takes clones.

    Raises ConfigError that names the plugin, and the file that enables it, where one cannot be had as declared.
    """
    known = merged(files, "extraKnownMarketplaces")
    found: list[Plugin] = []
    opened: dict[str, _Marketplace] = {}
    for name, (file, enabled) in sorted(merged(files, "enabledPlugins").items()):
        if enabled is False:
            continue
        plugin, _, marketplace = name.partition("@")
        if not (_NAME.fullmatch(plugin) and _NAME.fullmatch(marketplace)) or enabled is not True:
            raise ConfigError(
                f"{file.path}: `enabledPlugins` holds {name!r}: {enabled!r}",
                'write `"plugin@marketplace": true`',
            )
        try:
            if marketplace not in opened:
                opened[marketplace] = _open(marketplace, known.get(marketplace), scratch)
            found.append(_take(plugin, opened[marketplace], target, scratch))
        except ConfigError as error:
            raise ConfigError(
                f"the plugin {name}, enabled in {file.path}: {error.message}", error.fix
            ) from error
    return found


@dataclass(frozen=True)
class _Marketplace:
    name: str
    folder: Path
    commit: str | None  # None for a folder, whose plugins are known by their content
    plugins: Mapping[str, Mapping[str, Any]]
    plugin_root: str


def _open(name: str, declared: tuple[SettingsFile, Any] | None, scratch: Path) -> _Marketplace:
    if declared is None:
        raise ConfigError(
            f"the marketplace {name} is not declared",
            "add it to `extraKnownMarketplaces` of the same settings file",
        )
    file, entry = declared
    source = entry.get("source") if isinstance(entry, dict) else None
    if not isinstance(source, dict):
        raise ConfigError(
            f"{file.path}: the marketplace {name} has no `source`", "declare it as Claude Code has it"
        )
    if source.get("source") == "directory":
        folder, commit = _directory(source, file.level), None
    else:
        folder, commit = _clone(source, scratch / "marketplaces" / name)
    listed = read_object(_inside(folder, ".claude-plugin/marketplace.json"))
    entries = listed.get("plugins")
    metadata = listed.get("metadata")
    root = metadata.get("pluginRoot", ".") if isinstance(metadata, dict) else "."
    plugins = {
        str(plugin["name"]): plugin
        for plugin in (entries if isinstance(entries, list) else [])
        if isinstance(plugin, dict) and isinstance(plugin.get("name"), str)
    }
    return _Marketplace(name, folder, commit, plugins, str(root))


def _directory(source: Mapping[str, Any], level: Path) -> Path:
    path = source.get("path")
    folder = level / path if isinstance(path, str) and path else None
    if folder is None or not folder.is_dir():
        raise ConfigError(
            f"there is no folder {folder or path!r}",
            f"correct the marketplace's `path`; it starts from {level}",
        )
    if source.keys() & {"ref", "commit"}:
        raise ConfigError(
            "a folder has no `ref` or `commit`", "remove them, or use the source `git` with a file:// url"
        )
    return folder


def _take(name: str, marketplace: _Marketplace, target: Path, scratch: Path) -> Plugin:
    entry = marketplace.plugins.get(name)
    if entry is None:
        offered = ", ".join(sorted(marketplace.plugins)) or "nothing"
        raise ConfigError(f"the marketplace {marketplace.name} does not have it", f"it offers: {offered}")
    source = entry.get("source", f"./{name}")
    if isinstance(source, dict):
        folder, commit = _clone(source, scratch / "plugins" / marketplace.name / name)
        if isinstance(source.get("path"), str):
            folder = _inside(folder, source["path"])
    else:
        folder, commit = _inside(marketplace.folder, marketplace.plugin_root, str(source)), marketplace.commit
    if not folder.is_dir():
        raise ConfigError(
            f"there is no folder {source!r} in the marketplace", "ask its owner, or disable the plugin"
        )
    placed = target / marketplace.name / "plugins" / name
    copy_tree(folder, placed)
    manifest = _manifest(placed, entry)
    path = f"{PLUGINS}/{marketplace.name}/plugins/{name}"
    return Plugin(
        name, marketplace.name, commit or f"sha256:{digest_tree(placed)}", path, _hooks(placed, manifest)
    )


def _manifest(placed: Path, entry: Mapping[str, Any]) -> dict[str, Any]:
    """The plugin's own description; one that leaves it to its marketplace gets the marketplace's."""
    path = placed / ".claude-plugin" / "plugin.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        fields = {key: entry[key] for key in _DESCRIBED_BY_MARKETPLACE if key in entry}
        path.write_text(json.dumps(fields, indent=2))
    manifest = read_object(path)
    for key in ("commands", "agents", "skills", "hooks", "mcpServers", "lspServers", "outputStyles"):
        named = manifest.get(key)
        for value in named if isinstance(named, list) else [named]:
            if isinstance(value, str):
                _inside(placed, value)
    return manifest


def _hooks(placed: Path, manifest: Mapping[str, Any]) -> dict[str, list[Any]]:
    """All hooks of a plugin, by event: those of `hooks/hooks.json` and those that its description has or names."""
    declared = manifest.get("hooks", [])
    sources = declared if isinstance(declared, list) else [declared]
    paths = {
        _inside(placed, path) for path in ["hooks/hooks.json", *(s for s in sources if isinstance(s, str))]
    }
    found: dict[str, list[Any]] = {}
    for source in [*(read_object(path) for path in sorted(paths) if path.exists()), *sources]:
        hooks = source.get("hooks", source) if isinstance(source, dict) else {}
        for event, matchers in hooks.items() if isinstance(hooks, dict) else ():
            if isinstance(matchers, list):
                found.setdefault(event, []).extend(matchers)
    return found


def _inside(folder: Path, *parts: str) -> Path:
    """A path below `folder`, or ConfigError for one that leads elsewhere: `..`, absolute, through a link."""
    named = PurePosixPath(*parts)
    path = folder / named
    climbs = any(PurePosixPath(part).is_absolute() or ".." in PurePosixPath(part).parts for part in parts)
    if climbs or not path.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(
            f"{str(named)!r} points outside of its folder", "ask its owner, or disable the plugin"
        )
    return path


# -- git


def _clone(source: Mapping[str, Any], target: Path) -> tuple[Path, str]:
    """Fetches what a source names; returns its folder and commit."""
    url, wanted = _address(source), source.get("commit", source.get("sha"))
    ref = source.get("ref", "HEAD")
    if wanted is not None and not (isinstance(wanted, str) and _COMMIT.fullmatch(wanted)):
        raise ConfigError(f"{wanted!r} is no full commit hash", "name all of its hexadecimal characters")
    if not (isinstance(ref, str) and _REF.fullmatch(ref)):
        raise ConfigError(f"{ref!r} is no branch or tag", "correct `ref`")
    fix = f"check that `git ls-remote {url}` works here and has {wanted or ref}"
    target.mkdir(parents=True)
    _git(["init", "--quiet", "."], target, fix)
    _git(["fetch", "--quiet", "--depth=1", "--no-tags", "--", url, wanted or ref], target, fix)
    _git(["checkout", "--quiet", "--detach", "FETCH_HEAD"], target, fix)
    commit = _git(["rev-parse", "HEAD"], target, fix).strip()
    if wanted not in (None, commit):
        raise ConfigError(f"{url} gave {commit} instead of {wanted}", fix)
    return target, commit


def _address(source: Mapping[str, Any]) -> str:
    kind, repo, url = source.get("source"), source.get("repo"), source.get("url")
    if kind == "github" and isinstance(repo, str) and _REPOSITORY.fullmatch(repo):
        return _GITHUB.format(repo)
    if kind in ("git", "url", "git-subdir") and isinstance(url, str) and _URL.fullmatch(url):
        return url
    raise ConfigError(
        f"the source {dict(source)!r} cannot be used",
        'name {"source": "github", "repo": "owner/name"}, {"source": "git", "url": "https://..."} without a password in '
        'it, or {"source": "directory", "path": "..."}',
    )


def _git(arguments: list[str], folder: Path, fix: str) -> str:
    safe = ["-c", "protocol.ext.allow=never", "-c", "core.hooksPath=/dev/null"]
    # Git's own variables would name another repository where this runs from one of its hooks.
    kept = {name: value for name, value in os.environ.items() if name not in _OTHER_REPOSITORY}
    environment = {**kept, "GIT_TERMINAL_PROMPT": "0"}
    return run(["git", *safe, *arguments], fix, cwd=folder, env=environment)
