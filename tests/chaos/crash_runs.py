"""One conversation in a process that may die at any fault point; the next process continues it from the store.

It does not use Ray: the process is client, supervisor, owner and model endpoint at once, over the real store and CLI.
"""

import asyncio
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from claude_hitl_template.claude.cli_engine import CliConfig, CliEngine, is_plan_folder
from claude_hitl_template.claude.sandbox import SandboxConfig
from claude_hitl_template.claude.transcripts import TranscriptStore
from claude_hitl_template.domain.events import UserMessage, UserToolConfirmation
from claude_hitl_template.domain.models import Agent, Environment, Session
from claude_hitl_template.domain.people import Actor
from claude_hitl_template.files.blob_store import FileArea
from claude_hitl_template.files.manifest import shown
from claude_hitl_template.model.endpoint import OfflineUpstream
from claude_hitl_template.model.offline import Scenarios
from claude_hitl_template.session.gate import Gate
from claude_hitl_template.session.runner import Limits, SessionRunner
from claude_hitl_template.store.core import CoreStore
from claude_hitl_template.store.owners import LEASE_S
from claude_hitl_template.store.postgres import PostgresBackend
from claude_hitl_template.store.sqlite import SqliteBackend
from claude_hitl_template.workspace.sync import WorkspaceLocation, put_files
from tests import faults
from tests.chaos.oracle import Acknowledged
from tests.chaos.plans import Plan, Planner
from tests.contract.reaching import every_write
from tests.serving import model_app, serving

KEY = "key_lives"
UPLOADED = "brief.txt"
LIFE_S = 120.0  # timeout of a life (the run of one process), which usually takes some seconds


@dataclass(frozen=True)
class Home:
    """The data that outlives a process: the database, and below `root` the workspace, journal and acknowledged requests."""

    url: str
    root: Path

    @property
    def journal(self) -> Path:
        """The journal, whose folder `make_journal` creates."""
        return self.root / "journal" / "runs.txt"

    def note(self, name: str, **what: Any) -> None:
        with (self.root / f"{name}.jsonl").open("a") as file:
            file.write(json.dumps(what, default=str) + "\n")

    def noted(self, name: str) -> list[Any]:
        path = self.root / f"{name}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def acknowledged(self) -> list[Acknowledged]:
        return [
            Acknowledged(
                datetime.fromisoformat(s["at"]), s["client"], s["session_id"], s["asked"], s["event"]
            )
            for s in self.noted("acknowledged")
        ]


def live(home: Home, number: int) -> None:
    """Runs conversation `number` to its end, unless a planned fault kills the process."""
    faults.install(home.root / "faults")
    asyncio.run(asyncio.wait_for(_live(home, Planner(0, home.journal).plan(number)), LIFE_S))


def write_all(home: Home, number: int) -> None:
    """Calls every write method of the Store, without a CLI."""
    faults.install(home.root / "faults")

    async def write() -> None:
        await asyncio.wait_for(every_write(backend_of(home), f"life {number}"), LIFE_S)

    asyncio.run(write())


def backend_of(home: Home) -> SqliteBackend | PostgresBackend:
    return SqliteBackend(home.url) if home.url.startswith("sqlite") else PostgresBackend(home.url)


async def _live(home: Home, plan: Plan) -> None:
    backend = backend_of(home)
    store = CoreStore(backend, files=FileArea((home.root / "files").as_uri()))
    message = {"type": "user.message", "content": [{"type": "text", "text": plan.prompt}]}
    async with serving(model_app(OfflineUpstream(Scenarios.load()))) as model_url:
        session = await store.create_session(
            KEY,
            agent=Agent(),
            environment=Environment(),
            title=None,
            metadata={"conversation": str(plan.number)},
            initial=[UserMessage.model_validate(message)],
            idempotency_key="create",
        )
        home.note("created", id=session.id)
        await _repeat(home, store)
        if plan.kind == "deny":  # else there would be nothing to save: no command runs
            await _upload(home, store, session.id)
        while await _go_on(home, plan, store, await store.get_session(session.id), model_url):
            pass
    await _note_saved(home, store, session.id)
    await backend.close()


async def _upload(home: Home, store: CoreStore, session_id: str) -> None:
    folder = home.root / "uploaded"
    if not folder.exists():  # the same file, of the same age, in each life
        folder.mkdir()
        (folder / UPLOADED).write_text("What to do.\n")
    await store.add_files(session_id, KEY, await put_files(store, folder), idempotency_key="upload")


async def _note_saved(home: Home, store: CoreStore, session_id: str) -> None:
    for file in (await store.list_workspace(session_id, KEY, limit=100)).data:
        content = b"".join(await store.get_blobs(file.chunks))
        home.note("saved", session_id=session_id, path=shown(file.path), text=content.decode())


async def _go_on(home: Home, plan: Plan, store: CoreStore, session: Session, model_url: str) -> bool:
    """Takes the next step of the client or the supervisor; returns False at the conversation's end."""
    if session.lease is not None:
        await store.drop_lease(session.id, session.lease.epoch)
    if session.status in ("running", "rescheduling"):
        await _drive(
            home, store, await store.acquire(session.id, f"life {os.getpid()}", lease_s=LEASE_S), model_url
        )
    elif (session.stop_reason or {}).get("type") == "requires_action":
        for call in (session.stop_reason or {})["event_ids"]:
            await _decide(home, plan, store, session, call)
    else:
        return session.lease is not None
    return True


async def _decide(home: Home, plan: Plan, store: CoreStore, session: Session, call: str) -> None:
    [[said]] = plan.decisions.values()
    asked = {"type": "user.tool_confirmation", "tool_use_id": call, **said}
    home.note("asked", session_id=session.id, asked=asked)
    await _send(home, store, session.id, asked)


async def _repeat(home: Home, store: CoreStore) -> None:
    """Sends requests that an earlier process got no answer to again, with the same idempotency key."""
    answered = [said.asked for said in home.acknowledged()]
    for request in home.noted("asked"):
        if request["asked"] not in answered:
            await _send(home, store, request["session_id"], request["asked"])


async def _send(home: Home, store: CoreStore, session_id: str, asked: Mapping[str, Any]) -> None:
    inbound = [UserToolConfirmation.model_validate(asked)]
    [event] = await store.send_events(
        session_id, KEY, inbound, by=Actor(name="ann"), idempotency_key=f"decide {asked['tool_use_id']}"
    )
    home.note(
        "acknowledged",
        at=datetime.now(UTC),
        client="ann",
        session_id=session_id,
        asked=asked,
        event=event.wire(),
    )


async def _drive(home: Home, store: CoreStore, session: Session, model_url: str) -> None:
    run_dir = home.root / "run" / f"{session.id}-{session.epoch}"
    run_dir.mkdir(parents=True)
    tempfile.tempdir = str(run_dir)
    cli = CliConfig(
        home.root / "workspace",
        run_dir / "config",
        model_url,
        "token",
        sandbox=SandboxConfig(writable=(home.journal.parent,)),
    )
    transcripts = TranscriptStore(store, session.id, epoch=session.epoch, any_folder=True)

    def make_engine(session: Session, gate: Gate) -> CliEngine:
        return CliEngine(session, gate, transcripts, cli)

    runner = SessionRunner(
        store,
        session,
        make_engine=make_engine,
        workspace=WorkspaceLocation(cli.workspace, home.root / "saved"),
        is_plan_folder=is_plan_folder(cli.config_dir),
        limits=Limits(hot_window_s=0.0, idle_timeout_s=0.0),
    )
    await runner.run()
