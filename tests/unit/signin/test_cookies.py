"""Which attributes the cookies have, and that their values are made here."""

import base64
import json

import pytest
from starlette.responses import Response

from claude_hitl_template.config.secret_files import SigningKey
from claude_hitl_template.signin import cookies
from claude_hitl_template.signin.addresses import HOME, own_path
from claude_hitl_template.signin.cookies import FLOW_S, Signer


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def signer(clock: Clock) -> Signer:
    return Signer(SigningKey(b"k" * 32), clock)


def attributes(*, secure: bool) -> tuple[str, set[str]]:
    response = Response()
    cookies.put(response, "session", "value", secure=secure)
    first, *others = response.headers["set-cookie"].split("; ")
    return first, {other.lower() for other in others}


def test_over_https_a_cookie_is_of_this_host_alone() -> None:
    assert attributes(secure=True) == (
        "__Host-hitl_session=value",
        {"secure", "httponly", "samesite=lax", "path=/"},
    )


def test_without_https_it_goes_to_this_service_only() -> None:
    assert attributes(secure=False) == (
        "hitl_session=value",
        {"httponly", "samesite=lax", "path=/claude-hitl"},
    )


def test_a_flow_is_recovered_from_its_cookie_by_every_replica(signer: Signer) -> None:
    pending, cookie = signer.new_flow(
        "/claude-hitl/inbox", "https://hitl.example.org/claude-hitl/sign-in/callback"
    )
    assert Signer(SigningKey(b"k" * 32), lambda: 1000.0).find_flow(cookie) == pending
    assert pending.next_url == "/claude-hitl/inbox"
    for secret in (pending.flow.state, pending.flow.nonce, pending.flow.verifier):
        assert len(secret) == 64
        assert secret not in cookie
        assert secret not in base64.urlsafe_b64decode(cookie.partition(".")[0] + "==").decode()
    assert len({pending.flow.state, pending.flow.nonce, pending.flow.verifier}) == 3
    assert signer.new_flow("/", "x")[0].flow.state != pending.flow.state


def test_a_flow_ends_after_ten_minutes(signer: Signer, clock: Clock) -> None:
    _, cookie = signer.new_flow("/claude-hitl/inbox", "x")
    clock.now += FLOW_S
    assert signer.find_flow(cookie) is not None
    clock.now += 1
    assert signer.find_flow(cookie) is None


def test_a_cookie_that_was_made_elsewhere_is_no_flow(signer: Signer) -> None:
    _, cookie = signer.new_flow("/claude-hitl/inbox", "x")
    claim, _, mac = cookie.partition(".")
    changed = json.loads(base64.urlsafe_b64decode(claim + "=="))
    changed["next"] = "https://evil.example.org"
    forged = base64.urlsafe_b64encode(json.dumps(changed).encode()).decode().rstrip("=")
    other = Signer(SigningKey(b"o" * 32)).new_flow("/claude-hitl/inbox", "x")[1]
    for made in ("", ".", claim, f"{forged}.{mac}", f"{claim}.{mac[:-1]}", other, "\xff.\xff"):
        assert signer.find_flow(made) is None, made


def test_a_browser_is_known_for_one_account(signer: Signer) -> None:
    assert signer.is_known("Ann", signer.known("ann"))
    assert not signer.is_known("bob", signer.known("ann"))
    assert not signer.is_known("ann", "")


@pytest.mark.parametrize(
    "given",
    [
        "https://evil.example.org/claude-hitl/inbox",
        "//evil.example.org/claude-hitl/inbox",
        "///evil.example.org",
        "/\\evil.example.org",
        "/\t/evil.example.org",
        "\\\\evil.example.org",
        "javascript:alert(1)",
        "/claude-hitl/../evil",
        "/claude-hitl/%2e%2e/evil",
        "/claude-hitl/%252e%252e/evil",
        "/claude-hitl//evil.example.org",
        "/claude-hitl/%2f%2fevil.example.org",
        "/claude-hitl/%5cevil.example.org",
        "/claude-hitl/inbox\r\nset-cookie: a=b",
        "/claude-hitl/inbox?a=\x00",
        "/claude-hitlevil.example.org",
        "/",
        "",
        "inbox",
        "/claude-hitl/sign-in?next=/claude-hitl/sign-in",
        "/claude-hitl/sign-out",
        "/claude-hitl/" + "x" * 2000,
        "/claude-hitl/%25252525252e/evil",
        "http://[::1/claude-hitl/",
    ],
)
def test_a_sign_in_leads_to_no_other_place(given: str) -> None:
    assert own_path(given) == HOME


@pytest.mark.parametrize(
    "given",
    ["/claude-hitl/inbox", "/claude-hitl/inbox/appr_1?show=all&next=https://x", "/claude-hitl/account"],
)
def test_a_sign_in_leads_back_to_the_page(given: str) -> None:
    assert own_path(given) == given
