"""Starting and stopping what `hitl` runs on this machine: a Ray head of its own, and the application on it."""

import errno
import fcntl
import hashlib
import hmac
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
from pydantic import SecretStr

from claude_hitl_template import code_version
from claude_hitl_template.cli.client import Client
from claude_hitl_template.errors import ConfigError, HitlError
from claude_hitl_template.secrets import (
    API_KEY,
    MODEL_KEY,
    SIGNING_KEY,
    operator_key,
    read_api_key,
    read_signing_key,
)
from claude_hitl_template.settings import Settings, variable

START_S = 120.0
DRAIN_S = 10.0
# A tool that still runs gets this long to end by itself. Ray's own processes would take 15 s, and need none:
# whatever the service acknowledged is in the database.
TERM_S = 1.0
STOP_S = 15.0
LAST_LINES = 8
RAY_TOO_SLOW = "timed out during startup"  # in what Ray says then
# Ray turns 127.0.0.1 into the machine's outer address; this one stays on loopback (Linux).
LOOPBACK = "127.0.0.2" if sys.platform == "linux" else "127.0.0.1"
PORTS = ("ray_port", "ray_client_port", "dashboard_port", "serve_port")
_SECRET_FIELDS = {"api_key": API_KEY, "anthropic_api_key": MODEL_KEY}
_RAY_NAMES = ("raylet", "gcs_server")
_MARK = "HITL_CLUSTER"  # in the environment of all that runs under our head: tells ours from other clusters

