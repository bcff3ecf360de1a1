"""The inbox: calls that wait for a decision, across all sessions of a workspace."""

from typing import Annotated, Any

from fastapi import Query, Request
from fastapi.responses import JSONResponse

from claude_hitl_template.api import resources
from claude_hitl_template.api.auth import DECIDE, READ, CallerDep
from claude_hitl_template.api.bodies import ClaimApproval, Decide, DelegateApproval
from claude_hitl_template.api.listing import Cursor, each_once
from claude_hitl_template.api.parameters import (
    ApprovalId,
    IdempotencyKey,
    Limit,
    NonEmpty,
    Omitted,
    PageToken,
    States,
)
from claude_hitl_template.api.routing import api_router, errors
from claude_hitl_template.api.service import ServiceDep
from claude_hitl_template.api.wire import approval_wire
from claude_hitl_template.domain.models import ApprovalState

_PENDING = [ApprovalState.PENDING]

router = api_router("approvals", READ)
decisions = api_router("approvals", DECIDE)


@router.get("/v1/approvals", response_model=resources.Approvals)
async def list_approvals(
    *,
    request: Request,
    caller: CallerDep,
    service: ServiceDep,
    limit: Limit = 20,
    page: PageToken = None,
    states: States = _PENDING,
    session_id: Annotated[NonEmpty | Omitted, Query(description="Only approvals of this session.")] = None,
) -> JSONResponse:
    """List approvals; by default those that wait for a decision."""
    filters: dict[str, Any] = {"states": each_once(states), "session_id": session_id}
    cursor = Cursor.of(request, page, **filters)
    found = await service.store.list_approvals(caller.workspace_id, limit=limit, page=cursor.page, **filters)
    return cursor.response(found, approval_wire)


@router.get("/v1/approvals/{approval_id}", response_model=resources.Approval, responses=errors(404))
async def get_approval(approval_id: ApprovalId, caller: CallerDep, service: ServiceDep) -> JSONResponse:
    """Retrieve an approval."""
    return JSONResponse(approval_wire(await service.store.get_approval(approval_id, caller.workspace_id)))


@router.get(
    "/v1/approvals/{approval_id}/receipt", response_model=resources.Receipt, responses=errors(404, 409)
)
async def get_receipt(approval_id: ApprovalId, caller: CallerDep, service: ServiceDep) -> JSONResponse:
    """Retrieve a signed receipt of what was decided, which can be verified without the service."""
    return JSONResponse(await service.store.approval_receipt(approval_id, caller.workspace_id))


@decisions.post(
    "/v1/approvals/{approval_id}/decide",
    response_model=resources.Approval,
    responses=errors(404, 409, 413),
)
async def decide_approval(
    approval_id: ApprovalId,
    body: Decide,
    caller: CallerDep,
    service: ServiceDep,
    idempotency_key: IdempotencyKey = None,
) -> JSONResponse:
    """Decide on a call. The first decision counts: the same one again is accepted, another one is a conflict. Of a call that
    takes several people an allow is a vote until there are enough; a deny decides at once."""
    approval = await service.store.decide(
        approval_id,
        caller.workspace_id,
        body.confirmation(approval_id),
        by=caller.actor,
        idempotency_key=idempotency_key,
    )
    return JSONResponse(approval_wire(approval))


@decisions.post(
    "/v1/approvals/{approval_id}/claim", response_model=resources.Approval, responses=errors(404, 409, 413)
)
async def claim_approval(
    approval_id: ApprovalId,
    body: ClaimApproval,
    caller: CallerDep,
    service: ServiceDep,
    idempotency_key: IdempotencyKey = None,
) -> JSONResponse:
    """Tell others that the caller is looking at a call. They may decide on it all the same."""
    approval = await service.store.claim_approval(
        approval_id,
        caller.workspace_id,
        seconds=body.seconds,
        by=caller.actor,
        idempotency_key=idempotency_key,
    )
    return JSONResponse(approval_wire(approval))


@decisions.post(
    "/v1/approvals/{approval_id}/delegate", response_model=resources.Approval, responses=errors(404, 409, 413)
)
async def delegate_approval(
    approval_id: ApprovalId,
    body: DelegateApproval,
    caller: CallerDep,
    service: ServiceDep,
    idempotency_key: IdempotencyKey = None,
) -> JSONResponse:
    """Hand a call over to a person or a group that may decide on it."""
    approval = await service.store.delegate_approval(
        approval_id,
        caller.workspace_id,
        principal_id=body.principal_id,
        group=body.group,
        note=body.note,
        by=caller.actor,
        idempotency_key=idempotency_key,
    )
    return JSONResponse(approval_wire(approval))
