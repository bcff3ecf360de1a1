"""Starting and stopping what `hitl` runs on this machine: a Ray head of its own, and the application on it."""

import hmac
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
from pydantic import SecretStr

from claude_hitl_template import code_version
from claude_hitl_template.cli.client import Client, said_to_a_key
from claude_hitl_template.cli.host import panel, postgres, run_record
from claude_hitl_template.cli.host.ports import check_address, check_free
from claude_hitl_template.cli.host.processes import (
    end,
    family,
    intruder,
    node_address,
    private_dir,
    ray_environment,
    strays,
    temp_dir,
)
from claude_hitl_template.cluster import containers
from claude_hitl_template.config import network
from claude_hitl_template.config.secret_files import (
    operator_key,
    ray_token_file,
    read_api_key,
    read_signing_key,
)
from claude_hitl_template.config.settings import Settings, variable
from claude_hitl_template.errors import ConfigError, HitlError

START_S = 300.0  # on a machine that is busy; what ends before it is up is noticed at once
DATABASE_S = 10.0  # a database that is being started
DRAIN_S = 10.0
# A tool that still runs gets this long to end by itself. Ray's own processes would take 15 s, and need none:
# whatever the service acknowledged is in the database.
TERM_S = 1.0
LAST_LINES = 8
HEAD = (sys.executable, "-m", "claude_hitl_template.cluster.head")
RAY_STARTS = 3
RAY_NOT_YET = ("Failed to connect to Ray cluster",)
RAY_TOO_SLOW = ("timed out during startup", "Timed out waiting for node info")  # in what Ray says then
PORTS = ("ray_port", "ray_client_port", "dashboard_port", "serve_port")
# Settings of the command line alone; the service does not see them.
_OWN = ("home", "dashboard_url", "serve_url", "ray_address")

