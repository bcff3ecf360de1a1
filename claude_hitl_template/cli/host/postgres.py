"""A Postgres server of our own on this machine, in the data folder: for trying, and for tests."""

import os
import pwd
import secrets
import shutil
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from claude_hitl_template.cli.host.ports import free_ports
from claude_hitl_template.config.secret_files import (
    DATABASE_URL,
    POSTGRES_PASSWORD,
    read_database_url,
    write_secret,
)
from claude_hitl_template.config.settings import Settings
from claude_hitl_template.errors import ConfigError
from claude_hitl_template.store.database_status import DatabaseStatus, sqlite_status

USER = DATABASE = "hitl"
START_S = 60
# Where packages put them without putting them on PATH; the newest version first.
PLACES = ("/usr/lib/postgresql/*/bin", "/usr/pgsql-*/bin", "/opt/homebrew/opt/postgresql*/bin")
INSTALL = (
    "install it (apt install postgresql, brew install postgresql), or set DATABASE_URL to a server you have"
)


@dataclass(frozen=True)
class Account:
    """The user that the server runs as: Postgres refuses root. `uid` None: the current user."""

    uid: int | None = None
    gid: int | None = None


class LocalPostgres:
    """One server on loopback, its files in `folder`. Its password is in `password_file`, readable by us only."""

    def __init__(self, folder: Path, password_file: Path) -> None:
        self._folder, self._password_file = folder, password_file
        self._cluster = folder / "cluster"

    @property
    def made(self) -> bool:
        return (self._cluster / "PG_VERSION").exists()

    @property
    def log_path(self) -> Path:
        return self._folder / "server.log"

    def pid(self) -> int | None:
        """The server's process; None when it does not run."""
        server = self._server()
        return None if server is None else server.pid

    def _server(self) -> psutil.Process | None:
        try:
            process = psutil.Process(int((self._cluster / "postmaster.pid").read_text().split()[0]))
            # Its number may be another server's by now, which pg_ctl would end.
            runs = process.name() == "postgres" and _works_in(process, self._cluster)
        except (OSError, ValueError, IndexError, psutil.Error):
            return None
        return process if runs else None

    @property
    def url(self) -> str:
        """With the password in it. Raises ConfigError when the server does not run."""
        try:
            port = int((self._cluster / "postmaster.pid").read_text().splitlines()[3])
        except (OSError, ValueError, IndexError):
            raise ConfigError("the local Postgres does not run", "./hitl up --postgres") from None
        password = self._password_file.read_text().strip()
        return f"postgresql://{USER}:{password}@127.0.0.1:{port}/{DATABASE}"

    def start(self, options: Mapping[str, str] | None = None) -> bool:
        """Makes the server's files where there are none, and starts it; False when it ran. Raises ConfigError."""
        if self.pid() is not None:
            return False
        if not self.made:
            self._make()
        self._forget_dead()
        chosen = {
            "listen_addresses": "127.0.0.1",
            "port": str(free_ports(1)[0]),
            "unix_socket_directories": "",
            **(options or {}),
        }
        flags = " ".join(f"-c {name}={value or "''"}" for name, value in chosen.items())
        self._run(
            "pg_ctl", "start", "-D", self._cluster, "-w", "-t", START_S, "-l", self.log_path, "-o", flags
        )
        return True

    def stop(self, how: str = "fast") -> bool:
        """Ends the server and waits until its process has gone; False when it did not run. Raises ConfigError."""
        server = self._server()
        if server is None:
            return False
        self._run("pg_ctl", "stop", "-D", self._cluster, "-m", how, "-w", "-t", START_S)
        # pg_ctl waits for the file with the number only, and the server deletes that before it exits.
        until = time.monotonic() + START_S
        while _works_in(server, self._cluster):
            if time.monotonic() > until:
                raise ConfigError("the local Postgres does not end", f"read {self.log_path}")
            time.sleep(0.01)
        return True

    def _forget_dead(self) -> None:
        """A new server takes the number of a dead one for life if a zombie or, after a restart, another process has it."""
        if not any(_works_in(p, self._cluster) for p in psutil.process_iter()):
            (self._cluster / "postmaster.pid").unlink(missing_ok=True)

    def _make(self) -> None:
        account = server_account()
        self._folder.mkdir(parents=True, exist_ok=True)
        if account.uid is not None and account.gid is not None:
            os.chown(self._folder, account.uid, account.gid)
            _let_through(self._folder, account)
        self._folder.chmod(0o700)
        password = secrets.token_urlsafe(24)
        write_secret(self._password_file, password)
        handed = self._folder / "password"
        write_secret(handed, password)
        try:
            if account.uid is not None and account.gid is not None:
                os.chown(handed, account.uid, account.gid)
            self._run(
                "initdb", "-D", self._cluster, "-U", USER, "-E", "UTF8", "--locale=C", "-A", "scram-sha-256",
                f"--pwfile={handed}",
            )  # fmt: skip
        finally:
            handed.unlink(missing_ok=True)
        self._make_database()

    def _make_database(self) -> None:
        """Runs the server in single-user mode: no server accepts connections yet."""
        self._run(
            "postgres", "--single", "-D", self._cluster, "postgres", stdin=f"create database {DATABASE}\n"
        )

    def _run(self, program: str, *arguments: object, stdin: str = "") -> None:
        account = server_account()
        done = subprocess.run(  # noqa: S603
            [str(find_program(program)), *map(str, arguments)],
            input=stdin,
            stdout=subprocess.PIPE if program != "pg_ctl" else subprocess.DEVNULL,  # the server keeps it open
            stderr=subprocess.STDOUT if program != "pg_ctl" else subprocess.DEVNULL,
            text=True,
            cwd="/",
            user=account.uid,
            group=account.gid,
            extra_groups=[] if account.uid is not None else None,
            check=False,
        )
        if done.returncode != 0:
            raise ConfigError(
                f"{program} failed:\n{self._why(done.stdout)}", f"correct that, or read {self.log_path}"
            )

    def _why(self, output: str | None) -> str:
        try:
            lines = (output or self.log_path.read_text(errors="replace")).strip().splitlines()
        except OSError:
            lines = []
        return "\n".join(f"  {line}" for line in lines[-8:]) or "  it did not say why"


