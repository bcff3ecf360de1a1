"""Builds the sign-in of a replica from the settings, and makes the first user."""

import structlog

from claude_hitl_template.config.passwords import Passwords
from claude_hitl_template.config.secret_files import ADMIN, SigningKey, read_oidc_secret
from claude_hitl_template.config.settings import Settings
from claude_hitl_template.domain.group_roles import read_group_roles
from claude_hitl_template.domain.models import utcnow
from claude_hitl_template.domain.people import EVERYWHERE, SERVICE, WORKSPACE_ROLES, Principal, Role
from claude_hitl_template.signin.cookies import Signer
from claude_hitl_template.signin.oidc import Client, Provider
from claude_hitl_template.signin.service import SignIn
from claude_hitl_template.store.protocol import Clients

log = structlog.get_logger()


def build_sign_in(
    settings: Settings, store: Clients, signing_key: SigningKey, passwords: Passwords
) -> SignIn:
    """Raises ConfigError."""
    return SignIn(
        store,
        Signer(signing_key),
        passwords=passwords,
        provider=_provider(settings),
        roles=read_group_roles(settings.oidc_roles),
        public_url=settings.public_url,
    )


def _provider(settings: Settings) -> Provider | None:
    if settings.oidc_issuer is None:
        return None
    client = Client(
        issuer=settings.oidc_issuer,
        client_id=settings.oidc_client_id or "",  # Settings requires it
        secret=read_oidc_secret(settings),
        groups_claim=settings.oidc_groups_claim,
        scopes=settings.oidc_scopes,
    )
    return Provider(client)


async def make_first_user(store: Clients, passwords: Passwords, password: str | None) -> None:
    """Makes the user ADMIN, with every role in the default workspace and in the service, unless it has a password.

    Args:
        store: Has the default workspace already.
        passwords: Hashes the password.
        password: The generated one; None: its file was removed, and nothing is made.
    """
    found = await store.find_principal(name=ADMIN)
    if password is None or (found is not None and found.kind != "user"):
        return
    known = await store.find_password(ADMIN)
    if known is not None and known.password_hash is not None:
        return
    if found is None:
        found = await _add_admin(store)
    if await store.set_password(found.id, await passwords.hash(password), only_first=True):
        log.info("the user admin can sign in; ./hitl status --show-secrets shows the password")


async def _add_admin(store: Clients) -> Principal:
    default = next(workspace for workspace in await store.list_workspaces() if workspace.default)
    made = Principal(
        id=f"user_{ADMIN}",  # the same in each replica
        kind="user",
        name=ADMIN,
        created_at=utcnow(),
        roles={default.id: WORKSPACE_ROLES, EVERYWHERE: (Role.ADMIN,)},
    )
    return await store.add_principal(made, by=SERVICE)
