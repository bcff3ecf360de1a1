"""Records which checkout started the cluster of a data folder, and which command uses the folder now.

`run.json` describes the cluster that was started last; a command holds the lock of `up.lock` while it runs. A record may
outlive its cluster (a crash, a restart of the machine), so it is valid only while the process it names is that head.
"""

import fcntl
import json
import os
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import psutil

from claude_hitl_template.cli.host.processes import temp_dir
from claude_hitl_template.cli.program import ROOT, launcher
from claude_hitl_template.config.secret_files import make_data_folder, write_secret
from claude_hitl_template.config.settings import Settings
from claude_hitl_template.errors import ConfigError

CHECKOUT = ROOT.resolve()
_PACKAGE = Path(__file__).resolve().parents[2].name

type Step = Callable[[str], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Run:
    """The cluster that was started last. `settings`: fingerprints by name. `checkout`, `data_dir` and `ray_dir` are
    absolute paths; "" in a record of a release that did not write them."""

    pid: int
    settings: dict[str, str]
    checkout: str = ""
    data_dir: str = ""
    ray_dir: str = ""


def write(settings: Settings, pid: int, fingerprints: dict[str, str]) -> None:
    run = Run(pid, fingerprints, str(CHECKOUT), str(settings.data_dir), str(temp_dir(settings)))
    write_secret(_run_file(settings), json.dumps(asdict(run)))


def read(settings: Settings) -> Run | None:
    """The last run, which may be over; None if nothing was started on this folder or the file is not a record.

    A record that came with a copy of another data folder is none; one of a folder that was moved is.
    """
    names = {field.name for field in fields(Run)}
    try:
        found: Any = json.loads(_run_file(settings).read_text())
        usable = isinstance(found["pid"], int) and isinstance(found["settings"], dict)
        run = Run(**{name: value for name, value in found.items() if name in names})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    if not usable:
        return None
    return None if _is_another(Path(run.data_dir), settings.data_dir) else run


def as_recorded(settings: Settings) -> Settings:
    """The settings with the folders that the last run was started with: they tell its processes from others'."""
    run = read(settings)
    if run is None or not run.ray_dir:
        return settings
    return settings.model_copy(update={"ray_temp_dir": Path(run.ray_dir), "data_dir": Path(run.data_dir)})


def forget(settings: Settings) -> None:
    _run_file(settings).unlink(missing_ok=True)


def head(settings: Settings) -> psutil.Process | None:
    """The Ray head that was started last on this data folder, if it is alive.

    Its command line tells it: a number is given to another process after a while, and the time at which a process began
    changes with the machine's clock.
    """
    run = read(settings)
    if run is None:
        return None
    try:
        process = psutil.Process(run.pid)
        line = process.cmdline()
        zombie = process.status() == psutil.STATUS_ZOMBIE
    except (psutil.Error, ValueError, OverflowError):
        return None
    folder = f"--temp-dir={run.ray_dir or temp_dir(settings)}"
    return process if "--head" in line and folder in line and not zombie else None


def other_checkout(settings: Settings) -> Path | None:
    """The checkout that started the cluster which runs now, unless it is this one, or is not there any more: one that was
    moved is this one."""
    run = read(settings)
    if run is None or not run.checkout or head(settings) is None:
        return None
    return _other(run.checkout)


def check_ours(settings: Settings) -> None:
    """Raises ConfigError where another checkout runs the cluster of this data folder, or is about to start or stop it."""
    run, other = read(settings), other_checkout(settings)
    if run is not None and other is not None:
        raise _in_use(settings, other, run.pid, "started the service that runs on it")
    holder = _holder(settings)
    if holder is not None and (other := _other(holder.checkout)) is not None:
        raise _in_use(settings, other, holder.pid, "is using it")


def check_idle(settings: Settings, consequence: str) -> None:
    """Raises ConfigError while the service runs. `consequence`: what was not done for that reason."""
    process, other = head(settings), other_checkout(settings)
    if process is not None:
        by = f", started by the checkout {other} (process {process.pid})" if other else ""
        raise ConfigError(
            f"the service runs{by}; {consequence}", f"{launcher(other) if other else './hitl'} down"
        )


@contextmanager
def alone(settings: Settings, step: Step | None = None) -> Generator[None]:
    """Only one command changes what runs on a data folder; makes the folder where there is none.

    With `step`, a command waits within it until the one before has ended; without, it is refused. Raises ConfigError
    then, and at once where the other command is of another checkout.
    """
    make_data_folder(settings)
    with open(os.open(_lock_file(settings), os.O_RDWR | os.O_CREAT, 0o600), "r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _wait(settings, file.fileno(), step)
        file.seek(0)
        file.truncate()
        json.dump({"pid": os.getpid(), "checkout": str(CHECKOUT)}, file)
        file.flush()
        yield


@dataclass(frozen=True)
class _Holder:
    pid: int
    checkout: str


def _wait(settings: Settings, lock: int, step: Step | None) -> None:
    check_ours(settings)
    holder = _holder(settings)
    who = f"process {holder.pid}" if holder else "another process"
    if step is None:
        raise ConfigError(
            f"another ./hitl ({who}) is using {settings.data_dir}; nothing was done",
            "wait until it has ended, then try again",
        )
    with step(f"Another ./hitl ({who}) is using {settings.data_dir}: waiting for it"):
        fcntl.flock(lock, fcntl.LOCK_EX)


def _holder(settings: Settings) -> _Holder | None:
    """The holder of the lock; None if it is free or the holder is unknown."""
    try:
        with _lock_file(settings).open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                record = json.load(file)
                return _Holder(int(record["pid"]), str(record["checkout"]))
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def _is_another(recorded: Path, folder: Path) -> bool:
    """Whether a recorded folder exists and is not `folder`."""
    if recorded == Path() or recorded == folder:
        return False
    try:
        return not recorded.samefile(folder)
    except OSError:
        return False


def _other(checkout: str) -> Path | None:
    place = Path(checkout)
    there = (place / _PACKAGE).is_dir()
    return place if there and place.resolve() != CHECKOUT else None


def _in_use(settings: Settings, other: Path, pid: int, what: str) -> ConfigError:
    return ConfigError(
        f"the data folder {settings.data_dir} is in use by another checkout: {other} (process {pid}) {what}; nothing was "
        "changed",
        f"{launcher(other)} down, then try again; or choose another data folder and other ports (HITL_DATA_DIR, "
        "HITL_RAY_PORT and so on)",
    )


def _run_file(settings: Settings) -> Path:
    return settings.data_dir / "run.json"


def _lock_file(settings: Settings) -> Path:
    return settings.data_dir / "up.lock"
