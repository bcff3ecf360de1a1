"""`hitl vm`: a Linux machine for the cluster on a Mac, by OrbStack's `orb`. Elsewhere it prints the same steps, by ssh.

The machine is isolated from the Mac's files and network: agents run commands in it.
"""

import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import click
import typer

from claude_hitl_template.cli.program import ROOT, need_checkout
from claude_hitl_template.config.secret_files import API_KEY, RAY_TOKEN, write_secret
from claude_hitl_template.config.settings import Settings
from claude_hitl_template.errors import ConfigError

app = typer.Typer(help="The Linux machine that the cluster runs on, on a Mac.", no_args_is_help=True)
NAME, DISTRO, USER, FOLDER = "claude-hitl", "ubuntu:noble", "ray", "/home/ray/claude-hitl"
BOOTSTRAP = Path("claude_hitl_template/bin/bootstrap-host")
PROFILE = "vm"
BY_HAND = ("ssh", "HOST")
_ARCHIVE = ("git", "archive", "HEAD")


@dataclass(frozen=True)
class Step:
    """A command; `given`: the file or the command whose content it reads."""

    command: tuple[str, ...]
    given: Path | tuple[str, ...] | None = None

    def __str__(self) -> str:
        line = shlex.join(self.command)
        if isinstance(self.given, Path):
            return f"{line} < {shlex.quote(str(self.given))}"
        return f"{shlex.join(self.given)} | {line}" if self.given else line


@app.command()
def create() -> None:
    """Makes the machine, installs what it needs, brings the last commit there, and starts the service."""
    need_checkout("vm create")
    if _orb() and not _is_there():
        _run([Step(("orb", "create", "--isolated", DISTRO, NAME))])
    _do([*set_up_steps(_on_host()), *up_steps(_on_host())])
    _make_profile()
    _show_panel()


@app.command()
def start() -> None:
    """Starts the machine, Ray, the service and the panel, and says where the panel is."""
    _do([*_orb_steps("start"), *up_steps(_on_host())])
    _show_panel()


@app.command()
def stop() -> None:
    """Ends the service and the machine; nothing that was committed is lost."""
    _do([_as_user(_on_host(), f"{FOLDER}/hitl", "down"), *_orb_steps("stop")])


@app.command()
def status() -> None:
    """What the machine is, and what runs in it. Exit status: 0 healthy, 1 not."""
    _do([*_orb_steps("info"), _as_user(_on_host(), f"{FOLDER}/hitl", "status")])


@app.command()
def delete(yes: Annotated[bool, typer.Option("--yes", help="Without asking.")] = False) -> None:
    """Deletes the machine, with all sessions, approvals, files and keys in it."""
    if not _orb():
        _print([_as_user(BY_HAND, f"{FOLDER}/hitl", "down"), _as_user(BY_HAND, "rm", "-r", FOLDER)])
    if yes or (sys.stdin.isatty() and click.confirm(f"delete the machine {NAME} and all that is in it?")):
        _run([Step(("orb", "delete", "-f", NAME))])
    else:
        typer.echo("kept (--yes deletes it)")


def set_up_steps(host: Sequence[str]) -> list[Step]:
    """The steps from an empty Debian or Ubuntu to a checkout of ours; `host` begins a command line for it."""
    return [
        Step((*host, *_becoming(host, "root"), "bash", "-s"), BOOTSTRAP),
        _as_user(host, "mkdir", "-p", FOLDER),
        Step((*host, *_becoming(host, USER), "tar", "-xf", "-", "-C", FOLDER), _ARCHIVE),
    ]


def up_steps(host: Sequence[str]) -> list[Step]:
    return [_as_user(host, f"{FOLDER}/hitl", "up")]


def _as_user(host: Sequence[str], *command: str) -> Step:
    return Step((*host, *_becoming(host, USER), *command))


def _becoming(host: Sequence[str], user: str) -> tuple[str, ...]:
    return ("-u", user) if host[0] == "orb" else ("sudo", "-iu", user)


def _on_host() -> tuple[str, ...]:
    return ("orb", "-m", NAME) if _orb() else BY_HAND


def _orb() -> bool:
    return shutil.which("orb") is not None


def _orb_steps(verb: str) -> list[Step]:
    return [Step(("orb", verb, NAME))] if _orb() else []


def _is_there() -> bool:
    return subprocess.run(["orb", "info", NAME], capture_output=True, check=False).returncode == 0  # noqa: S603, S607


def _do(steps: Sequence[Step]) -> None:
    if _orb():
        _run(steps)
    else:
        _print(steps)


def _print(steps: Iterable[Step]) -> None:
    """Prints the steps for a host elsewhere, and ends the command with status 1, because nothing was done."""
    typer.echo(
        "OrbStack's orb is not on this machine, and nothing was done. On a Debian or Ubuntu HOST, by ssh:"
    )
    typer.echo("\n".join(f"    {step}" for step in steps))
    typer.echo("On the host itself: ./hitl bootstrap-host as root, then ./hitl up as the user ray.")
    raise typer.Exit(1)


def _run(steps: Iterable[Step]) -> None:
    """Raises ConfigError at the first that fails."""
    for step in steps:
        typer.echo(f"$ {step}")
        done = subprocess.run(step.command, input=_content(step), cwd=ROOT, check=False)  # noqa: S603
        if done.returncode != 0:
            raise ConfigError(
                f"`{step}` failed ({done.returncode})", "correct what it says above, and run this again"
            )


def _content(step: Step) -> bytes | None:
    if isinstance(step.given, Path):
        return (ROOT / step.given).read_bytes()
    if step.given is None:
        return b""  # what we are given is not the machine's
    made = subprocess.run(step.given, cwd=ROOT, capture_output=True, check=False)  # noqa: S603
    if made.returncode != 0:
        raise ConfigError(
            f"`{shlex.join(step.given)}` failed: {made.stderr.decode(errors='replace').strip()}",
            "run this in a git checkout of the project",
        )
    return made.stdout


def _make_profile() -> None:
    """profiles/vm.env with the key that the service made, unless there is one."""
    home = Settings.load().home
    path = home / "profiles" / f"{PROFILE}.env"
    if path.exists():
        return
    keys = {"HITL_API_KEY": _secret_on_host(API_KEY), "HITL_RAY_TOKEN": _secret_on_host(RAY_TOKEN)}
    path.parent.mkdir(exist_ok=True)
    example = (ROOT / "profiles" / f"{PROFILE}.env.example").read_text()
    write_secret(path, example + "".join(f"{name}={value}\n" for name, value in keys.items()))
    typer.echo(f"made {path}: ./hitl deploy --profile {PROFILE}, ./hitl doctor --profile {PROFILE}")


def _secret_on_host(name: str) -> str:
    command = _as_user(_on_host(), "cat", f"{FOLDER}/.hitl/secrets/{name}").command
    completed = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if completed.returncode != 0:
        raise ConfigError(f"the machine's {name} cannot be read", "./hitl vm status says how it is")
    return completed.stdout.strip()


def _show_panel() -> None:
    typer.echo(f"Panel      {Settings.load(PROFILE).panel_at}")
