"""`hitl doctor`: checks everything the service needs and names the fix for each problem."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import httpx
import psutil
import typer

from claude_hitl_template import code_version
from claude_hitl_template.cli.commands.notifications import failing_channels
from claude_hitl_template.cli.common import report_checks
from claude_hitl_template.cli.deploy import remote
from claude_hitl_template.cli.deploy.cluster import asks_for_token
from claude_hitl_template.cli.deploy.rollout import Profile
from claude_hitl_template.cli.host import panel, ports, postgres, run_record, service
from claude_hitl_template.cli.host.processes import is_ours, private_dir, temp_dir
from claude_hitl_template.cli.program import launcher
from claude_hitl_template.cluster import containers
from claude_hitl_template.config import network
from claude_hitl_template.config.settings import Settings, variable
from claude_hitl_template.errors import ConfigError
from claude_hitl_template.presentation.checks import Check
from claude_hitl_template.presentation.text import size

LEAST_PYTHON = (3, 12)
LEAST_DISK_BYTES = 1024**3
FULL_DISK_BYTES = 16 * 1024**2
LEAST_MEMORY_BYTES = 2 * 1024**3
RAY_MEMORY_SHARE = 0.7  # Ray keeps 30 % of what is available at its start for its object store
SOCKET_PATH_BYTES = 107
# As Ray names its longest socket below its folder.
LONGEST_SOCKET = "session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
VERSION_TIMEOUT_S = 20.0
UPSTREAM_TIMEOUT_S = 5.0


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    away: Annotated[
        bool,
        typer.Option(
            "--remote", help="Checks the cluster that .env names from this machine; so does --profile."
        ),
    ] = False,
    profile: Profile = None,
) -> None:
    """Checks everything the service needs and names the fix for each problem. Exit status 1 if there is one."""
    settings = Settings.load(profile)
    found = remote.examine(settings) if away or profile else examine(settings)
    report_checks(list(found), as_json=as_json)


def examine(settings: Settings) -> Iterator[Check]:
    """Every check, in the order in which problems are best fixed."""
    from claude_hitl_template.claude.sandbox import sandbox_check  # noqa: PLC0415  (slow to import)

    yield python_check(sys.version_info[:2])
    yield environment_check(Path(sys.prefix))
    yield cli_check(settings.cli_path)
    yield from _ray_checks(settings)
    yield address_check(settings.host)
    for name in service.ports(settings):
        yield port_check(settings, name)
    yield folder_check(settings.data_dir)
    yield checkout_check(run_record.other_checkout(settings))
    yield database_check(settings)
    yield disk_check(shutil.disk_usage(_nearest(settings.data_dir)).free)
    yield files_check(settings.files_at)
    yield memory_check(psutil.virtual_memory().available)
    yield capacity_check(settings, os.cpu_count() or 1, psutil.virtual_memory().total)
    yield secrets_check(settings.secrets_dir)
    yield key_check(_model_key(settings))
    if settings.anthropic_api_key is not None:
        yield upstream_check(settings.anthropic_base_url, settings.anthropic_api_key.get_secret_value())
    yield service_check(service.healthy(settings), service.ray_process(settings) is not None, code_version())
    if settings.panel and service.healthy(settings):
        yield panel_check(panel.check_panel(settings))
    if service.healthy(settings):
        yield channels_check(failing_channels(settings))
    yield sandbox_check(settings.sandbox)
    yield floor_check(settings)
    if sys.platform == "linux":
        yield setpriv_check(shutil.which("setpriv"))
    for image in settings.images:
        yield from containers.examine(image)


def floor_check(settings: Settings) -> Check:
    try:
        return Check("floor", "ok", settings.floor().described())
    except ConfigError as error:
        return Check("floor", "wrong", error.message, error.fix)


def python_check(found: tuple[int, ...]) -> Check:
    shown = ".".join(map(str, found))
    if found >= LEAST_PYTHON:
        return Check("Python", "ok", shown)
    return Check(
        "Python", "wrong", f"{shown} is too old", "install Python 3.12 or newer, delete .venv, run ./hitl up"
    )


def environment_check(prefix: Path) -> Check:
    """The commands in .venv name the folder that it was made in: in one that was moved or copied, none of them works."""
    place = _script_folder(prefix / "bin" / "ray")
    if place is None or _same(place, prefix / "bin"):
        return Check(".venv", "ok", str(prefix))
    found = f"its commands run the Python of {place}: it was made there, and moved or copied here"
    return Check(".venv", "wrong", found, f"./hitl up recreates it, or delete {prefix} first")


def checkout_check(other: Path | None) -> Check:
    if other is None:
        return Check("checkout", "ok", str(run_record.CHECKOUT))
    found = f"another one, {other}, started what runs on this data folder"
    return Check(
        "checkout", "warning", found, f"{launcher(other)} down, or choose another folder with HITL_DATA_DIR"
    )


def cli_check(chosen: Path | None) -> Check:
    """The Claude Code CLI answers, and is not older than the one that this project was tested with."""
    from claude_hitl_template.claude.cli_engine import PINNED_CLI, bundled_cli  # noqa: PLC0415  (slow to import)

    path = chosen or bundled_cli()
    fix = "correct HITL_CLI_PATH, or unset it" if chosen else "delete .venv and run ./hitl up"
    try:
        result = subprocess.run(  # noqa: S603
            [path, "--version"], capture_output=True, text=True, timeout=VERSION_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        return Check("Claude Code CLI", "wrong", f"{path} does not run: {error}", fix)
    return cli_version_check(result.stdout, PINNED_CLI, fix)


def cli_version_check(output: str, least: str, fix: str) -> Check:
    first = output.partition(" ")[0].strip()
    if _numbers(first) < _numbers(least):
        return Check("Claude Code CLI", "wrong", f"version {first or 'unknown'} is older than {least}", fix)
    return Check("Claude Code CLI", "ok", first)


def ray_version_check(installed: str, running: str | None) -> Check:
    if running in (None, installed):
        return Check("Ray", "ok", installed + (" (not running)" if running is None else ""))
    return Check("Ray", "wrong", f"{running} runs, {installed} is installed", "./hitl down, then ./hitl up")


def socket_check(folder: Path) -> Check:
    longest = len(os.fsencode(folder / LONGEST_SOCKET))
    if longest <= SOCKET_PATH_BYTES:
        return Check("Ray's folder", "ok", str(folder))
    found = f"{folder} makes socket paths of {longest} bytes, {SOCKET_PATH_BYTES} are possible"
    return Check("Ray's folder", "wrong", found, "choose a shorter folder with HITL_RAY_TEMP_DIR")


def ray_folder_check(folder: Path, uid: int) -> Check:
    """Ray's folder belongs to the user that created it, and is closed to others: they could change what Ray runs."""
    name = "Ray's folder's owner"
    if not folder.exists():
        return Check(name, "ok", "not made yet")
    owner, mode = folder.stat().st_uid, folder.stat().st_mode
    if owner == uid and mode & 0o077:
        return Check(name, "wrong", f"{folder} is open to other users", f"chmod 700 {folder}")
    if owner == uid:
        return Check(name, "ok", f"you ({uid})")
    return Check(
        name,
        "wrong",
        f"{folder} belongs to user {owner}, and you are {uid}",
        f"end that user's Ray and remove {folder}, or choose another folder with HITL_RAY_TEMP_DIR",
    )


