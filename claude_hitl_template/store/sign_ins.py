"""The Store's rules for signing in: passwords, users of a sign-in provider, and the sessions of browsers."""

from collections.abc import Iterator
from datetime import timedelta

from claude_hitl_template.domain.models import new_id
from claude_hitl_template.domain.people import SERVICE, Actor, Principal
from claude_hitl_template.domain.sign_in import (
    ABSOLUTE,
    BrowserSession,
    Login,
    PasswordOf,
    ProviderUser,
    SignedIn,
    Way,
    replaced_roles,
)
from claude_hitl_template.errors import Conflict, Forbidden, NotFound
from claude_hitl_template.store.backend import Tx
from claude_hitl_template.store.base import StoreBase
from claude_hitl_template.store.people import PEOPLE, check_administered
from claude_hitl_template.store.recording import record_principal, record_sign_in

NAME_CHARS = 200


class SignInRules(StoreBase):
    # -- passwords

    async def find_password(self, name: str) -> PasswordOf | None:
        async with self._reading() as tx:
            principal = await tx.named_principal(name=name)
            if principal is None or principal.kind != "user":
                return None
            login = await tx.login(principal.id)
            return PasswordOf(principal=principal, password_hash=login and login.password_hash)

    async def set_password(
        self, principal_id: str, password_hash: str, *, only_first: bool = False, by: Actor = SERVICE
    ) -> bool:
        async with self._writing("add_key") as tx:
            principal = await _user(tx, principal_id)
            login = await tx.login(principal_id) or Login(principal_id=principal_id)
            if only_first and login.password_hash is not None:
                return False
            if login.password_hash != password_hash:
                await tx.put_login(login.but(password_hash=password_hash, password_set_at=self._clock()))
                await _end(tx, await tx.browser_sessions(principal_id))
                changed = {"name": principal.name, "password": "changed"}
                record_sign_in(
                    tx, "principal.changed", principal, by, target=principal_id, now=self._clock(), **changed
                )
            return True

    # -- users of a sign-in provider

    async def put_provider_user(self, user: ProviderUser) -> Principal:
        async with self._writing("add_key") as tx:
            await tx.lock(PEOPLE)
            found = await tx.named_principal(external_id=user.external_id) or await _linked(tx, user)
            before = found or Principal(
                id=new_id("user"), kind="user", name=await _free_name(tx, user), created_at=self._clock()
            )
            login = await tx.login(before.id) or Login(principal_id=before.id)
            changed = before.but(
                external_id=user.external_id,
                email=user.email or before.email,
                groups=user.groups,
                roles=replaced_roles(before.roles, login.provider_roles, user.roles),
            )
            if found is not None and changed != found:
                changed = changed.but(version=found.version + 1)
                await check_administered(tx, found, changed)
            if changed != found:
                await tx.put_principal(changed)
                provider = Actor(name=f"sign-in provider {user.issuer_host}")
                record_principal(tx, found, changed, provider, self._clock())
            if login.provider_roles != user.roles:
                await tx.put_login(login.but(provider_roles=user.roles))
            return changed

    # -- the sessions of browsers

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
        async with self._writing("add_key") as tx:
            known = await tx.browser_session(token_hash)
            if known is not None:
                return known
            principal = await self._admitted(tx, principal_id, way, password_hash)
            now = self._clock()
            former = await tx.browser_session(replaces) if replaces else None
            await _end(tx, [former] if former else [])
            await tx.forget_browser_sessions(now)
            made = BrowserSession(
                id=new_id("bses"),
                token_hash=token_hash,
                principal_id=principal_id,
                way=way,
                user_agent=user_agent,
                network=network,
                created_at=now,
                last_seen_at=now,
                expires_at=now + ABSOLUTE,
            )
            await tx.put_browser_session(made)
            user = _actor(principal)
            record_sign_in(tx, "sign_in", principal, user, target=made.id, now=now, way=way, network=network)
            return made

    async def note_failed_sign_in(self, principal_id: str, *, network: str) -> None:
        async with self._writing("add_key") as tx:
            user, now = await _user(tx, principal_id), self._clock()
            record_sign_in(
                tx, "sign_in.failed", user, _actor(user), target=principal_id, now=now, network=network
            )

    async def _admitted(self, tx: Tx, principal_id: str, way: Way, password_hash: str | None) -> Principal:
        """The user. Raises Forbidden, Conflict for what changed since the sign-in was checked."""
        principal = await _user(tx, principal_id)
        if principal.disabled_at is not None:
            raise Forbidden("this account is disabled")
        if way == "password":
            login = await tx.login(principal_id)
            if login is None or login.password_hash != password_hash:
                raise Conflict("the password was changed meanwhile; sign in again")
        return principal

    async def find_browser_session(self, token_hash: str, *, seen_s: float) -> SignedIn | None:
        async with self._reading() as tx:
            found = await self._signed_in(tx, token_hash)
        if found is None or self._clock() - found.session.last_seen_at < timedelta(seconds=seen_s):
            return found
        async with self._writing("add_key") as tx:
            found = await self._signed_in(tx, token_hash)
            if found is None:
                return None
            seen = found.session.but(last_seen_at=self._clock())
            await tx.put_browser_session(seen)
            return found.but(session=seen)

    async def _signed_in(self, tx: Tx, token_hash: str) -> SignedIn | None:
        session = await tx.browser_session(token_hash)
        if session is None or session.is_over(self._clock()):
            return None
        principal = await tx.principal(session.principal_id)
        if principal is None or principal.disabled_at is not None:
            return None
        ids = sorted(workspace.id for workspace in await tx.workspaces() if principal.roles_in(workspace.id))
        return SignedIn(session=session, principal=principal, workspace_ids=tuple(ids))

    async def list_browser_sessions(self, principal_id: str) -> list[BrowserSession]:
        async with self._reading() as tx:
            return [one for one in await tx.browser_sessions(principal_id) if not one.is_over(self._clock())]

    async def end_browser_sessions(
        self, principal_id: str, session_id: str | None = None, *, by: Actor = SERVICE
    ) -> None:
        async with self._writing("add_key") as tx:
            user, found = await _user(tx, principal_id), await tx.browser_sessions(principal_id)
            for session in found:
                if session_id in (None, session.id):
                    await _end(tx, [session])
                    record_sign_in(
                        tx, "sign_out", user, by, target=session.id, now=self._clock(), user=user.name
                    )


