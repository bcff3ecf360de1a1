"""Sign-in with an OpenID Connect provider: which answers are accepted, and what a user reads about the others."""

import re
import time
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
import pytest_asyncio
from pydantic import SecretStr

from claude_hitl_template.signin.browser import Refused
from claude_hitl_template.signin.oidc import Client, Flow, Identity, Provider, is_confidential
from tests.oidc_provider import CLIENT_ID, CLIENT_SECRET, LocalProvider, local_provider

REDIRECT = "http://127.0.0.1:8001/claude-hitl/sign-in/callback"
FLOW = Flow(state="state-1", nonce="nonce-1", verifier="v" * 64, redirect_uri=REDIRECT)


@pytest_asyncio.fixture
async def there() -> AsyncIterator[LocalProvider]:
    async with local_provider() as provider:
        yield provider


def ours(there: LocalProvider, **changes: Any) -> Provider:
    client = {"issuer": there.issuer, "client_id": CLIENT_ID, "secret": SecretStr(CLIENT_SECRET), **changes}
    return Provider(Client(**client))


async def sign_in(provider: Provider, flow: Flow = FLOW, **changes: str) -> Identity:
    return await provider.identify(flow, {**await come_back(provider, flow), **changes})


async def come_back(provider: Provider, flow: Flow = FLOW) -> dict[str, str]:
    """What the browser brings back from the provider."""
    async with httpx.AsyncClient() as browser:
        answer = await browser.get(await provider.address(flow))
    assert answer.status_code == 303, answer.text
    location = answer.headers["location"]
    assert location.startswith(f"{REDIRECT}?")
    return {name: values[0] for name, values in parse_qs(urlsplit(location).query).items()}


async def test_a_user_is_identified_by_issuer_and_subject(there: LocalProvider) -> None:
    there.user = {
        "sub": "u-1", "preferred_username": "ann", "groups": ["approvers", "ops"],
        "email": "ann@example.org", "email_verified": True,
    }  # fmt: skip
    found = await sign_in(ours(there))
    assert found == Identity(there.issuer, "u-1", "ann@example.org", "ann@example.org", ("approvers", "ops"))
    assert found.external_id == f"{there.issuer}|u-1"


@pytest.mark.parametrize("verified", [None, False, "true", 1])
async def test_an_address_that_the_provider_has_not_verified_is_not_used(
    there: LocalProvider, verified: object
) -> None:
    there.user |= {"email": "admin@example.org", "email_verified": verified}
    found = await sign_in(ours(there))
    assert (found.name, found.email) == ("ann", None)


async def test_claims_that_the_id_token_does_not_have_are_asked_for(there: LocalProvider) -> None:
    there.user_info = {"groups": ["approvers"], "email": "ann@example.org", "email_verified": True}
    found = await sign_in(ours(there))
    assert found.groups == ("approvers",)
    assert found.email == "ann@example.org"
    there.user_info = {"sub": "u-2", "groups": ["ops"]}
    with pytest.raises(Refused, match="another user"):
        await sign_in(ours(there))


async def test_an_address_of_the_id_token_is_not_verified_by_another_one(there: LocalProvider) -> None:
    there.user |= {"email": "admin@example.org"}
    there.user_info = {"email": "ann@example.org", "email_verified": True}
    # The provider's userinfo replaces what the ID token says, as a provider that contradicts itself does.
    assert (await sign_in(ours(there))).email is None


@pytest.mark.parametrize(
    ("given", "found"),
    [("ops", ("ops",)), (["ops", 3, "", "ops", {"a": 1}], ("ops",)), (None, ()), ({"ops": 1}, ())],
)
async def test_groups_come_in_any_claim_as_a_list_or_a_text(
    there: LocalProvider, given: object, found: tuple[str, ...]
) -> None:
    there.user |= {"roles": given}
    assert (await sign_in(ours(there, groups_claim="roles"))).groups == found


async def test_new_keys_of_the_provider_are_fetched_once(there: LocalProvider) -> None:
    provider = ours(there)
    await sign_in(provider)
    await sign_in(provider)
    assert there.asked.count("keys") == 1
    there.rotate()
    await sign_in(provider)
    assert there.asked.count("keys") == 2
    assert there.asked.count("discovery") == 1


async def test_a_key_that_the_provider_does_not_publish_is_refused(there: LocalProvider) -> None:
    provider = ours(there)
    await sign_in(provider)
    there.published = there.key
    there.rotate()
    with pytest.raises(Refused, match="signature"):
        await sign_in(provider)
    assert there.asked.count("keys") == 2


