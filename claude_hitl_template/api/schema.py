"""The OpenAPI document: what each route takes and answers. Requests are read by hand (strict_json.py), so it is said here.

What JSON Schema cannot say is refused all the same: NUL and lone surrogates in texts, numbers that are too large, names
that are given twice, what does not wait.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, Literal, get_args

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic.json_schema import models_json_schema

from claude_hitl_template.api.strict_json import Body
from claude_hitl_template.api.wire import CreateSession, UpdateSession
from claude_hitl_template.domain.events import EVENT_TYPES, FOREIGN_TYPES, ClientEvent, UserToolConfirmation
from claude_hitl_template.domain.models import ApprovalKind, ApprovalState, Decision, SessionStatus

PREVIEW_TYPES = ("agent.message", "agent.thinking")
_ONE_OF_OURS: Any = {"enum": sorted(EVENT_TYPES)}
_REFERENCE = "#/components/schemas/{model}"
_JSON = "application/json"
_PROBLEMS = {
    400: "The request is not what it should be; the message names the field",
    401: "No key, or one that is not known here",
    404: "There is nothing of this id, or it is another key's",
    409: "Against what is recorded: another decision was first, the session is archived, or it runs",
    413: "Too large",
    429: "Too many requests with this key; retry-after says when to come back",
    503: "The store cannot be used now; the same request may be repeated",
}


def _reference(name: str) -> dict[str, Any]:
    return {"$ref": _REFERENCE.format(model=name)}


class SendEvents(Body):
    events: list[ClientEvent] = Field(min_length=1, max_length=100)


class Decide(UserToolConfirmation):
    """A confirmation without what the address says."""

    type: Literal["user.tool_confirmation"] = Field(default="user.tool_confirmation", exclude=True)
    tool_use_id: str = Field(default="", exclude=True)


class Drain(Body):
    grace_s: Annotated[float, Field(strict=True)] = 10


class Secret(Body):
    value: str


def _key_name(given: str) -> str:
    name = given.strip()
    if not name:
        raise ValueError("is empty; say whose key it is")
    if not name.isprintable():
        raise ValueError("has characters that cannot be shown")
    return name


class NewKey(Body):
    name: Annotated[str, Field(min_length=1, max_length=100), AfterValidator(_key_name)]


# What is answered ------------------------------------------------------------------------------------------------


class _Shown(BaseModel):
    """Clients must expect fields that are not named here."""

    model_config = ConfigDict(extra="allow")


class _Error(_Shown):
    type: str
    message: str


class Problem(_Shown):
    """`request_id` is that of the header `request-id`, which every answer has; the service's log has it, too."""

    type: Literal["error"]
    error: _Error
    request_id: str | None


class _Stats(_Shown):
    active_seconds: float
    duration_seconds: float


class AgentShown(_Shown):
    type: Literal["agent"]
    id: str
    version: int
    name: str
    description: str | None
    model: dict[str, Any]
    system: str | None
    tools: list[dict[str, Any]]
    mcp_servers: list[dict[str, Any]]
    permission_rules: list[dict[str, Any]]
    permission_mode: Literal["default", "plan"]


class ListedAgent(AgentShown):
    created_at: datetime
    updated_at: datetime
    archived_at: datetime | None


class SessionShown(_Shown):
    type: Literal["session"]
    id: str
    agent: AgentShown
    environment_id: str
    title: str | None
    metadata: dict[str, str]
    status: SessionStatus
    stop_reason: dict[str, Any] | None
    parked: bool
    waiting_for_room: bool
    first_words: str | None
    created_at: datetime
    updated_at: datetime
    archived_at: datetime | None
    stats: _Stats
    usage: dict[str, Any]


class SessionDeleted(_Shown):
    type: Literal["session_deleted"]
    id: str


class EventShown(_Shown):
    """An event of the log; what else it has depends on its type."""

    id: str
    type: str = Field(json_schema_extra=_ONE_OF_OURS)
    processed_at: datetime | None


class Preview(_Shown):
    """A piece of an event in the making."""

    type: Literal["event_start", "event_delta"]


