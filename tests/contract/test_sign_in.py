"""Signing in with a password: what a browser gets, what ends it, and what does not get in. On each backend."""

import asyncio
import re
from datetime import timedelta

import httpx
import pytest
import structlog

from claude_hitl_template.config.secret_files import ADMIN
from claude_hitl_template.domain.people import SERVICE, Actor, Principal, Role
from claude_hitl_template.domain.sign_in import ABSOLUTE, IDLE
from claude_hitl_template.errors import Conflict, Forbidden
from claude_hitl_template.signin.setup import make_first_user
from claude_hitl_template.store.core import CoreStore
from claude_hitl_template.testing.clock import FakeClock
from tests.sign_in import HOST, KEY, PASSWORD, PASSWORDS, Browser, add_user, payments, replica, said

NEW = "another horse battery"


def set_cookies(answer: httpx.Response) -> dict[str, str]:
    """The Set-Cookie headers, by name."""
    return {value.partition("=")[0]: value for value in answer.headers.get_list("set-cookie")}


async def test_a_user_signs_in_acts_and_signs_out(store: CoreStore) -> None:
    user = await add_user(store)
    browser = Browser(replica(store))
    asked = await browser.get("/inbox?state=pending")
    assert asked.status_code == 303
    assert asked.headers["location"] == "/claude-hitl/sign-in?next=%2Fclaude-hitl%2Finbox%3Fstate%3Dpending"
    answer = await browser.sign_in(next_url="/claude-hitl/inbox%3Fstate%3Dpending")
    assert (answer.status_code, answer.headers["location"]) == (303, "/claude-hitl/inbox?state=pending")
    assert (await browser.get("/inbox")).json()["workspaces"] == list(user.workspace_ids)
    done = await browser.post("/inbox", {"csrf": await browser.csrf(), "call": "a"})
    assert done.json()["done_by"] == user.id
    assert done.json()["form"]["call"] == "a"
    assert "Firefox on Linux (this browser)" in said(await browser.get("/account"))
    before = browser.cookies["hitl_session"]
    out = await browser.post("/sign-out", {"csrf": await browser.csrf()})
    assert (out.status_code, out.headers["location"]) == (303, "/claude-hitl/sign-in")
    assert "hitl_session" not in browser.cookies
    browser.set_cookie("hitl_session", before)
    assert await browser.user() is None


async def test_what_is_stored_opens_nothing(store: CoreStore) -> None:
    user = await add_user(store)
    browser = Browser(replica(store))
    await browser.sign_in()
    [session] = await store.list_browser_sessions(user.id)
    assert browser.cookies["hitl_session"] not in session.model_dump_json()
    thief = Browser(replica(store))
    thief.set_cookie("hitl_session", session.token_hash)
    assert await thief.user() is None


@pytest.mark.parametrize(
    ("name", "password"), [("ann", "wrong"), ("unknown", PASSWORD), ("", ""), ("ann\0", PASSWORD)]
)
async def test_a_wrong_name_and_a_wrong_password_are_answered_alike(
    store: CoreStore, name: str, password: str
) -> None:
    await add_user(store)
    answer = await Browser(replica(store)).sign_in(name, password)
    assert answer.status_code == 401
    assert "This name and password do not belong together." in said(answer)
    assert 'role="alert"' in answer.text
    assert "hitl_session" not in set_cookies(answer)


async def test_a_service_account_and_a_user_without_a_password_do_not_sign_in(store: CoreStore) -> None:
    await add_user(store, "robot", kind="service_account", password=None)
    await add_user(store, "eve", password=None)
    browser = Browser(replica(store))
    for name in ("robot", "eve", "./hitl key"):
        assert (await browser.sign_in(name, "")).status_code == 401


