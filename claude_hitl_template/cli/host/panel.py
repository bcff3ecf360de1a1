"""Kodosumi's two processes next to Ray: the spooler keeps what flows write, the panel shows it to browsers.

Their settings, secrets among them, come from a file in their working folder, so that neither a command line nor an
environment shows any; relative paths of Kodosumi's end up in that folder.
"""

import json
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import httpx
import psutil

from claude_hitl_template.cli.host.ports import check_free
from claude_hitl_template.cli.host.processes import (
    CHUNK_BYTES,
    end,
    node_address,
    own_addresses,
    panel_environment,
    strays,
)
from claude_hitl_template.config import network
from claude_hitl_template.config.secret_files import (
    PANEL_PASSWORD,
    PANEL_PROOF,
    panel_proof,
    read_panel_login,
    write_secret,
)
from claude_hitl_template.config.settings import Settings, variable
from claude_hitl_template.errors import ConfigError, Unauthorized, Unavailable

ADMIN = "admin"
TOKEN_HEADER = "KODOSUMI_API_KEY"  # noqa: S105  (a header's name)
START_S = 60.0
POLL_S = 0.25
ASK_S = 10.0
LAST_LINES = 8
NAMES = ("spooler", "panel")
UNGUARDED = "unguarded panel"  # Kodosumi's own, which earlier versions started
SERVER = "claude_hitl_template.panel.server"
SPOOLER = "claude_hitl_template.panel.spooler"


def routes_url(settings: Settings) -> str:
    """The address of Serve's list of applications, from which the panel reads their entries."""
    return settings.base_url.rpartition("/")[0] + "/-/routes"


def running(settings: Settings) -> dict[str, psutil.Process]:
    """Our spooler and our panel, by name, those that are alive."""
    found: dict[str, psutil.Process] = {}
    for process in strays(settings):
        name = _name(process)
        if name:
            found[name] = process
    return found


@dataclass(frozen=True)
class PanelStatus:
    """The panel's process ids, the number of flows that the spooler follows, and the problem with its fix."""

    panel: int | None
    spooler: int | None
    flows: int = 0
    problem: str | None = None
    fix: str = ""


def check_panel(settings: Settings) -> PanelStatus:
    """Asks the panel and its spooler for their state."""
    alive = running(settings)
    pids = {name: process.pid for name, process in alive.items()}
    found = PanelStatus(panel=pids.get("panel"), spooler=pids.get("spooler"))
    for name in NAMES:
        if name not in alive:
            return replace(found, problem=f"the {name} does not run", fix="./hitl up; ./hitl logs says why")
    try:
        panel = Panel(settings)
        health, entries = panel.health(), panel.entries()
    except Unauthorized as error:
        return replace(found, problem=str(error), fix=f"write its password into {_password_file(settings)}")
    except Unavailable as error:
        return replace(found, problem=str(error), fix="./hitl logs; ./hitl down, then ./hitl up restarts it")
    found = replace(found, flows=health["flows"])
    if health["spooler"] != found.spooler:
        return replace(
            found, problem="the panel does not find the spooler", fix="./hitl down, then ./hitl up"
        )
    if not entries:
        why = f"the panel lists no entry: it could not read {routes_url(settings)} when it started"
        return replace(found, problem=why, fix="./hitl up")
    return found


def start_missing(settings: Settings) -> list[str]:
    """Starts what does not run, and does not wait for it. Returns the names of what was started."""
    alive = running(settings)
    end([process for name, process in alive.items() if name == UNGUARDED])
    missing = [name for name in NAMES if name not in alive]
    if missing:
        write_settings(settings)
    for name in missing:
        _start(settings, name)
    return missing


def wait(settings: Settings) -> None:
    """Returns when the spooler works and the panel lists the entries that Serve has now.

    Raises ConfigError, Unauthorized.
    """
    deadline, panel = time.monotonic() + START_S, Panel(settings)
    while True:
        with suppress(Unavailable):
            if panel.register() and panel.health()["spooler"] in _pids(settings):
                return
        _check(settings, deadline)
        time.sleep(POLL_S)


