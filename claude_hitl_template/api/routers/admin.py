"""People and keys: workspaces, users, service accounts, their roles, and API keys; and the decisions of deleted sessions."""

from typing import Annotated, Any

from fastapi import Path, Request
from fastapi.responses import JSONResponse

from claude_hitl_template.api import resources
from claude_hitl_template.api.auth import ADMINISTER, MANAGE, OPERATOR, Caller, CallerDep
from claude_hitl_template.api.bodies import (
    ChangePrincipal,
    ChangeWorkspace,
    NewKey,
    NewPrincipal,
    NewWorkspace,
    SetMember,
    SetPolicy,
)
from claude_hitl_template.api.listing import Cursor
from claude_hitl_template.api.parameters import IdempotencyKey, Limit, PageToken
from claude_hitl_template.api.routing import api_router, errors
from claude_hitl_template.api.service import Service, ServiceDep
from claude_hitl_template.config.secret_files import api_key_for, hash_api_key, new_api_key, public_prefix
from claude_hitl_template.domain.models import ApiKey, KeptDecision, StoredPolicy, new_id, utcnow
from claude_hitl_template.domain.people import Action, Principal, Role, Workspace
from claude_hitl_template.errors import Conflict, Forbidden, NotFound

WorkspaceId = Annotated[str, Path(description="The id of a workspace.")]
PrincipalId = Annotated[str, Path(description="The id of a user or a service account.")]
KeyId = Annotated[str, Path(description="The id of an API key.")]

router = api_router("admin", ADMINISTER)
managed = api_router("admin", MANAGE)
operator = api_router("admin", OPERATOR)

# -- workspaces


@managed.get("/v1/admin/workspaces", response_model=resources.Workspaces)
async def list_workspaces(caller: CallerDep, service: ServiceDep) -> JSONResponse:
    """List the workspaces that the caller manages; all of them for an administrator."""
    found = await service.store.list_workspaces()
    return JSONResponse(
        {
            "data": [_workspace(one) for one in found if _manages(caller, one.id)],
        }
    )


@router.post("/v1/admin/workspaces", response_model=resources.Workspace, responses=errors(409, 413))
async def create_workspace(
    request: Request,
    body: NewWorkspace,
    caller: CallerDep,
    service: ServiceDep,
    idempotency_key: IdempotencyKey = None,
) -> JSONResponse:
    """Create a workspace, which has no members yet."""
    wanted = _new_id("wrkspc", request, idempotency_key, service)
    made = Workspace(id=wanted, name=body.name, created_at=utcnow())
    found = await service.store.add_workspace(made, by=caller.actor)
    return JSONResponse(_workspace(_same(found, made)))


@managed.post(
    "/v1/admin/workspaces/{workspace_id}", response_model=resources.Workspace, responses=errors(409, 412, 413)
)
async def update_workspace(
    workspace_id: WorkspaceId,
    body: ChangeWorkspace,
    caller: CallerDep,
    service: ServiceDep,
    idempotency_key: IdempotencyKey = None,  # the same change twice is one, with any key
) -> JSONResponse:
    """Rename a workspace, or turn its separation of duties on or off."""
    _check_manages(caller, workspace_id)
    changed = await service.store.change_workspace(
        workspace_id, body.changes(), if_version=body.version, by=caller.actor
    )
    return JSONResponse(_workspace(changed))


@managed.get("/v1/admin/workspaces/{workspace_id}/members", response_model=resources.Members)
async def list_members(workspace_id: WorkspaceId, caller: CallerDep, service: ServiceDep) -> JSONResponse:
    """List who belongs to a workspace, with the roles."""
    _check_manages(caller, workspace_id)
    await service.store.get_workspace(workspace_id)
    found = await service.store.list_principals()
    return JSONResponse({"data": [_member(one, workspace_id) for one in found if workspace_id in one.roles]})


@managed.put(
    "/v1/admin/workspaces/{workspace_id}/members/{principal_id}",
    response_model=resources.Member,
    responses=errors(409, 412, 413),
)
async def set_member(
    workspace_id: WorkspaceId,
    principal_id: PrincipalId,
    body: SetMember,
    caller: CallerDep,
    service: ServiceDep,
) -> JSONResponse:
    """Set the roles of a user or service account in a workspace; none removes it from the workspace."""
    _check_manages(caller, workspace_id)
    await service.store.get_workspace(workspace_id)
    principal = await service.store.get_principal(principal_id)
    others = {name: roles for name, roles in principal.roles.items() if name != workspace_id}
    roles = {**others, workspace_id: tuple(body.roles)} if body.roles else others
    changed = await service.store.change_principal(
        principal_id, {"roles": roles}, if_version=body.version or principal.version, by=caller.actor
    )
    return JSONResponse(_member(changed, workspace_id))


# -- rules


