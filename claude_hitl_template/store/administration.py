"""The part of `store.protocol.Clients` that administers: sign-ins, keys, people, policies and the audit log."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Literal, Protocol

from claude_hitl_template.domain.audit import Entry
from claude_hitl_template.domain.models import ApiKey, Identity, Page, StoredPolicy
from claude_hitl_template.domain.people import SCOPES, SERVICE, Actor, Principal, Scope, Workspace
from claude_hitl_template.domain.policy.tiers import WorkspacePolicy
from claude_hitl_template.domain.sign_in import BrowserSession, PasswordOf, ProviderUser, SignedIn, Way
from claude_hitl_template.store.filters import EVERY_ENTRY, AuditFilter, Order


class SignIns(Protocol):
    """Methods for the pages that people sign in to. Only hashes of passwords and tokens come here."""

    async def find_password(self, name: str) -> PasswordOf | None:
        """The user of this name, with the stored hash of the password; None if no user has the name."""
        ...

    async def set_password(
        self, principal_id: str, password_hash: str, *, only_first: bool = False, by: Actor = SERVICE
    ) -> bool:
        """Sets a user's password and ends the user's browser sessions.

        With `only_first`, a password that is there stays, and the result is False. Raises NotFound.
        """
        ...

    async def put_provider_user(self, user: ProviderUser) -> Principal:
        """The user whom a sign-in provider describes: found by `external_id`, else by an address that the provider has
        verified, else made. Groups, and the roles that came from them, are replaced.

        Raises Conflict if no administrator would be left.
        """
        ...

    async def add_browser_session(
        self,
        principal_id: str,
        token_hash: str,
        *,
        way: Way,
        password_hash: str | None = None,
        user_agent: str = "",
        network: str = "",
        replaces: str | None = None,
    ) -> BrowserSession:
        """Begins a browser's session; returns the one that has this token already.

        Args:
            principal_id: the user.
            token_hash: of the new token.
            way: how the user signed in.
            password_hash: what the password was verified against, for the way "password".
            user_agent: as the browser names itself.
            network: where it is.
            replaces: the token hash of the browser's session until now, which ends.

        Raises:
            NotFound: there is no such user.
            Forbidden: the user is disabled.
            Conflict: the user has another password now.
        """
        ...

    async def note_failed_sign_in(self, principal_id: str, *, network: str) -> None:
        """Records in the audit log that a sign-in of this user failed. Raises NotFound."""
        ...

    async def find_browser_session(self, token_hash: str, *, seen_s: float) -> SignedIn | None:
        """The session with its user; None if it ended, or the user is disabled. Its use is recorded every `seen_s`."""
        ...

    async def list_browser_sessions(self, principal_id: str) -> list[BrowserSession]: ...

    async def end_browser_sessions(
        self, principal_id: str, session_id: str | None = None, *, by: Actor = SERVICE
    ) -> None:
        """Ends one session of the user, or all of them. Raises NotFound for an unknown user."""
        ...


class Keys(Protocol):
    """Methods for API keys. Only hashes of secrets come here."""

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
        """Records a key. For a known hash it returns the existing key, which may be revoked.

        `principal` is whose it is, and is made with the key if it is new. Without, the key gets a service account, and a
        workspace with the key's id, of its own. Raises Conflict, InvalidInput as `add_principal` does.
        """
        ...

    async def find_identity(self, secret_hash: str) -> Identity | None:
        """The active key with this hash, with its principal; None if it is unknown, revoked, replaced or expired, or its
        principal is disabled."""
        ...

    async def note_key_use(self, key_id: str, at: datetime) -> None:
        """Records when a key was used last."""
        ...

    async def list_keys(self) -> list[ApiKey]:
        """All keys, oldest first, including revoked and replaced ones, without those of the panel's roles."""
        ...

    async def revoke_key(self, key_id: str, *, by: Actor = SERVICE) -> ApiKey:
        """Revokes a key; its sessions stay. Raises NotFound, and Conflict for the first key."""
        ...

    async def rotate_key(
        self, key_id: str, secret_hash: str, prefix: str = "", *, by: Actor = SERVICE
    ) -> ApiKey:
        """Replaces a key's secret. The old secret becomes invalid; the sessions stay with the key.

        Raises NotFound, and Conflict for a key that was revoked or a secret that another key has, or had.
        """
        ...

    async def set_first_key(self, secret_hash: str, prefix: str = "") -> ApiKey:
        """Sets the secret of the first key, rotating it if it had another one. A revoked or replaced secret stays
        invalid; the returned key shows that."""
        ...

    async def get_key(self, key_id: str) -> ApiKey:
        """The key with this id. Raises NotFound."""
        ...