type Step = Callable[[str], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Stopped:
    """What `stop` did. `unfinished`: number of turns that were cut off; None if the service did not answer."""

    processes: int
    unfinished: int | None


def healthy(settings: Settings) -> dict[str, Any] | None:
    """Returns the health report of the service on this machine; None if it does not answer."""
    return healthy_at(settings.base_url, settings)


def healthy_at(url: str, settings: Settings) -> dict[str, Any] | None:
    """Returns a service's health report; `url` is its address without /v1. None if it does not answer."""
    try:
        answer = network.request("GET", f"{url}/v1/health", timeout=5)
        found = answer.json() if answer.status_code == 200 else None
        return None if found is None else {**found, **said_to_a_key(url, settings)}
    except (httpx.HTTPError, ValueError):
        return None


def start(settings: Settings, step: Step, *, make_postgres: bool = False) -> list[str]:
    """Starts Ray and the application where they do not run yet, as the settings are now.

    `step` is entered around everything that takes longer than a second. Returns what was done. Raises ConfigError.
    Callers hold `run_record.alone` where another command could be at work on the same data folder.
    """
    run_record.check_ours(settings)
    _check_ray_folder(settings)
    network.check_proxies()
    from claude_hitl_template.files.blob_store import FileArea  # noqa: PLC0415  (slow to import)

    FileArea(settings.files_at)  # an unusable URL fails here, not when the ledger starts
    done: list[str] = []
    moves = make_postgres and not postgres.local(settings).made and ray_process(settings) is not None
    changed = [*changed_settings(settings), *(["--postgres"] if moves else [])]
    head = ray_process(settings)
    if head is not None and changed == [variable("anthropic_api_key")]:  # its file is read for each request
        run_record.write(settings, head.pid, fingerprints(settings))
        done.append("the model key changed: it counts from the next request to the model")
    elif changed:
        with step(f"Settings changed ({', '.join(changed)}): stopping what runs"):
            stop(settings)
        done.append(f"restarted, because of {', '.join(changed)}")
    with ExitStack() as undo:
        if ray_process(settings) is None:
            undo.callback(_end_what_was_started, settings, step)
        done += _start_missing(settings, step, make_postgres, restarted=bool(done))
        undo.pop_all()
    return done


def _end_what_was_started(settings: Settings, step: Step) -> None:
    """Ends everything of a failed start (Ray, the panel, our own Postgres), so that no port stays in use."""
    if not _strays(settings) and ray_process(settings) is None and postgres.local(settings).pid() is None:
        return
    with step("That failed: ending what was started"):
        stop(settings)


def _start_missing(settings: Settings, step: Step, make_postgres: bool, *, restarted: bool) -> list[str]:
    done = postgres.start_missing(settings, make=make_postgres)
    if ray_process(settings) is None:
        end(_strays(settings))
        check_ports(settings)
        _start_ray(settings)
        postgres.check(settings, patience_s=DATABASE_S)  # while Ray starts; a problem ends that again
        done.append("started Ray")
    found = healthy(settings)
    # What ./hitl deploy brought stays until Ray ends: this checkout may be an old one.
    stale = found is None or (found.get("code") != code_version() and not found.get("package"))
    if stale:
        what = "Starting Ray and the application" if done or restarted else "Deploying the application"
        with step(f"{what} (some 15 seconds)"):
            _deploy_patiently(settings)
        private_dir(settings).chmod(0o700)  # one that a setting names was opened by Ray
        done.append("deployed the application" if found is None else "deployed the changed code")
    else:
        undrain(settings)  # an earlier stop may have been broken off
    return done + _start_pages(settings, step, stale=stale)


def _start_pages(settings: Settings, step: Step, *, stale: bool) -> list[str]:
    """Starts the panel, and waits for it and for what Ray's head starts once the application is healthy: it needs neither,
    and would be ready later if they started together.

    `stale`: the application was deployed just now, so the panel must read its entries again.
    """
    started = panel.start_missing(settings) if settings.panel else []
    changed = settings.panel and (started or stale or panel.check_panel(settings).problem)
    if changed or not _is_complete(settings):
        follows = "Ray's dashboard and the panel follow" if settings.panel else "Ray's dashboard follows"
        with step(f"REST is ready at {settings.base_url}/v1; {follows}"):
            _until_complete(settings)
            if settings.panel:
                panel.wait(settings)
    return [f"started the {name}" for name in started]


def _is_complete(settings: Settings) -> bool:
    """Whether Ray's dashboard and its server for Ray Client answer."""
    try:
        socket.create_connection((node_address(settings), settings.ray_client_port), timeout=5).close()
        url = f"{settings.own_dashboard}/api/authentication_mode"
        return network.request("GET", url, timeout=5).is_success
    except (OSError, httpx.HTTPError):
        return False


def _until_complete(settings: Settings) -> None:
    deadline = time.monotonic() + START_S
    while not _is_complete(settings):
        _check_head(settings)
        if time.monotonic() > deadline:
            log_path = settings.logs_dir / "ray.log"
            raise ConfigError(
                f"Ray's dashboard does not answer after {START_S:.0f} s:\n{_tail(log_path)}",
                f"read {log_path}",
            )
        time.sleep(0.1)


def _check_ray_folder(settings: Settings) -> None:
    """Raises ConfigError where the cluster of another data folder uses the Ray folder that these settings name."""
    found = intruder(settings)
    if found is not None:
        pid, folder = found
        raise ConfigError(
            f"{temp_dir(settings)} is the Ray folder of another cluster, whose data folder is {folder} (process {pid})",
            "choose another one with HITL_RAY_TEMP_DIR, or unset it",
        )


def _strays(settings: Settings) -> list[psutil.Process]:
    """What belongs to the cluster, as the settings are now and as they were when it was started."""
    found = [*strays(settings), *strays(run_record.as_recorded(settings))]
    return list({process.pid: process for process in found}.values())


def stop(settings: Settings) -> Stopped:
    """Lets running turns come to rest for up to DRAIN_S, then ends Ray and all that runs under it, by their ids."""
    process = ray_process(settings)
    try:
        unfinished = _drain(settings) if process else None  # else what answers there is another data folder's
    except KeyboardInterrupt:
        undrain(settings)
        raise
    found = [*(family(process) if process else []), *_strays(settings)]
    members = list({member.pid: member for member in found}.values())
    try:
        for member in members:
            with suppress(psutil.NoSuchProcess):
                member.send_signal(signal.SIGTERM)
        psutil.wait_procs(members, timeout=TERM_S)
    finally:  # also when interrupted: a half-stopped Ray does not answer and blocks the next start
        end(members)
    ended = len(members)
    while found := _strays(settings):  # what was being started meanwhile
        end(found)
        ended += len(found)
    if settings.images:
        containers.remove_left(temp_dir(settings))
    ended += postgres.local(settings).stop()
    run_record.forget(settings)
    return Stopped(ended, unfinished)


def ray_process(settings: Settings) -> psutil.Process | None:
    """The head that `start` started, if it is alive."""
    return run_record.head(settings)


def changed_settings(settings: Settings) -> list[str]:
    """The variables whose values differ from those that the running head was started with; [] when none runs."""
    run = run_record.read(settings)
    if run is None or ray_process(settings) is None:
        return []
    before = run.settings
    return [variable(name) for name, mark in fingerprints(settings).items() if before.get(name) != mark]


def check_ports(settings: Settings) -> None:
    """Raises ConfigError that names the first port which is taken, and its holder, or an address that is not ours."""
    check_address(settings.host, variable("host"))
    for name in ports(settings):
        check_free(getattr(settings, name), variable(name))


def ports(settings: Settings) -> tuple[str, ...]:
    """The settings that name a port we listen on."""
    return (*PORTS, "panel_port") if settings.panel else PORTS


def make_ray_folder(settings: Settings) -> None:
    """Closes Ray's folder to other users. Raises ConfigError for one that belongs to another user, or to all, as /tmp."""
    folder = private_dir(settings)
    if not os.path.lexists(folder):
        folder.mkdir(mode=0o700, parents=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & stat.S_ISVTX:
        raise ConfigError(
            f"{folder} is not a folder of yours alone, so another user could change what Ray runs",
            f"remove {folder}, or choose another folder with HITL_RAY_TEMP_DIR",
        )
    folder.chmod(0o700)


def _start_ray(settings: Settings) -> None:
    make_ray_folder(settings)
    command = [
        *HEAD, "--head",
        f"--port={settings.ray_port}", f"--ray-client-server-port={settings.ray_client_port}",
        f"--dashboard-host={settings.host}", f"--dashboard-port={settings.dashboard_port}",
        f"--node-ip-address={node_address(settings)}", f"--temp-dir={temp_dir(settings)}",
        f"--rest-after={settings.base_url}/v1/health", f"--fork-server={private_dir(settings) / 'fork.sock'}",
        *([f"--num-cpus={settings.ray_num_cpus}"] if settings.ray_num_cpus else []),
        *(["--panel"] if settings.panel else []),
    ]  # fmt: skip
    with (settings.logs_dir / "ray.log").open("wb") as log:
        process = subprocess.Popen(  # noqa: S603
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            cwd=run_record.CHECKOUT,  # Python takes code from the current folder first, which may be another checkout
            env={**ray_environment(settings), **_container_environment(settings)},
        )
    run_record.write(settings, process.pid, fingerprints(settings))


def _container_environment(settings: Settings) -> dict[str, str]:
    """The environment of the raylet's podman; empty if sessions are local processes."""
    if not settings.images:
        return {}
    share = settings.session_memory_bytes, settings.session_processes
    hooks, cluster = settings.data_dir / "hooks", temp_dir(settings)
    return containers.raylet_environment(hooks, cluster, settings.images[0], *share)


def _deploy_patiently(settings: Settings) -> None:
    """Ray gives its own start 30 s, which a machine that is busy may not keep: then it is started, or asked, again."""
    for attempt in range(RAY_STARTS):
        try:
            _deploy(settings)
        except ConfigError as error:
            ended = ray_process(settings) is None
            signs = RAY_TOO_SLOW if ended else RAY_NOT_YET
            if attempt == RAY_STARTS - 1 or not any(sign in error.message for sign in signs):
                raise
            if ended:
                end(_strays(settings))
                _start_ray(settings)
        else:
            return


def _deploy(settings: Settings) -> None:
    """Deploys while Ray starts, and waits for Ray. Raises ConfigError with the last lines of the log."""
    env = {**ray_environment(settings), "RAY_ADDRESS": f"{node_address(settings)}:{settings.ray_port}"}
    log_path = settings.logs_dir / "deploy.log"
    command = [sys.executable, "-m", "claude_hitl_template.query"]
    deadline = time.monotonic() + START_S
    with log_path.open("wb") as log:
        deploying = subprocess.Popen(  # noqa: S603
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env, cwd=run_record.CHECKOUT
        )
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
    """Returns how many turns did not end in time; None if the service could not be asked."""
    if healthy(settings) is None:
        return None
    try:
        client = Client(settings.base_url, operator_key(settings))
        answer = client.post("/v1/internal/drain", {"grace_s": DRAIN_S}, timeout_s=DRAIN_S + 10)
        return int(answer["still_running"])
    except HitlError:  # it is being stopped because something is wrong with it, perhaps this
        return None


def undrain(settings: Settings) -> None:
    """Has a service that was about to be stopped go on at once; by itself it does so half a minute later."""
    with suppress(HitlError):
        Client(settings.base_url, operator_key(settings)).delete("/v1/internal/drain")


def drained_s(settings: Settings) -> float:
    """Seconds for which the service on this machine has started nothing because it is being stopped; 0: it works, or it does
    not say."""
    try:
        answer = Client(settings.base_url, operator_key(settings)).get("/v1/internal/drain")
        return float(answer["drained_s"])
    except HitlError:
        return 0.0


def fingerprints(settings: Settings) -> dict[str, str]:
    """By setting, what tells a value from another one without saying what it is."""
    key = read_signing_key(settings).secret

    def value(name: str) -> str:
        given = getattr(settings, name)
        if given is None and name == "api_key":  # then the one that was made stays
            return read_api_key(settings)
        if name == "ray_token":
            return ray_token_file(settings).read_text()
        return given.get_secret_value() if isinstance(given, SecretStr) else str(given)

    return {
        name: hmac.new(key, value(name).encode(), "sha256").hexdigest()[:16]
        for name in Settings.model_fields
        if name not in _OWN  # of the home, what it leads to counts, not where from
    }