type Step = Callable[[str], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Stopped:
    """What `stop` did. `unfinished` turns were cut off; None: the service did not answer, so nobody knows."""

    processes: int
    unfinished: int | None


@dataclass(frozen=True)
class Prepared:
    """What `prepare` found to do: the first API key if it was made just now; where a key is kept that was replaced;
    whether there was a key for the model, and is none any more."""

    made_key: str | None = None
    former_key: Path | None = None
    went_offline: bool = False


def prepare(settings: Settings) -> Prepared:
    """Makes the data folder and its secrets. Raises ConfigError."""
    try:
        for folder in (settings.data_dir, settings.secrets_dir, settings.logs_dir):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder = settings.secrets_dir
        _keep(folder / SIGNING_KEY, secrets.token_hex(32))
        offline = _model_key(folder / MODEL_KEY, settings.anthropic_api_key)
        if settings.api_key is not None:
            former = _replace_key(folder / API_KEY, settings.api_key.get_secret_value())
            return Prepared(former_key=former, went_offline=offline)
        made = f"hitl_{secrets.token_urlsafe(32)}"
        return Prepared(made_key=made if _keep(folder / API_KEY, made) else None, went_offline=offline)
    except OSError as error:
        raise ConfigError(
            f"the data folder {settings.data_dir} cannot be written: {error.strerror}",
            "choose another with HITL_DATA_DIR, or correct its permissions",
        ) from error


def healthy(settings: Settings) -> dict[str, str] | None:
    """What the service says of itself; None when it does not answer."""
    try:
        answer = httpx.get(f"{settings.base_url}/v1/health", timeout=5)
        return answer.json() if answer.status_code == 200 else None
    except (httpx.HTTPError, ValueError):
        return None


def start(settings: Settings, step: Step) -> list[str]:
    """Starts Ray and the application where they do not run yet, as the settings are now.

    `step` is entered around everything that takes longer than a second. Returns what was done. Raises ConfigError.
    """
    done: list[str] = []
    with _alone(settings, step):
        changed = changed_settings(settings)
        if changed:
            with step(f"Settings changed ({', '.join(changed)}): stopping what runs"):
                stop(settings)
            done.append(f"restarted, because of {', '.join(changed)}")
        if ray_process(settings) is None:
            _end(_strays(settings))
            check_ports(settings)
            _start_ray(settings)
            done.append("started Ray")
        found = healthy(settings)
        if found is None or found.get("code") != code_version():
            what = "Starting Ray and the application" if done else "Deploying the application"
            with step(f"{what} (about half a minute)"):
                _deploy_patiently(settings)
            done.append("deployed the application" if found is None else "deployed the changed code")
    return done


def stop(settings: Settings) -> Stopped:
    """Lets running turns come to rest for up to DRAIN_S, then ends Ray and all that runs under it, by their ids."""
    unfinished = _drain(settings)
    process = ray_process(settings)
    family = [process, *process.children(recursive=True)] if process else []
    family = list({p.pid: p for p in [*family, *_strays(settings)]}.values())
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.send_signal(signal.SIGTERM)
    _, left = psutil.wait_procs(family, timeout=TERM_S)
    _end(left)
    ended = len(family)
    while found := _strays(settings):  # what was being started meanwhile
        _end(found)
        ended += len(found)
    _run_file(settings).unlink(missing_ok=True)
    return Stopped(ended, unfinished)


def ray_process(settings: Settings) -> psutil.Process | None:
    """The head that `start` started, if it is alive."""
    known = _last_run(settings)
    try:
        process = psutil.Process(known["pid"])
        alive = process.create_time() == known["created"] and process.status() != psutil.STATUS_ZOMBIE
    except (KeyError, psutil.NoSuchProcess):
        return None
    return process if alive else None


def changed_settings(settings: Settings) -> list[str]:
    """The variables whose values differ from those that the running head was started with; [] when none runs."""
    if ray_process(settings) is None:
        return []
    before = _last_run(settings).get("settings", {})
    return [variable(name) for name, mark in fingerprints(settings).items() if before.get(name) != mark]


def check_ports(settings: Settings) -> None:
    """Raises ConfigError that names the first port which is taken, and its holder."""
    for name in PORTS:
        port = getattr(settings, name)
        if not is_free(port):
            raise ConfigError(*taken(port, variable(name)))


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return False
            raise ConfigError(
                f"port {port} cannot be used: {error.strerror}", "choose one above 1023"
            ) from error
    return True


def taken(port: int, name: str) -> tuple[str, str]:
    """What is wrong with a port that is taken, and what mends it."""
    holder = holder_of(port)
    if holder is None:
        return f"port {port} ({name}) is taken by another process", f"choose another port with {name}"
    who = f"{holder.name()} (process {holder.pid})"
    if _is_ray(holder):
        return (
            f"port {port} ({name}) is taken by another Ray cluster: {who}",
            "choose other ports (HITL_RAY_PORT and so on, see .env.example), or end that cluster with its own means",
        )
    return f"port {port} ({name}) is taken by {who}", f"end it, or choose another port with {name}"


def holder_of(port: int) -> psutil.Process | None:
    """The process that listens on a port, as far as this user may know."""
    try:
        listening = psutil.net_connections("tcp")
        pid = next(
            c.pid for c in listening if c.status == psutil.CONN_LISTEN and c.laddr and c.laddr[1] == port
        )
        return psutil.Process(pid) if pid else None
    except (StopIteration, psutil.Error):
        return None


def is_ours(settings: Settings, process: psutil.Process) -> bool:
    """Whether a process belongs to the cluster that `start` starts with these settings.

    Its environment says so; or, for those that overwrote it with a title, an option that names Ray's folder.
    """
    folder = str(temp_dir(settings))
    try:
        if process.uids().real != os.getuid():
            return False
        named = any(part.startswith("--") and folder in part for part in process.cmdline())
        return named or process.environ().get(_MARK) == folder
    except psutil.Error:
        return False


def temp_dir(settings: Settings) -> Path:
    """Ray's folder. Short: Ray puts sockets there, and their paths may have 107 characters."""
    name = hashlib.sha256(str(settings.data_dir).encode()).hexdigest()[:8]
    return settings.ray_temp_dir or Path(f"/tmp/hitl-{os.getuid()}-{name}")  # noqa: S108


@contextmanager
def _alone(settings: Settings, step: Step) -> Generator[None]:
    """Two `hitl up` at once take turns."""
    with (settings.data_dir / "up.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with step("Another ./hitl up is at work: waiting for it"):
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _start_ray(settings: Settings) -> None:
    command = [
        str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--disable-usage-stats",
        f"--port={settings.ray_port}", f"--ray-client-server-port={settings.ray_client_port}",
        f"--dashboard-host={settings.host}", f"--dashboard-port={settings.dashboard_port}",
        f"--node-ip-address={_node_address(settings)}", f"--temp-dir={temp_dir(settings)}",
        "--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0",
        *([f"--num-cpus={settings.ray_num_cpus}"] if settings.ray_num_cpus else []),
    ]  # fmt: skip
    with (settings.logs_dir / "ray.log").open("wb") as log:
        process = subprocess.Popen(  # noqa: S603
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=ray_environment(settings),
        )
    created = psutil.Process(process.pid).create_time()
    run = {"pid": process.pid, "created": created, "settings": fingerprints(settings)}
    _write(_run_file(settings), json.dumps(run))


def _deploy_patiently(settings: Settings) -> None:
    """Ray gives its own start 30 s, which a machine that is busy may not keep: then it is started once more."""
    try:
        _deploy(settings)
    except ConfigError as error:
        if ray_process(settings) is not None or RAY_TOO_SLOW not in error.message:
            raise
        _end(_strays(settings))
        _start_ray(settings)
        _deploy(settings)


def _deploy(settings: Settings) -> None:
    """Deploys beside Ray's own start, which it waits for. Raises ConfigError with the last lines of the log."""
    env = {**ray_environment(settings), "RAY_ADDRESS": f"{_node_address(settings)}:{settings.ray_port}"}
    log_path = settings.logs_dir / "deploy.log"
    command = [sys.executable, "-m", "claude_hitl_template.query"]
    deadline = time.monotonic() + START_S
    with log_path.open("wb") as log:
        deploying = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env)  # noqa: S603
        try:
            while deploying.poll() is None:
                _check_head(settings)
                _check_time(deadline, log_path)
                time.sleep(0.1)
        finally:
            deploying.kill()
            deploying.wait()
    if deploying.returncode != 0:
        raise ConfigError(
            f"the application did not start:\n{_tail(log_path)}", f"correct that, or read {log_path}"
        )
    while healthy(settings) is None:
        _check_time(deadline, log_path)
        time.sleep(0.1)


def _check_head(settings: Settings) -> None:
    if ray_process(settings) is None:
        log_path = settings.logs_dir / "ray.log"
        raise ConfigError(f"Ray did not start:\n{_tail(log_path)}", f"correct that, or read {log_path}")


def _check_time(deadline: float, log_path: Path) -> None:
    if time.monotonic() > deadline:
        raise ConfigError(
            f"the application does not answer after {START_S:.0f} s:\n{_tail(log_path)}",
            f"read {log_path} and ./hitl logs; ./hitl up tries again",
        )


def _tail(path: Path) -> str:
    lines = path.read_text(errors="replace").splitlines()
    return "\n".join(f"  {line}" for line in lines[-LAST_LINES:])


def _drain(settings: Settings) -> int | None:
    """How many turns did not come to rest in time; None when the service could not be asked."""
    if healthy(settings) is None:
        return None
    try:
        client = Client(settings.base_url, operator_key(settings))
        answer = client.post("/v1/internal/drain", {"grace_s": DRAIN_S}, timeout_s=DRAIN_S + 10)
        return int(answer["still_running"])
    except HitlError:  # it is being stopped because something is wrong with it, perhaps this
        return None


def ray_environment(settings: Settings) -> dict[str, str]:
    """This process's environment without what Ray's processes, and so the agents, must not have."""
    hidden = ("KEY", "TOKEN", "SECRET", "PASSWORD")
    kept = {name: value for name, value in os.environ.items() if not any(h in name.upper() for h in hidden)}
    chosen = {
        variable(name): str(getattr(settings, name))
        for name in Settings.model_fields
        if name not in _SECRET_FIELDS and getattr(settings, name) is not None
    }
    ours = {
        _MARK: str(temp_dir(settings)),
        "RAY_kill_child_processes_on_worker_exit_with_raylet_subreaper": "true",
    }
    return {**kept, **chosen, **ours}


def fingerprints(settings: Settings) -> dict[str, str]:
    """By setting, what tells a value from another one without saying what it is."""
    key = read_signing_key(settings)

    def value(name: str) -> str:
        given = getattr(settings, name)
        if given is None and name == "api_key":  # then the one that was made stays
            return read_api_key(settings)
        return given.get_secret_value() if isinstance(given, SecretStr) else str(given)

    return {
        name: hmac.new(key, value(name).encode(), "sha256").hexdigest()[:16]
        for name in Settings.model_fields
        if name != "home"  # what it leads to counts, not where from
    }


def _is_ray(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        line = " ".join(process.cmdline())
        return process.name() in _RAY_NAMES or "ray/dashboard" in line or "ray.util.client.server" in line
    return False


def _node_address(settings: Settings) -> str:
    return LOOPBACK if settings.host in ("127.0.0.1", "localhost", "::1") else settings.host


def _strays(settings: Settings) -> list[psutil.Process]:
    """Processes of our cluster, whoever their parent is now."""
    return [p for p in psutil.process_iter() if p.pid != os.getpid() and is_ours(settings, p)]


def _end(processes: list[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=STOP_S)


def _run_file(settings: Settings) -> Path:
    return settings.data_dir / "run.json"


def _last_run(settings: Settings) -> dict[str, Any]:
    try:
        return json.loads(_run_file(settings).read_text())
    except (OSError, ValueError):
        return {}


def _model_key(path: Path, given: SecretStr | None) -> bool:
    """Writes or removes the key for the model; True when one was removed."""
    had = path.exists()
    if given is None:
        path.unlink(missing_ok=True)
    else:
        _write(path, given.get_secret_value())
    return had and given is None


def _replace_key(path: Path, key: str) -> Path | None:
    """Writes another key. The one before is kept, and its place returned: only with it can its sessions be seen."""
    if path.exists() and path.read_text().strip() == key:
        return None
    former = path.with_name(f"{path.name}.until-{time.strftime('%Y%m%d-%H%M%S')}")
    replaced = path.exists()
    if replaced:
        path.rename(former)
    _write(path, key)
    return former if replaced else None


def _keep(path: Path, value: str) -> bool:
    """Writes unless it is there; True when it wrote."""
    if path.exists():
        return False
    _write(path, value)
    return True


def _write(path: Path, value: str) -> None:
    temporary = path.with_suffix(".new")
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(value)
    temporary.replace(path)