async def test_cookies_are_out_of_reach_for_scripts_and_other_sites(store: CoreStore) -> None:
    await add_user(store)
    plain = set_cookies(await Browser(replica(store)).sign_in())["hitl_session"].lower()
    for attribute in ("httponly", "samesite=lax", "path=/claude-hitl"):
        assert attribute in plain
    assert "secure" not in plain
    for secure in (
        Browser(replica(store), host="https://hitl.example.org"),
        Browser(replica(store, public_url=HOST.replace("http:", "https:")), host="https://hitl.example.org"),
    ):
        sent = set_cookies(await secure.sign_in())
        assert {"__Host-hitl_session", "__Host-hitl_known"} <= sent.keys()
        for cookie in sent.values():
            for attribute in ("secure", "httponly", "samesite=lax", "path=/"):
                assert attribute in cookie.lower().split("; "), cookie
            assert "domain" not in cookie.lower()


async def test_a_cookie_that_another_port_has_set_is_not_taken_over_https(store: CoreStore) -> None:
    await add_user(store)
    plain = Browser(replica(store))
    await plain.sign_in()
    secure = Browser(replica(store), host="https://hitl.example.org")
    secure.set_cookie("hitl_session", plain.cookies["hitl_session"])
    assert await secure.user() is None


async def test_signing_in_changes_the_token_and_ends_the_one_before(store: CoreStore) -> None:
    user = await add_user(store)
    browser = Browser(replica(store))
    browser.set_cookie("hitl_session", "chosen by an attacker")
    await browser.sign_in()
    first = browser.cookies["hitl_session"]
    assert first != "chosen by an attacker"
    [session] = await store.list_browser_sessions(user.id)
    browser.set_cookie("hitl_form", "f")  # from a form that was open before
    form = {"csrf": KEY.mac(b"sign-in form", "f")}
    again = await browser.post("/sign-in", {**form, "name": "ann", "password": PASSWORD})
    assert again.status_code == 303
    [other] = await store.list_browser_sessions(user.id)
    assert other.id != session.id
    assert browser.cookies["hitl_session"] != first


async def test_a_signed_in_browser_goes_on_to_where_it_wanted(store: CoreStore) -> None:
    await add_user(store)
    browser = Browser(replica(store))
    await browser.sign_in()
    assert (await browser.get("/sign-in?next=/claude-hitl/inbox")).headers["location"] == "/claude-hitl/inbox"


async def test_a_sign_in_leads_to_no_other_site(store: CoreStore) -> None:
    await add_user(store)
    for there in ("https://evil.example.org", "//evil.example.org", "/%5Cevil.example.org"):
        answer = await Browser(replica(store)).sign_in(next_url=there)
        assert answer.headers["location"] == "/claude-hitl/inbox"


# -- forms of others


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example.org", "sec_fetch_site": "cross-site"},
        {"origin": "http://hitl.example.org:8080", "sec_fetch_site": "same-site"},
        {"origin": "http://hitl.example.org:8080", "sec_fetch_site": ""},
        {"origin": "null", "sec_fetch_site": ""},
        {"origin": "", "sec_fetch_site": ""},
        {"origin": "https://hitl.example.org", "sec_fetch_site": "cross-site"},
    ],
)
async def test_a_page_of_another_origin_does_nothing(store: CoreStore, headers: dict[str, str]) -> None:
    user = await add_user(store)
    browser = Browser(replica(store))
    form = await browser.form()
    refused = await browser.post("/sign-in", {**form, "name": "ann", "password": PASSWORD}, **headers)
    assert refused.status_code == 403
    assert "another address sent this" in said(refused)
    await browser.sign_in()
    csrf = await browser.csrf()
    for path in ("/sign-out", "/account/sessions", "/account/password", "/inbox"):
        assert (await browser.post(path, {"csrf": csrf}, **headers)).status_code == 403, path
    assert await browser.user() == "ann"
    assert len(await store.list_browser_sessions(user.id)) == 1