@managed.get("/v1/admin/workspaces/{workspace_id}/policy", response_model=resources.Policy)
async def get_policy(workspace_id: WorkspaceId, caller: CallerDep, service: ServiceDep) -> JSONResponse:
    """Retrieve a workspace's rules."""
    _check_manages(caller, workspace_id)
    return JSONResponse(_policy(await service.store.get_policy(workspace_id)))


@managed.put(
    "/v1/admin/workspaces/{workspace_id}/policy",
    response_model=resources.Policy,
    responses=errors(409, 412, 413),
)
async def set_policy(
    workspace_id: WorkspaceId, body: SetPolicy, caller: CallerDep, service: ServiceDep
) -> JSONResponse:
    """Replace a workspace's rules. Stricter ones also hold for calls that wait."""
    _check_manages(caller, workspace_id)
    stored = await service.store.set_policy(
        workspace_id, body.policy(), if_version=body.version, by=caller.actor
    )
    return JSONResponse(_policy(stored))


# -- users and service accounts


@router.get("/v1/admin/principals", response_model=resources.Principals)
async def list_principals(service: ServiceDep) -> JSONResponse:
    """List all users and service accounts."""
    return JSONResponse({"data": [_principal(one) for one in await service.store.list_principals()]})


@router.post("/v1/admin/principals", response_model=resources.Principal, responses=errors(409, 413))
async def create_principal(
    request: Request,
    body: NewPrincipal,
    caller: CallerDep,
    service: ServiceDep,
    idempotency_key: IdempotencyKey = None,
) -> JSONResponse:
    """Create a user or a service account."""
    wanted = _new_id("user" if body.kind == "user" else "svac", request, idempotency_key, service)
    made = Principal(id=wanted, created_at=utcnow(), **body.fields())
    found = await service.store.add_principal(made, by=caller.actor)
    return JSONResponse(_principal(_same(found, made)))


@router.get("/v1/admin/principals/{principal_id}", response_model=resources.Principal)
async def get_principal(principal_id: PrincipalId, service: ServiceDep) -> JSONResponse:
    """Retrieve a user or a service account."""
    return JSONResponse(_principal(await service.store.get_principal(principal_id)))


@router.post(
    "/v1/admin/principals/{principal_id}", response_model=resources.Principal, responses=errors(409, 412, 413)
)
async def update_principal(
    principal_id: PrincipalId,
    body: ChangePrincipal,
    caller: CallerDep,
    service: ServiceDep,
    idempotency_key: IdempotencyKey = None,  # the same change twice is one, with any key
) -> JSONResponse:
    """Change a user or a service account; a disabled one is refused everywhere, with all of its keys."""
    changed = await service.store.change_principal(
        principal_id, body.changes(), if_version=body.version, by=caller.actor
    )
    return JSONResponse(_principal(changed))


# -- keys


@managed.get("/v1/admin/keys", response_model=resources.Keys)
async def list_keys(caller: CallerDep, service: ServiceDep) -> JSONResponse:
    """List API keys, also those that were revoked: of the workspace's own service accounts; for an administrator, all."""
    owners = {one.id: one for one in await service.store.list_principals()}
    keys = await service.store.list_keys()
    return JSONResponse(
        {"data": [_key(key) for key in keys if _may_hand_out(caller, owners.get(key.principal_id or ""))]}
    )


@managed.post("/v1/admin/keys", response_model=resources.KeyWithSecret, responses=errors(409, 413))
async def create_key(
    request: Request,
    body: NewKey,
    caller: CallerDep,
    service: ServiceDep,
    idempotency_key: IdempotencyKey = None,
) -> JSONResponse:
    """Create an API key, for a new service account of its name unless `principal_id` says whose it is."""
    owner = await _owner(body, caller, service)
    if not _may_hand_out(caller, owner):
        raise Forbidden("a key of this user or service account opens more than what you manage")
    secret = _secret(request, idempotency_key, service.operator_key)
    made = await service.store.add_key(
        body.name,
        hash_api_key(secret),
        public_prefix(secret),
        principal=owner,
        scopes=body.scopes,
        expires_at=body.expires_at,
        by=caller.actor,
    )
    if (made.name, made.scopes, made.expires_at) != (body.name, tuple(body.scopes), body.expires_at):
        raise Conflict("this Idempotency-Key came with another request before; use a new one")
    return JSONResponse({**_key(made), "secret": secret})


@managed.delete("/v1/admin/keys/{key_id}", response_model=resources.Key, responses=errors(409))
async def revoke_key(key_id: KeyId, caller: CallerDep, service: ServiceDep) -> JSONResponse:
    """Revoke an API key. The sessions that were made with it remain."""
    await _check_key(key_id, caller, service)
    return JSONResponse(_key(await service.store.revoke_key(key_id, by=caller.actor)))


