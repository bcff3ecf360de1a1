"""Signs users in with an OpenID Connect provider: authorization code flow with PKCE, state and nonce."""

import hmac
import json
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.parse import urlsplit

import httpx
from authlib.oauth2.auth import ClientAuth
from authlib.oauth2.rfc6749.parameters import prepare_grant_uri, prepare_token_request
from authlib.oauth2.rfc7636 import create_s256_code_challenge
from authlib.oidc.core import CodeIDToken
from authlib.oidc.discovery import get_well_known_url
from joserfc import jwt
from joserfc.errors import InvalidClaimError, InvalidKeyIdError, JoseError, MissingClaimError
from joserfc.jwk import KeySet
from joserfc.jws import JWSRegistry
from pydantic import SecretStr

from claude_hitl_template.config import network
from claude_hitl_template.signin.browser import Refused

LEEWAY_S = 120  # how far the provider's clock may be off
REQUEST_S = 10.0
METADATA_S = 3600.0  # how long metadata and keys are used without asking again
MAX_ANSWER_BYTES = 1024 * 1024
MAX_GROUPS, MAX_NAME_CHARS = 500, 200
# Signatures with a public key; "none" and signatures with a shared secret are refused whatever the provider lists.
ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_NEEDED = ("authorization_endpoint", "token_endpoint", "jwks_uri")
_AGAIN = "Sign in again."


@dataclass(frozen=True)
class Client:
    """How this service is registered with the provider.

    Attributes:
        secret: None for a public client, which proves itself by PKCE only.
        groups_claim: The claim with the names of the user's groups.
    """

    issuer: str
    client_id: str
    secret: SecretStr | None = None
    groups_claim: str = "groups"
    scopes: str = "openid profile email"


@dataclass(frozen=True)
class Flow:
    """The secrets of one sign-in, which end with it."""

    state: str
    nonce: str
    verifier: str
    redirect_uri: str


@dataclass(frozen=True)
class Identity:
    """Who the provider says that someone is. `email` only if the provider has verified it."""

    issuer: str
    subject: str
    name: str
    email: str | None = None
    groups: tuple[str, ...] = ()

    @property
    def external_id(self) -> str:
        return f"{self.issuer}|{self.subject}"


@dataclass
class _Provider:
    """What the provider publishes, and until when it is used."""

    metadata: Mapping[str, Any]
    until: float
    keys: KeySet | None = field(default=None)


