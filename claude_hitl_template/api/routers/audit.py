"""The audit log of a workspace and of the service, and the public keys that its signatures are verified with."""

import json
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import Query, Request
from fastapi.responses import JSONResponse, StreamingResponse

from claude_hitl_template.api import resources
from claude_hitl_template.api.auth import MANAGE, READ, Caller, CallerDep
from claude_hitl_template.api.listing import Cursor
from claude_hitl_template.api.parameters import CreatedAt, Limit, NonEmpty, Omitted, Order, PageToken, Seq
from claude_hitl_template.api.routing import api_router, content
from claude_hitl_template.api.service import Service, ServiceDep
from claude_hitl_template.domain.audit import SERVICE_CHAIN
from claude_hitl_template.domain.audit.ocsf import to_ocsf
from claude_hitl_template.domain.models import new_id
from claude_hitl_template.domain.people import Action
from claude_hitl_template.store.filters import AuditFilter

keys = api_router("audit", READ)
router = api_router("audit", MANAGE)

Chain = Annotated[
    Literal["workspace", "service"],
    Query(
        description="`service`: what concerns no single workspace, such as sign-ins; for admins of the service."
    ),
]
JSONL = "application/jsonl"


@keys.get("/v1/audit/keys", response_model=resources.AuditKeys)
async def list_audit_keys(service: ServiceDep) -> JSONResponse:
    """List the public keys of the service (a JWK set), which verify its checkpoints, exports and receipts."""
    return JSONResponse({"keys": await service.store.audit_keys()})


@router.get("/v1/audit", response_model=resources.AuditEntries)
async def list_audit(
    *,
    request: Request,
    caller: CallerDep,
    service: ServiceDep,
    limit: Limit = 20,
    page: PageToken = None,
    order: Order = "desc",
    chain: Chain = "workspace",
    action: Annotated[NonEmpty | Omitted, Query(description="Only entries of this action.")] = None,
    actor: Annotated[
        NonEmpty | Omitted, Query(description="Only what this principal did, by its id.")
    ] = None,
    target: Annotated[NonEmpty | Omitted, Query(description="Only what was done to this id.")] = None,
    created: CreatedAt,
) -> JSONResponse:
    """List entries of the audit log."""
    matching = AuditFilter(action=action, actor=actor, target=target, created=created)
    workspace_id = _chain(chain, caller)
    cursor = Cursor.of(request, page, order=order, workspace_id=workspace_id, **matching.model_dump())
    found = await service.store.list_audit(
        workspace_id, limit=limit, page=cursor.page, order=order, matching=matching
    )
    return cursor.response(found, lambda entry: entry.wire())


@router.get(
    "/v1/audit/export", response_class=StreamingResponse, responses=content(JSONL, {"type": "string"})
)
async def export_audit(
    caller: CallerDep,
    service: ServiceDep,
    form: Annotated[
        Literal["jsonl", "ocsf"],
        Query(
            alias="format",
            description="`jsonl` can be verified. `ocsf` is for a SIEM, and has no signatures.",
        ),
    ] = "jsonl",
    chain: Chain = "workspace",
    from_seq: Seq = 1,
) -> StreamingResponse:
    """Export the audit log as JSON Lines: entries by `seq`, signed checkpoints between them, and a signed end.

    The export is itself the last entry. A response without the signed end is not whole.
    """
    workspace_id = _chain(chain, caller)
    end = await service.store.begin_export(
        workspace_id, new_id("exp"), form=form, from_seq=from_seq, by=caller.actor
    )
    return StreamingResponse(_lines(service, workspace_id, from_seq, end, form), media_type=JSONL)


def _chain(chain: Literal["workspace", "service"], caller: Caller) -> str:
    if chain == "workspace":
        return caller.workspace_id
    caller.check(Action.ADMINISTER)
    return SERVICE_CHAIN


async def _lines(
    service: Service, workspace_id: str, from_seq: int, end: dict[str, Any], form: str
) -> AsyncIterator[str]:
    after = from_seq - 1
    while after < end["seq"]:
        found, after = await service.store.export_audit(workspace_id, after=after, up_to=end["seq"])
        if form == "ocsf":
            found = [to_ocsf(one) for one in found if one["type"] == "audit_entry"]
        yield "".join(_line(one) for one in found)
    if form == "jsonl":
        yield _line(end)


def _line(document: dict[str, Any]) -> str:
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")) + "\n"
