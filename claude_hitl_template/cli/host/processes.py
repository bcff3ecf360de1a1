"""Which processes on this machine are ours, and what environment they are started with."""

import hashlib
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from socket import AF_INET

import psutil
from pydantic import SecretStr

from claude_hitl_template.config import network
from claude_hitl_template.config.secret_files import ray_token_file, read_ray_token
from claude_hitl_template.config.settings import Settings, variable

STOP_S = 15.0
LOG_BYTES = 16 * 1024 * 1024
CHUNK_BYTES = 1024 * 1024  # larger ones make uploads from flows fail in Kodosumi 1.1.0
# Ray turns 127.0.0.1 into the machine's outer address; this one stays on loopback (Linux).
LOOPBACK = "127.0.0.2" if sys.platform == "linux" else "127.0.0.1"
# In the environment of all that `start` starts: they tell ours from other clusters.
_MARK = "HITL_CLUSTER"
_DATA = variable("data_dir")
_OF_ANOTHER_RAY = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_DASHBOARD_ADDRESS", "RAY_NAMESPACE")


def is_ours(settings: Settings, process: psutil.Process) -> bool:
    """Whether a process belongs to the cluster that `start` starts with these settings.

    Its environment says so; or, for those that overwrote it with a title, an option that names Ray's folder.
    """
    folder = str(temp_dir(settings))
    try:
        if process.uids().real != os.getuid():
            return False
        variables = process.environ()
        if _MARK in variables:
            return variables[_MARK] == folder and not _is_of_another(settings, variables)
        return any(part.startswith("--") and folder in part for part in process.cmdline())
    except psutil.Error:
        return False


def intruder(settings: Settings) -> tuple[int, str] | None:
    """A process that uses our Ray's folder and belongs to another data folder: its id, and that folder."""
    folder = str(temp_dir(settings))
    for process in psutil.process_iter():
        try:
            variables = process.environ()
        except (psutil.Error, OSError):
            continue
        if variables.get(_MARK) == folder and _is_of_another(settings, variables):
            return process.pid, variables[_DATA]
    return None


def _is_of_another(settings: Settings, environment: Mapping[str, str]) -> bool:
    variables = environment.get(_DATA)
    return variables is not None and Path(variables).resolve() != settings.data_dir.resolve()


def temp_dir(settings: Settings) -> Path:
    """Ray's folder. Short: Ray puts sockets there, and their paths may have 107 characters."""
    return settings.ray_temp_dir or private_dir(settings) / "ray"


def private_dir(settings: Settings) -> Path:
    """The folder around Ray's own, unless a setting names another one. Ray lets every user write to its folders."""
    name = hashlib.sha256(str(settings.data_dir).encode()).hexdigest()[:8]
    return settings.ray_temp_dir or Path(f"/tmp/hitl-{os.getuid()}-{name}")  # noqa: S108


def names_secret(variable_name: str) -> bool:
    """Whether an environment variable's name suggests that its value is secret."""
    return any(word in variable_name.upper() for word in ("KEY", "TOKEN", "SECRET", "PASSWORD"))


