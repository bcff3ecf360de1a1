"""`hitl status`: what runs, where, and whether it is healthy."""

import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from claude_hitl_template import code_version
from claude_hitl_template.cli.client import Client
from claude_hitl_template.cli.commands.notifications import failing_channels
from claude_hitl_template.cli.common import print_json, table_width
from claude_hitl_template.cli.deploy.cluster import asks_for_token
from claude_hitl_template.cli.deploy.remote import OPEN, OPEN_FIX
from claude_hitl_template.cli.deploy.rollout import Profile
from claude_hitl_template.cli.host import panel, postgres, run_record, service
from claude_hitl_template.cli.host.processes import temp_dir
from claude_hitl_template.cli.program import launcher, named
from claude_hitl_template.cli.terminal.sessions import state
from claude_hitl_template.config.build_info import describe_origin
from claude_hitl_template.config.secret_files import (
    ADMIN,
    read_admin_password,
    read_api_key,
    read_panel_login,
    read_ray_token,
)
from claude_hitl_template.config.settings import Settings, variable
from claude_hitl_template.errors import HitlError
from claude_hitl_template.presentation.text import size, visible

VALUE_AT = 11  # the column at which the value of a line begins
STATES = ("running", "rescheduling", "waiting for room", "waiting hot", "waiting parked", "idle")


_NO_SANDBOX = {
    "off": "OFF (HITL_SANDBOX=off): an agent's commands have all permissions of the service",
    "none": "none on this system: an agent's commands have all your permissions; for experiments only",
}


def status(
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    show_secrets: Annotated[
        bool,
        typer.Option(
            "--show-secrets",
            help="Also shows the API key, the panel's login, the first user's password and Ray's token.",
        ),
    ] = False,
    profile: Profile = None,
) -> None:
    """Shows what runs, where, and whether it is healthy. Exit status: 0 healthy, 1 not."""
    settings = Settings.load(profile)
    facts = gather(settings)
    if show_secrets:
        facts["secrets"] = _secrets(settings)
    if as_json:
        print_json(facts)
    else:
        for line in describe(facts):
            typer.secho(_folded(line), fg="red" if line.startswith("sandbox") else None)
        if facts["ray"]["asks_for_token"] is False:
            typer.secho(f"WARNING    {OPEN}; {OPEN_FIX}", fg="red")
    raise typer.Exit(0 if facts["healthy"] else 1)


def _folded(line: str) -> str:
    """A line in as many as a terminal needs, the further ones below its value; whole where there is no terminal."""
    width = table_width()
    if width is None:
        return line
    return textwrap.fill(
        line, width, subsequent_indent=VALUE_AT * " ", break_long_words=False, break_on_hyphens=False
    )


def gather(settings: Settings) -> dict[str, Any]:
    """The state of this machine's service, as JSON. `problems` lists each problem with its fix."""
    head, app = service.ray_process(settings), service.healthy_at(settings.service_url, settings)
    elsewhere = head is None and bool(settings.serve_url or (app or {}).get("package"))
    there = {"url": settings.panel_at} if settings.panel and app and elsewhere else None
    with ThreadPoolExecutor() as asking:  # most of the command's time is waiting for answers
        ask = partial(_ask, asking, settings)
        asked_work, asked_channels = ask(_work, bool(app)), ask(failing_channels, bool(app))
        asked_panel = ask(panel.check_panel, settings.panel and bool(app) and not elsewhere)
        asked_token = ask(asks_for_token, bool(app))
        asked_drained = ask(service.drained_s, bool(head and app))
        database = postgres.check_database(settings)
        other = run_record.other_checkout(settings)
        work, panel_status = asked_work.result(), asked_panel.result()
    problems = find_problems(
        head=head is not None,
        app=app,
        code=code_version(),
        elsewhere=settings.service_url if elsewhere else None,
        checkout=str(other) if other else None,
        changed=service.changed_settings(settings) if head else [],
        refused=work if isinstance(work, str) else None,
        panel=f"{panel_status.problem}: {panel_status.fix}"
        if panel_status and panel_status.problem
        else None,
        database=database.problem,
        drained_s=asked_drained.result() or 0.0,
        channels=(asked_channels.result() or ()) if isinstance(work, dict) else (),
    )
    return {
        "healthy": not problems,
        "problems": problems,
        "ray": {
            "pid": head.pid if head else None,
            "running_s": round(time.time() - head.create_time()) if head else None,
            "ports": {variable(name): getattr(settings, name) for name in service.ports(settings)},
            "temp_dir": str(temp_dir(settings)),
            "elsewhere": settings.dashboard if elsewhere else None,
            "asks_for_token": asked_token.result(),
            "checkout": str(other) if other else None,
        },
        "panel": {"url": settings.panel_url, **asdict(panel_status)} if panel_status else there,
        "app": {"url": f"{settings.service_url}/v1", **(app or {})},
        "work": work if isinstance(work, dict) else None,
        "database": {"place": database.place, "pid": postgres.local(settings).pid()},
        "data": _data(settings),
    }


