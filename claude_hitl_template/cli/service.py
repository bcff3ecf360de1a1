"""Starting and stopping what `hitl` runs on this machine: a Ray head of its own, and the application on it."""

import hashlib
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil

from claude_hitl_template import code_version
from claude_hitl_template.errors import ConfigError
from claude_hitl_template.secrets import API_KEY, MODEL_KEY, SIGNING_KEY
from claude_hitl_template.settings import Settings, variable

START_S = 120.0
STOP_S = 15.0
# Ray turns 127.0.0.1 into the machine's outer address; this one stays on loopback (Linux).
LOOPBACK = "127.0.0.2" if sys.platform == "linux" else "127.0.0.1"
_PORTS = ("ray_port", "ray_client_port", "dashboard_port", "serve_port")


def prepare(settings: Settings) -> str | None:
    """Makes the data folder and its secrets. Returns the first API key if it was made just now. Raises ConfigError."""
    try:
        for folder in (settings.data_dir, settings.secrets_dir, settings.logs_dir):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder = settings.secrets_dir
        _keep(folder / SIGNING_KEY, secrets.token_hex(32))
        given = settings.anthropic_api_key
        if given is None:
            (folder / MODEL_KEY).unlink(missing_ok=True)
        else:
            _write(folder / MODEL_KEY, given.get_secret_value())
        if settings.api_key is not None:
            _write(folder / API_KEY, settings.api_key.get_secret_value())
            return None
        made = f"hitl_{secrets.token_urlsafe(32)}"
        return made if _keep(folder / API_KEY, made) else None
    except OSError as error:
        raise ConfigError(
            f"the data folder {settings.data_dir} cannot be written: {error.strerror}",
            "choose another with HITL_DATA_DIR, or correct its permissions",
        ) from error


def healthy(settings: Settings) -> dict[str, str] | None:
    """What the service says of itself; None when it does not answer."""
    try:
        answer = httpx.get(f"{settings.base_url}/v1/health", timeout=5)
    except httpx.HTTPError:
        return None
    return answer.json() if answer.status_code == 200 else None


def start(settings: Settings) -> None:
    """Starts Ray and the application where they do not run yet. Raises ConfigError."""
    if ray_process(settings) is None:
        _check_ports(settings)
        _start_ray(settings)
    found = healthy(settings)
    if found is None or found.get("code") != code_version():
        _deploy(settings)


def stop(settings: Settings) -> None:
    """Ends Ray and all that runs under it, by their ids. What is committed stays."""
    process = ray_process(settings)
    if process is not None:
        family = [process, *process.children(recursive=True)]
        process.send_signal(signal.SIGTERM)
        _, left = psutil.wait_procs([process], timeout=STOP_S)
        del left
        _end([p for p in family if p.is_running()])
    _end(_strays(settings))
    _run_file(settings).unlink(missing_ok=True)


def ray_process(settings: Settings) -> psutil.Process | None:
    """The head that `start` started, if it is alive."""
    try:
        known = json.loads(_run_file(settings).read_text())
        process = psutil.Process(known["pid"])
        return process if process.create_time() == known["created"] else None
    except (OSError, ValueError, KeyError, psutil.NoSuchProcess):
        return None


def _start_ray(settings: Settings) -> None:
    command = [
        str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--disable-usage-stats",
        f"--port={settings.ray_port}", f"--ray-client-server-port={settings.ray_client_port}",
        f"--dashboard-host={settings.host}", f"--dashboard-port={settings.dashboard_port}",
        f"--node-ip-address={_node_address(settings)}", f"--temp-dir={_temp_dir(settings)}",
        "--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0",
        *([f"--num-cpus={settings.ray_num_cpus}"] if settings.ray_num_cpus else []),
    ]  # fmt: skip
    with (settings.logs_dir / "ray.log").open("ab") as log:
        process = subprocess.Popen(  # noqa: S603
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=_environment(settings),
        )
    created = psutil.Process(process.pid).create_time()
    _write(_run_file(settings), json.dumps({"pid": process.pid, "created": created}))


def _deploy(settings: Settings) -> None:
    env = {**_environment(settings), "RAY_ADDRESS": f"{_node_address(settings)}:{settings.ray_port}"}
    log_path = settings.logs_dir / "deploy.log"
    with log_path.open("wb") as log:
        command = [sys.executable, "-m", "claude_hitl_template.query"]
        result = subprocess.run(  # noqa: S603
            command, stdout=log, stderr=log, env=env, timeout=START_S, check=False
        )
    if result.returncode != 0:
        last = "\n  ".join(log_path.read_text(errors="replace").splitlines()[-5:])
        raise ConfigError(f"the application did not start:\n  {last}", f"read {log_path}")
    deadline = time.monotonic() + START_S
    while healthy(settings) is None:
        if time.monotonic() > deadline:
            raise ConfigError("the application does not answer", f"read {settings.logs_dir}")
        time.sleep(0.1)


def _environment(settings: Settings) -> dict[str, str]:
    """This process's environment without what Ray's processes, and so the agents, must not have."""
    hidden = ("KEY", "TOKEN", "SECRET", "PASSWORD")
    kept = {name: value for name, value in os.environ.items() if not any(h in name.upper() for h in hidden)}
    chosen = {
        variable(name): str(getattr(settings, name))
        for name in Settings.model_fields
        if name not in ("api_key", "anthropic_api_key") and getattr(settings, name) is not None
    }
    return {**kept, **chosen, "RAY_kill_child_processes_on_worker_exit_with_raylet_subreaper": "true"}


def _check_ports(settings: Settings) -> None:
    listening = {c.laddr.port: c.pid for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    for name in _PORTS:
        port = getattr(settings, name)
        if port in listening:
            pid = listening[port]
            holder = f"{psutil.Process(pid).name()} (process {pid})" if pid else "another process"
            raise ConfigError(
                f"port {port} is taken by {holder}", f"end it, or choose another port with {variable(name)}"
            )


def _node_address(settings: Settings) -> str:
    return LOOPBACK if settings.host in ("127.0.0.1", "localhost", "::1") else settings.host


def _temp_dir(settings: Settings) -> Path:
    """Short: Ray puts sockets there, and their paths may have 107 characters."""
    name = hashlib.sha256(str(settings.data_dir).encode()).hexdigest()[:8]
    return settings.ray_temp_dir or Path(f"/tmp/hitl-{os.getuid()}-{name}")  # noqa: S108


def _strays(settings: Settings) -> list[psutil.Process]:
    """Processes of our cluster that outlived their parent: they name its folder."""
    folder, found = str(_temp_dir(settings)), list[psutil.Process]()
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and any(folder in part for part in process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def _end(processes: list[psutil.Process]) -> None:
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(processes, timeout=STOP_S)


def _run_file(settings: Settings) -> Path:
    return settings.data_dir / "run.json"


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