async def test_a_form_needs_the_token_of_its_own_session(store: CoreStore) -> None:
    await add_user(store)
    await add_user(store, "bob")
    app = replica(store)
    ann, bob = Browser(app), Browser(app)
    await ann.sign_in()
    await bob.sign_in("bob")
    for wrong in ({}, {"csrf": ""}, {"csrf": await bob.csrf()}, {"csrf": "ÿ"}):
        for path in ("/sign-out", "/account/sessions", "/account/password", "/inbox"):
            refused = await ann.post(path, wrong)
            assert refused.status_code == 403
    assert await ann.user() == "ann"
    by_script = await ann.post("/inbox", {}, x_csrf_token=await ann.csrf())
    assert by_script.status_code == 200
    assert (await ann.post("/inbox", {}, x_csrf_token="wrong")).status_code == 403


async def test_the_sign_in_form_is_of_this_browser(store: CoreStore) -> None:
    await add_user(store)
    attacker, victim = Browser(replica(store)), Browser(replica(store))
    form = await attacker.form()
    await victim.form()
    for fields in (form, {**form, "csrf": ""}):
        answer = await victim.post("/sign-in", {**fields, "name": "ann", "password": PASSWORD})
        assert answer.status_code == 400
        assert "too old" in said(answer)
        assert "hitl_session" not in set_cookies(answer)


async def test_a_script_of_a_page_is_sent_to_the_sign_in_page(store: CoreStore) -> None:
    browser = Browser(replica(store))
    answer = await browser.get(
        "/inbox", **{"hx-request": "true", "hx-current-url": f"{HOST}/claude-hitl/inbox?a=b"}
    )
    assert answer.status_code == 401
    assert answer.headers["hx-redirect"] == "/claude-hitl/sign-in?next=%2Fclaude-hitl%2Finbox%3Fa%3Db"
    elsewhere = {"hx-request": "true", "hx-current-url": "http://evil.example.org/claude-hitl/x"}
    answer = await browser.get("/inbox", **elsewhere)
    assert answer.headers["hx-redirect"] == "/claude-hitl/sign-in?next=%2Fclaude-hitl%2Finbox"
    posted = await browser.post("/inbox", {}, referer=f"{HOST}/claude-hitl/inbox/a")
    assert posted.headers["location"] == "/claude-hitl/sign-in?next=%2Fclaude-hitl%2Finbox%2Fa"


# -- the end of a session


@pytest.mark.parametrize("end", ["signed out", "signed out everywhere", "disabled", "new password"])
async def test_an_end_counts_in_every_replica_within_half_a_second(store: CoreStore, end: str) -> None:
    user = await add_user(store)
    now = 1000.0
    one, other = (replica(store, clock=lambda: now) for _ in range(2))
    here = Browser(one)
    await here.sign_in()
    there = here.at(other)
    assert (await here.user(), await there.user()) == ("ann", "ann")
    if end == "signed out":
        [session] = await store.list_browser_sessions(user.id)
        await store.end_browser_sessions(user.id, session.id)
    elif end == "signed out everywhere":
        await store.end_browser_sessions(user.id)
    elif end == "disabled":
        await store.change_principal(user.id, {"disabled": True}, by=SERVICE)
    else:
        await store.set_password(user.id, "another hash")
    now += 0.51
    assert (await here.user(), await there.user()) == (None, None)


async def test_a_new_password_ends_every_session_but_the_one_that_changed_it(store: CoreStore) -> None:
    user = await add_user(store)
    app = replica(store)
    here, elsewhere = Browser(app), Browser(app)
    await here.sign_in()
    await elsewhere.sign_in()
    before = here.cookies["hitl_session"]
    fields = {"csrf": await here.csrf(), "old": PASSWORD, "new": NEW, "again": NEW}
    for wrong, status, says in (
        ({"old": "wrong"}, 401, "do not belong together"),
        ({"new": "short", "again": "short"}, 400, "12 to 1024 characters"),
        ({"again": "different horse"}, 400, "two new passwords differ"),
    ):
        answer = await here.post("/account/password", {**fields, **wrong})
        assert (answer.status_code, says in said(answer)) == (status, True), said(answer)
    changed = await here.post("/account/password", fields)
    assert changed.status_code == 303
    assert "The password is changed" in said(await here.at(app).get("/account?password-changed=yes"))
    assert here.cookies["hitl_session"] != before
    fresh = replica(store)
    assert await here.at(fresh).user() == "ann"
    assert await elsewhere.at(fresh).user() is None
    assert len(await store.list_browser_sessions(user.id)) == 1
    assert (await Browser(fresh).sign_in()).status_code == 401
    assert (await Browser(fresh).sign_in(password=NEW)).status_code == 303


