"""The Store's rules for workspaces, users and service accounts."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from claude_hitl_template.domain.people import EVERYWHERE, SERVICE, Actor, Principal, Role, Workspace
from claude_hitl_template.errors import Conflict, InvalidInput, NotFound, Outdated
from claude_hitl_template.store.backend import Tx
from claude_hitl_template.store.base import StoreBase
from claude_hitl_template.store.recording import record_principal, record_workspace

# Changes of people follow one another: two administrators must not remove each other, nor undo each other's change.
PEOPLE = "people"


class PeopleRules(StoreBase):
    async def list_workspaces(self) -> list[Workspace]:
        async with self._reading() as tx:
            return sorted(await tx.workspaces(), key=lambda one: (not one.default, one.name, one.id))

    async def get_workspace(self, workspace_id: str) -> Workspace:
        async with self._reading() as tx:
            return await _workspace(tx, workspace_id)

    async def add_workspace(self, workspace: Workspace, *, by: Actor = SERVICE) -> Workspace:
        async with self._writing("add_key") as tx:
            known = await tx.workspace(workspace.id)
            if known is not None:
                return known
            await _check_free(tx, workspace.name)
            await tx.put_workspace(workspace)
            record_workspace(tx, None, workspace, by, self._clock())
            return workspace

    async def change_workspace(
        self,
        workspace_id: str,
        changes: Mapping[str, Any],
        *,
        if_version: int | None = None,
        by: Actor = SERVICE,
    ) -> Workspace:
        async with self._writing("add_key") as tx:
            workspace = await _workspace(tx, workspace_id)
            changed = _changed(workspace, changes)
            if changed == workspace:
                return workspace
            check_version(workspace.version, if_version)
            if changed.name != workspace.name:
                await _check_free(tx, changed.name)
            await tx.put_workspace(changed)
            record_workspace(tx, workspace, changed, by, self._clock())
            return changed

    async def list_principals(self) -> list[Principal]:
        async with self._reading() as tx:
            return sorted(await tx.principals(), key=lambda one: (one.name, one.id))

    async def get_principal(self, principal_id: str) -> Principal:
        async with self._reading() as tx:
            return await _principal(tx, principal_id)

    async def find_principal(self, *, name: str = "", external_id: str = "") -> Principal | None:
        async with self._reading() as tx:
            return await tx.named_principal(name=name, external_id=external_id)

    async def add_principal(self, principal: Principal, *, by: Actor = SERVICE) -> Principal:
        async with self._writing("add_key") as tx:
            await tx.lock(PEOPLE)
            known = await tx.principal(principal.id)
            if known is not None:
                return known
            await check_roles(tx, principal)
            await tx.put_principal(principal)
            record_principal(tx, None, principal, by, self._clock())
            return principal

    async def change_principal(
        self,
        principal_id: str,
        changes: Mapping[str, Any],
        *,
        if_version: int | None = None,
        by: Actor = SERVICE,
    ) -> Principal:
        async with self._writing("add_key") as tx:
            await tx.lock(PEOPLE)
            principal = await _principal(tx, principal_id)
            wanted = dict(changes)
            if "disabled" in wanted:
                disabled = wanted.pop("disabled")
                wanted["disabled_at"] = (principal.disabled_at or self._clock()) if disabled else None
            changed = _changed(principal, wanted)
            if changed == principal:
                return principal
            check_version(principal.version, if_version)
            await check_roles(tx, changed)
            await check_administered(tx, principal, changed)
            await tx.put_principal(changed)
            record_principal(tx, principal, changed, by, self._clock())
            return changed


def check_version(current: int, expected: int | None) -> None:
    """Raises Outdated unless the caller changes what it has seen."""
    if expected is not None and expected != current:
        raise Outdated(
            f"it was changed meanwhile: the current version is {current}, and the change was made to {expected}"
        )


def _changed[T: (Workspace, Principal)](noun: T, changes: Mapping[str, Any]) -> T:
    """The record with checked changes. Fields that a newer version added to it stay."""
    declared = {name: getattr(noun, name) for name in type(noun).model_fields}
    try:
        checked = type(noun).model_validate({**declared, **changes})
        changed = noun.but(**{name: getattr(checked, name) for name in changes})
        return noun if changed == noun else changed.but(version=noun.version + 1)
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidInput(str(first["msg"]), ".".join(map(str, first["loc"]))) from error


async def _workspace(tx: Tx, workspace_id: str) -> Workspace:
    workspace = await tx.workspace(workspace_id)
    if workspace is None:
        raise NotFound(f"there is no workspace {workspace_id!r}")
    return workspace


async def _principal(tx: Tx, principal_id: str) -> Principal:
    principal = await tx.principal(principal_id)
    if principal is None:
        raise NotFound(f"there is no user or service account {principal_id!r}")
    return principal


async def _check_free(tx: Tx, name: str) -> None:
    if any(workspace.name == name for workspace in await tx.workspaces()):
        raise Conflict(f"there is a workspace {name!r} already")


async def check_roles(tx: Tx, principal: Principal) -> None:
    """Raises InvalidInput for a role in an unknown workspace, or one that is not of a workspace."""
    for workspace_id, roles in principal.roles.items():
        if workspace_id != EVERYWHERE and Role.ADMIN in roles:
            raise InvalidInput("admin is a role of the service; give it as a role everywhere", "roles")
        if workspace_id != EVERYWHERE and await tx.workspace(workspace_id) is None:
            raise InvalidInput(f"there is no workspace {workspace_id!r}", "roles")


async def check_administered(tx: Tx, before: Principal, after: Principal) -> None:
    """Raises Conflict if no administrator of the service would be left."""

    def administers(one: Principal) -> bool:
        return Role.ADMIN in one.roles_in(None)

    if not administers(before) or administers(after):
        return
    firsts = [key.principal_id for key in await tx.keys() if key.first]
    if after.id in firsts:
        raise Conflict(f"{before.name} has the key that ./hitl itself uses, and stays an administrator")
    if not any(administers(one) for one in await tx.principals() if one.id != after.id):
        raise Conflict(f"{before.name} is the last administrator; make another one first")