def address_check(host: str) -> Check:
    try:
        ports.check_address(host, variable("host"))
    except ConfigError as error:
        return Check("address", "wrong", error.message, error.fix)
    return Check("address", "ok", f"{host}, where the ports listen")


def port_check(settings: Settings, name: str) -> Check:
    """Ok if the port is free or ours. A free port while Ray runs is wrong: connections would be refused."""
    port, label = getattr(settings, name), f"port {getattr(settings, name)} ({variable(name)})"
    if ports.is_free(port):
        if service.ray_process(settings) is None:
            return Check(label, "ok", "free")
        fix = "./hitl up; if that does not help, ./hitl down before it"
        return Check(label, "wrong", "connections are refused: Ray runs, but nothing listens here", fix)
    holder = ports.holder_of(port)
    if holder is not None and _belongs(settings, holder):
        return Check(label, "ok", f"ours (process {holder.pid})")
    return Check(label, "wrong", *ports.taken(port, variable(name)))


def folder_check(folder: Path) -> Check:
    fix = "choose another folder with HITL_DATA_DIR, or correct its permissions"
    place = _nearest(folder)
    try:
        with tempfile.TemporaryFile(dir=place):
            return Check("data folder", "ok", f"{folder}{'' if place == folder else ' (not made yet)'}")
    except OSError as error:
        return Check("data folder", "wrong", f"{folder} cannot be written: {error.strerror}", fix)