@managed.post("/v1/admin/keys/{key_id}/rotate", response_model=resources.KeyWithSecret, responses=errors(409))
async def rotate_key(
    request: Request,
    key_id: KeyId,
    caller: CallerDep,
    service: ServiceDep,
    idempotency_key: IdempotencyKey = None,
) -> JSONResponse:
    """Give an API key a new secret. The previous one stops working."""
    await _check_key(key_id, caller, service)
    secret = _secret(request, idempotency_key, service.operator_key)
    key = await service.store.rotate_key(key_id, hash_api_key(secret), public_prefix(secret), by=caller.actor)
    if key.first:
        service.secret_files.keep_api_key(secret)
    return JSONResponse({**_key(key), "secret": secret})


@operator.get("/v1/internal/decisions", response_model=resources.KeptDecisions)
async def list_kept_decisions(
    request: Request, service: ServiceDep, limit: Limit = 100, page: PageToken = None
) -> JSONResponse:
    """List the decisions of deleted sessions, of all workspaces, oldest first."""
    cursor = Cursor.of(request, page)
    found = await service.store.list_kept_decisions(limit=limit, page=cursor.page)
    return cursor.response(found, _kept)


# -- who may manage what


def _manages(caller: Caller, workspace_id: str) -> bool:
    if Action.ADMINISTER in caller.actions:
        return True
    return Action.MANAGE in caller.actions and caller.workspace_id == workspace_id


def _check_manages(caller: Caller, workspace_id: str) -> None:
    """Raises NotFound for a workspace that is not the caller's to manage, as if there were none."""
    if not _manages(caller, workspace_id):
        raise NotFound(f"there is no workspace {workspace_id!r}")


def _may_hand_out(caller: Caller, owner: Principal | None) -> bool:
    """Whether the caller may see, make and revoke the keys of a principal: they permit what it may do."""
    if Action.ADMINISTER in caller.actions:
        return True
    return owner is not None and owner.kind == "service_account" and set(owner.roles) <= {caller.workspace_id}


async def _owner(body: NewKey, caller: Caller, service: Service) -> Principal:
    """Whose a new key is. A service account that there is not yet is made with the key."""
    if body.principal_id is not None:
        return await service.store.get_principal(body.principal_id)
    known = await service.store.find_principal(name=body.name)
    if known is None:
        roles = tuple(Role(one) for one in body.roles or ("requester", "approver"))
        return Principal(
            id=new_id("svac"),
            kind="service_account",
            name=body.name,
            created_at=utcnow(),
            roles={caller.workspace_id: roles},
        )
    if known.kind == "user":
        raise Conflict(f"{body.name} is a user: name it with principal_id, or choose another name")
    if body.roles is not None and set(body.roles) != set(known.roles.get(caller.workspace_id, ())):
        raise Conflict(
            f"there is a service account {body.name} with other roles; leave roles out, or change them"
        )
    return known


async def _check_key(key_id: str, caller: Caller, service: Service) -> None:
    """Raises NotFound for a key that is not the caller's to manage, as if there were none."""
    key = await service.store.get_key(key_id)
    owner = await service.store.get_principal(key.principal_id) if key.principal_id else None
    if not _may_hand_out(caller, owner):
        raise NotFound(f"there is no key {key_id!r}")


def _new_id(prefix: str, request: Request, idempotency_key: str | None, service: Service) -> str:
    """A new id. A repeated request, which has the same idempotency key, gets the same one."""
    if idempotency_key is None:
        return new_id(prefix)
    return f"{prefix}_{hash_api_key(_secret(request, idempotency_key, service.operator_key))[:26]}"


def _same[T: (Workspace, Principal)](found: T, made: T) -> T:
    """Raises Conflict if the record that has the id of `made` is another one."""
    if found.name != made.name:
        raise Conflict("this Idempotency-Key came with another request before; use a new one")
    return found


def _secret(request: Request, idempotency_key: str | None, operator_key: str) -> str:
    """A new secret. A repeated request, which has the same idempotency key, gets the same one."""
    if idempotency_key is None:
        return new_api_key()
    return api_key_for(f"{request.url.path}\n{idempotency_key}", operator_key)


# -- on the wire


def _workspace(workspace: Workspace) -> dict[str, Any]:
    return {"type": "workspace", **workspace.model_dump(mode="json")}


def _policy(stored: StoredPolicy) -> dict[str, Any]:
    known = stored.model_dump(mode="json", exclude={"policy"})
    return {"type": "policy", **known, **stored.policy.model_dump(mode="json")}


def _principal(principal: Principal) -> dict[str, Any]:
    return {"type": "principal", **principal.model_dump(mode="json")}


def _member(principal: Principal, workspace_id: str) -> dict[str, Any]:
    return {
        "type": "member",
        "principal_id": principal.id,
        "name": principal.name,
        "kind": principal.kind,
        "roles": list(principal.roles.get(workspace_id, ())),
        "version": principal.version,
    }


def _key(key: ApiKey) -> dict[str, Any]:
    return {"type": "api_key", **key.model_dump(mode="json", exclude={"secret_hash"})}


def _kept(decision: KeptDecision) -> dict[str, Any]:
    known = decision.model_dump(mode="json", exclude={"id"}, by_alias=False)
    return {"type": "kept_decision", "approval_id": decision.id, **known}
