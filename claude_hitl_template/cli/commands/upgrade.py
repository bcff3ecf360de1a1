"""`hitl upgrade`: compares the code with the data folder and the running service, and brings them to this version."""

import re
from dataclasses import asdict, dataclass
from typing import Annotated

import typer

from claude_hitl_template import __version__, code_version
from claude_hitl_template.cli.commands.backup import open_database
from claude_hitl_template.cli.common import print_json
from claude_hitl_template.cli.host import run_record, service
from claude_hitl_template.cli.program import IN_CHECKOUT, NAME, ROOT
from claude_hitl_template.cli.terminal import chat
from claude_hitl_template.config.settings import Settings
from claude_hitl_template.store.backup import schema
from claude_hitl_template.store.connect import migrations

NOTES = (ROOT if IN_CHECKOUT else ROOT / "claude_hitl_template") / "CHANGELOG.md"
UNRELEASED = "Unreleased"


@dataclass(frozen=True)
class Comparison:
    """This code next to what is there. `service`: version and code of the one that runs, None if none does.

    `schema`: the newest migration of the database, None if it has no tables. `pending`: what the migrations do that the
    next start applies. `notes`: the lines of the changelog about versions that the service does not have yet.
    """

    version: str
    code: str
    service: tuple[str, str] | None
    schema: str | None
    schema_is_newer: bool
    pending: list[str]
    notes: list[str]

    @property
    def differs(self) -> bool:
        running = self.service is not None and self.service != (self.version, self.code)
        return running or self.schema_is_newer or (self.schema is not None and bool(self.pending))


def upgrade(
    check: Annotated[
        bool, typer.Option("--check", help="Only compares. Exit status: 0 nothing to do, 1 otherwise.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The comparison as JSON, with --check.")] = False,
) -> None:
    """Compares this version with the data folder and the service; without --check, then does what `up` does.

    Uses nothing but this machine: get the new version first, by git or pip.
    """
    if as_json and not check:
        raise typer.BadParameter("goes with --check", param_hint="--json")
    settings = Settings.load()
    run_record.check_ours(settings)
    found = compare(settings)
    if as_json:
        print_json(asdict(found))
    else:
        typer.echo("\n".join([*describe(found), *(["", *found.notes] if check and found.differs else [])]))
    if check or not found.differs:
        raise typer.Exit(1 if found.differs else 0)
    chat.ensure_up(settings)


def compare(settings: Settings) -> Comparison:
    """Raises ConfigError, StoreUnreachable for a database that cannot be read."""
    running = service.healthy(settings) if service.ray_process(settings) else None
    known = migrations()
    there = None
    if settings.data_dir.exists() and (settings.database_url or _has_database(settings)):
        with open_database(settings) as url:
            there = schema(url)
    return Comparison(
        version=__version__,
        code=code_version(),
        service=(str(running.get("version")), str(running.get("code"))) if running else None,
        schema=there,
        schema_is_newer=there is not None and there > max(known),
        pending=[what for revision, what in known.items() if there is None or revision > there],
        notes=notes(NOTES.read_text(), str(running.get("version")) if running else None),
    )


def describe(found: Comparison) -> list[str]:
    """The comparison as lines for a human."""
    lines = [f"this code   {found.version}, code {found.code}"]
    if found.service is None:
        lines.append("service     does not run")
    else:
        same = (
            "the same"
            if found.service == (found.version, found.code)
            else f"another one; {NAME} up replaces it"
        )
        lines.append(f"service     {found.service[0]}, code {found.service[1]}: {same}")
    if found.schema is None:
        lines.append("database    empty; the first start makes its tables")
    elif found.schema_is_newer:
        lines.append(f"database    migration {found.schema}, of a newer version, which this code can use")
    else:
        lines.append(f"database    migration {found.schema}: {_pending(found.pending)}")
        lines += [f"            {what}" for what in found.pending]
    return lines


def notes(changelog: str, since: str | None) -> list[str]:
    """The lines of the changelog for versions after `since`; for an unknown one, only what is not released yet."""
    lines: list[str] = []
    for section in re.split(r"^(?=## )", changelog, flags=re.MULTILINE)[1:]:
        version = section.splitlines()[0].removeprefix("## ").split()[0]
        if version != UNRELEASED and (since is None or _numbers(version) <= _numbers(since)):
            break
        lines += section.strip().splitlines()
    return lines


def _pending(pending: list[str]) -> str:
    return f"the next start applies {len(pending)} more" if pending else "up to date"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))


def _has_database(settings: Settings) -> bool:
    return settings.database_path.exists() or settings.postgres_dir.exists()
