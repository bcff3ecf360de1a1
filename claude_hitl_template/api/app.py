"""The application under /v1: routers put together, with everything they need handed in."""

import asyncio
import hmac
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import TypeAdapter

from claude_hitl_template.api import problems, schema
from claude_hitl_template.api.agents import agent_wire, build_agent
from claude_hitl_template.api.auth import WRONG_KEYS, Authenticator, WrongKeys, presented_key
from claude_hitl_template.api.files import download, file_wire
from claude_hitl_template.api.keys import key_routes
from claude_hitl_template.api.secrets import secret_routes
from claude_hitl_template.api.strict_json import (
    Place,
    parse,
    query_choice,
    query_flag,
    query_limit,
    query_list,
    query_order,
    query_times,
    read_json,
    read_number,
)
from claude_hitl_template.api.undeclared import DECLARED, check_covered
from claude_hitl_template.api.wire import (
    CreateSession,
    UpdateSession,
    approval_wire,
    environment_wire,
    session_wire,
)
from claude_hitl_template.config.secret_files import SecretFiles, hash_api_key
from claude_hitl_template.domain.events import EVENT_TYPES, FOREIGN_TYPES, UserToolConfirmation
from claude_hitl_template.domain.models import (
    Agent,
    ApiKey,
    ApprovalState,
    Environment,
    Event,
    ImageFacts,
    Page,
    SessionStatus,
    new_id,
    utcnow,
)
from claude_hitl_template.domain.policy.floor import Floor
from claude_hitl_template.errors import InvalidInput, NotFound, Unauthorized, Unavailable
from claude_hitl_template.store.protocol import NOW, Clients

KEEP_ALIVE_S = 10.0
LOOK_AT_KEY_S = 2.0  # how often a stream looks whether its key is still one
OPEN_FACTS = (
    "version",
    "code",
    "ray",
    "model",
)  # without a key; /v1/version, with one, has all
_STATES = TypeAdapter(ApprovalState)
_STATUSES: TypeAdapter[Any] = TypeAdapter(SessionStatus)


@dataclass(frozen=True)
class Service:
    """What the routes stand on. `facts` is what /v1/version shows; `operator_key` opens `drain`, the keys and the
    secrets, the latter also the first API key.

    `floor` holds whatever an agent's policy says. `environments` by id are what a session may name; `image_facts` says
    what is known of an image's reference now, None for one that is not here (yet). It never raises, and answers at once.
    """

    store: Clients
    agent: Agent
    floor: Floor
    environments: Mapping[str, Environment]
    image_facts: Callable[[str], Awaitable[ImageFacts | None]]
    facts: Callable[[], dict[str, Any]]
    drain: Callable[[float], Awaitable[int]]
    undrain: Callable[[], Awaitable[None]]
    drained_s: Callable[[], Awaitable[float]]
    operator_key: str
    shelf: SecretFiles
    max_request_bytes: int
    requests_per_minute: int
    wrong_keys_per_minute: int = WRONG_KEYS


def build_app(service: Service) -> FastAPI:
    """A FastAPI whose every failure is JSON in the protocol's shape; to be mounted, never merged into another."""
    # No pages of documentation: they would be open to everyone, and load their scripts from elsewhere.
    app = FastAPI(
        title="claude-hitl",
        version=str(service.facts().get("version", "")),
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
    )
    problems.install(app)
    authenticator = Authenticator(
        service.store, service.requests_per_minute, WrongKeys(service.wrong_keys_per_minute)
    )
    operator = _operator_check(service.operator_key, authenticator.wrong_keys)
    most = service.max_request_bytes
    for router in (
        _open_routes(service),
        _operator_routes(service, operator),
        secret_routes(service.shelf, service.operator_key, authenticator, most),
        key_routes(service.store, service.shelf, service.operator_key, operator, most),
        _Routes(service, authenticator).router,
    ):
        check_covered(router)
        app.include_router(router)
    app.dependency_overrides[_caller] = authenticator
    schema.install(app)
    return app


def _caller() -> ApiKey:
    raise AssertionError("build_app says who calls")


Caller = Annotated[ApiKey, Depends(_caller)]


def _open_routes(service: Service) -> APIRouter:
    router = APIRouter(tags=["health"], dependencies=DECLARED)

    @router.get("/v1/health")
    async def health() -> Any:
        try:
            await asyncio.wait_for(service.store.ping(write=False), 10)
        except TimeoutError as error:
            raise Unavailable("the ledger does not answer") from error
        facts = service.facts()
        return {"status": "ok", **{name: facts.get(name) for name in OPEN_FACTS}}

    return router


