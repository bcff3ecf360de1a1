"""Ray's head as `hitl up` starts it: `ray start --head --block` without what nothing here uses.

    python -m claude_hitl_template.cluster.head --head --temp-dir=... --port=... ...

`ray start` imports every command of Ray, and keeps that in memory; waits for the dashboard before it starts anything else;
passes no choice of the dashboard's modules on; and keeps all logs. A cluster that was started by `ray start` works the same.
"""

# ruff: noqa: E402 - Ray reads variables when it is imported
import os

# For the workers that are forked off this process: they are of any job, and end with it.
OF_A_WORKER = {"RAY_JOB_ID": "ffffffff", "RAY_RAYLET_PID": str(os.getpid())}
if __name__ == "__main__":
    os.environ.update(OF_A_WORKER)

import argparse
import re
import shutil
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
from ray._private import services
from ray._private.authentication.authentication_token_setup import ensure_token_if_auth_enabled
from ray._private.node import Node
from ray._private.parameter import RayParams
from ray._private.resource_isolation_config import ResourceIsolationConfig

from claude_hitl_template.cluster import fork_server, setup_worker

# Each is a process. The others show Ray Data, Ray Train, and what a Prometheus and a Grafana that are not here have.
MODULES = ("UsageStatsHead", "JobHead", "ServeHead", "StateHead", "ReportHead", "NodeHead", "EventHead")
PATIENCE_S = 120.0  # an application that is not healthy by then may need the dashboard to be understood
POLL_S = 0.5
WATCH_S = 1.0
TIDY_S = 60.0
KEPT_WORKERS = 200  # ended ones whose log files stay: five files and some 12 KiB each
KEPT_STARTS = 5  # earlier ones whose folders stay
WORKERS_LOG = re.compile(r".*[-_](?P<pid>\d+)\.(out|err|log)(\.\d+)?")  # also those of drivers
ASKED_TO = (
    0,
    signal.SIGTERM,
    -signal.SIGTERM,
    128 + signal.SIGTERM,
)  # exit statuses after SIGTERM, as `ray start` has it


class Head(Node):  # pyright: ignore[reportUntypedBaseClass]
    """The node whose dashboard and Ray Client server start later: the others need the processors more."""

    def start_ray_client_server(self) -> None:
        """Called by Ray in the middle of its start."""

    def start_api_server(self, **_: Any) -> None:
        """Called by Ray in the middle of its start."""

    def start_the_rest(self) -> None:
        """Returns when the dashboard answers. Its failure is logged, and the cluster works without it."""
        super().start_ray_client_server()
        start = services.start_ray_process

        def with_modules(command: list[str], *args: Any, **kwargs: Any) -> Any:
            return start([*command, f"--modules-to-load={','.join(MODULES)}"], *args, **kwargs)

        services.start_ray_process = with_modules
        try:
            super().start_api_server(include_dashboard=None, raise_on_failure=False)
        finally:
            services.start_ray_process = start


def main(arguments: Sequence[str] | None = None) -> None:
    """Starts the head's processes, and stays until one of them ends unexpectedly, or a signal ends this one."""
    given = parse(arguments)
    for name in OF_A_WORKER:
        os.environ.pop(name, None)
    if sys.platform == "linux":  # elsewhere processes that are forked and not replaced are not safe
        fork_server.start(given.fork_server, setup_worker.rays_own("default_worker.py"), panel=given.panel)
        os.environ[setup_worker.SOCKET] = str(given.fork_server)
    ensure_token_if_auth_enabled(create_token_if_missing=False)
    head = Head(params(given), head=True, shutdown_at_exit=True, spawn_reaper=True)
    print(f"Ray runs at {head.address}", flush=True)
    remove_old_starts(Path(head.get_session_dir_path()))
    logs = Path(head.get_logs_dir_path())
    ended = watch(head, lambda: is_healthy(given.rest_after), lambda: remove_old_logs(logs))
    head.kill_all_processes(check_alive=False, allow_graceful=False)
    sys.exit(f"ended unexpectedly: {', '.join(ended)}; its logs are in {head.get_logs_dir_path()}")


