"""The Ray Serve application.

    python -m claude_hitl_template.query      deploys to the cluster at RAY_ADDRESS and waits until it is healthy

A Serve config names `fast_app` as `import_path`: it builds the ingress, bound to the ledger and the supervisor.
"""

import logging
import shutil
import sys
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import ray
from ray import serve

from claude_hitl_template.cluster import ROUTE
from claude_hitl_template.cluster.deployments import build
from claude_hitl_template.cluster.ledger_line import APP_NAME
from claude_hitl_template.config import build_info, logs
from claude_hitl_template.config.secret_files import prepare
from claude_hitl_template.config.settings import Settings
from claude_hitl_template.errors import ConfigError

# What the deployments import only when they start.
_LATE = (
    "store.connect",
    "store.core",
    "store.sql",
    "cluster.ledger_handle",
    "cluster.supervisor",
    "cluster.ray_host",
    "cluster.owner",
    "notify.courier",
)
_OF_PANEL = ("panel.entries", "panel.flow", "panel.gateway", "panel.services")


def fast_app(_args: dict[str, Any]) -> Any:
    """Builds the application. Creates the data folder and its secrets if they do not exist.

    Serve calls it before it replaces the running application, which keeps running if this raises. So the configuration
    is checked here.
    """
    origin = build_info.origin()
    if origin is not None:
        build_info.check_machine(origin)
    settings = Settings.load()
    for name in (*_LATE, *(_OF_PANEL if settings.panel else ())):
        import_module(f"{__package__}.{name}")
    from claude_hitl_template.cluster.ingress import CurrentUpstream  # noqa: PLC0415  (`main` does without)

    settings.floor()
    prepare(settings)
    CurrentUpstream(settings)
    return build(settings)


@contextmanager
def _code_for_containers(settings: Settings) -> Generator[dict[str, Any] | None]:
    """Yields the application's runtime environment. Owners in containers inherit it and import this code, not the image's.

    None if sessions are local processes, which import the code from the same place as the service.
    """
    if not settings.images:
        yield None
        return
    package = Path(__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(package, Path(folder) / package.name, ignore=shutil.ignore_patterns("__pycache__"))
        yield {"working_dir": folder}


def main() -> None:
    """Deploys, and returns when the application is healthy. Raises ConfigError."""
    settings = Settings.load()
    with _code_for_containers(settings) as runtime_env:
        ray.init(
            namespace="serve", log_to_driver=False, logging_level=logging.WARNING, runtime_env=runtime_env
        )
    serve.start(
        proxy_location="HeadOnly",  # the address belongs to the head; a proxy on another host could not listen on it
        http_options={"host": settings.host, "port": settings.serve_port, "request_timeout_s": None},
    )
    try:
        serve.run(build(settings), name=APP_NAME, route_prefix=ROUTE)
    except RuntimeError as error:
        raise ConfigError(f"{error}\n{_why_not_deployed()}") from error
    ray.shutdown()  # at the interpreter's exit it would wait half a second for messages


def _why_not_deployed() -> str:
    """Joins the deployments' status messages: Serve's own error names the failed ones, but not always the cause."""
    app = serve.status().applications.get(APP_NAME)
    return "\n".join(found.message for found in app.deployments.values() if found.message) if app else ""


if __name__ == "__main__":
    logs.configure("INFO")
    try:
        main()
    except ConfigError as error:
        sys.exit(f"error: {error}")