async def test_one_browser_or_all_are_signed_out(store: CoreStore) -> None:
    user, stranger = await add_user(store), await add_user(store, "bob")
    app = replica(store)
    here, there, third, bobs = (Browser(app) for _ in range(4))
    for browser in (here, there, third):
        await browser.sign_in()
    await bobs.sign_in("bob")
    sessions = await store.list_browser_sessions(user.id)
    [of_bob] = await store.list_browser_sessions(stranger.id)
    csrf = await here.csrf()
    await here.post("/account/sessions", {"csrf": csrf, "session_id": of_bob.id})
    ids = {one.id for one in sessions}
    page = (await there.get("/account")).text
    shown = set(re.findall(r'name="session_id" value="([^"]+)"', page))
    assert shown < ids
    assert len(shown) == 2
    await here.post("/account/sessions", {"csrf": csrf, "session_id": sorted(shown)[0]})
    assert len(await store.list_browser_sessions(user.id)) == 2
    still = here if await here.at(replica(store)).user() else third
    answer = await still.post("/account/sessions", {"csrf": await still.csrf()})
    assert answer.headers["location"] == "/claude-hitl/sign-in"
    assert await store.list_browser_sessions(user.id) == []
    assert await bobs.at(replica(store)).user() == "bob"


async def test_a_session_ends_unused_after_twelve_hours_and_at_most_after_seven_days(
    store: CoreStore, clock: FakeClock
) -> None:
    await add_user(store)
    browser = Browser(replica(store))
    await browser.sign_in()

    async def later(by: timedelta) -> str | None:
        clock.now += by
        return await browser.at(replica(store)).user()

    assert await later(IDLE - timedelta(minutes=2)) == "ann"
    assert await later(IDLE - timedelta(minutes=2)) == "ann"
    assert await later(IDLE) is None
    await browser.sign_in()
    began = clock.now
    while clock.now - began + IDLE < ABSOLUTE:
        assert await later(IDLE - timedelta(minutes=1)) == "ann"
    clock.now = began + ABSOLUTE - timedelta(seconds=1)
    assert await later(timedelta(0)) == "ann"
    assert await later(timedelta(seconds=1)) is None


async def test_a_password_that_was_changed_meanwhile_does_not_sign_in(store: CoreStore) -> None:
    user = await add_user(store)
    found = await store.find_password("ann")
    assert found is not None
    await store.set_password(user.id, await PASSWORDS.hash(NEW))
    with pytest.raises(Conflict, match="changed meanwhile"):
        await store.add_browser_session(user.id, "t", way="password", password_hash=found.password_hash)
    await store.change_principal(user.id, {"disabled": True}, by=SERVICE)
    with pytest.raises(Forbidden, match="disabled"):
        await store.add_browser_session(user.id, "t", way="provider")


async def test_repeated_writes_have_no_further_effect(store: CoreStore) -> None:
    user = await add_user(store)
    one = await store.add_browser_session(user.id, "t", way="provider", user_agent="u", network="n")
    assert one == await store.add_browser_session(user.id, "t", way="provider")
    found = await store.find_password("ann")
    assert found is not None
    assert found.password_hash is not None
    assert await store.set_password(user.id, found.password_hash)
    assert len(await store.list_browser_sessions(user.id)) == 1  # the same password ends no session
    assert not await store.set_password(user.id, "other", only_first=True)
    for _ in range(2):
        await store.end_browser_sessions(user.id, one.id)
    assert await store.find_browser_session("t", seen_s=60) is None


# -- who is not let in