class Provider:
    """One OpenID Connect provider.

    Args:
        client: How this service is registered there.
        http: Makes a client for HTTP.
        clock: The time in seconds since 1970.
    """

    def __init__(
        self,
        client: Client,
        *,
        http: Callable[..., AbstractAsyncContextManager[httpx.AsyncClient]] = network.outward_async,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._client, self._http, self._clock = client, http, clock
        self._known: _Provider | None = None

    @property
    def name(self) -> str:
        """The provider's host, for people."""
        return urlsplit(self._client.issuer).hostname or self._client.issuer

    async def address(self, flow: Flow) -> str:
        """Where the browser goes to sign in. Raises Refused."""
        provider = await self._provider()
        return prepare_grant_uri(
            str(provider.metadata["authorization_endpoint"]),
            self._client.client_id,
            "code",
            flow.redirect_uri,
            self._client.scopes,
            flow.state,
            nonce=flow.nonce,
            code_challenge=create_s256_code_challenge(flow.verifier),
            code_challenge_method="S256",
        )

    async def identify(self, flow: Flow, answer: Mapping[str, str]) -> Identity:
        """Who came back from the provider.

        Args:
            flow: As for `address`.
            answer: The query parameters that the browser brought back.

        Raises:
            Refused: With what happened, and what to do.
        """
        if not hmac.compare_digest(answer.get("state", "").encode(), flow.state.encode()):
            raise Refused("This sign-in was started in another tab or window.", _AGAIN, 400)
        self._check_answer(answer)
        provider = await self._provider()
        token = await self._token(provider, flow, answer["code"])
        claims = await self._claims(provider, flow, token)
        if not {self._client.groups_claim, "email", "preferred_username"} <= claims.keys():
            claims = _merged(await self._user_info(provider, token, claims), claims)
        return self._identity(claims)

    # -- what the provider publishes

    async def _provider(self) -> _Provider:
        if self._known is None or self._known.until < self._clock():
            metadata = await self._get(get_well_known_url(self._client.issuer, external=True))
            self._check_metadata(metadata)
            self._known = _Provider(metadata, self._clock() + METADATA_S)
        return self._known

    def _check_metadata(self, metadata: Mapping[str, Any]) -> None:
        own = metadata.get("issuer")
        if own != self._client.issuer:
            raise self._wrong(
                f"it calls itself {str(own)[:200]!r}, and HITL_OIDC_ISSUER is {self._client.issuer!r}",
                "The operator sets HITL_OIDC_ISSUER to exactly what the provider calls itself.",
            )
        for name in _NEEDED:
            url = metadata.get(name)
            if not isinstance(url, str) or not is_confidential(url):
                raise self._wrong(
                    f"its metadata has no usable {name}", "The operator of the provider corrects it."
                )

    async def _keys(self, provider: _Provider, *, again: bool = False) -> KeySet:
        if provider.keys is None or again:
            found = await self._get(str(provider.metadata["jwks_uri"]))
            try:
                provider.keys = KeySet.import_key_set(cast(Any, found))
            except (JoseError, KeyError, TypeError, ValueError) as error:
                raise self._wrong(
                    "its keys cannot be read", "The operator of the provider corrects them."
                ) from error
        return provider.keys

    # -- one sign-in

    def _check_answer(self, answer: Mapping[str, str]) -> None:
        if "error" in answer:
            described = answer.get("error_description") or answer["error"]
            raise Refused(f"{self.name} did not sign you in: {described[:500]}", _AGAIN)
        if not answer.get("code"):
            raise Refused(f"{self.name} sent no code.", _AGAIN, 400)
        if answer.get("iss", self._client.issuer) != self._client.issuer:
            raise Refused("The answer is from another provider.", _AGAIN, 400)

    async def _token(self, provider: _Provider, flow: Flow, code: str) -> Mapping[str, Any]:
        secret = self._client.secret
        method = self._auth_method(provider)
        auth = ClientAuth(self._client.client_id, secret and secret.get_secret_value(), method)
        body = prepare_token_request(
            "authorization_code", code=code, redirect_uri=flow.redirect_uri, code_verifier=flow.verifier
        )
        headers = {"accept": "application/json", "content-type": "application/x-www-form-urlencoded"}
        url, headers, body = auth.prepare("POST", str(provider.metadata["token_endpoint"]), headers, body)
        status, token = await self._ask("POST", url, content=body, headers=headers)
        if token.get("error") == "invalid_grant":
            raise Refused(
                f"{self.name} does not accept this sign-in any more: it was used already, or took too long.",
                _AGAIN,
            )
        if status != 200 or not isinstance(token.get("id_token"), str):
            why = str(token.get("error_description") or token.get("error") or f"status {status}")[:500]
            raise self._wrong(
                f"it refused this service: {why}",
                "The operator checks HITL_OIDC_CLIENT_ID, HITL_OIDC_CLIENT_SECRET, and that the provider knows "
                f"{flow.redirect_uri} as a redirect URI.",
            )
        return token

    def _auth_method(self, provider: _Provider) -> str:
        if self._client.secret is None:
            return "none"
        listed = provider.metadata.get("token_endpoint_auth_methods_supported") or ["client_secret_basic"]
        return "client_secret_basic" if "client_secret_basic" in listed else "client_secret_post"

    async def _claims(self, provider: _Provider, flow: Flow, token: Mapping[str, Any]) -> Mapping[str, Any]:
        """The claims of the ID token, after all checks. Unknown keys are looked for once: the provider may have new ones."""
        listed = provider.metadata.get("id_token_signing_alg_values_supported") or ["RS256"]
        registry = JWSRegistry(algorithms=[a for a in listed if a in ALGORITHMS], strict_check_header=False)
        try:
            try:
                found = jwt.decode(token["id_token"], await self._keys(provider), registry=registry)
            except InvalidKeyIdError:
                found = jwt.decode(
                    token["id_token"], await self._keys(provider, again=True), registry=registry
                )
        except (JoseError, ValueError, TypeError) as error:
            raise self._wrong(
                f"its signature is not valid ({type(error).__name__})",
                f"{_AGAIN} If that does not help, the operator of the provider checks its keys.",
            ) from error
        self._check_clock(found.claims)
        claims = CodeIDToken(
            found.claims,
            found.header,
            {
                "iss": {"essential": True, "value": self._client.issuer},
                "aud": {"essential": True, "value": self._client.client_id},
            },
            {
                "nonce": flow.nonce,
                "client_id": self._client.client_id,
                "access_token": token.get("access_token"),
            },
        )
        try:
            claims.validate(now=int(self._clock()), leeway=LEEWAY_S)
        except JoseError as error:
            raise self._claim_problem(error, found.claims) from error
        return found.claims

    def _check_clock(self, claims: Mapping[str, Any]) -> None:
        issued = claims.get("iat")
        if not isinstance(issued, (int, float)) or isinstance(issued, bool):
            raise self._wrong(
                "its answer has no usable time of issue (iat)", "The operator of the provider corrects it."
            )
        ahead = issued - self._clock()
        if abs(ahead) > LEEWAY_S:
            raise self._wrong(
                f"its clock is {abs(ahead) / 60:.0f} minutes {'ahead of' if ahead > 0 else 'behind'} this service's; "
                f"up to {LEEWAY_S // 60} minutes are accepted",
                "The operators of both synchronise their clocks (NTP).",
            )

    def _claim_problem(self, error: JoseError, claims: Mapping[str, Any]) -> Refused:
        claim = error.claim if isinstance(error, (InvalidClaimError, MissingClaimError)) else ""
        if claim == "aud":
            return self._wrong(
                f"its answer is for another client, {str(claims.get('aud'))[:200]}",
                "The operator checks HITL_OIDC_CLIENT_ID.",
            )
        if claim == "nonce":
            return Refused("This answer belongs to another sign-in.", _AGAIN, 400)
        return self._wrong(
            f"its answer is not valid ({claim or error.error}); its clock may be off by up to {LEEWAY_S // 60} minutes",
            _AGAIN,
        )

    async def _user_info(
        self, provider: _Provider, token: Mapping[str, Any], claims: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """Claims that the ID token does not have. {} if the provider has no such endpoint."""
        url = provider.metadata.get("userinfo_endpoint")
        if not isinstance(url, str) or not is_confidential(url) or not token.get("access_token"):
            return {}
        found = await self._get(url, headers={"authorization": f"Bearer {token['access_token']}"})
        if found.get("sub") != claims["sub"]:
            raise self._wrong("it described another user than the one who signed in", _AGAIN)
        return found

    def _identity(self, claims: Mapping[str, Any]) -> Identity:
        subject = claims["sub"]
        if not isinstance(subject, str) or not 1 <= len(subject) <= 255:
            raise self._wrong("its answer names no user (sub)", "The operator of the provider corrects it.")
        given = claims.get("email") if claims.get("email_verified") is True else None
        email = given if isinstance(given, str) and 3 <= len(given) <= MAX_NAME_CHARS else None
        names = (email, claims.get("preferred_username"), claims.get("name"), subject)
        name = next(" ".join(name.split()) for name in names if isinstance(name, str) and name.strip())
        return Identity(
            self._client.issuer,
            subject,
            name[:MAX_NAME_CHARS],
            email,
            _groups(claims.get(self._client.groups_claim)),
        )

    # -- HTTP

    async def _get(self, url: str, **options: Any) -> dict[str, Any]:
        status, found = await self._ask("GET", url, **options)
        if status != 200:
            raise self._wrong(
                f"{url} answers with status {status}",
                "Try again later; the operator checks HITL_OIDC_ISSUER.",
            )
        return found

    async def _ask(self, method: str, url: str, **options: Any) -> tuple[int, dict[str, Any]]:
        """Status and JSON object of the response; {} for a refusal that is not JSON."""
        try:
            async with self._http(timeout=REQUEST_S) as http, http.stream(method, url, **options) as response:
                raw = b""
                async for piece in response.aiter_bytes():
                    raw += piece
                    if len(raw) > MAX_ANSWER_BYTES:
                        raise self._wrong(
                            "its answer is too large", "The operator of the provider corrects it."
                        )
        except (*network.UNREACHABLE, httpx.HTTPError, httpx.InvalidURL) as error:
            raise self._wrong(
                f"it does not answer ({type(error).__name__})",
                "Try again in a few minutes, or sign in with a password of this service.",
                503,
            ) from error
        return response.status_code, _json_object(raw)

    def _wrong(self, what: str, fix: str, status: int = 502) -> Refused:
        return Refused(f"The sign-in with {self.name} failed: {what}.", fix, status)


def is_confidential(url: str) -> bool:
    """Whether nothing between here and there can read what is sent: https, or this machine."""
    try:
        found = urlsplit(url)
        return (found.scheme == "https" and bool(found.hostname)) or (
            found.scheme == "http" and found.hostname in _LOOPBACK
        )
    except ValueError:
        return False


def _json_object(raw: bytes) -> dict[str, Any]:
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _merged(user_info: Mapping[str, Any], claims: Mapping[str, Any]) -> Mapping[str, Any]:
    """The claims of the ID token, and further ones. That an address is verified is said only about the same address."""
    if user_info.get("email") != claims.get("email", user_info.get("email")):
        user_info = {name: value for name, value in user_info.items() if name != "email_verified"}
    return {**user_info, **claims}


def _groups(given: Any) -> tuple[str, ...]:
    """The names of groups; some providers send one name as a text."""
    listed = [given] if isinstance(given, str) else given if isinstance(given, list) else []
    names = [name for name in listed if isinstance(name, str) and 0 < len(name) <= MAX_NAME_CHARS]
    return tuple(dict.fromkeys(names))[:MAX_GROUPS]