class Ping(BaseModel):
    """A sign of life."""

    model_config = ConfigDict(extra="forbid")


class Frame(_Shown):
    """One message of an event stream. `id` is the cursor of an event that is committed; nothing else has one."""

    event: str
    id: Annotated[str, Field(pattern="^[0-9]+$")] = ""
    data: Annotated[
        str,
        Field(
            json_schema_extra={
                "contentMediaType": _JSON,
                "contentSchema": {
                    "anyOf": [_reference("EventShown"), _reference("Preview"), _reference("Ping")]
                },
            }
        ),
    ]


class Sent(_Shown):
    data: list[EventShown]


class ApprovalShown(_Shown):
    type: Literal["approval"]
    id: str
    session_id: str
    event_id: str
    batch: list[str]
    kind: ApprovalKind
    tool_name: str
    input: dict[str, Any]
    digest: str
    cwd: str
    targets: list[str] | None
    agent_id: str | None
    state: ApprovalState
    held: bool
    created_at: datetime
    expires_at: datetime | None
    decision: Decision | None
    run_input: dict[str, Any] | None
    run_digest: str | None
    closed_at: datetime | None


class WorkspaceFile(_Shown):
    type: Literal["workspace_file"]
    path: str
    size_bytes: int
    mode: str = Field(pattern="^[0-7]{3,}$")
    modified_at: datetime | None


class EnvironmentShown(_Shown):
    type: Literal["environment"]
    id: str
    name: str
    description: str | None
    config: dict[str, Any]
    image: str | None
    image_digest: str | None
    image_facts: dict[str, Any] | None
    dependencies: dict[str, Any] | None
    created_at: datetime
    updated_at: datetime
    archived_at: datetime | None


class Facts(_Shown):
    version: str
    model: str


class Health(Facts):
    """Needs no key. Facts has the rest, and needs one."""

    status: Literal["ok"]


class DrainState(_Shown):
    """For how many seconds more nothing is started, unless it is undone before; 0: the service works as ever."""

    drained_s: float


class Drained(_Shown):
    still_running: int


class SecretState(_Shown):
    name: str
    set: bool


class SecretStates(_Shown):
    data: list[SecretState]


class KeyShown(_Shown):
    id: str
    name: str
    prefix: str
    first: bool
    created_at: datetime
    revoked_at: datetime | None


class KeysShown(_Shown):
    data: list[KeyShown]


class KeyWithSecret(KeyShown):
    """The secret is shown this once."""

    secret: str


class KeptDecisionShown(_Shown):
    """What is kept of a decision when its session is deleted."""

    approval_id: str
    session_id: str
    key_id: str
    tool_name: str
    digest: str
    run_digest: str | None
    result: Literal["allow", "deny"]
    decided_by: str
    decided_at: datetime


class KeptDecisions(_Shown):
    data: list[KeptDecisionShown]
    next_page: str | None


class Sessions(_Shown):
    data: list[SessionShown]
    next_page: str | None


class Events(_Shown):
    data: list[EventShown]
    next_page: str | None


class Approvals(_Shown):
    data: list[ApprovalShown]
    next_page: str | None


class WorkspaceFiles(_Shown):
    data: list[WorkspaceFile]
    next_page: str | None


class Agents(_Shown):
    data: list[ListedAgent]
    next_page: str | None


class Environments(_Shown):
    data: list[EnvironmentShown]
    next_page: str | None


# What is taken beside a body -------------------------------------------------------------------------------------


def _parameter(name: str, schema: Mapping[str, Any], where: str = "query") -> dict[str, Any]:
    return {"name": name, "in": where, "required": False, "schema": dict(schema)}


def _text(name: str, **more: Any) -> dict[str, Any]:
    """A query parameter that is refused when it is empty."""
    return _parameter(name, {"type": "string", "minLength": 1, **more})


def _several(name: str, choices: Sequence[str]) -> dict[str, Any]:
    return _parameter(f"{name}[]", {"type": "array", "items": {"type": "string", "enum": list(choices)}})


