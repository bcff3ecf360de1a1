"""A small OpenID Connect provider on loopback, which can also do what a provider must not do.

It checks what it gets: client, redirect URI, PKCE, and that a code is used once.
"""

import base64
import hashlib
import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from urllib.parse import parse_qs, unquote, urlencode

from authlib.oidc.core.util import create_half_hash
from joserfc import jwt
from joserfc.jwk import KeySet, OctKey, RSAKey
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from tests.serving import serving

CLIENT_ID, CLIENT_SECRET = "hitl", "the client's secret"


@cache
def signing_key(number: int) -> RSAKey:
    """One of the provider's keys; making one takes a while."""
    return RSAKey.generate_key(2048, {"kid": f"key-{number}", "use": "sig"}, auto_kid=False)


@dataclass
class LocalProvider:
    """Signs in `user` without a question.

    Attributes:
        user: The claims of the user who signs in next.
        claims: Replace those of the next ID token; None leaves one out.
        clock_off_s: How far its clock is ahead.
        user_info: Claims that only the userinfo endpoint has.
        key: The number of the key that signs; `published`: that of the one that is published, if it is another.
        algorithm: Of the next ID token: "RS256", or "HS256" with the client's secret as the key.
    """

    user: dict[str, Any] = field(default_factory=lambda: {"sub": "u-1", "preferred_username": "ann"})
    claims: dict[str, Any] = field(default_factory=dict)
    user_info: dict[str, Any] | None = None
    clock_off_s: float = 0.0
    algorithm: str = "RS256"
    key: int = 0
    published: int | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    issuer: str = ""
    asked: list[str] = field(default_factory=list)
    down: bool = False
    _codes: dict[str, dict[str, str]] = field(default_factory=dict)
    _tokens: dict[str, dict[str, Any]] = field(default_factory=dict)

    def rotate(self) -> None:
        """Replaces the signing key by one with another id."""
        self.key += 1

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/.well-known/openid-configuration", self._discovery),
                Route("/keys", self._jwks),
                Route("/authorize", self._authorize),
                Route("/token", self._token, methods=["POST"]),
                Route("/userinfo", self._userinfo),
            ],
        )

    async def _discovery(self, _request: Request) -> Response:
        self.asked.append("discovery")
        if self.down:
            return Response("down for maintenance", 503)
        found: dict[str, Any] = {
            "issuer": self.issuer,
            "authorization_endpoint": f"{self.issuer}/authorize",
            "token_endpoint": f"{self.issuer}/token",
            "jwks_uri": f"{self.issuer}/keys",
            "id_token_signing_alg_values_supported": ["RS256", "HS256", "none"],
        }
        if self.user_info is not None:
            found["userinfo_endpoint"] = f"{self.issuer}/userinfo"
        return JSONResponse({**found, **self.metadata})

    async def _jwks(self, _request: Request) -> Response:
        self.asked.append("keys")
        published = self.key if self.published is None else self.published
        return JSONResponse(KeySet([signing_key(published)]).as_dict(private=False))

    async def _authorize(self, request: Request) -> Response:
        asked = dict(request.query_params)
        assert asked["response_type"] == "code"
        assert asked["client_id"] == CLIENT_ID
        assert asked["code_challenge_method"] == "S256"
        assert "openid" in asked["scope"].split()
        code = secrets.token_urlsafe()
        self._codes[code] = asked
        return RedirectResponse(
            f"{asked['redirect_uri']}?{urlencode({'code': code, 'state': asked['state']})}", 303
        )

    async def _token(self, request: Request) -> Response:
        self.asked.append("token")
        form = {name: values[0] for name, values in parse_qs((await request.body()).decode()).items()}
        if _basic(request) != (CLIENT_ID, CLIENT_SECRET):
            return JSONResponse({"error": "invalid_client", "error_description": "unknown client"}, 401)
        asked = self._codes.pop(form["code"], None)  # once
        challenge = hashlib.sha256(form.get("code_verifier", "").encode()).digest()
        if (
            asked is None
            or form["redirect_uri"] != asked["redirect_uri"]
            or base64.urlsafe_b64encode(challenge).decode().rstrip("=") != asked["code_challenge"]
        ):
            return JSONResponse({"error": "invalid_grant"}, 400)
        access_token = secrets.token_urlsafe()
        self._tokens[access_token] = {**self.user, **(self.user_info or {})}
        return JSONResponse(
            {
                "access_token": access_token,
                "token_type": "Bearer",
                "id_token": self._id_token(asked, access_token),
            }
        )

    def _id_token(self, asked: dict[str, str], access_token: str) -> str:
        now = int(time.time() + self.clock_off_s)
        claims: dict[str, Any] = {
            "iss": self.issuer,
            "aud": CLIENT_ID,
            "iat": now,
            "exp": now + 300,
            "nonce": asked["nonce"],
            "at_hash": create_half_hash(access_token, "RS256").decode(),
            **self.user,
            **self.claims,
        }
        claims = {name: value for name, value in claims.items() if value is not None}
        if self.algorithm == "HS256":
            return jwt.encode({"alg": "HS256"}, claims, OctKey.import_key(CLIENT_SECRET))
        key = signing_key(self.key)
        return jwt.encode({"alg": self.algorithm, "kid": key.kid}, claims, key)

    async def _userinfo(self, request: Request) -> Response:
        self.asked.append("userinfo")
        token = request.headers["authorization"].removeprefix("Bearer ")
        return JSONResponse(self._tokens[token])


def _basic(request: Request) -> tuple[str, str] | None:
    kind, _, given = request.headers.get("authorization", "").partition(" ")
    if kind != "Basic":
        return None
    name, _, secret = base64.b64decode(given).decode().partition(":")
    return unquote(name), unquote(secret)


@asynccontextmanager
async def local_provider() -> AsyncGenerator[LocalProvider]:
    """Serves a provider on a free port of 127.0.0.1."""
    made = LocalProvider()
    async with serving(made.app()) as address:
        made.issuer = address
        yield made