def _ask[T](
    pool: ThreadPoolExecutor, settings: Settings, question: Callable[[Settings], T], wanted: bool
) -> Future[T | None]:
    """The answer to the question once it is there; None if it is not wanted."""
    return pool.submit(lambda: question(settings) if wanted else None)


def find_problems(
    *,
    head: bool,
    app: dict[str, Any] | None,
    code: str,
    elsewhere: str | None = None,
    checkout: str | None = None,
    changed: list[str],
    refused: str | None,
    panel: str | None = None,
    database: str | None = None,
    drained_s: float = 0.0,
    channels: Sequence[str] = (),
) -> list[str]:
    """The problems, worst first; [] when there are none.

    `elsewhere`: the address of a service that another machine runs. `checkout`: another one that started what runs here.
    """
    if app is None and elsewhere:
        return [
            f"nothing answers at {elsewhere}; ./hitl doctor with --remote, or with the same --profile, says more"
        ]
    if app is None:
        return [
            "Ray runs, but the service does not answer; ./hitl up deploys it, ./hitl logs says why"
            if head
            else "nothing runs; start it with ./hitl up"
        ]
    problems: list[str] = []
    if not head and not elsewhere:
        problems.append("something answers on the port, but it was not started from this data folder")
    if app.get("code") != code and elsewhere:
        problems.append("the service runs another code than the working tree: ./hitl deploy")
    elif app.get("code") != code and not app.get("package") and checkout:
        problems.append(
            f"the service runs the code of another checkout: {launcher(Path(checkout))} down, then ./hitl up"
        )
    elif app.get("code") != code and not app.get("package"):
        problems.append("the service is older than the working tree: ./hitl up")
    if drained_s:
        problems.append(
            f"it is being stopped: it starts no session for {drained_s:.0f} s more; ./hitl up has it go on at once"
        )
    if changed and not checkout:
        problems.append(f"{', '.join(changed)} changed since the start: ./hitl up")
    if database is not None:
        problems.append(f"the database: {database}")
    problems += [f"notifications are not delivered over {one}; ./hitl notifications" for one in channels]
    return [*problems, *(problem for problem in (refused, panel) if problem)]


def count_states(sessions: Iterable[dict[str, Any]]) -> dict[str, int]:
    """How many sessions are in each state."""
    found = Counter(state(session) for session in sessions)
    return {name: found[name] for name in STATES}