def _operator_check(operator_key: str, wrong_keys: WrongKeys) -> Callable[[Request], Awaitable[None]]:
    """Lets in what only `./hitl` on the service's own machine may do: no API key opens it."""

    async def check(request: Request) -> None:
        if not hmac.compare_digest(presented_key(request).encode(), operator_key.encode()):
            why = "an API key does not open this; ./hitl on the service's own machine does it"
            raise wrong_keys.refusal(request, why)

    return check


def _operator_routes(service: Service, check: Callable[[Request], Awaitable[None]]) -> APIRouter:
    router = APIRouter(dependencies=[Depends(check), *DECLARED])

    @router.get("/v1/internal/drain")
    async def drained() -> Any:
        return {"drained_s": round(await service.drained_s(), 1)}

    @router.delete("/v1/internal/drain")
    async def undrain() -> Any:
        await service.undrain()
        return {"drained_s": 0.0}

    @router.post("/v1/internal/drain")
    async def drain(request: Request) -> Any:
        body = parse(schema.Drain, await read_json(request, service.max_request_bytes))
        return {"still_running": await service.drain(min(max(body.grace_s, 0), 300))}

    return router


class _Routes:
    def __init__(self, service: Service, authenticator: Authenticator) -> None:
        self._s, self._store, self._authenticator = service, service.store, authenticator
        # By the name that routes ask for the caller under, or it would run, and count the request, twice.
        self.router = router = APIRouter(dependencies=[Depends(_caller), *DECLARED])
        for method, path, endpoint, tag in (
            ("POST", "/v1/sessions", self.create_session, "sessions"),
            ("GET", "/v1/sessions", self.list_sessions, "sessions"),
            ("GET", "/v1/sessions/{session_id}", self.get_session, "sessions"),
            ("POST", "/v1/sessions/{session_id}", self.update_session, "sessions"),
            ("DELETE", "/v1/sessions/{session_id}", self.delete_session, "sessions"),
            ("POST", "/v1/sessions/{session_id}/archive", self.archive_session, "sessions"),
            ("GET", "/v1/sessions/{session_id}/events", self.list_events, "events"),
            ("POST", "/v1/sessions/{session_id}/events", self.send_events, "events"),
            ("GET", "/v1/sessions/{session_id}/events/stream", self.stream_events, "events"),
            ("GET", "/v1/sessions/{session_id}/workspace", self.list_workspace, "workspace"),
            ("GET", "/v1/sessions/{session_id}/workspace/files", self.workspace_file, "workspace"),
            ("GET", "/v1/approvals", self.list_approvals, "approvals"),
            ("GET", "/v1/approvals/{approval_id}", self.get_approval, "approvals"),
            ("POST", "/v1/approvals/{approval_id}/decide", self.decide, "approvals"),
            ("GET", "/v1/agents", self.list_agents, "agents"),
            ("GET", "/v1/agents/{agent_id}", self.get_agent, "agents"),
            ("GET", "/v1/environments", self.list_environments, "environments"),
            ("GET", "/v1/environments/{environment_id}", self.get_environment, "environments"),
            ("GET", "/v1/version", self.version, "health"),
            ("GET", "/v1/openapi.json", self.openapi, "health"),
        ):
            router.add_api_route(path, endpoint, methods=[method], tags=[tag], response_model=None)

    async def _body(self, request: Request) -> Any:
        return await read_json(request, self._s.max_request_bytes)

    # -- sessions

    async def create_session(self, request: Request, caller: Caller) -> Any:
        body = parse(CreateSession, await self._body(request))
        environment = self._s.environments.get(body.environment_id)
        if environment is None:
            known = ", ".join(self._s.environments)
            raise NotFound(
                f"environment_id: there is no environment {body.environment_id!r}; there are: {known}"
            )
        session = await self._store.create_session(
            caller.id,
            agent=build_agent(body.agent, self._s.agent, self._s.floor),
            environment=environment,
            title=body.title,
            metadata=body.metadata,
            initial=body.initial_events,
            idempotency_key=_idempotency_key(request),
        )
        return session_wire(session)

    async def list_sessions(self, request: Request, caller: Caller) -> Any:
        order = query_order(request, "desc")
        filters: dict[str, Any] = {
            "statuses": _each_once(query_choice(request, "statuses", _STATUSES)),
            "agent_id": request.query_params.get("agent_id"),
            "created": query_times(request),
            "include_archived": query_flag(request, "include_archived"),
        }
        place = Place.of(request, order=order, **filters)
        page = await self._store.list_sessions(
            caller.id, limit=query_limit(request), page=place.page, order=order, **filters
        )
        return _answered(page, session_wire, place)

    async def get_session(self, session_id: str, caller: Caller) -> Any:
        return session_wire(await self._store.get_session(session_id, caller.id))

    async def update_session(self, session_id: str, request: Request, caller: Caller) -> Any:
        body = parse(UpdateSession, await self._body(request))
        changes = body.model_dump(exclude_unset=True)
        session = await self._store.update_session(
            session_id, caller.id, changes=changes, idempotency_key=_idempotency_key(request)
        )
        return session_wire(session)

    async def archive_session(self, session_id: str, caller: Caller) -> Any:
        return session_wire(await self._store.archive_session(session_id, caller.id))

    async def delete_session(self, session_id: str, caller: Caller) -> Any:
        await self._store.delete_session(session_id, caller.id)
        return {"type": "session_deleted", "id": session_id}

    # -- events

    async def list_events(self, session_id: str, request: Request, caller: Caller) -> Any:
        types = _each_once(query_list(request, "types"))
        unknown = sorted(set(types) - EVENT_TYPES - FOREIGN_TYPES)
        if unknown:
            raise InvalidInput(f"{unknown[0]!r} is no event type", "types")
        order, created = query_order(request, "asc"), query_times(request)
        place = Place.of(request, order=order, types=types, created=created)
        page = await self._store.list_events(
            session_id,
            caller.id,
            limit=query_limit(request, 100),
            page=place.page,
            order=order,
            types=types,
            created=created,
        )
        return _answered(page, Event.wire, place)

    async def send_events(self, session_id: str, request: Request, caller: Caller) -> Any:
        body = parse(schema.SendEvents, await self._body(request))
        sent = await self._store.send_events(
            session_id,
            caller.id,
            body.events,
            decided_by=caller.name,
            idempotency_key=_idempotency_key(request),
        )
        return {"data": [e.wire() for e in sent]}

    async def stream_events(self, session_id: str, request: Request, caller: Caller) -> StreamingResponse:
        wanted = query_list(request, "event_deltas")
        for name in wanted:
            if name not in schema.PREVIEW_TYPES:
                raise InvalidInput(f"one of {', '.join(schema.PREVIEW_TYPES)}", "event_deltas")
        session = await self._store.get_session(session_id, caller.id)
        after = _last_event_id(request, session.next_seq - 1)
        over = (
            session.status == "terminated" and after == session.next_seq - 1
        )  # its last event was sent before
        secret_hash = hash_api_key(presented_key(request))
        stream = self._stream(session_id, caller.id, secret_hash, after, frozenset(wanted))
        stream = _nothing() if over else stream
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        return StreamingResponse(stream, media_type="text/event-stream", headers=headers)

    async def _stream(
        self, session_id: str, key_id: str, secret_hash: str, after: int, wanted: frozenset[str]
    ) -> AsyncIterator[str]:
        yield ": connected\n\n"
        previewed: set[str] = set()
        position = NOW if wanted else None
        while await self._authenticator.find(secret_hash):
            try:
                waiting = self._store.wait_events(
                    session_id, key_id, after, timeout_s=KEEP_ALIVE_S, previews=position
                )
                found, previews, newest = await self._while_known(secret_hash, waiting)
            except Unauthorized:
                return
            except NotFound:
                yield _sse(
                    {"type": "session.deleted", "id": new_id("sevt"), "processed_at": utcnow().isoformat()}
                )
                return
            position = newest if wanted else None
            for preview in previews:
                if _wants(preview, wanted, previewed):
                    yield _sse(preview)
            for event in found:
                yield _sse(event.wire(), event.seq)
                after = event.seq
            if not found and not previews:
                yield "event: ping\ndata: {}\n\n"
            if found and found[-1].type == "session.status_terminated":
                return

    async def _while_known[T](self, secret_hash: str, waiting: Coroutine[Any, Any, T]) -> T:
        """What `waiting` returns. Raises Unauthorized, a few seconds later, when the key is revoked meanwhile."""
        task = asyncio.ensure_future(waiting)
        try:
            while not (await asyncio.wait([task], timeout=LOOK_AT_KEY_S))[0]:
                if await self._authenticator.find(secret_hash) is None:
                    raise Unauthorized("this API key was revoked")
            return task.result()
        finally:
            task.cancel()

    # -- workspaces

    async def list_workspace(self, session_id: str, request: Request, caller: Caller) -> Any:
        place = Place.of(request)
        page = await self._store.list_workspace(
            session_id, caller.id, limit=query_limit(request, 100), page=place.page
        )
        return _answered(page, file_wire, place)

    async def workspace_file(self, session_id: str, caller: Caller, path: str = "") -> StreamingResponse:
        file = await self._store.workspace_file(session_id, caller.id, path)
        return await download(self._store, file)

    # -- approvals

    async def list_approvals(self, request: Request, caller: Caller) -> Any:
        filters: dict[str, Any] = {
            "states": _each_once(query_choice(request, "states", _STATES)) or [ApprovalState.PENDING],
            "session_id": request.query_params.get("session_id"),
        }
        place = Place.of(request, **filters)
        page = await self._store.list_approvals(
            caller.id, limit=query_limit(request), page=place.page, **filters
        )
        return _answered(page, approval_wire, place)

    async def get_approval(self, approval_id: str, caller: Caller) -> Any:
        return approval_wire(await self._store.get_approval(approval_id, caller.id))

    async def decide(self, approval_id: str, request: Request, caller: Caller) -> Any:
        body = await self._body(request)
        if not isinstance(body, dict):
            raise InvalidInput("the body is a JSON object")
        for name in ("type", "tool_use_id"):
            if name in body:
                raise InvalidInput("the address says which call is decided", name)
        said = parse(
            UserToolConfirmation, {**body, "type": "user.tool_confirmation", "tool_use_id": approval_id}
        )
        approval = await self._store.decide(
            approval_id,
            caller.id,
            said,
            decided_by=caller.name,
            idempotency_key=_idempotency_key(request),
        )
        return approval_wire(approval)

    # -- agents, environments, the service itself

    async def list_agents(self, request: Request) -> Any:
        _check_only_page(request)
        return {"data": [self._agent()], "next_page": None}

    async def get_agent(self, agent_id: str, request: Request) -> Any:
        if agent_id != self._s.agent.id:
            raise NotFound(f"there is no agent {agent_id!r}")
        version = read_number(request.query_params.get("version", str(self._s.agent.version)))
        if not version:
            raise InvalidInput("a whole number from 1", "version")
        if version != self._s.agent.version:
            raise NotFound(f"agent {agent_id!r} has no version {version}")
        return self._agent()

    def _agent(self) -> dict[str, Any]:
        epoch = "2026-01-01T00:00:00+00:00"
        return {
            **agent_wire(self._s.agent), "archived_at": None, "created_at": epoch, "updated_at": epoch, "metadata": {}
        }  # fmt: skip

    async def list_environments(self, request: Request) -> Any:
        _check_only_page(request)
        found = await asyncio.gather(*map(self._environment, self._s.environments.values()))
        return {"data": found, "next_page": None}

    async def get_environment(self, environment_id: str) -> Any:
        environment = self._s.environments.get(environment_id)
        if environment is None:
            raise NotFound(f"there is no environment {environment_id!r}")
        return await self._environment(environment)

    async def _environment(self, environment: Environment) -> dict[str, Any]:
        facts = await self._s.image_facts(environment.image) if environment.image else None
        return environment_wire(environment, facts, sandboxed=self._s.facts().get("sandbox") == "on")

    async def version(self) -> Any:
        return self._s.facts()

    async def openapi(self, request: Request) -> Any:
        return request.app.openapi()