async def test_a_disabled_user_and_a_user_without_a_role_read_why(store: CoreStore) -> None:
    user = await add_user(store)
    app = replica(store)
    await store.change_principal(user.id, {"disabled": True}, by=SERVICE)
    answer = await Browser(app).sign_in()
    assert answer.status_code == 403
    assert "The account ann is disabled. What to do: An administrator" in said(answer)
    await store.change_principal(user.id, {"disabled": False, "roles": {}}, by=SERVICE)
    answer = await Browser(app).sign_in()
    assert answer.status_code == 403
    assert "no role in any workspace of this service. What to do: Ask an administrator" in said(answer)
    assert await store.list_browser_sessions(user.id) == []


async def test_a_user_who_loses_the_last_role_sees_nothing_more_and_may_sign_in_as_another(
    store: CoreStore,
) -> None:
    user, _ = await add_user(store), await add_user(store, "bob")
    browser = Browser(replica(store))
    await browser.sign_in()
    await store.change_principal(user.id, {"roles": {}}, by=SERVICE)
    after = browser.at(replica(store))
    refused = await after.get("/inbox")
    assert refused.status_code == 403
    assert "no role in any workspace" in said(refused)
    assert (await after.get("/account")).status_code == 403
    assert (await after.sign_in("bob")).status_code == 303
    assert await after.user() == "bob"


async def test_roles_are_those_of_now(store: CoreStore) -> None:
    user = await add_user(store)
    other = await store.add_workspace(payments(), by=SERVICE)
    browser = Browser(replica(store))
    await browser.sign_in()
    await store.change_principal(user.id, {"roles": {other.id: (Role.VIEWER,)}}, by=SERVICE)
    assert (await browser.at(replica(store)).get("/inbox")).json()["workspaces"] == [other.id]


async def test_guessing_is_slowed_down_and_the_user_signs_in_from_elsewhere(store: CoreStore) -> None:
    await add_user(store)
    app = replica(store)
    guesser = Browser(app)
    for _ in range(6):
        assert (await guesser.sign_in(password="wrong")).status_code == 401
    refused = await guesser.sign_in()
    assert refused.status_code == 429
    assert refused.headers["retry-after"] == "2"
    assert "Too many sign-ins failed. Wait 2 s" in said(refused)
    assert (await Browser(app, address="198.51.100.1").sign_in()).status_code == 303


async def failure_is_recorded(store: CoreStore, user: Principal) -> None:
    async with asyncio.timeout(5):
        while not any(
            entry.action == "sign_in.failed"
            for entry in (await store.list_audit(user.workspace_ids[0], limit=9)).data
        ):
            await asyncio.sleep(0.01)


async def test_every_sign_in_and_its_end_is_in_the_audit_log_with_who_did_it(store: CoreStore) -> None:
    user = await add_user(store)
    browser = Browser(replica(store))
    await browser.sign_in("unknown", "wrong")
    await browser.sign_in(password="wrong")
    await failure_is_recorded(store, user)
    await browser.sign_in()
    csrf = await browser.csrf()
    await browser.post("/account/password", {"csrf": csrf, "old": PASSWORD, "new": NEW, "again": NEW})
    await browser.post("/sign-out", {"csrf": await browser.at(replica(store)).csrf()})
    admin = Actor(name="./hitl")
    await browser.sign_in(password=NEW)
    await store.end_browser_sessions(user.id, by=admin)
    found = await store.list_audit(user.workspace_ids[0], limit=100, order="asc")
    entries = [
        entry for entry in found.data if entry.action.startswith("sign_") or "password" in entry.details
    ]
    assert [(entry.action, entry.actor.name) for entry in entries] == [
        ("principal.changed", "claude-hitl"),
        ("sign_in.failed", "ann"),
        ("sign_in", "ann"),
        ("principal.changed", "ann"),
        ("sign_in", "ann"),
        ("sign_out", "ann"),
        ("sign_in", "ann"),
        ("sign_out", "./hitl"),
    ]
    assert entries[2].details == {"way": "password", "network": "192.0.2.1"}
    for secret in (PASSWORD, NEW, "wrong"):
        assert secret not in str(entries)