@pytest.mark.parametrize(
    ("claims", "says"),
    [
        ({"aud": "another-client"}, r"another client, another-client.*HITL_OIDC_CLIENT_ID"),
        ({"aud": [CLIENT_ID, "another-client"]}, "azp"),
        ({"iss": "https://other.example.org"}, "iss"),
        ({"nonce": "replayed"}, "another sign-in"),
        ({"nonce": None}, "another sign-in"),
        ({"exp": int(time.time()) - 121}, r"not valid.*2 minutes"),
        ({"exp": None}, "exp"),
        ({"iat": None}, "iat"),
        ({"sub": None}, "sub"),
        ({"at_hash": "wrong"}, "at_hash"),
    ],
)
async def test_a_wrong_claim_is_named(there: LocalProvider, claims: dict[str, Any], says: str) -> None:
    there.claims = claims
    with pytest.raises(Refused) as refused:
        await sign_in(ours(there))
    assert re.search(says, f"{refused.value} {refused.value.fix}", re.DOTALL), (
        refused.value,
        refused.value.fix,
    )


@pytest.mark.parametrize(("off_s", "says"), [(300, "5 minutes ahead of"), (-300, "5 minutes behind")])
async def test_a_clock_that_is_five_minutes_off_is_named(
    there: LocalProvider, off_s: float, says: str
) -> None:
    there.clock_off_s = off_s
    with pytest.raises(Refused, match=f"{says} .* up to 2 minutes") as refused:
        await sign_in(ours(there))
    assert "NTP" in refused.value.fix
    there.clock_off_s = off_s / 3
    await sign_in(ours(there))


async def test_a_token_that_is_signed_with_the_shared_secret_or_not_at_all_is_refused(
    there: LocalProvider,
) -> None:
    there.algorithm = "HS256"
    with pytest.raises(Refused, match="signature"):
        await sign_in(ours(there))


async def test_a_code_works_once(there: LocalProvider) -> None:
    provider = ours(there)
    answer = await come_back(provider)
    await provider.identify(FLOW, answer)
    with pytest.raises(Refused, match="used already"):
        await provider.identify(FLOW, answer)


async def test_a_code_of_another_browser_is_refused(there: LocalProvider) -> None:
    provider = ours(there)
    theirs = await come_back(provider, Flow("state-2", "nonce-2", "w" * 64, REDIRECT))
    with pytest.raises(Refused, match="another tab"):
        await provider.identify(FLOW, theirs)
    with pytest.raises(Refused, match="used already"):  # PKCE
        await provider.identify(FLOW, {**theirs, "state": FLOW.state})


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ({"error": "access_denied", "error_description": "no <b>access</b>"}, "no <b>access</b>"),
        ({"code": ""}, "no code"),
        ({"iss": "https://other.example.org"}, "another provider"),
    ],
)
async def test_an_answer_that_is_not_a_sign_in_is_refused(
    there: LocalProvider, answer: dict[str, str], says: str
) -> None:
    with pytest.raises(Refused, match=says):
        await sign_in(ours(there), **answer)


async def test_a_client_that_the_provider_does_not_know_is_reported_to_the_operator(
    there: LocalProvider,
) -> None:
    with pytest.raises(Refused, match="unknown client") as refused:
        await sign_in(ours(there, secret=SecretStr("another")))
    assert "HITL_OIDC_CLIENT_SECRET" in refused.value.fix
    assert REDIRECT in refused.value.fix
    assert "another" not in str(refused.value.args)


async def test_a_provider_that_is_down_is_named_and_found_again_later(there: LocalProvider) -> None:
    there.down = True
    provider = ours(there)
    with pytest.raises(Refused, match="status 503"):
        await provider.address(FLOW)
    there.down = False
    await sign_in(provider)
    with pytest.raises(Refused, match="does not answer") as refused:
        await Provider(Client("http://127.0.0.1:9", CLIENT_ID)).address(FLOW)
    assert refused.value.status == 503


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ({"issuer": "https://other.example.org"}, "calls itself 'https://other.example.org'"),
        ({"token_endpoint": "http://other.example.org/token"}, "no usable token_endpoint"),
        ({"jwks_uri": None}, "no usable jwks_uri"),
        ({"authorization_endpoint": "javascript:alert(1)"}, "no usable authorization_endpoint"),
    ],
)
async def test_metadata_that_cannot_be_used_is_named(
    there: LocalProvider, metadata: dict[str, Any], says: str
) -> None:
    there.metadata = metadata
    with pytest.raises(Refused, match=says):
        await ours(there).address(FLOW)


def test_only_https_and_this_machine_are_confidential() -> None:
    assert is_confidential("https://id.example.org/a")
    assert is_confidential("http://127.0.0.1:8080/a")
    assert not is_confidential("http://id.example.org/a")
    assert not is_confidential("file:///etc/passwd")
