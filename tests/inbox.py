"""An inbox over a store in memory: sessions that wait, the people who look at it, and a client for its pages."""

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import cache
from typing import Any

import httpx
from fastapi import FastAPI
from starlette.types import ASGIApp, Message

from claude_hitl_template.api.followers import Followers
from claude_hitl_template.config.secret_files import SigningKey
from claude_hitl_template.domain import events
from claude_hitl_template.domain.canonical_json import call_digest
from claude_hitl_template.domain.events import UserMessage
from claude_hitl_template.domain.models import Agent, Approval, Environment, Session, new_id, utcnow
from claude_hitl_template.domain.people import SERVICE, Role, Workspace
from claude_hitl_template.domain.policy.command_segments import JudgedSegment
from claude_hitl_template.files.manifest import Manifest, SavedFile, SavedLink, blob_name
from claude_hitl_template.inbox.app import build_inbox_app
from claude_hitl_template.inbox.live import Live
from claude_hitl_template.inbox.services import Pages
from claude_hitl_template.notify.addresses import Targets
from claude_hitl_template.notify.push_keys import PushKey
from claude_hitl_template.notify.slack_presses import SlackApp
from claude_hitl_template.store.core import CoreStore
from claude_hitl_template.store.protocol import Call
from claude_hitl_template.testing.memory_backend import MemoryBackend
from claude_hitl_template.testing.signed_in import COOKIE, CSRF, SignedIn

ROOT = "/claude-hitl"
FOLDER = "/w"
OWNER = 1  # the epoch of each session's owner


def message(text: str) -> UserMessage:
    return UserMessage.model_validate({"type": "user.message", "content": [{"type": "text", "text": text}]})


@cache
def _slack() -> SlackApp:
    return SlackApp.of(SigningKey(b"k" * 32), Targets(), f"https://hitl.example{ROOT}")


@dataclass
class Desk:
    """A store with two workspaces, and who may look at them. `ann` approves and requests in the first, `bob` in the second;
    `vic` may only look at the first."""

    store: CoreStore
    signed_in: SignedIn
    workspaces: tuple[str, str]
    sessions: dict[str, Session] = field(default_factory=dict[str, Session])
    slack: SlackApp = field(default_factory=_slack)

    async def session(self, title: str = "A title", *, workspace: int = 0, said: str = "I do it.") -> Session:
        """A session with an owner, in which the agent has said something."""
        session = await self.store.create_session(
            self.workspaces[workspace],
            agent=Agent(),
            environment=Environment(),
            title=title,
            metadata={},
            initial=[message("go")],
        )
        await self.store.acquire(session.id, "owner", lease_s=600)
        await self.store.commit(session.id, OWNER, [events.agent_message(new_id("sevt"), said)])
        return session

    async def ask(
        self,
        tool: str = "Bash",
        given: Mapping[str, Any] | None = None,
        *,
        session: Session | None = None,
        targets: Sequence[str] = (),
        expires_at: datetime | None = None,
        segments: Sequence[JudgedSegment] = (),
        folder: str = ".",
        **about: Any,
    ) -> Approval:
        """A call that waits. `about`: of the session that is created for it, unless there is one."""
        session = session or await self.session(**about)
        call_id, given = new_id("toolu"), dict({"command": "ls"} if given is None else given)
        call = Call(
            call_id=call_id,
            tool_name=tool,
            input=given,
            digest=call_digest(given, FOLDER),
            verdict="ask",
            folder=folder,
            targets=tuple(targets),
            segments=tuple(segments),
        )
        shown = [events.tool_use(call_id, tool, given, "ask", None)]
        [approval] = await self.store.open_calls(
            session.id, OWNER, shown, [call], cwd=FOLDER, expires_at=expires_at
        )
        return approval

    async def begin_turn(self, session: Session) -> None:
        """Begins the turn of the message that was sent last."""
        sent = await self.store.list_events(session.id, None, limit=1, order="desc", types=["user.message"])
        await self.store.begin_turn(session.id, OWNER, sent.data[0].id)

    async def save(
        self,
        session: Session,
        files: Mapping[str, str],
        *,
        at: datetime | None = None,
        mode: int = 0o644,
        links: Mapping[str, str] | None = None,
    ) -> None:
        """Saves these files as the session's workspace. `links`: their targets by path."""
        mtime = int((at or utcnow() - timedelta(days=1)).timestamp() * 1e9)
        blobs = {path: text.encode() for path, text in files.items()}
        await self.store.put_blobs(list(blobs.values()))
        saved = [SavedFile(path, mode, len(b), mtime, (blob_name(b),)) for path, b in blobs.items()]
        manifest = Manifest.of(saved, [SavedLink(*link) for link in (links or {}).items()]).encode()
        await self.store.put_blobs(manifest)
        await self.store.save_workspace(session.id, OWNER, blob_name(manifest[-1]))

    def pages(self, *, sandboxed: bool = True, is_free: bool = False) -> Pages:
        return Pages(
            store=self.store,
            agent=Agent(),
            environments={"default": Environment()},
            followers=Followers(self.store.wait_events),
            live=Live(self.store),
            user=self.signed_in.user,
            check_csrf=self.signed_in.check_csrf,
            targets=Targets(),
            has_mail=True,
            slack=self.slack,
            push_key=PushKey.generate().public,
            install=self.signed_in.install,
            sandboxed=sandboxed,
            is_free=lambda: is_free,
        )