def database_check(settings: Settings) -> Check:
    server = postgres.local(settings)
    if settings.database_url is None and server.made and server.pid() is None:
        return Check("database", "warning", "Postgres of our own, which does not run", "./hitl up")
    try:
        found = postgres.check_database(settings)
    except ConfigError as error:
        return Check("database", "wrong", error.message, error.fix)
    if found.problem is None:
        return Check("database", "ok", found.place)
    fix = "start the database, or correct DATABASE_URL"
    return Check("database", "wrong", f"{found.place}: {found.problem}", fix)


def disk_check(free_bytes: int) -> Check:
    if free_bytes >= LEAST_DISK_BYTES:
        return Check("disk", "ok", f"{size(free_bytes)} free")
    level = "warning" if free_bytes >= FULL_DISK_BYTES else "wrong"
    return Check("disk", level, f"only {size(free_bytes)} free", "make room, or move HITL_DATA_DIR")


def files_check(url: str) -> Check:
    """Whether a driver for the file area exists. The file area itself is not contacted."""
    from claude_hitl_template.files.blob_store import FileArea  # noqa: PLC0415  (slow to import)

    try:
        FileArea(url)
    except ConfigError as error:
        return Check("file area", "wrong", error.message, error.fix)
    return Check("file area", "ok", url)


def memory_check(free_bytes: int) -> Check:
    if free_bytes >= LEAST_MEMORY_BYTES:
        return Check("memory", "ok", f"{size(free_bytes)} free")
    return Check(
        "memory", "warning", f"only {size(free_bytes)} free", "end other programs; a session needs 0.4 GiB"
    )


def capacity_check(settings: Settings, cpus: int, memory_bytes: int) -> Check:
    """How many sessions can be awake at once: what Ray reserves for each, of what Ray has on a machine with nothing else."""
    by_cpu = int((settings.ray_num_cpus or cpus) / settings.session_cpus)
    by_memory = int(memory_bytes * RAY_MEMORY_SHARE / settings.session_memory_bytes)
    found = (
        f"about {min(by_cpu, by_memory)} sessions awake at once (by CPU {by_cpu}, by memory {by_memory}); parked ones take "
        "neither"
    )
    if min(by_cpu, by_memory):
        return Check("capacity", "ok", found)
    fix = "lower HITL_SESSION_CPUS or HITL_SESSION_MEMORY_BYTES: what Ray reserves for each"
    return Check("capacity", "wrong", found, fix)


def secrets_check(folder: Path) -> Check:
    """Secrets are readable by their owner only."""
    if not folder.is_dir():
        return Check("secrets", "ok", "none yet")
    loose = [path.name for path in sorted(folder.iterdir()) if path.is_file() and path.stat().st_mode & 0o077]
    if loose:
        return Check("secrets", "wrong", f"others may read {', '.join(loose)}", f"chmod 600 {folder}/*")
    return Check("secrets", "ok", f"{folder}, readable by you only")


def key_check(key: str | None) -> Check:
    """Checks the format of the model key without showing it."""
    if key is None:
        return Check("model key", "ok", "none: the offline model answers (a script, no AI)")
    odd = [what for what, there in _oddities(key) if there]
    if odd:
        return Check(
            "model key", "wrong", f"ANTHROPIC_API_KEY holds {' and '.join(odd)}", "set it to the bare key"
        )
    return Check("model key", "ok", "set")