def _listing(*, order: bool = False) -> tuple[dict[str, Any], ...]:
    found = (
        _parameter("limit", {"type": "integer", "minimum": 1, "maximum": 1000}),
        _text("page", description="next_page of the answer before, which had the same filters and order"),
    )
    return (*found, _parameter("order", {"type": "string", "enum": ["asc", "desc"]})) if order else found


_TIMES = tuple(
    _parameter(f"created_at[{bound}]", {"type": "string", "format": "date-time"})
    for bound in ("gt", "gte", "lt", "lte")
)
MAX_KEY_CHARS = 255
_ONCE = _parameter(
    "Idempotency-Key", {"type": "string", "minLength": 1, "maxLength": MAX_KEY_CHARS}, "header"
)
_SINCE = _parameter(
    "Last-Event-ID",
    {"type": "integer", "minimum": 0, "description": "the id of the last event that arrived; 0: all of them"},
    "header",
)
_PATH = {**_parameter("path", {"type": "string"}), "allowEmptyValue": True}  # no file has it, which is a 404
_SESSION = _text("session_id")
_STATES = _several("states", [state.value for state in ApprovalState])
_STATES["schema"]["default"] = [ApprovalState.PENDING.value]


@dataclass(frozen=True)
class Operation:
    """What a route answers when all is well (None: bytes; `media` says of which kind), what it takes, how it fails."""

    answer: type[BaseModel] | None
    body: type[BaseModel] | None = None
    parameters: tuple[dict[str, Any], ...] = ()
    conflicts: bool = False
    media: str = _JSON
    open: bool = False


OPERATIONS: Mapping[str, Operation] = {
    "POST /v1/sessions": Operation(SessionShown, CreateSession, (_ONCE,), conflicts=True),
    "GET /v1/sessions": Operation(
        Sessions,
        parameters=(
            *_listing(order=True),
            *_TIMES,
            _several("statuses", get_args(SessionStatus)),
            _text("agent_id"),
            _parameter("include_archived", {"type": "boolean"}),
        ),
    ),
    "GET /v1/sessions/{session_id}": Operation(SessionShown),
    "POST /v1/sessions/{session_id}": Operation(SessionShown, UpdateSession, (_ONCE,), conflicts=True),
    "DELETE /v1/sessions/{session_id}": Operation(SessionDeleted, conflicts=True),
    "POST /v1/sessions/{session_id}/archive": Operation(SessionShown, parameters=(_ONCE,), conflicts=True),
    "GET /v1/sessions/{session_id}/events": Operation(
        Events,
        parameters=(*_listing(order=True), *_TIMES, _several("types", sorted(EVENT_TYPES | FOREIGN_TYPES))),
    ),
    "POST /v1/sessions/{session_id}/events": Operation(Sent, SendEvents, (_ONCE,), conflicts=True),
    "GET /v1/sessions/{session_id}/events/stream": Operation(
        Frame, parameters=(_SINCE, _several("event_deltas", PREVIEW_TYPES)), media="text/event-stream"
    ),
    "GET /v1/sessions/{session_id}/workspace": Operation(WorkspaceFiles, parameters=_listing()),
    "GET /v1/sessions/{session_id}/workspace/files": Operation(
        None, parameters=(_PATH,), media="application/octet-stream"
    ),
    "GET /v1/approvals": Operation(Approvals, parameters=(*_listing(), _STATES, _SESSION)),
    "GET /v1/approvals/{approval_id}": Operation(ApprovalShown),
    "POST /v1/approvals/{approval_id}/decide": Operation(ApprovalShown, Decide, (_ONCE,), conflicts=True),
    "GET /v1/agents": Operation(Agents, parameters=_listing()),
    "GET /v1/agents/{agent_id}": Operation(
        ListedAgent, parameters=(_parameter("version", {"type": "integer", "minimum": 1}),)
    ),
    "GET /v1/environments": Operation(Environments, parameters=_listing()),
    "GET /v1/environments/{environment_id}": Operation(EnvironmentShown),
    "GET /v1/version": Operation(Facts),
    "GET /v1/openapi.json": Operation(_Shown),
    "GET /v1/health": Operation(Health, open=True),
    "GET /v1/internal/drain": Operation(DrainState),
    "DELETE /v1/internal/drain": Operation(DrainState),
    "POST /v1/internal/drain": Operation(Drained, Drain, (_ONCE,)),
    "GET /v1/internal/keys": Operation(KeysShown),
    "POST /v1/internal/keys": Operation(KeyWithSecret, NewKey, (_ONCE,), conflicts=True),
    "DELETE /v1/internal/keys/{key_id}": Operation(KeyShown, conflicts=True),
    "POST /v1/internal/keys/{key_id}/rotate": Operation(KeyWithSecret, parameters=(_ONCE,), conflicts=True),
    "GET /v1/internal/decisions": Operation(KeptDecisions, parameters=_listing()),
    "GET /v1/internal/secrets": Operation(SecretStates),
    "PUT /v1/internal/secrets/{name}": Operation(SecretState, Secret),
    "DELETE /v1/internal/secrets/{name}": Operation(SecretState),
}