def watch(head: Head, healthy: Callable[[], bool], tidy: Callable[[], None]) -> list[str]:
    """Starts the rest when the service is healthy, or after PATIENCE_S, and calls `tidy` every TIDY_S; returns what ended
    unexpectedly."""
    deadline, started = time.monotonic() + PATIENCE_S, False
    tidied = time.monotonic()
    while not (
        ended := [kind for kind, process in head.dead_processes() if process.returncode not in ASKED_TO]
    ):
        if not started and (healthy() or time.monotonic() > deadline):
            head.start_the_rest()
            started = True
        if time.monotonic() > tidied + TIDY_S:
            tidy()
            tidied = time.monotonic()
        time.sleep(WATCH_S if started else POLL_S)
    return ended


def remove_old_logs(logs: Path) -> None:
    """Removes the log files of ended workers, apart from those of the KEPT_WORKERS that wrote last. Ray keeps all."""
    of_workers = defaultdict[int, list[Path]](list)
    for folder in (logs, logs / "events", logs / "export_events"):
        for path in folder.glob("*"):
            if (found := WORKERS_LOG.fullmatch(path.name)) and path.is_file():
                of_workers[int(found["pid"])].append(path)
    ended = [paths for pid, paths in of_workers.items() if not psutil.pid_exists(pid)]
    ended.sort(key=lambda paths: max(map(_written, paths)), reverse=True)
    for paths in ended[KEPT_WORKERS:]:
        for path in paths:
            path.unlink(missing_ok=True)


def remove_old_starts(session: Path) -> None:
    """Removes the folders of earlier starts next to this one's, apart from the last KEPT_STARTS. Ray keeps all."""
    earlier = sorted(path for path in session.parent.glob("session_2*") if path.name < session.name)
    for path in earlier[:-KEPT_STARTS]:
        shutil.rmtree(path, ignore_errors=True)


def _written(path: Path) -> float:
    with suppress(FileNotFoundError):
        return path.stat().st_mtime
    return 0.0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Takes the options of `ray start` that `hitl up` gives, under their names."""
    parser = argparse.ArgumentParser(prog="claude_hitl_template.cluster.head", description=__doc__)
    parser.add_argument(
        "--head", action="store_true", required=True, help="as of `ray start`, like the following"
    )
    for name in ("port", "ray-client-server-port", "dashboard-port"):
        parser.add_argument(f"--{name}", type=int, required=True)
    for name in ("node-ip-address", "dashboard-host", "temp-dir"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--num-cpus", type=int)
    parser.add_argument(
        "--fork-server", type=Path, required=True, help="path of the socket at which workers are forked"
    )
    parser.add_argument("--panel", action="store_true", help="whether the panel will run")
    parser.add_argument(
        "--rest-after", required=True, help="address that answers once the service is healthy"
    )
    return parser.parse_args(arguments)


def params(given: argparse.Namespace) -> RayParams:
    """What Ray is started with; ports that are not given are chosen by Ray's processes."""
    return RayParams(
        gcs_server_port=given.port,
        node_ip_address=(address := services.resolve_ip_for_localhost(given.node_ip_address)),
        node_name=address,
        min_worker_port=0,
        max_worker_port=0,
        ray_client_server_port=given.ray_client_server_port,
        dashboard_host=given.dashboard_host,
        dashboard_port=given.dashboard_port,
        dashboard_agent_listen_port=0,
        temp_dir=given.temp_dir,
        worker_path=setup_worker.__file__,
        setup_worker_path=setup_worker.__file__,
        num_cpus=given.num_cpus,
        no_monitor=True,  # it adds and removes hosts
        include_log_monitor=False,  # pyright: ignore[reportArgumentType]  it sends what workers print to drivers
        resource_isolation_config=ResourceIsolationConfig(enable_resource_isolation=False),
    )


def is_healthy(url: str) -> bool:
    """Whether `url` answers with a 200."""
    at = urlsplit(url)
    connection = HTTPConnection(at.netloc, timeout=5)
    try:
        connection.request("GET", at.path)
        return connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


if __name__ == "__main__":
    main()