@asynccontextmanager
async def desk(store: CoreStore | None = None) -> AsyncIterator[Desk]:
    """A desk over this store, or one in memory."""
    store = store or CoreStore(MemoryBackend())
    signed_in = SignedIn()
    first, second = [
        await store.add_workspace(Workspace(id=new_id("wrkspc"), name=name, created_at=utcnow()), by=SERVICE)
        for name in ("First", "Second")
    ]
    signed_in.add("ann", {first.id: (Role.APPROVER, Role.REQUESTER)})
    signed_in.add("bob", {second.id: (Role.APPROVER, Role.REQUESTER)})
    signed_in.add("eve", {first.id: (Role.APPROVER,), second.id: (Role.APPROVER,)})
    signed_in.add("vic", {first.id: (Role.VIEWER,)})
    for person in signed_in.people.values():
        await store.add_principal(person.principal, by=SERVICE)
    yield Desk(store, signed_in, (first.id, second.id))


@asynccontextmanager
async def browser(
    on: Desk, person: str = "ann", *, sandboxed: bool = True, is_free: bool = False
) -> AsyncIterator[httpx.AsyncClient]:
    """A client with this person's cookie, without scripts. Addresses begin with the service's own path."""
    outer = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    outer.mount(ROOT, build_inbox_app(on.pages(sandboxed=sandboxed, is_free=is_free)))
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(outer, raise_app_exceptions=False),
        base_url=f"http://inbox.test{ROOT}/",
        cookies={COOKIE: person},
    ) as client:
        yield client


class Stream:
    """What a page hears."""

    def __init__(self) -> None:
        self.frames: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()

    async def send(self, message: Message) -> None:
        for text in filter(None, message.get("body", b"").decode().split("\n\n")):
            fields = dict(line.split(": ", 1) for line in text.split("\n"))
            self.frames.put_nowait((fields["event"], json.loads(fields["data"])))

    async def next(self) -> tuple[str, Any]:
        """The next event that is not a ping."""
        while (found := await asyncio.wait_for(self.frames.get(), 10))[0] == "ping":
            pass
        return found


@asynccontextmanager
async def listening(app: ASGIApp, person: str, query: str = "rows=yes") -> AsyncIterator[Stream]:
    """Has a page of this person open."""
    stream, gone = Stream(), asyncio.Event()

    async def receive() -> Message:
        await gone.wait()
        return {"type": "http.disconnect"}

    scope = {
        "type": "http", "method": "GET", "path": "/inbox/stream", "query_string": query.encode(), "root_path": "",
        "headers": [(b"cookie", f"{COOKIE}={person}".encode())], "http_version": "1.1", "scheme": "http",
        "server": ("inbox.test", 80), "client": ("127.0.0.1", 1), "raw_path": b"/inbox/stream",
    }  # fmt: skip
    task = asyncio.create_task(app(scope, receive, stream.send))
    try:
        assert await stream.next() == ("hello", {})
        yield stream
    finally:
        gone.set()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def decision(approval: Approval, do: str, **fields: str) -> dict[str, str]:
    """The fields that the form of a card sends."""
    return {"csrf": CSRF, "nonce": new_id("n"), "digest": approval.digest, "do": do, **fields}


async def shown_changes(client: httpx.AsyncClient, session: Session, path: str = "") -> dict[str, str]:
    """What the page says of each file, as one line of text, by path."""
    answer = await client.get(f"sessions/{session.id}/changes", params={"path": path} if path else None)
    assert answer.status_code == 200, answer.text
    sections = re.findall(
        r'<section class="call" aria-label="([^"]*)">(.*?)</section>', answer.text, re.DOTALL
    )
    return {name: " ".join(re.sub("<[^>]*>", " ", html).split()) for name, html in sections}
