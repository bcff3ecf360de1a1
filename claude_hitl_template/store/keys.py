"""The Store's rules for API keys: made, found, replaced and revoked by the hash of their secret."""

from collections.abc import Sequence
from datetime import datetime

from claude_hitl_template.domain.models import ApiKey, Identity, new_id
from claude_hitl_template.domain.people import (
    EVERYWHERE,
    SCOPES,
    SERVICE,
    WORKSPACE_ROLES,
    Actor,
    Principal,
    Role,
    Scope,
    Workspace,
)
from claude_hitl_template.errors import Conflict, NotFound
from claude_hitl_template.store.backend import Tx
from claude_hitl_template.store.base import StoreBase
from claude_hitl_template.store.people import check_roles
from claude_hitl_template.store.recording import record_key, record_principal, record_workspace

FIRST = "./hitl key"  # the name of the first key, which ./hitl uses on the service's machine, and from which users copy it
FORMER_FIRST = "first key"  # its name in a store that an earlier version made
OF_A_ROLE = "panel:"  # what the "hash" of a key begins with that a role of the panel has; no secret opens it


class KeyRules(StoreBase):
    async def add_key(
        self,
        name: str,
        secret_hash: str,
        prefix: str = "",
        *,
        principal: Principal | None = None,
        scopes: Sequence[Scope] = SCOPES,
        expires_at: datetime | None = None,
        by: Actor = SERVICE,
    ) -> ApiKey:
        async with self._writing("add_key") as tx:
            found = await tx.find_key(secret_hash)
            if found is not None:
                return found
            if principal is not None and await tx.principal(principal.id) is None:
                await check_roles(tx, principal)
                await tx.put_principal(principal)
                record_principal(tx, None, principal, by, self._clock())
            return await self._add(
                tx,
                name,
                secret_hash,
                prefix,
                by,
                principal=principal,
                scopes=scopes,
                expires_at=expires_at,
            )

    async def find_identity(self, secret_hash: str) -> Identity | None:
        async with self._reading() as tx:
            key = await tx.find_key(secret_hash)
            found = await _identity(tx, key) if key is not None and key.principal_id is not None else None
        if key is None or not key.is_valid(self._clock()):
            return None
        if found is None:  # an earlier version made this key
            async with self._writing("add_key") as tx:
                adopted = await self._adopt(tx, await _key(tx, key.id))
                found = await _identity(tx, adopted)
        return None if found is None or found.principal.disabled_at is not None else found

    async def note_key_use(self, key_id: str, at: datetime) -> None:
        async with self._writing("add_key") as tx:
            key = await tx.key(key_id)
            if key is not None and (key.last_used_at is None or key.last_used_at < at):
                await tx.put_key(key.but(last_used_at=at))

    async def get_key(self, key_id: str) -> ApiKey:
        async with self._reading() as tx:
            return await _key(tx, key_id)

    async def list_keys(self) -> list[ApiKey]:
        async with self._reading() as tx:
            found = [key for key in await tx.keys() if not key.secret_hash.startswith(OF_A_ROLE)]
        return sorted(found, key=lambda key: (key.created_at, key.id))

    async def revoke_key(self, key_id: str, *, by: Actor = SERVICE) -> ApiKey:
        async with self._writing("add_key") as tx:
            key = await _api_key(tx, key_id)
            if key.first:
                raise Conflict(
                    f"{key_id} is the first key, which ./hitl itself uses: ./hitl keys rotate replaces its secret"
                )
            if key.revoked_at is None:
                key = key.but(revoked_at=self._clock())
                await tx.put_key(key)
                await record_key(tx, "key.revoked", key, by, self._clock())
            return key

    async def rotate_key(
        self, key_id: str, secret_hash: str, prefix: str = "", *, by: Actor = SERVICE
    ) -> ApiKey:
        async with self._writing("add_key") as tx:
            return await self._rotate(tx, await _api_key(tx, key_id), secret_hash, prefix, by)

    async def set_first_key(self, secret_hash: str, prefix: str = "") -> ApiKey:
        async with self._writing("add_key") as tx:
            found, first = await tx.find_key(secret_hash), await _first(tx)
            if found is None and first is not None:
                found = await self._rotate(tx, first, secret_hash, prefix, SERVICE)
            found = found or await self._add(tx, FIRST, secret_hash, prefix, SERVICE)
            if (found.first and found.principal_id is not None) or found.revoked_at is not None:
                return found  # a secret that was replaced opens nothing again
            if first is not None and first.id != found.id:
                await tx.put_key(first.but(first=False))
            found = (await self._adopt(tx, found)).but(first=True)
            await tx.put_key(found)
            await self._make_default(tx, found)
            return found

    async def _add(
        self,
        tx: Tx,
        name: str,
        secret_hash: str,
        prefix: str,
        by: Actor,
        *,
        principal: Principal | None = None,
        scopes: Sequence[Scope] = SCOPES,
        expires_at: datetime | None = None,
    ) -> ApiKey:
        """A key with a hash that is not known."""
        made = ApiKey(
            id=new_id("key"),
            name=name,
            secret_hash=secret_hash,
            created_at=self._clock(),
            prefix=prefix,
            principal_id=principal and principal.id,
            scopes=tuple(scopes),
            expires_at=expires_at,
        )
        await tx.add_key(made)
        kept = await tx.find_key(secret_hash) or made  # another ledger may have been first
        adopted = await self._adopt(tx, kept)
        if kept.id == made.id:
            await record_key(tx, "key.created", adopted, by, self._clock())
        return adopted

    async def _adopt(self, tx: Tx, key: ApiKey) -> ApiKey:
        """The key with a principal. One that was made without is its own: it gets a workspace with its id, to which the
        sessions belong that it made, and a service account (for a role of the panel: a user) with every role there.

        All ids follow from the key's, so that two ledgers that do this at once do the same.
        """
        if key.principal_id is not None:
            return key
        now = self._clock()
        if await tx.workspace(key.id) is None:
            workspace = Workspace(id=key.id, name=key.name, created_at=key.created_at)
            await tx.put_workspace(workspace)
            record_workspace(tx, None, workspace, SERVICE, now)
        of_a_role = key.secret_hash.startswith(OF_A_ROLE)
        suffix = key.id.partition("_")[2]
        principal_id = f"user_{suffix}" if of_a_role else f"svac_{suffix}"
        name = key.name.removeprefix("panel: ") if of_a_role else key.name
        known = await tx.principal(principal_id) or await tx.named_principal(name=name)
        principal = Principal(
            id=principal_id,
            kind="user" if of_a_role else "service_account",
            name=name if known is None else f"{name} ({suffix[-6:]})",
            created_at=key.created_at,
            external_id=key.secret_hash if of_a_role else None,
            roles={key.id: WORKSPACE_ROLES},
        )
        if (
            known is not None and of_a_role and known.kind == "user"
        ):  # a role of the panel is the user of its name
            roles = {**known.roles, key.id: WORKSPACE_ROLES}
            principal = known.but(roles=roles, version=known.version + 1)
        if known is None or known.id != principal_id or known.kind == "user":
            await tx.put_principal(principal)
            record_principal(
                tx, known if known and known.id == principal.id else None, principal, SERVICE, now
            )
        adopted = key.but(principal_id=principal.id)
        await tx.put_key(adopted)
        return adopted

    async def _make_default(self, tx: Tx, first: ApiKey) -> None:
        """Makes the first key's own workspace the default one, and its service account an administrator."""
        principal = await tx.principal(str(first.principal_id))
        if principal is None:
            raise AssertionError(f"{first.id} was given a principal, which is missing")
        home = first.id if first.id in principal.roles else next(iter(principal.workspace_ids), first.id)
        for workspace in await tx.workspaces():
            if workspace.default != (workspace.id == home):
                name = "default" if workspace.name in (FIRST, FORMER_FIRST) else workspace.name
                changed = workspace.but(default=workspace.id == home, name=name)
                await tx.put_workspace(changed)
                record_workspace(tx, workspace, changed, SERVICE, self._clock())
        roles = {**principal.roles, home: WORKSPACE_ROLES, EVERYWHERE: (Role.ADMIN,)}
        administrator = principal.but(roles=roles)
        await tx.put_principal(administrator)
        record_principal(tx, principal, administrator, SERVICE, self._clock())

    async def _rotate(self, tx: Tx, key: ApiKey, secret_hash: str, prefix: str, by: Actor) -> ApiKey:
        """The key with another secret. The one before stays known as revoked, so that nothing makes it a key again."""
        if key.secret_hash == secret_hash:
            return key
        if key.revoked_at is not None:
            raise Conflict(f"{key.id} was revoked; make another key")
        if await tx.find_key(secret_hash) is not None:
            raise Conflict("this secret is, or was, that of another key; use a new one")
        changed = key.but(secret_hash=secret_hash, prefix=prefix)
        await tx.put_key(changed)
        now = self._clock()
        former = key.but(id=new_id("key"), name=f"{key.name}, replaced", first=False, revoked_at=now)
        await tx.add_key(former)
        await record_key(tx, "key.rotated", changed, by, now, former=former.id)
        return changed


async def _identity(tx: Tx, key: ApiKey) -> Identity | None:
    principal = await tx.principal(str(key.principal_id))
    if principal is None:
        return None
    found = [await tx.workspace(name) for name in principal.workspace_ids]
    return Identity(key=key, principal=principal, workspaces=tuple(one for one in found if one is not None))


async def _key(tx: Tx, key_id: str) -> ApiKey:
    key = await tx.key(key_id)
    if key is None:
        raise NotFound(f"there is no key {key_id!r}")
    return key


async def _api_key(tx: Tx, key_id: str) -> ApiKey:
    key = await _key(tx, key_id)
    if key.secret_hash.startswith(OF_A_ROLE):
        raise NotFound(f"there is no API key {key_id!r}")
    return key


async def _first(tx: Tx) -> ApiKey | None:
    """The first key; of a store that an earlier version made, the last one that it gave this name."""
    keys = [key for key in await tx.keys() if key.revoked_at is None]
    named = sorted((key for key in keys if key.name in (FIRST, FORMER_FIRST)), key=lambda key: key.created_at)
    return next((key for key in keys if key.first), named[-1] if named else None)