def upstream_check(url: str, key: str) -> Check:
    """The model's service answers and accepts the key; listing models is free of charge."""
    try:
        headers = {"x-api-key": key, "anthropic-version": "2023-06-01"}
        with network.outward(timeout=UPSTREAM_TIMEOUT_S) as client:
            answer = client.get(f"{url.rstrip('/')}/v1/models", headers=headers)
    except UnicodeEncodeError:
        return Check(
            "model", "warning", "not asked: no request can carry such a key", "correct the key first"
        )
    except ConfigError as error:
        return Check("model", "wrong", error.message, error.fix)
    except (httpx.HTTPError, httpx.InvalidURL, *network.UNREACHABLE) as error:
        why = str(error) or type(error).__name__
        fix = "check the network and its proxy, or ANTHROPIC_BASE_URL"
        return Check("model", "wrong", f"{url} cannot be reached: {why}", fix)
    if answer.status_code in (401, 403):
        fix = "set ANTHROPIC_API_KEY to a key of this service that is not revoked, then ./hitl up"
        return Check("model", "wrong", f"{url} refuses the key ({answer.status_code})", fix)
    return Check("model", "ok", f"{url} answers ({answer.status_code})")


def service_check(app: dict[str, str] | None, head: bool, code: str) -> Check:
    if app is None:
        found = "Ray runs, but the service does not answer" if head else "does not run"
        return Check("service", "wrong" if head else "warning", found, "./hitl up")
    if app.get("code") != code:
        return Check("service", "warning", "healthy, but older than the working tree", "./hitl up")
    return Check("service", "ok", f"healthy, code {code}")


def setpriv_check(path: str | None) -> Check:
    if path:
        return Check("setpriv", "ok", path)
    return Check(
        "setpriv", "wrong", "missing: a killed session could leave its CLI behind", "apt install util-linux"
    )


def panel_check(found: panel.PanelStatus) -> Check:
    if found.problem is None:
        return Check("panel", "ok", f"lists our entries; {found.flows} conversations open in it")
    return Check("panel", "wrong", found.problem, found.fix)


def channels_check(failing: Sequence[str]) -> Check:
    """Whether notifications arrive."""
    if not failing:
        return Check("notifications", "ok", "no channel fails")
    fix = "correct the channel or its target, or switch it off; ./hitl notifications shows each failure"
    return Check("notifications", "warning", "; ".join(failing), fix)


def _ray_checks(settings: Settings) -> Iterator[Check]:
    app = service.healthy(settings)
    yield ray_version_check(version("ray"), app.get("ray") if app else None)
    yield from remote.token_checks(asks_for_token(settings))
    yield socket_check(temp_dir(settings))
    yield ray_folder_check(private_dir(settings), os.getuid())


def _belongs(settings: Settings, process: psutil.Process) -> bool:
    head = service.ray_process(settings)
    try:
        under_head = head is not None and (process == head or head in process.parents())
    except psutil.Error:
        under_head = False
    return under_head or is_ours(settings, process)


def _model_key(settings: Settings) -> str | None:
    return settings.anthropic_api_key.get_secret_value() if settings.anthropic_api_key else None


def _oddities(key: str) -> Iterator[tuple[str, bool]]:
    yield "white space", any(char.isspace() for char in key)
    yield "quotes", any(char in "'\"`" for char in key)
    yield "characters that are not ASCII", not key.isascii()


def _script_folder(script: Path) -> Path | None:
    """The folder of the Python that a script names, in its first line, or its second where the path has spaces."""
    try:
        head = script.read_bytes()[:4096].decode(errors="replace").splitlines()[:2]
    except OSError:
        return None
    found = re.match(r"#!(/.*)/python[0-9.]*$", head[0] if head else "")
    second = head[1] if len(head) > 1 else ""
    found = found or re.match(r"""'''exec' "?(/[^"]*?)/python[0-9.]*"? """, second)
    return Path(found[1]) if found else None


def _same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False


def _nearest(folder: Path) -> Path:
    """The folder, or the nearest one above that exists."""
    return next((place for place in (folder, *folder.parents) if place.exists()), Path("/"))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdecimal())