def ray_environment(settings: Settings) -> dict[str, str]:
    """This process's environment without what Ray's processes, and so the agents, must not have."""
    variables = {variable(name) for name in Settings.model_fields}  # below, and the secret ones not at all
    left_out = {*variables, *_OF_ANOTHER_RAY}
    kept = {
        name: value for name, value in os.environ.items() if name not in left_out and not names_secret(name)
    }
    chosen = {
        variable(name): text
        for name in Settings.model_fields
        if not isinstance(getattr(settings, name), SecretStr) and (text := settings.text(name)) is not None
    }
    ours = {
        _MARK: str(temp_dir(settings)),
        # Said here, so that neither a token in the user's home nor what the shell says of another Ray counts.
        "RAY_AUTH_MODE": "token",
        # Even where usage reports are off, Ray reports that they are: this leads nowhere.
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_USAGE_STATS_REPORT_URL": "http://127.0.0.1:9/",
        # Of each of Ray's log files: by default half a gigabyte, with five older ones.
        "RAY_ROTATION_MAX_BYTES": str(LOG_BYTES),
        "RAY_ROTATION_BACKUP_COUNT": "2",
        "RAY_AUTH_TOKEN_PATH": str(ray_token_file(settings)),
        # Metrics and records of tasks, which nothing here reads, are not collected; Serve's controller looks less often (by
        # default ten times a second) at what should run. Together that was a third of what an idle service used.
        "RAY_enable_metrics_collection": "false",
        "RAY_task_events_report_interval_ms": "0",
        "RAY_event_stats": "false",
        "METRICS_RECORD_INTERVAL_S": "60",
        "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "2000",
        "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.3",
        "RAY_kill_child_processes_on_worker_exit_with_raylet_subreaper": "true",
        # A replica's own code is all asynchronous: a thread of its own would only add two hops to each request and chunk.
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        # Requests for the service take a shorter way through Serve's proxy (cluster/proxy_relay.py).
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "claude_hitl_template.cluster.proxy_relay.middlewares",
        # Importing Kodosumi would load a .env of a parent folder into the environment, and create folders there.
        "PYTHON_DOTENV_DISABLED": "1",
        "KODO_EXEC_DIR": str(settings.panel_dir / "execution"),
        "KODO_SPOOLER_LOG_FILE": str(settings.logs_dir / "spooler.log"),
        "KODO_YAML_BASE": str(settings.panel_dir / "config" / "config.yaml"),
        "KODO_CHUNK_SIZE": str(CHUNK_BYTES),
    }
    return {**network.with_proxies(kept, own_addresses(settings)), **chosen, **ours}


def authenticate(settings: Settings) -> None:
    """Has Ray, when it is imported into this process, show the token of the cluster that the settings lead to."""
    token = read_ray_token(settings)
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        os.environ.pop(name, None)
    os.environ["RAY_AUTH_MODE"] = "disabled" if token is None else "token"
    if token is not None:
        os.environ["RAY_AUTH_TOKEN"] = (
            token  # what others see of a process's environment is what it was started with
        )


def own_addresses(settings: Settings) -> list[str]:
    """This machine's addresses at which a part of the cluster may be reachable."""
    interfaces = (
        found.address for each in psutil.net_if_addrs().values() for found in each if found.family == AF_INET
    )
    return list(dict.fromkeys([settings.local_host, node_address(settings), *interfaces]))


def panel_environment(settings: Settings) -> dict[str, str]:
    """The environment of spooler and panel, without variables that they do not need: their settings are in a file."""
    ours = ray_environment(settings)
    kept = {
        name: value
        for name, value in ours.items()
        if not name.startswith(("KODO_", "HITL_")) or name in (_MARK, _DATA)
    }
    return {**network.without_proxies(kept), "RAY_ADDRESS": f"{node_address(settings)}:{settings.ray_port}"}


def node_address(settings: Settings) -> str:
    """The address that Ray's own processes have: on all of the host's, only what people use listens."""
    inside = ("127.0.0.1", "0.0.0.0")  # noqa: S104
    return LOOPBACK if settings.host in inside else settings.host


def strays(settings: Settings) -> list[psutil.Process]:
    """All processes of our cluster, even if their parent has ended."""
    return [p for p in psutil.process_iter() if p.pid != os.getpid() and is_ours(settings, p)]


def family(head: psutil.Process) -> list[psutil.Process]:
    """`head`, which began a session of the operating system; all below it; and what is left in that session of processes
    below it that have ended. Raises psutil.NoSuchProcess."""
    found = {process.pid: process for process in (head, *head.children(recursive=True))}
    for process in psutil.process_iter():
        if process.pid not in found and _session(process) == head.pid:
            found |= {each.pid: each for each in (process, *process.children(recursive=True))}
    return list(found.values())


def _session(process: psutil.Process) -> int | None:
    with suppress(ProcessLookupError):
        return os.getsid(process.pid)
    return None


def end(processes: list[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=STOP_S)