async def _nothing() -> AsyncIterator[str]:
    yield ": connected\n\n"


def _answered[T](page: Page[T], wire: Callable[[T], dict[str, Any]], place: Place) -> JSONResponse:
    """A page of a listing. FastAPI would look at each value first whether it is JSON: as long as reading the page takes."""
    return JSONResponse({"data": [wire(one) for one in page.data], "next_page": place.behind(page.next_page)})


def _each_once[T: str](values: Sequence[T]) -> list[T]:
    """In an order of their own, so that the same filter is the same however it is written."""
    return sorted(set(values))


def _check_only_page(request: Request) -> None:
    query_limit(request)
    if "page" in request.query_params:
        raise InvalidInput("this is no cursor; everything is on the first page", "page")


def _idempotency_key(request: Request) -> str | None:
    """The caller's, whose length is checked with the other headers."""
    return request.headers.get("idempotency-key")


def _last_event_id(request: Request, newest: int) -> int:
    """Where a stream begins: behind Last-Event-ID, or with what happens from now on."""
    given = request.headers.get("last-event-id")
    if given is None:
        return newest
    seq = read_number(given)
    if seq is None or seq > newest:
        raise InvalidInput(
            "the id of an event of this stream, as it was sent; 0 for the beginning", "Last-Event-ID"
        )
    return seq


def _wants(preview: dict[str, Any], wanted: frozenset[str], opened: set[str]) -> bool:
    """Only previews of the wanted types, and only from their beginning."""
    if preview["type"] == "event_start":
        if preview["event"]["type"] in wanted:
            opened.add(preview["event"]["id"])
            return True
        return False
    return preview["event_id"] in opened


def _sse(event: dict[str, Any], seq: int | None = None) -> str:
    cursor = f"id: {seq}\n" if seq is not None else ""
    return f"{cursor}event: {event['type']}\ndata: {json.dumps(event, ensure_ascii=False)}\n\n"
