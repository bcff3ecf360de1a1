"""What Ray Serve builds the application from.

    python -m claude_hitl_template.query      deploys to the cluster at RAY_ADDRESS and waits until it is healthy

`fast_app` is what a Serve config names: an ingress over the ledger and the supervisor.
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

from claude_hitl_template.cluster.deployments import CurrentUpstream, build
from claude_hitl_template.cluster.ledger import APP_NAME
from claude_hitl_template.config import build_info, logs
from claude_hitl_template.config.secret_files import prepare
from claude_hitl_template.config.settings import Settings
from claude_hitl_template.errors import ConfigError

ROUTE = "/claude-hitl"
# What deployments import only when they start.
_LATE = ("store.sql",)
_OF_PANEL = ("panel.entries", "panel.flow", "panel.gateway", "panel.services")


def fast_app(_args: dict[str, Any]) -> Any:
    """What `import_path` in a Serve config names. Makes the data folder and its secrets where there are none.

    Serve calls it before it replaces what runs, which goes on running when this raises: so errors are found here.
    """
    origin = build_info.origin()
    if origin is not None:
        build_info.check_machine(origin)
    settings = Settings.load()
    for name in (*_LATE, *(_OF_PANEL if settings.panel else ())):
        import_module(f"{__package__}.{name}")
    settings.floor()
    prepare(settings)
    CurrentUpstream(settings)
    return build(settings)


@contextmanager
def _code_for_containers(settings: Settings) -> Generator[dict[str, Any] | None]:
    """The runtime environment of the application: owners in containers inherit this code with it, before the image's.

    None where sessions are local processes, which import the code from where it is stored, as the service does.
    """
    if not settings.images:
        yield None
        return
    package = Path(__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(package, Path(folder) / package.name, ignore=shutil.ignore_patterns("__pycache__"))
        yield {"working_dir": folder}


def main() -> None:
    """Deploys, and returns when the application answers. Raises ConfigError."""
    settings = Settings.load()
    with _code_for_containers(settings) as runtime_env:
        ray.init(
            namespace="serve", log_to_driver=False, logging_level=logging.WARNING, runtime_env=runtime_env
        )
    serve.start(
        proxy_location="HeadOnly",  # the address is the head's own: on another host nothing could listen on it
        http_options={"host": settings.host, "port": settings.serve_port, "request_timeout_s": None},
    )
    try:
        serve.run(build(settings), name=APP_NAME, route_prefix=ROUTE)
    except RuntimeError as error:
        raise ConfigError(f"{error}\n{_why_not_deployed()}") from error


def _why_not_deployed() -> str:
    """What each deployment says: Serve's own error names those that failed, and not always why."""
    app = serve.status().applications.get(APP_NAME)
    return "\n".join(found.message for found in app.deployments.values() if found.message) if app else ""


if __name__ == "__main__":
    logs.configure("INFO")
    try:
        main()
    except ConfigError as error:
        sys.exit(f"error: {error}")
