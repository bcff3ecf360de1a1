"""The Store's rules for API keys: made, found, replaced and revoked by the hash of their secret."""

from claude_hitl_template.domain.models import ApiKey, new_id
from claude_hitl_template.errors import Conflict, NotFound
from claude_hitl_template.store.backend import Tx
from claude_hitl_template.store.base import StoreBase

FIRST = "./hitl key"  # the name of the first key, which ./hitl uses on the service's machine, and from which users copy it
FORMER_FIRST = "first key"  # its name in a store that an earlier version made
OF_A_ROLE = "panel:"  # what the "hash" of a key begins with that a role of the panel has; no secret opens it


class KeyRules(StoreBase):
    async def add_key(self, name: str, secret_hash: str, prefix: str = "") -> ApiKey:
        async with self._writing("add_key") as tx:
            return await self._add(tx, name, secret_hash, prefix)

    async def find_key(self, secret_hash: str) -> ApiKey | None:
        async with self._reading() as tx:
            key = await tx.find_key(secret_hash)
        return key if key is not None and key.revoked_at is None else None

    async def get_key(self, key_id: str) -> ApiKey:
        async with self._reading() as tx:
            return await _key(tx, key_id)

    async def list_keys(self) -> list[ApiKey]:
        async with self._reading() as tx:
            found = [key for key in await tx.keys() if not key.secret_hash.startswith(OF_A_ROLE)]
        return sorted(found, key=lambda key: (key.created_at, key.id))

    async def revoke_key(self, key_id: str) -> ApiKey:
        async with self._writing("add_key") as tx:
            key = await _api_key(tx, key_id)
            if key.first:
                raise Conflict(
                    f"{key_id} is the first key, which ./hitl itself uses: ./hitl keys rotate replaces its secret"
                )
            if key.revoked_at is None:
                key = key.but(revoked_at=self._clock())
                await tx.put_key(key)
            return key

    async def rotate_key(self, key_id: str, secret_hash: str, prefix: str = "") -> ApiKey:
        async with self._writing("add_key") as tx:
            return await self._rotate(tx, await _api_key(tx, key_id), secret_hash, prefix)

    async def set_first_key(self, secret_hash: str, prefix: str = "") -> ApiKey:
        async with self._writing("add_key") as tx:
            found, first = await tx.find_key(secret_hash), await _first(tx)
            if found is None and first is not None:
                found = await self._rotate(tx, first, secret_hash, prefix)
            found = found or await self._add(tx, FIRST, secret_hash, prefix)
            if found.first or found.revoked_at is not None:  # a secret that was replaced opens nothing again
                return found
            if first is not None and first.id != found.id:
                await tx.put_key(first.but(first=False))
            found = found.but(first=True)
            await tx.put_key(found)
            return found

    async def _add(self, tx: Tx, name: str, secret_hash: str, prefix: str) -> ApiKey:
        found = await tx.find_key(secret_hash)
        if found:
            return found
        made = ApiKey(
            id=new_id("key"), name=name, secret_hash=secret_hash, created_at=self._clock(), prefix=prefix
        )
        await tx.add_key(made)
        return await tx.find_key(secret_hash) or made  # another ledger may have been first

    async def _rotate(self, tx: Tx, key: ApiKey, secret_hash: str, prefix: str) -> ApiKey:
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
        return changed


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
