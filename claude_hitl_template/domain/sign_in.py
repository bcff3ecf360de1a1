"""Records of signing in: passwords, and the sessions of browsers."""

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Literal

from pydantic import Field

from claude_hitl_template.domain.models import Frozen
from claude_hitl_template.domain.people import Principal, Role

IDLE, ABSOLUTE = (
    timedelta(hours=12),
    timedelta(days=7),
)  # how long a browser's session lasts unused, and at most
type Way = Literal["password", "provider"]


class BrowserSession(Frozen):
    """A browser in which a user is signed in. Its cookie has the token, of which only the hash is stored.

    `expires_at`: it ends at this time at the latest. `network`: where it began, as `rate_limit.network_of` has it.
    """

    id: str
    token_hash: str
    principal_id: str
    way: Way
    user_agent: str = ""
    network: str = ""
    created_at: datetime
    last_seen_at: datetime
    expires_at: datetime

    def is_over(self, now: datetime) -> bool:
        return now >= self.expires_at or now >= self.last_seen_at + IDLE


class Login(Frozen):
    """How a user signs in.

    Attributes:
        password_hash: None without a password.
        provider_roles: By workspace id, what the sign-in provider's groups gave at the last sign-in. The next one takes
            away what they no longer give.
    """

    principal_id: str
    password_hash: str | None = None
    password_set_at: datetime | None = None
    provider_roles: dict[str, tuple[Role, ...]] = Field(default_factory=dict[str, tuple[Role, ...]])


class PasswordOf(Frozen):
    """A user, and the stored hash of the password; None: the user has none."""

    principal: Principal
    password_hash: str | None


class SignedIn(Frozen):
    """A browser's session with its user. `workspace_ids`: where the user has a role."""

    session: BrowserSession
    principal: Principal
    workspace_ids: tuple[str, ...]


class ProviderUser(Frozen):
    """A user as the sign-in provider describes them.

    `email` is one that the provider has verified. `roles` is by workspace id, or people.EVERYWHERE.
    """

    external_id: str
    issuer_host: str
    name: str
    email: str | None = None
    groups: tuple[str, ...] = ()
    roles: dict[str, tuple[Role, ...]] = Field(default_factory=dict[str, tuple[Role, ...]])


def replaced_roles(
    own: Mapping[str, tuple[Role, ...]],
    before: Mapping[str, tuple[Role, ...]],
    now: Mapping[str, tuple[Role, ...]],
) -> dict[str, tuple[Role, ...]]:
    """A user's roles after a sign-in with the provider.

    Args:
        own: The roles until then, by workspace id.
        before: Those that the provider's groups gave at the last sign-in, which are taken away.
        now: Those that they give now.
    """
    found: dict[str, tuple[Role, ...]] = {}
    for workspace in dict.fromkeys((*own, *now)):
        kept = [role for role in own.get(workspace, ()) if role not in before.get(workspace, ())]
        roles = tuple(dict.fromkeys((*kept, *now.get(workspace, ()))))
        if roles:
            found[workspace] = roles
    return found