# -- secrets


async def test_no_password_and_no_token_is_logged(store: CoreStore) -> None:
    canary = "canary-of-a-password"
    await add_user(store, password=canary)
    with structlog.testing.capture_logs() as logged:
        browser = Browser(replica(store))
        await browser.sign_in(password=f"{canary}-wrong")
        await browser.sign_in(canary, "ann")  # into the wrong field
        await browser.sign_in(password=canary)
        session, csrf = browser.cookies["hitl_session"], await browser.csrf()
        await browser.post(
            "/account/password", {"csrf": csrf, "old": canary, "new": f"{canary}-2", "again": f"{canary}-2"}
        )
        await browser.post("/sign-out", {"csrf": "wrong"})
    assert {entry["event"] for entry in logged} >= {"a sign-in failed", "signed in", "password changed"}
    for secret in (canary, session, csrf, browser.cookies["hitl_session"]):
        assert secret not in str(logged)


async def test_every_page_forbids_what_it_does_not_need(store: CoreStore) -> None:
    await add_user(store)
    browser = Browser(replica(store))
    answers = [
        await browser.get("/sign-in"),
        await browser.get("/sign-in/callback"),
        await browser.get("/account/x"),
    ]
    await browser.sign_in()
    answers += [await browser.get("/account"), await browser.get("/account")]
    for answer in answers:
        csp = answer.headers["content-security-policy"]
        assert "default-src 'none'" in csp
        assert "unsafe-inline" not in csp
        assert "frame-ancestors 'none'" in csp
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert not re.search(r"<style|<script(?![^>]* src=)| style=| on\w+=", answer.text)


async def test_what_a_user_typed_is_shown_as_text(store: CoreStore) -> None:
    name = '"><script>alert(1)</script>\u202e'
    answer = await Browser(replica(store)).sign_in(name, "x")
    assert "<script>alert" not in answer.text
    await add_user(store, "<b>eve</b>\u202egnp")
    browser = Browser(replica(store))
    await browser.sign_in("<b>eve</b>\u202egnp")
    page = (await browser.get("/account")).text
    assert "<b>eve" not in page
    assert "\u202e" not in page.replace('value="&lt;b&gt;eve&lt;/b&gt;\u202egnp"', "")


async def test_a_form_that_is_too_large_is_refused(store: CoreStore) -> None:
    browser = Browser(replica(store))
    form = await browser.form()
    for fields in ({"name": "x" * 17_000}, {f"field{n}": "x" for n in range(20)}):
        assert (await browser.post("/sign-in", {**form, **fields})).status_code == 400
    assert (await browser.sign_in("x" * 201, "y" * 1025)).status_code == 401


# -- the first user


async def test_replicas_that_start_at_once_make_one_admin(store: CoreStore) -> None:
    await store.set_first_key("hash of the first key")
    await asyncio.gather(*(make_first_user(store, PASSWORDS, "the generated one") for _ in range(4)))
    assert [one.name for one in await store.list_principals() if one.kind == "user"] == [ADMIN]
    assert (await Browser(replica(store)).sign_in(ADMIN, "the generated one")).status_code == 303


async def test_the_first_start_makes_an_admin_once(store: CoreStore) -> None:
    await store.set_first_key("hash of the first key")
    await make_first_user(store, PASSWORDS, None)
    assert await store.find_principal(name=ADMIN) is None
    for _ in range(2):
        await make_first_user(store, PASSWORDS, "the generated one")
    browser = Browser(replica(store))
    assert (await browser.sign_in(ADMIN, "the generated one")).status_code == 303
    admin = await store.find_principal(name=ADMIN)
    assert admin is not None
    [default] = [one for one in await store.list_workspaces() if one.default]
    assert admin.roles_in(default.id) == set(Role)
    await store.set_password(admin.id, await PASSWORDS.hash(NEW))
    await make_first_user(store, PASSWORDS, "the generated one")
    assert (await browser.at(replica(store)).sign_in(ADMIN, "the generated one")).status_code == 401
