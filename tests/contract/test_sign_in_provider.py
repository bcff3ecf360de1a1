"""Signing in with a provider: who the user is here, which roles the groups give, and what a user reads when it fails."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import pytest_asyncio
import structlog
from pydantic import SecretStr
from starlette.types import ASGIApp

from claude_hitl_template.domain.group_roles import read_group_roles
from claude_hitl_template.domain.people import SERVICE, Principal, Role
from claude_hitl_template.domain.sign_in import ProviderUser
from claude_hitl_template.errors import Conflict
from claude_hitl_template.signin.oidc import Client, Provider
from claude_hitl_template.store.core import CoreStore
from tests.oidc_provider import CLIENT_ID, CLIENT_SECRET, LocalProvider, local_provider
from tests.sign_in import HOST, Browser, add_user, payments, replica, said

ROLES = "approvers=default:approver;ops=default:operator;payers=payments:viewer;admins=*:admin"


@pytest_asyncio.fixture
async def there() -> AsyncIterator[LocalProvider]:
    async with local_provider() as provider:
        yield provider


def with_provider(store: CoreStore, there: LocalProvider, roles: str = ROLES, **options: Any) -> ASGIApp:
    client = Client(there.issuer, CLIENT_ID, SecretStr(CLIENT_SECRET))
    return replica(store, provider=Provider(client), roles=read_group_roles(roles), **options)


async def go_there(browser: Browser, next_url: str = "/claude-hitl/inbox") -> str:
    """Starts a sign-in, and lets the provider sign its user in. Returns where the provider sends the browser."""
    started = await browser.get(f"/sign-in/provider?next={next_url}")
    assert started.status_code == 303, said(started)
    async with httpx.AsyncClient() as elsewhere:
        answer = await elsewhere.get(started.headers["location"])
    assert answer.status_code == 303, answer.text
    back = urlsplit(answer.headers["location"])
    assert f"{back.scheme}://{back.netloc}" == browser.host
    return f"{back.path.removeprefix('/claude-hitl')}?{back.query}"


async def sign_in(browser: Browser, next_url: str = "/claude-hitl/inbox") -> httpx.Response:
    return await browser.get(await go_there(browser, next_url))


async def found(store: CoreStore, there: LocalProvider, sub: str = "u-1") -> Principal:
    principal = await store.find_principal(external_id=f"{there.issuer}|{sub}")
    assert principal is not None
    return principal


async def default_id(store: CoreStore) -> str:
    await store.set_first_key("hash of the first key")
    return next(one.id for one in await store.list_workspaces() if one.default)


def user(sub: str = "u-1", groups: Sequence[str] = ("approvers",), **claims: Any) -> dict[str, Any]:
    return {"sub": sub, "preferred_username": "ann", "groups": list(groups), **claims}


async def test_a_user_of_the_provider_is_made_signs_in_and_returns_to_the_page(
    store: CoreStore, there: LocalProvider
) -> None:
    workspace = await default_id(store)
    there.user = user()
    browser = Browser(with_provider(store, there))
    assert f"Sign in with {urlsplit(there.issuer).hostname}" in said(await browser.get("/sign-in"))
    answer = await sign_in(browser, "/claude-hitl/inbox%3Fa%3Db")
    assert (answer.status_code, answer.headers["location"]) == (303, "/claude-hitl/inbox?a=b")
    assert (await browser.get("/inbox")).json()["workspaces"] == [workspace]
    principal = await found(store, there)
    assert (principal.kind, principal.name, principal.groups) == ("user", "ann", ("approvers",))
    assert principal.roles == {workspace: (Role.APPROVER,)}
    entries = (await store.list_audit(workspace, limit=100, order="asc")).data
    log = {entry.action: entry for entry in entries}
    assert log["sign_in"].actor.id == principal.id
    host = urlsplit(there.issuer).hostname
    assert log["role.changed"].actor.name == f"sign-in provider {host}"
    assert log["role.changed"].details == {"name": "ann", "before": [], "after": ["approver"]}
    [session] = await store.list_browser_sessions(principal.id)
    assert session.way == "provider"
    account = said(await browser.get("/account"))
    assert "with the provider" in account
    assert "Change your password" not in account
    assert (await Browser(with_provider(store, there)).sign_in("ann", "")).status_code == 401


async def test_each_sign_in_replaces_the_roles_of_groups_and_keeps_those_that_were_given_here(
    store: CoreStore, there: LocalProvider
) -> None:
    workspace = await default_id(store)
    other = (await store.add_workspace(payments(), by=SERVICE)).id
    app = with_provider(store, there)
    there.user = user(groups=["approvers", "payers", "unknown"])
    browser = Browser(app)
    await sign_in(browser)
    one = await found(store, there)
    assert one.roles == {workspace: (Role.APPROVER,), other: (Role.VIEWER,)}
    given = {**one.roles, workspace: (Role.APPROVER, Role.REQUESTER)}
    await store.change_principal(one.id, {"roles": given}, by=SERVICE)
    there.user = user(groups=["ops"])
    await sign_in(Browser(app))
    two = await found(store, there)
    assert (two.id, two.groups) == (one.id, ("ops",))
    assert {w: set(roles) for w, roles in two.roles.items()} == {workspace: {Role.REQUESTER, Role.OPERATOR}}
    # The browser that was signed in before has lost the role, too.
    assert (await browser.at(with_provider(store, there)).get("/inbox")).json()["workspaces"] == [workspace]
    version = two.version
    await sign_in(Browser(app))
    assert (await found(store, there)).version == version


async def test_a_user_who_was_removed_from_every_group_reads_why_and_has_no_access(
    store: CoreStore, there: LocalProvider
) -> None:
    await default_id(store)
    app = with_provider(store, there)
    there.user = user()
    browser = Browser(app)
    await sign_in(browser)
    there.user = user(groups=["lunch"])
    refused = await sign_in(Browser(app))
    assert refused.status_code == 403
    text = said(refused)
    assert "You are ann, and you have no role in any workspace" in text
    assert "names these groups of yours: lunch" in text
    assert "Ask an administrator" in text
    assert (await found(store, there)).roles == {}
    assert (await browser.at(with_provider(store, there)).get("/inbox")).status_code == 403


async def test_every_user_may_get_a_role_and_an_unknown_workspace_is_logged(
    store: CoreStore, there: LocalProvider
) -> None:
    workspace = await default_id(store)
    there.user = {"sub": "u-1"}
    with structlog.testing.capture_logs() as logged:
        await sign_in(Browser(with_provider(store, there, "*=default:viewer;*=nowhere:approver")))
    assert (await found(store, there)).roles == {workspace: (Role.VIEWER,)}
    [entry] = [entry for entry in logged if entry["log_level"] == "error"]
    assert entry["workspace"] == "nowhere"


async def test_a_local_user_is_the_same_person_only_by_an_address_that_the_provider_has_verified(
    store: CoreStore, there: LocalProvider
) -> None:
    local = await add_user(store, "Ann Smith", email="Ann@example.org")
    app = with_provider(store, there)
    there.user = user("u-1", email="ann@example.org", email_verified=False)
    await sign_in(Browser(app))
    assert (await found(store, there, "u-1")).id != local.id
    there.user = user("u-2", email="ann@example.org", email_verified=True)
    await sign_in(Browser(app))
    linked = await found(store, there, "u-2")
    assert (linked.id, linked.name) == (local.id, "Ann Smith")
    # The address is in use by someone whom the provider knows: another subject is another person.
    there.user = user("u-3", email="ann@example.org", email_verified=True)
    await sign_in(Browser(app))
    assert (await found(store, there, "u-3")).id not in (local.id, linked.id)


async def test_no_one_gets_the_name_of_another_user(store: CoreStore, there: LocalProvider) -> None:
    await add_user(store, "admin")
    app = with_provider(store, there)
    host = urlsplit(there.issuer).hostname
    for sub, name in (("u-1", "Admin"), ("u-2", "admin"), ("u-3", "admin"), ("u-4", "x" * 300)):
        there.user = {**user(sub), "preferred_username": name}
        await sign_in(Browser(app))
    names = [(await found(store, there, sub)).name for sub in ("u-1", "u-2", "u-3", "u-4")]
    assert names == [f"Admin ({host})", f"admin ({host}, 2)", f"admin ({host}, 3)", "x" * 200]


async def test_users_who_sign_in_for_the_first_time_at_once_are_made_once_with_names_of_their_own(
    store: CoreStore,
) -> None:
    given = [ProviderUser(external_id=f"i|{n % 3}", issuer_host="i", name="ann") for n in range(12)]
    made = await asyncio.gather(*(store.put_provider_user(one) for one in given))
    assert len({one.id for one in made}) == 3
    assert sorted({one.name for one in made}) == ["ann", "ann (i)", "ann (i, 2)"]


async def test_a_subject_of_another_issuer_is_another_user(store: CoreStore, there: LocalProvider) -> None:
    await default_id(store)
    there.user = user()
    await sign_in(Browser(with_provider(store, there)))
    async with local_provider() as other:
        other.user = user()
        await sign_in(Browser(with_provider(store, other)))
        assert (await found(store, other)).id != (await found(store, there)).id


async def test_a_disabled_user_does_not_get_in_by_the_provider(
    store: CoreStore, there: LocalProvider
) -> None:
    await default_id(store)
    there.user = user()
    app = with_provider(store, there)
    await sign_in(Browser(app))
    await store.change_principal((await found(store, there)).id, {"disabled": True}, by=SERVICE)
    refused = await sign_in(Browser(app))
    assert (refused.status_code, "is disabled" in said(refused)) == (403, True)


async def test_the_last_administrator_stays_one(store: CoreStore) -> None:
    given = ProviderUser(external_id="i|1", issuer_host="i", name="ann", roles={"*": (Role.ADMIN,)})
    await store.put_provider_user(given)
    with pytest.raises(Conflict, match="last administrator"):
        await store.put_provider_user(given.but(roles={}))
    await store.put_provider_user(given.but(external_id="i|2", name="bob"))
    assert (await store.put_provider_user(given.but(roles={}))).roles == {}


async def test_a_sign_in_is_finished_by_any_replica_and_in_the_browser_that_began_it(
    store: CoreStore, there: LocalProvider
) -> None:
    await default_id(store)
    there.user = user()
    one, other = with_provider(store, there), with_provider(store, there)
    browser = Browser(one)
    back = await go_there(browser)
    stranger = await Browser(other).get(back)
    assert stranger.status_code == 400
    assert "began in another browser, or more than 10 minutes ago" in said(stranger)
    assert (await browser.at(other).get(back)).status_code == 303
    assert await browser.user() == "ann"
    again = await browser.get(back)
    assert again.status_code == 400  # the flow ended with the sign-in


async def test_a_replayed_code_is_refused_even_with_the_flows_cookie(
    store: CoreStore, there: LocalProvider
) -> None:
    await default_id(store)
    there.user = user()
    browser = Browser(with_provider(store, there))
    back = await go_there(browser)
    flow = browser.cookies["hitl_flow"]
    await browser.get(back)
    browser.set_cookie("hitl_flow", flow)
    replayed = await browser.get(back)
    assert replayed.status_code == 403
    assert "used already, or took too long. What to do: Sign in again." in said(replayed)


@pytest.mark.parametrize(
    ("what", "status", "says"),
    [
        ("down", 502, ("failed", "status 503", "HITL_OIDC_ISSUER")),
        ("another audience", 502, ("another client", "HITL_OIDC_CLIENT_ID")),
        ("clock", 502, ("5 minutes ahead", "up to 2 minutes", "synchronise")),
        ("keys", 502, ("signature is not valid", "Sign in again")),
    ],
)
async def test_a_failure_is_a_page_that_says_what_happened_and_what_to_do(
    store: CoreStore, there: LocalProvider, what: str, status: int, says: tuple[str, ...]
) -> None:
    await default_id(store)
    there.user = user()
    browser = Browser(with_provider(store, there))
    if what == "down":
        there.down = True
        answer = await browser.get("/sign-in/provider")
    else:
        back = await go_there(browser)
        if what == "another audience":
            there.claims = {"aud": "another client"}
        elif what == "clock":
            there.clock_off_s = 300
        else:
            there.published, there.key = 0, 1
        answer = await browser.get(back)
    assert answer.status_code == status
    for part in says:
        assert part in said(answer)
    assert "hitl_session" not in browser.cookies


async def test_the_providers_words_are_shown_as_text(store: CoreStore, there: LocalProvider) -> None:
    browser = Browser(with_provider(store, there))
    back = (await go_there(browser)).partition("?")[2]
    state = next(part for part in back.split("&") if part.startswith("state="))
    answer = await browser.get(
        f"/sign-in/callback?{state}&error=a&error_description=%3Cscript%3Ealert(1)%3C/script%3E"
    )
    assert answer.status_code == 403
    assert "<script>alert" not in answer.text
    assert "alert(1)" in answer.text


async def test_the_address_that_the_provider_sends_browsers_to_is_the_public_one(
    store: CoreStore, there: LocalProvider
) -> None:
    await default_id(store)
    there.user = user()
    public = "https://hitl.example.org"
    browser = Browser(with_provider(store, there, public_url=public), host=public)
    assert public != HOST
    assert (await sign_in(browser)).status_code == 303
    assert await browser.user() == "ann"


async def test_without_a_provider_there_is_no_such_page(store: CoreStore) -> None:
    browser = Browser(replica(store))
    for path in ("/sign-in/provider", "/sign-in/callback?code=a&state=b"):
        answer = await browser.get(path)
        assert (answer.status_code, "no sign-in provider" in said(answer)) == (404, True)


async def test_no_code_and_no_token_of_the_provider_is_logged(store: CoreStore, there: LocalProvider) -> None:
    await default_id(store)
    there.user = user()
    with structlog.testing.capture_logs() as logged:
        browser = Browser(with_provider(store, there))
        back = await go_there(browser)
        await browser.get(back)
        await browser.get(back)
    assert logged
    for secret in (
        back.partition("code=")[2].partition("&")[0],
        browser.cookies["hitl_session"],
        CLIENT_SECRET,
    ):
        assert secret not in str(logged)
