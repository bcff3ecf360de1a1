"""The files for `koco deploy -r`: data/config with this deploy's additions, checked more strictly than by Serve."""

import json
import shutil
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, SecretStr, ValidationError

from claude_hitl_template.cli.host.processes import names_secret
from claude_hitl_template.config.settings import Settings, variable
from claude_hitl_template.errors import ConfigError

MAIN = "config.yaml"
OURS = "claude-hitl"
# Settings of this machine that do not apply to the cluster.
_LOCAL = frozenset(
    {
        "home",
        "data_dir",
        "credentials",
        "host",
        "ray_port",
        "ray_client_port",
        "dashboard_port",
        "serve_port",
        "panel_port",
        "ray_temp_dir",
        "ray_num_cpus",
        "dashboard_url",
        "serve_url",
        "ray_address",
        "cli_path",
        "policy",
        "panel",
    }
)
_FIX = "correct it, then deploy again; https://docs.ray.io/en/latest/serve/production-guide/config.html names the keys"

type Files = dict[str, dict[str, Any]]


def read(folder: Path) -> Files:
    """The content of each file, by name. Raises ConfigError with file and place for keys that Serve would ignore."""
    from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema  # noqa: PLC0415  (slow to import)

    files = {path.name: _parse(path) for path in sorted(folder.glob("*.yaml"))}
    if MAIN not in files:
        raise ConfigError(f"{folder / MAIN} is not there", "take it from this project's repository")
    applications = {name: document for name, document in files.items() if name != MAIN}
    if all(document.get("name") != OURS for document in applications.values()):
        raise ConfigError(f"no file in {folder} has `name: {OURS}`", "take it from this project's repository")
    for name, document in applications.items():
        _check(folder / name, ServeApplicationSchema, document)
        _check_environments(folder / name, document)
    whole = {**files[MAIN], "applications": list(applications.values())}
    _check(folder / MAIN, ServeDeploySchema, whole)
    return files


def travelling(settings: Settings) -> dict[str, str]:
    """The settings chosen here that apply to the service on any machine, as variables, without secrets.

    Ray hands them to containers in a shell command. Raises ConfigError for a value that would break it.
    """
    chosen = {
        name: text
        for name in sorted(settings.model_fields_set - _LOCAL)
        if not isinstance(getattr(settings, name), SecretStr) and (text := settings.text(name)) is not None
    }
    for name, text in chosen.items():
        if "'" in text or not text.isprintable():
            raise ConfigError(
                f"{variable(name)} holds a quote or a control character, which cannot be handed to the cluster",
                f"set {variable(name)} on the cluster, where ./hitl up reads it",
            )
    return {variable(name): text for name, text in chosen.items()}


def complete(files: Files, *, uri: str, variables: Mapping[str, str], http: Mapping[str, Any]) -> Files:
    """With the package and the variables in our application, and the address that Serve has or is to have."""
    completed: Files = {
        MAIN: {**files[MAIN], "http_options": {**files[MAIN].get("http_options", {}), **http}}
    }
    for name, document in files.items():
        if name == MAIN:
            continue
        completed[name] = document
        if document["name"] == OURS:
            env = document.get("runtime_env") or {}
            ours = {**env, "working_dir": uri, "env_vars": {**(env.get("env_vars") or {}), **variables}}
            completed[name] = {**document, "runtime_env": ours}
    return completed


def write(files: Files, folder: Path) -> Path:
    """Writes only these files; returns the one for koco. Raises ConfigError."""
    import yaml  # noqa: PLC0415  (slow to import)

    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, mode=0o700)
        for name, document in files.items():
            (folder / name).write_text(yaml.safe_dump(document, sort_keys=False))
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror}", "correct HITL_DATA_DIR") from error
    return folder / MAIN


def check_no_secret(files: Files, secrets: list[str]) -> None:
    """Raises ConfigError for a secret: anyone who reaches the dashboard can read the config, and koco leaves a copy."""
    text = json.dumps(files, ensure_ascii=False)
    if any(value in text for value in secrets if value):
        raise ConfigError(
            "a file of data/config holds a secret of this machine's settings",
            "remove it there; ./hitl secrets set NAME",
        )


def _parse(path: Path) -> dict[str, Any]:
    import yaml  # noqa: PLC0415  (slow to import)

    try:
        document = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", "correct it, then deploy again") from error
    if not isinstance(document, dict):
        raise ConfigError(f"{path} does not hold keys and values", _FIX)
    return document


def _check(path: Path, model: type[BaseModel], document: dict[str, Any]) -> None:
    unknown = next(_unknown(model, document), None)
    if unknown:
        raise ConfigError(f"{path}: {unknown} is not a key that Serve knows; it would ignore it", _FIX)
    try:
        model.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{path}: {where or 'it'}: {first['msg']}", _FIX) from None


def _unknown(model: type[BaseModel], document: Mapping[str, Any], place: str = "") -> Iterator[str]:
    """Dotted paths of the keys that no field of the model, or of those below it, has."""
    for key, value in document.items():
        field = model.model_fields.get(str(key))
        here = f"{place}{key}"
        if field is None:
            yield here
            continue
        for inner in _models(field.annotation):
            for index, item in enumerate(value if isinstance(value, list) else [value]):
                if isinstance(item, Mapping):
                    yield from _unknown(
                        inner, item, f"{here}[{index}]." if isinstance(value, list) else f"{here}."
                    )


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The one model that values of this type are read as; none for what may be several things, or anything."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (list, Union, types.UnionType):
        inner = [part for part in get_args(annotation) if part is not type(None)]
        return _models(inner[0]) if len(inner) == 1 else []
    return []


def _check_environments(path: Path, document: Mapping[str, Any]) -> None:
    from ray.runtime_env import RuntimeEnv  # noqa: PLC0415  (slow to import)

    deployments = [one for one in document.get("deployments") or [] if isinstance(one, Mapping)]
    options = [one.get("ray_actor_options") or {} for one in deployments]
    for holder in (document, *options):
        env = holder.get("runtime_env") or {}
        unknown = sorted(set(env) - RuntimeEnv.known_fields)
        if unknown:
            raise ConfigError(f"{path}: runtime_env.{unknown[0]} is not a key that Ray knows", _FIX)
        secret = sorted(name for name in env.get("env_vars") or {} if names_secret(str(name)))
        if secret:
            raise ConfigError(
                f"{path}: runtime_env.env_vars.{secret[0]}: everyone on the cluster can read what stands there",
                f"./hitl secrets set {secret[0]}, if it is for this service",
            )