def install(app: FastAPI) -> None:
    """Has `app.openapi()` say all of this. Raises KeyError for a route that is not described."""
    made = _document(app)
    app.openapi = lambda: made


def _document(app: FastAPI) -> dict[str, Any]:
    document = get_openapi(title=app.title, version=app.version, routes=app.routes)
    for path, methods in document["paths"].items():
        for method, said in methods.items():
            _describe(said, OPERATIONS[f"{method.upper()} {path}"])
    document["components"] = {
        "schemas": _schemas(),
        "securitySchemes": {
            "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            "bearer": {"type": "http", "scheme": "bearer"},
        },
    }
    return document


def _describe(said: dict[str, Any], operation: Operation) -> None:
    in_path = [p for p in said.get("parameters", ()) if p["in"] == "path"]
    said["parameters"] = [*in_path, *operation.parameters]
    said["security"] = [] if operation.open else [{"key": []}, {"bearer": []}]
    if operation.body is not None:
        said["requestBody"] = {
            "required": True,
            "content": {_JSON: {"schema": _reference(operation.body.__name__)}},
        }
    schema = (
        _reference(operation.answer.__name__) if operation.answer else {"type": "string", "format": "binary"}
    )
    said["responses"] = {
        "200": {
            "description": "Done",
            "headers": _headers(200),
            "content": {operation.media: {"schema": schema}},
        }
    }
    for status in _failures(operation, by_id=bool(in_path)):
        content = {_JSON: {"schema": _reference(Problem.__name__)}}
        said["responses"][str(status)] = {
            "description": _PROBLEMS[status],
            "headers": _headers(status),
            "content": content,
        }


def _headers(status: int) -> dict[str, Any]:
    found: dict[str, Any] = {"request-id": {"type": "string"}}
    if status == 409:
        found["x-should-retry"] = {"const": "false"}
    if status in (429, 503):
        found["retry-after"] = {"type": "integer", "minimum": 0}
    return {name: {"required": True, "schema": schema} for name, schema in found.items()}


def _failures(operation: Operation, *, by_id: bool) -> Iterator[int]:
    yield 503
    yield 400
    if operation.open:
        return
    yield from (401, 429)
    if by_id or operation.body is CreateSession:
        yield 404
    if operation.conflicts:
        yield 409
    if operation.body is not None:
        yield 413


def _schemas() -> dict[str, Any]:
    taken = {o.body for o in OPERATIONS.values() if o.body}
    given = {o.answer for o in OPERATIONS.values() if o.answer} | {Problem, Preview, Ping}
    both = [(model, "validation") for model in sorted(taken | given, key=lambda model: model.__name__)]
    _, found = models_json_schema(both, ref_template=_REFERENCE)  # pyright: ignore[reportArgumentType]
    for name in ("type", "tool_use_id"):
        found["$defs"]["Decide"]["properties"].pop(name)
    return found["$defs"]
