"""`hitl logs`: logs of the service and its sessions' processes in order of time, without secrets."""

import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from claude_hitl_template.cli.host.processes import temp_dir
from claude_hitl_template.config.settings import Settings
from claude_hitl_template.errors import ConfigError, InvalidInput
from claude_hitl_template.presentation.text import visible

POLL_S = 0.5
# What Ray writes into a worker's files for its own use, gRPC's remark at every fork, Serve's line for every store call.
_NOISE = re.compile(r"^(:job_id:|:actor_name:|:task_name:|[IW]\d{4} .*fork_posix|INFO .* CALL \w+ OK )")
_TIME = re.compile(r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d(?:[.,]\d+)?")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_SECRETS = re.compile(
    r"sk-ant-[\w-]+|hitl_[\w-]{20,}|(?i:(?<=bearer )|(?<=x-api-key: )|(?<=x-api-key=))[^\s\"',]+"
)
MASK = "[secret]"


@dataclass
class LogFile:
    """One file, read on from where the last reading ended; `stamp` is the time of its last line."""

    path: Path
    offset: int = 0
    stamp: str = ""
    name: str = field(init=False)

    def __post_init__(self) -> None:
        self.name = _owner(self.path)

    def read(self) -> Iterator[tuple[str, str]]:
        """(time, line) of each whole line that is new; a line without a time belongs to the one before it."""
        if self.path.stat().st_size < self.offset:  # the file was truncated or replaced
            self.offset = 0
        with self.path.open("rb") as file:
            file.seek(self.offset)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self.offset += len(whole)
        for raw in whole.decode(errors="replace").split("\n")[:-1]:
            line = _COLOUR.sub("", raw)
            if line and not _NOISE.match(line):
                found = _TIME.search(line)
                self.stamp = found[0].replace("T", " ").replace(",", ".") if found else self.stamp
                yield self.stamp, f"{self.name}  {line}"


def logs(
    session: Annotated[
        str | None,
        typer.Argument(
            metavar="[WHAT]",
            help="Only this log, by its name; or only lines that have this text, such as a session's id.",
        ),
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Follow new lines.")] = False,
    count: Annotated[int, typer.Option("--lines", "-n", min=0, help="Number of last lines.")] = 200,
) -> None:
    """Shows the service's log with secrets masked."""
    settings = Settings.load()
    hide = masker(settings)
    known: dict[Path, LogFile] = {}
    every = new_lines(settings, known)
    if not known:
        raise ConfigError("there are no logs: nothing was started yet", "./hitl up")
    before = _wanted(every, session)
    if session is not None and not before:
        _check_known(session, known.values(), follow=follow)
    for line in before[max(len(before) - count, 0) :]:
        typer.echo(hide(line))
    while follow:
        time.sleep(POLL_S)
        for line in _wanted(new_lines(settings, known), session):
            typer.echo(hide(line))


def new_lines(settings: Settings, known: dict[Path, LogFile]) -> list[str]:
    """What was written since `known` was read last, in order of time; files that are new are added to `known`."""
    for path in _paths(settings):
        known.setdefault(path, LogFile(path))
    found = [entry for log in known.values() if log.path.exists() for entry in log.read()]
    return [line for _, line in sorted(found, key=lambda entry: entry[0])]


def masker(settings: Settings) -> Callable[[str], str]:
    """Masks the service's secrets, and what looks like one; and makes the rest visible."""
    values: list[str] = []
    if settings.secrets_dir.is_dir():
        values = [p.read_text().strip() for p in settings.secrets_dir.iterdir() if p.is_file()]
    exact = re.compile("|".join(re.escape(v) for v in values if v) or r"(?!)")

    def hide(line: str) -> str:
        return visible(_SECRETS.sub(MASK, exact.sub(MASK, line)))

    return hide


def _wanted(lines: Iterable[str], text: str | None) -> list[str]:
    """A line begins with its log's name, so a text that is in it may be that, too."""
    return [line for line in lines if text is None or text in line]


def _check_known(text: str, logs: Iterable[LogFile], *, follow: bool) -> None:
    """Raises InvalidInput for what is in no line, unless it may come: the name of a log, or what is followed."""
    names = sorted({log.name for log in logs})
    if not follow and not any(name.startswith(text) for name in names):
        raise InvalidInput(
            f"no line has {text!r}, and no log has this name; the logs are: {', '.join(names)}"
        )


def _paths(settings: Settings) -> list[Path]:
    """Serve's own files repeat what its replicas wrote to standard error, so the workers' files are enough."""
    ray = temp_dir(settings) / "session_latest" / "logs"
    return [
        *sorted(settings.logs_dir.glob("*.log")),
        *sorted(ray.glob("worker-*.out")),
        *sorted(ray.glob("worker-*.err")),
    ]


def _owner(path: Path) -> str:
    """The writer of a log file: the actor that a worker's file names in its first lines, otherwise the file's name."""
    if not path.name.startswith("worker-"):
        return path.stem
    with path.open("rb") as file:
        head = file.read(2000).decode(errors="replace")
    named = re.search(r"^:actor_name:(.+)$", head, re.MULTILINE)
    actor = named[1].removeprefix("ServeReplica:") if named else "worker"
    return f"{actor}[{path.stem.rsplit('-', 1)[-1]}]"
