"""Signing in, staying signed in, and signing out, over the Store."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from urllib.parse import urlsplit

import structlog
from fastapi import Request
from starlette.responses import Response

from claude_hitl_template.config.passwords import MAX_CHARS, Passwords, check_length
from claude_hitl_template.domain.group_roles import DEFAULT, EVERYONE, GroupRole
from claude_hitl_template.domain.people import EVERYWHERE, Principal, Role, Workspace
from claude_hitl_template.domain.rate_limit import network_of
from claude_hitl_template.domain.sign_in import BrowserSession, PasswordOf, ProviderUser, SignedIn
from claude_hitl_template.errors import HitlError, Unauthorized
from claude_hitl_template.signin import cookies
from claude_hitl_template.signin.addresses import CALLBACK
from claude_hitl_template.signin.attempts import Attempt, Attempts
from claude_hitl_template.signin.browser import BrowserUser, Refused
from claude_hitl_template.signin.cookies import PendingFlow, Signer
from claude_hitl_template.signin.oidc import Identity, Provider
from claude_hitl_template.store.protocol import Clients

log = structlog.get_logger()
REMEMBER_S = 0.5  # how long a session that was found is cached, and so how long an ended one may still work
REMEMBERED = 10_000
SEEN_S = 60.0  # how often at most a session's last use is recorded
MAX_NAME_CHARS, MAX_AGENT_CHARS = 200, 300


class SignIn:
    """The sign-in of one replica. Implements `browser.Users`.

    Args:
        store: Keeps users and the sessions of browsers.
        signer: Makes cookies and tokens of forms.
        passwords: Verifies passwords.
        attempts: Limits sign-ins that fail.
        provider: The sign-in provider; None: passwords only.
        roles: What the provider's groups give.
        public_url: Under which browsers reach the service; None: under the address that they used.
        clock: Seconds, never going back.
    """

    def __init__(
        self,
        store: Clients,
        signer: Signer,
        *,
        passwords: Passwords,
        attempts: Attempts | None = None,
        provider: Provider | None = None,
        roles: Sequence[GroupRole] = (),
        public_url: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._store, self.signer, self.provider = store, signer, provider
        self.passwords, self._attempts = passwords, attempts or Attempts()
        self._roles, self._public_url = roles, public_url
        self._known: OrderedDict[str, tuple[SignedIn, float]] = OrderedDict()
        self._noting = set[asyncio.Task[None]]()
        self._looking: dict[str, asyncio.Future[SignedIn | None]] = {}

    # -- who the browser is

    async def user(self, request: Request) -> BrowserUser | None:
        token = cookies.get(request, "session", secure=self.is_secure(request))
        found = await self._find(cookies.hash_token(token)) if token else None
        if found is None:
            return None
        if not found.workspace_ids:
            raise no_workspace(found.principal)
        return BrowserUser(found.principal, found.workspace_ids, self.signer.csrf(token), found.session.id)

    async def _find(self, token_hash: str) -> SignedIn | None:
        known = self._known.get(token_hash)
        if known is not None and known[1] > self._clock():
            return known[0]
        looking = self._looking.get(token_hash)
        if looking is None:  # a page's requests arrive together: one question to the ledger answers them all
            looking = self._looking[token_hash] = asyncio.ensure_future(self._look(token_hash))
            looking.add_done_callback(lambda _: self._looking.pop(token_hash, None))
        return await asyncio.shield(looking)

    async def _look(self, token_hash: str) -> SignedIn | None:
        found = await self._store.find_browser_session(token_hash, seen_s=SEEN_S)
        if found is None:
            self._known.pop(token_hash, None)
            return None
        self._known[token_hash] = found, self._clock() + REMEMBER_S
        if len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        return found

    # -- where the browser is

    def own_origin(self, request: Request) -> str:
        return self._public_url or f"{request.url.scheme}://{request.headers.get('host', '')}"

    def is_secure(self, request: Request) -> bool:
        """Whether the browser uses https, so that cookies may require it."""
        return urlsplit(self.own_origin(request)).scheme == "https"

    # -- signing in

    async def with_password(self, request: Request, name: str, password: str) -> PasswordOf:
        """The user with this name and password, and its stored hash.

        Raises Unauthorized, RateLimited, and Refused for a user who is disabled or in no workspace.
        """
        name = name.strip()
        known = self.signer.is_known(name, cookies.get(request, "known", secure=self.is_secure(request)))
        attempt = Attempt(name[:MAX_NAME_CHARS], _address(request), known)
        self._attempts.begin(attempt)
        usable = len(name) <= MAX_NAME_CHARS and len(password) <= MAX_CHARS
        found = await self._store.find_password(name) if usable else None
        stored = found and found.password_hash
        if not await self.passwords.verify(stored, password if usable else "") or found is None:
            # Not the name: people type passwords into that field, too.
            log.warning(
                "a sign-in failed", principal_id=found and found.principal.id, network=attempt.network
            )
            if found is not None and stored is not None:
                self._note_failure(found.principal, attempt.network)
            raise Unauthorized("This name and password do not belong together.")
        self._attempts.succeeded(attempt)
        await self._check_admitted(found.principal)
        return found

    def _note_failure(self, principal: Principal, network: str) -> None:
        """Has a failure recorded after the response: the time of an answer must not say which names exist."""
        noting = asyncio.create_task(self._noted(principal.id, network))
        self._noting.add(noting)
        noting.add_done_callback(self._noting.discard)

    async def _noted(self, principal_id: str, network: str) -> None:
        try:
            await self._store.note_failed_sign_in(principal_id, network=network)
        except HitlError as error:
            log.warning("a failed sign-in is not in the audit log", principal_id=principal_id, why=str(error))

    def start(self, request: Request, next_url: str) -> tuple[PendingFlow, str]:
        """A sign-in with the provider, and its cookie."""
        return self.signer.new_flow(next_url, self.own_origin(request) + CALLBACK)

    async def with_provider(
        self, provider: Provider, pending: PendingFlow, answer: Mapping[str, str]
    ) -> Principal:
        """The user that the provider names, made or changed as it says. Raises Refused."""
        identity = await provider.identify(pending.flow, answer)
        principal = await self._store.put_provider_user(
            ProviderUser(
                external_id=identity.external_id,
                issuer_host=provider.name,
                name=identity.name,
                email=identity.email,
                groups=identity.groups,
                roles=self._roles_of(identity, await self._store.list_workspaces()),
            )
        )
        await self._check_admitted(principal, identity)
        return principal

    def _roles_of(self, identity: Identity, workspaces: Sequence[Workspace]) -> dict[str, tuple[Role, ...]]:
        ids = {workspace.name: workspace.id for workspace in workspaces}
        ids |= {workspace.id: workspace.id for workspace in workspaces}
        ids |= {DEFAULT: workspace.id for workspace in workspaces if workspace.default}  # noqa: B035  (one is)
        ids[EVERYWHERE] = EVERYWHERE
        found: dict[str, tuple[Role, ...]] = {}
        for given in self._roles:
            if given.group not in (*identity.groups, EVERYONE):
                continue
            workspace = ids.get(given.workspace)
            if workspace is None:
                log.error("HITL_OIDC_ROLES names a workspace that does not exist", workspace=given.workspace)
                continue
            found[workspace] = tuple(dict.fromkeys((*found.get(workspace, ()), given.role)))
        return found

    async def _check_admitted(self, principal: Principal, identity: Identity | None = None) -> None:
        if principal.disabled_at is not None:
            raise Refused(
                f"The account {principal.name} is disabled.", "An administrator of the service can enable it."
            )
        workspaces = await self._store.list_workspaces()
        if not any(principal.roles_in(workspace.id) for workspace in workspaces):
            raise no_workspace(principal, identity)

    # -- sessions

    async def begin(
        self,
        request: Request,
        response: Response,
        principal: Principal,
        *,
        password: PasswordOf | None = None,
    ) -> BrowserSession:
        """Signs the browser in, with a new token; the session that its cookie had until now ends.

        Args:
            request: Has the browser's cookie until now.
            response: Gets the new one.
            principal: The user.
            password: What was verified; None if the provider signed the user in.

        Raises:
            Conflict: The password was changed meanwhile.
            Forbidden: The user was disabled meanwhile.
        """
        secure, token = self.is_secure(request), cookies.new_token()
        before = cookies.get(request, "session", secure=secure)
        session = await self._store.add_browser_session(
            principal.id,
            cookies.hash_token(token),
            way="password" if password else "provider",
            password_hash=password and password.password_hash,
            user_agent=request.headers.get("user-agent", "")[:MAX_AGENT_CHARS],
            network=network_of(_address(request)),
            replaces=cookies.hash_token(before) if before else None,
        )
        cookies.put(response, "session", token, secure=secure)
        cookies.put(
            response, "known", self.signer.known(principal.name), secure=secure, max_age_s=cookies.KNOWN_S
        )
        log.info("signed in", principal_id=principal.id, way=session.way, browser_session=session.id)
        return session

    async def sessions(self, user: BrowserUser) -> list[BrowserSession]:
        """The browsers in which this user is signed in, the one used last first."""
        found = await self._store.list_browser_sessions(user.principal.id)
        return sorted(found, key=lambda session: session.last_seen_at, reverse=True)

    async def roles(self, user: BrowserUser) -> list[tuple[str, str]]:
        """Name of each workspace of the user, and the user's roles there."""
        workspaces = [w for w in await self._store.list_workspaces() if w.id in user.workspace_ids]
        return [(w.name, ", ".join(sorted(user.principal.roles_in(w.id)))) for w in workspaces]

    async def end(self, user: BrowserUser, session_id: str | None = None) -> None:
        """Signs out: one browser, or all of them."""
        await self._store.end_browser_sessions(user.principal.id, session_id, by=user.actor)
        self._known.clear()  # other replicas notice within REMEMBER_S
        log.info("signed out", principal_id=user.principal.id, browser_session=session_id or "all")

    # -- the password

    async def has_password(self, user: BrowserUser) -> bool:
        found = await self._store.find_password(user.principal.name)
        return found is not None and found.password_hash is not None

    async def change_password(self, request: Request, user: BrowserUser, old: str, new: str) -> PasswordOf:
        """Changes the password, which ends every session of the user. Returns the user with the new hash.

        Raises Unauthorized for a wrong old one, RateLimited, InvalidInput for an unusable new one.
        """
        check_length(new)
        await self.with_password(request, user.principal.name, old)
        hashed = await self.passwords.hash(new)
        await self._store.set_password(user.principal.id, hashed, by=user.actor)
        self._known.clear()
        log.info("password changed", principal_id=user.principal.id)
        return PasswordOf(principal=user.principal, password_hash=hashed)


def no_workspace(principal: Principal, identity: Identity | None = None) -> Refused:
    """The refusal of a user that has no role in any workspace."""
    groups = ""
    if identity is not None:
        named = ", ".join(identity.groups[:20]) or "none"
        groups = f" The sign-in provider names these groups of yours: {named}."
    return Refused(
        f"You are {principal.name}, and you have no role in any workspace of this service.{groups}",
        "Ask an administrator of the service for a role, then sign in again.",
    )


def _address(request: Request) -> str:
    return request.client.host if request.client else ""
