"""The Store's rules for the policies of workspaces."""

from claude_hitl_template.domain.models import StoredPolicy
from claude_hitl_template.domain.people import Actor
from claude_hitl_template.domain.policy.tiers import WorkspacePolicy
from claude_hitl_template.errors import NotFound, Outdated
from claude_hitl_template.store.backend import Tx
from claude_hitl_template.store.base import StoreBase, wake_topic
from claude_hitl_template.store.people import check_version
from claude_hitl_template.store.recording import record_policy


class PolicyRules(StoreBase):
    async def get_policy(self, workspace_id: str) -> StoredPolicy:
        async with self._reading() as tx:
            return await _policy(tx, workspace_id)

    async def set_policy(
        self, workspace_id: str, policy: WorkspacePolicy, *, if_version: int | None = None, by: Actor
    ) -> StoredPolicy:
        # Read in a transaction of its own: a lock that two writers share and then both want to raise is a deadlock.
        stored = await self.get_policy(workspace_id)
        if stored.policy == policy:
            return stored
        check_version(stored.version, if_version)
        async with self._writing("add_key") as tx:
            made = StoredPolicy(
                workspace_id=workspace_id,
                version=stored.version + 1,
                policy=policy,
                changed_at=self._clock(),
                changed_by=by.name,
            )
            if not await tx.put_policy(made):
                raise Outdated("it was changed at the same time; read the current version, and change that")
            record_policy(tx, stored, made, by, self._clock())
        await self._wake_owners()
        return made

    async def _wake_owners(self) -> None:
        """Owners read the policy with their session, at the latest when they renew their lease."""
        async with self._reading() as tx:
            owned = [one.id for one in await tx.supervised() if one.lease is not None]
        for session_id in owned:
            self._notify(wake_topic(session_id))


async def _policy(tx: Tx, workspace_id: str) -> StoredPolicy:
    if await tx.workspace(workspace_id) is None:
        raise NotFound(f"there is no workspace {workspace_id!r}")
    return await tx.policy(workspace_id) or StoredPolicy(workspace_id=workspace_id)