def local(settings: Settings) -> LocalPostgres:
    return LocalPostgres(settings.postgres_dir, settings.secrets_dir / POSTGRES_PASSWORD)


def start_missing(settings: Settings, *, make: bool) -> list[str]:
    """Starts the local server where `make` asks for it, or an earlier start made it. Returns what was done.

    Raises ConfigError.
    """
    server = local(settings)
    if settings.database_url is not None:
        if make:
            raise ConfigError("DATABASE_URL names a Postgres already", "unset it, or leave --postgres away")
        return []
    if not make and not server.made:
        return []
    started = server.start()
    write_secret(settings.secrets_dir / DATABASE_URL, server.url)
    return ["started Postgres"] if started else []


def check(settings: Settings, *, patience_s: float) -> None:
    """Brings the database's schema up to date, and waits for one that is unreachable. Raises ConfigError."""
    from claude_hitl_template.store import connect  # noqa: PLC0415  (slow to import)

    connect.check_replicas(settings)
    connect.prepare_schema(connect.store_url(settings), patience_s=patience_s)


def check_database(settings: Settings) -> DatabaseStatus:
    """Queries the database's location and health. Raises ConfigError for a URL that is not usable."""
    if read_database_url(settings) is None:
        return sqlite_status(settings.database_path)
    from claude_hitl_template.store import connect  # noqa: PLC0415  (slow to import)

    return connect.check_database(settings)


def find_program(name: str) -> Path:
    """Raises ConfigError when Postgres is not installed."""
    found = shutil.which(name)
    if found:
        return Path(found)
    for place in PLACES:
        fits = sorted(Path("/").glob(f"{place.lstrip('/')}/{name}"), key=_version, reverse=True)
        if fits:
            return fits[0]
    raise ConfigError(f"Postgres is not installed: there is no {name}", INSTALL)


def server_account() -> Account:
    """Raises ConfigError if this process is root and no other user can run the server."""
    if os.geteuid() != 0:
        return Account()
    for name in ("postgres", "nobody"):
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return Account(entry.pw_uid, entry.pw_gid)
    raise ConfigError("Postgres refuses to run as root, and there is no user postgres or nobody", INSTALL)


def _works_in(process: psutil.Process, folder: Path) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE and Path(process.cwd()).samefile(folder)
    except (psutil.Error, OSError):
        return False


def _version(path: Path) -> tuple[int, ...]:
    return tuple(int(part) for part in "".join(c if c.isdigit() else " " for c in str(path)).split())


def _let_through(folder: Path, account: Account) -> None:
    """The server's user must be able to traverse the parent folders. Ours get only that permission."""
    for place in folder.parents:
        mode = place.stat()
        if mode.st_mode & 0o001 or mode.st_uid == account.uid:
            continue
        if place == folder.parent and mode.st_uid == os.geteuid():
            place.chmod(mode.st_mode | 0o011)
            continue
        raise ConfigError(
            f"the server's user cannot reach {folder}: {place} is closed to it",
            "choose another data folder with HITL_DATA_DIR, run ./hitl as a user that is not root, or set DATABASE_URL",
        )