async def _user(tx: Tx, principal_id: str) -> Principal:
    principal = await tx.principal(principal_id)
    if principal is None or principal.kind != "user":
        raise NotFound(f"there is no user {principal_id!r}")
    return principal


def _actor(principal: Principal) -> Actor:
    return Actor(name=principal.name, principal_id=principal.id)


async def _end(tx: Tx, sessions: list[BrowserSession]) -> None:
    for session in sessions:
        await tx.delete_browser_session(session.id)


async def _linked(tx: Tx, user: ProviderUser) -> Principal | None:
    """The local user with this address, which the provider has verified, unless another one of a provider has it."""
    if user.email is None:
        return None
    email = user.email.casefold()
    found = [one for one in await tx.principals() if (one.email or "").casefold() == email]
    if len(found) != 1 or found[0].kind != "user" or found[0].external_id is not None:
        return None
    return found[0]


async def _free_name(tx: Tx, user: ProviderUser) -> str:
    """A name that no one has. Decisions are recorded under it, so it must not be another user's, whatever its case."""
    taken = {one.name.casefold() for one in await tx.principals()}
    return next(name for name in _names(user) if name.casefold() not in taken)


def _names(user: ProviderUser) -> Iterator[str]:
    yield user.name[:NAME_CHARS]
    suffix = f" ({user.issuer_host})"[: NAME_CHARS // 2]
    yield user.name[: NAME_CHARS - len(suffix)] + suffix
    number = 2
    while True:
        suffix = f" ({user.issuer_host}, {number})"[-NAME_CHARS // 2 :]
        yield user.name[: NAME_CHARS - len(suffix)] + suffix
        number += 1