class Panel:
    """The panel as its first role sees it. Every method raises Unavailable, or Unauthorized for a changed password."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._token = ""

    def health(self) -> dict[str, Any]:
        """`spooler`: the process id of the one the panel knows of, None when it knows none; `flows`: how many it follows."""
        found = self._ask("GET", "/health").get("spooler_status", {})
        return {"spooler": found.get("pid"), "flows": found.get("active", 0)}

    def entries(self) -> list[str]:
        """The addresses of our entries that the panel lists."""
        return self._ours(self._ask("GET", "/flow", params={"pp": 100})["items"])

    def register(self) -> list[str]:
        """Has the panel read the entries again, as it does by itself at its start only. Returns their addresses."""
        return self._ours(self._ask("POST", "/flow/register", body={"url": routes_url(self._settings)}))

    def _ours(self, entries: list[Mapping[str, Any]]) -> list[str]:
        return [str(e["url"]) for e in entries if e["base_url"].startswith(self._settings.base_url)]

    def _ask(self, method: str, path: str, *, body: Any = None, params: Any = None) -> Any:
        try:
            if not self._token:
                self._token = self._log_in()
            headers = {TOKEN_HEADER: self._token, "accept": "application/json"}
            url = self._settings.panel_url + path
            answer = network.request(method, url, json=body, params=params, headers=headers, timeout=ASK_S)
            answer.raise_for_status()
            return answer.json()
        except (httpx.HTTPError, ValueError, KeyError) as error:
            raise Unavailable(f"the panel does not answer at {self._settings.panel_url}: {error}") from error

    def _log_in(self) -> str:
        login = read_panel_login(self._settings)
        secret, password = login or ("", "")
        body, headers = {"name": ADMIN, "password": password}, {PANEL_PROOF: panel_proof(secret)}
        url = self._settings.panel_url + "/api/login"
        answer = network.request("POST", url, json=body, headers=headers, timeout=ASK_S)
        if answer.status_code == 401:
            file = _password_file(self._settings)
            raise Unauthorized(f"the panel refuses {ADMIN} with the password in {file}: it was changed there")
        return str(answer.raise_for_status().json()[TOKEN_HEADER])


def _password_file(settings: Settings) -> Path:
    return settings.secrets_dir / PANEL_PASSWORD


def _pids(settings: Settings) -> list[int]:
    return [process.pid for process in running(settings).values()]


def _name(process: psutil.Process) -> str | None:
    try:
        line = process.cmdline()
    except psutil.Error:
        return None
    if SERVER in line:
        return "panel"
    if SPOOLER in line:
        return "spooler"
    if "kodosumi.cli" not in line:
        return None
    # Kodosumi's own spooler, which earlier versions started, does the same with more work.
    return "spooler" if "spool" in line else UNGUARDED if "serve" in line else None


def _start(settings: Settings, name: str) -> None:
    what = ["-m", SERVER, "--register", routes_url(settings)] if name == "panel" else ["-m", SPOOLER]
    with (settings.logs_dir / f"{name}.log").open("ab") as log:
        subprocess.Popen(  # noqa: S603
            [sys.executable, *what],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            cwd=settings.panel_dir,
            env=panel_environment(settings),
        )


def write_settings(settings: Settings) -> None:
    login = read_panel_login(settings)
    if login is None:
        raise ConfigError("the panel has no secrets", "start the service with ./hitl up")
    folder = settings.panel_dir
    folder.mkdir(mode=0o700, exist_ok=True)
    values = {
        "SECRET_KEY": login[0],
        "ADMIN_PASSWORD": login[1],
        "APP_SERVER": f"http://{_listens_on(settings)}:{settings.panel_port}",
        # Every address that the panel has; under another one, and to pages of another one, it does not answer.
        "CORS_ORIGINS": json.dumps(_origins(settings)),
        "RAY_SERVER": f"{node_address(settings)}:{settings.ray_port}",
        "ADMIN_DATABASE": f"sqlite+aiosqlite:///{folder / 'admin.db'}",
        "EXEC_DIR": str(folder / "execution"),
        "UPLOAD_DIR": str(folder / "uploads"),
        "APP_LOG_FILE": str(settings.logs_dir / "panel.log"),
        "SPOOLER_LOG_FILE": str(settings.logs_dir / "spooler.log"),
        # Its debug lines hold what was said; what it writes to its standard output, the file has too.
        **{f"{part}_LOG_FILE_LEVEL": "INFO" for part in ("APP", "SPOOLER")},
        **{f"{part}_STD_LEVEL": "CRITICAL" for part in ("APP", "SPOOLER")},
        # There is none: a redeploy from the panel would delete the service, which is not deployed from a file.
        "YAML_BASE": str(folder / "config" / "config.yaml"),
        "CHUNK_SIZE": str(CHUNK_BYTES),
        "SPOOLER_INTERVAL": "0.5",  # seconds between two looks for new flows
    }
    write_secret(folder / ".env", "".join(f"KODO_{name}='{value}'\n" for name, value in values.items()))


def _origins(settings: Settings) -> list[str]:
    names = [settings.local_host, "localhost", "127.0.0.1"]
    if _listens_on(settings) == "0.0.0.0":  # noqa: S104
        names += [socket.gethostname().lower(), *own_addresses(settings)]
    port = settings.panel_port
    given = [name.strip().lower() for name in settings.panel_hosts.split(",") if name.strip()]
    hosts = [*(f"{name}:{port}" for name in names), *(n if ":" in n else f"{n}:{port}" for n in given)]
    return list(dict.fromkeys(f"http://{host}" for host in hosts))


def _listens_on(settings: Settings) -> str:
    """The panel calls itself by the name that the browser used, which is localhost where its port is forwarded."""
    on_loopback = ip_address(node_address(settings)).is_loopback
    return settings.host if on_loopback else "0.0.0.0"  # noqa: S104


def _check(settings: Settings, deadline: float) -> None:
    """Starts what ended: a spooler gives up while the one before it is not forgotten. Raises ConfigError at last, and at
    at once if another program has the panel's port."""
    if "panel" not in running(settings):
        check_free(settings.panel_port, variable("panel_port"))
    if time.monotonic() < deadline:
        start_missing(settings)
        return
    logs = [settings.logs_dir / f"{name}.log" for name in NAMES]
    raise ConfigError(
        f"the panel is not ready after {START_S:.0f} s:\n" + "\n".join(_tail(path) for path in logs),
        f"read {logs[0]} and {logs[1]}; ./hitl up tries again, HITL_PANEL=false goes without it",
    )


def _tail(path: Path) -> str:
    lines = path.read_text(errors="replace").splitlines()
    return "\n".join(f"  {line}" for line in lines[-LAST_LINES:])