def describe(facts: dict[str, Any]) -> list[str]:
    """The facts as lines for a human."""
    ray, app, work, data = facts["ray"], facts["app"], facts["work"], facts["data"]
    lines = [
        f"service    {'healthy' if facts['healthy'] else 'NOT HEALTHY'}",
        f"ray        {_ray(ray)}",
        f"rest       {app['url']}",
    ]
    if facts["panel"]:
        lines.append(_panel_line(facts["panel"]))
    if "model" in app:
        lines.append(
            f"model      {'offline (a script, no AI)' if app['model'] == 'offline' else app['model']}"
        )
        lines.append(
            f"versions   claude-hitl {app.get('version')}, code {app.get('code')}, Ray {app.get('ray')}"
        )
    if app.get("sandbox", "on") != "on":
        lines.append(f"sandbox    {_NO_SANDBOX[app['sandbox']]}")
    if "floor" in app:
        lines.append(f"floor      {app['floor']}")
    if origin := describe_origin(app):
        lines.append(f"deployed   {origin}")
    if work:
        counts = ", ".join(f"{count} {name}" for name, count in work["sessions"].items() if count) or "none"
        lines.append(f"sessions   {counts}")
        lines.append(f"approvals  {work['pending']} waiting for a decision")
    if not ray["elsewhere"]:
        lines.append(f"database   {_database(facts['database'], data['database_bytes'])}")
        lines.append(f"data       {data['folder']}: {size(data['bytes'])}")
    lines += [f"{name:<11} {value}" for name, value in facts.get("secrets", {}).items()]
    return [visible(named(line)) for line in [*lines, *(f"problem    {p}" for p in facts["problems"])]]


def _ray(ray: dict[str, Any]) -> str:
    if ray["elsewhere"]:
        return f"on another machine; dashboard {ray['elsewhere']}"
    ports = ", ".join(f"{name}={port}" for name, port in ray["ports"].items())
    runs = f"process {ray['pid']}, for {ray['running_s']} s" if ray["pid"] else "does not run"
    by = f", started by the checkout {ray['checkout']}" if ray.get("checkout") else ""
    return f"{runs}{by}; {ports}"


def _database(database: dict[str, Any], sqlite_bytes: int) -> str:
    own = f"; ours, process {database['pid']}" if database["pid"] else ""
    return f"{database['place']}{own}{f', {size(sqlite_bytes)}' if database['place'].startswith('SQLite') else ''}"


def _panel_line(panel: dict[str, Any]) -> str:
    if "panel" not in panel:  # on another machine, whose processes are not seen from here
        return f"panel      {panel['url']}"
    runs = ", ".join(
        f"{name} {f'process {panel[name]}' if panel[name] else 'does not run'}"
        for name in ("panel", "spooler")
    )
    return f"panel      {panel['url']}; {runs}; {panel['flows']} conversations open in it"


def _secrets(settings: Settings) -> dict[str, str]:
    """What a user needs to get in, by what it is for. Raises ConfigError when nothing was started yet."""
    login = read_panel_login(settings)
    entry = {"login": f"{panel.ADMIN}, password {login[1]}"} if settings.panel and login else {}
    password = read_admin_password(settings)
    first = {"sign-in": f"{ADMIN}, first password {password}"} if password else {}
    token = read_ray_token(settings)
    return {"API key": read_api_key(settings), **entry, **first, **({"Ray's token": token} if token else {})}


def _work(settings: Settings) -> dict[str, Any] | str:
    """Sessions by state and pending approvals; or why the service does not say."""
    try:
        with closing(Client.open(settings)) as client:
            pending = sum(1 for _ in client.pages("/v1/approvals", **{"states[]": "pending"}))
            return {"sessions": count_states(client.pages("/v1/sessions")), "pending": pending}
    except HitlError as error:
        return str(error)


def _data(settings: Settings) -> dict[str, Any]:
    database = settings.database_path
    parts = [database.with_name(database.name + suffix) for suffix in ("", "-wal", "-shm")]
    return {
        "folder": str(settings.data_dir),
        "bytes": folder_bytes(settings.data_dir),
        "database_bytes": sum(part.stat().st_size for part in parts if part.exists()),
    }


def folder_bytes(folder: Path) -> int:
    """Bytes in the files below a folder; links are not followed, and what vanishes meanwhile counts nothing."""
    total = 0
    for base, _, names in folder.walk():
        for name in names:
            try:
                total += (base / name).lstat().st_size
            except FileNotFoundError:
                continue
    return total