class People(Protocol):
    """Methods for workspaces, users and service accounts."""

    async def list_workspaces(self) -> list[Workspace]:
        """All workspaces by name, the default one first."""
        ...

    async def get_workspace(self, workspace_id: str) -> Workspace:
        """Raises NotFound."""
        ...

    async def add_workspace(self, workspace: Workspace, *, by: Actor) -> Workspace:
        """Returns the one that there is, if its id is known. Raises Conflict for a name that another workspace has."""
        ...

    async def change_workspace(
        self, workspace_id: str, changes: Mapping[str, Any], *, if_version: int | None = None, by: Actor
    ) -> Workspace:
        """`changes` may hold `name` and `separation_of_duties`. Raises NotFound, Conflict, InvalidInput, Outdated. A change
        that is there already has no effect, to whatever version it was made."""
        ...

    async def list_principals(self) -> list[Principal]:
        """All users and service accounts by name."""
        ...

    async def get_principal(self, principal_id: str) -> Principal:
        """Raises NotFound."""
        ...

    async def find_principal(self, *, name: str = "", external_id: str = "") -> Principal | None:
        """By name, or by who it is for the panel or a sign-in provider; None if there is none."""
        ...

    async def add_principal(self, principal: Principal, *, by: Actor) -> Principal:
        """Returns the one that there is, if its id is known. Raises Conflict for a name or an external id that another one
        has, InvalidInput for an unknown workspace."""
        ...

    async def change_principal(
        self, principal_id: str, changes: Mapping[str, Any], *, if_version: int | None = None, by: Actor
    ) -> Principal:
        """`changes` may hold `name`, `email`, `roles`, `groups` and `disabled` (bool). A change that is there already has no
        effect, to whatever version it was made.

        Raises NotFound, Conflict (a name that is taken; the last administrator), Outdated, InvalidInput.
        """
        ...


class Policies(Protocol):
    """Methods for the rules of workspaces."""

    async def get_policy(self, workspace_id: str) -> StoredPolicy:
        """A workspace's policy. Raises NotFound for an unknown workspace."""
        ...

    async def set_policy(
        self, workspace_id: str, policy: WorkspacePolicy, *, if_version: int | None = None, by: Actor
    ) -> StoredPolicy:
        """Replaces a workspace's policy. It holds for calls that wait, too, where it is stricter.

        The same policy again changes nothing. Raises NotFound, TooLarge, and Outdated unless `if_version` is the current
        version; None replaces any version.
        """
        ...


class AuditLogs(Protocol):
    """Methods for the audit log of each workspace."""

    async def list_audit(
        self,
        workspace_id: str,
        *,
        limit: int,
        page: str | None = None,
        order: Order = "desc",
        matching: AuditFilter = EVERY_ENTRY,
    ) -> Page[Entry]:
        """Entries of a workspace's audit log, the newest first."""
        ...

    async def begin_export(
        self, workspace_id: str, export_id: str, *, form: Literal["jsonl", "ocsf"], from_seq: int, by: Actor
    ) -> dict[str, Any]:
        """Records an export in the log and returns its signed end; its `seq` is that of the new entry, the last one that is
        exported. Again with the same `export_id` nothing is recorded. Raises InvalidInput if the log has no entry
        `from_seq`."""
        ...

    async def export_audit(
        self, workspace_id: str, *, after: int, up_to: int
    ) -> tuple[list[dict[str, Any]], int]:
        """Entries with seq > `after` as far as they fit into one answer, with the checkpoints between them, and the seq of
        the last one; call it again after that one until it is `up_to`."""
        ...

    async def audit_keys(self) -> list[dict[str, str]]:
        """The public keys that sign the audit log, as JWKs."""
        ...

    async def approval_receipt(self, approval_id: str, workspace_id: str) -> dict[str, Any]:
        """The signed receipt of an approval, also of a session that was deleted.

        Raises NotFound, and Conflict while there is no decision, or for one from before the log was kept.
        """
        ...


class Administration(SignIns, Keys, People, Policies, AuditLogs, Protocol):
    """All of them."""
