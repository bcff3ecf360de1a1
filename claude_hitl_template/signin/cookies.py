"""The cookies of the sign-in, and what their values are.

The session's cookie is HttpOnly, and SameSite=Lax: with Strict a link in a mail would always lead to the sign-in page,
because a browser sends no Strict cookie when it comes from another site. What Lax leaves open, a link that changes
something, does not exist: every change is a POST with a token of the form.

Over https the names begin with `__Host-`, so that neither another port nor a subdomain can set them.
"""

import base64
import hashlib
import hmac
import json
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from fastapi import Request
from starlette.responses import Response

from claude_hitl_template.config.secret_files import SigningKey
from claude_hitl_template.signin.addresses import ROOT, own_path
from claude_hitl_template.signin.oidc import Flow

type Kind = Literal["session", "form", "flow", "known"]
FLOW_S, KNOWN_S = 600, 90 * 86400
MAX_COOKIE_CHARS = 4000
_NAMES: dict[Kind, str] = {kind: f"hitl_{kind}" for kind in ("session", "form", "flow", "known")}


def name_of(kind: Kind, *, secure: bool) -> str:
    return f"__Host-{_NAMES[kind]}" if secure else _NAMES[kind]


def get(request: Request, kind: Kind, *, secure: bool) -> str:
    """The value of a cookie; "" if the browser sent none."""
    value = request.cookies.get(name_of(kind, secure=secure), "")
    return value if len(value) <= MAX_COOKIE_CHARS else ""


def put(response: Response, kind: Kind, value: str, *, secure: bool, max_age_s: int | None = None) -> None:
    """Sets a cookie; without `max_age_s` until the browser is closed."""
    response.set_cookie(
        name_of(kind, secure=secure),
        value,
        max_age=max_age_s,
        path="/" if secure else ROOT,  # __Host- requires "/"; without TLS other programs of the host get less
        secure=secure,
        httponly=True,
        samesite="lax",
    )


def remove(response: Response, kind: Kind, *, secure: bool) -> None:
    put(response, kind, "", secure=secure, max_age_s=0)


def new_token() -> str:
    """The value of a session's cookie: 256 random bits."""
    return secrets.token_urlsafe(32)


def hash_token(token: str) -> str:
    """The stored form of a token. It is long and random, so a plain SHA-256 is enough."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True)
class PendingFlow:
    """A sign-in that is at the provider, and where to go after it."""

    flow: Flow
    next_url: str


class Signer:
    """Makes values of cookies and forms that every replica can check without remembering them.

    Args:
        key: The service's signing key.
        clock: The time in seconds since 1970.
    """

    def __init__(self, key: SigningKey, clock: Callable[[], float] = time.time) -> None:
        self._key, self._clock = key, clock

    def csrf(self, token: str) -> str:
        """What the forms of a session send back."""
        return self._key.mac(b"sign-in csrf", token)

    def form(self, token: str) -> str:
        """What the sign-in form sends back, of the form's cookie `token`."""
        return self._key.mac(b"sign-in form", token)

    def known(self, account: str) -> str:
        """The cookie of a browser that signed in to this account."""
        return self._key.mac(b"sign-in known", account.casefold())

    def is_known(self, account: str, value: str) -> bool:
        return hmac.compare_digest(self.known(account).encode(), value.encode("utf-8", "surrogatepass"))

    def new_flow(self, next_url: str, redirect_uri: str) -> tuple[PendingFlow, str]:
        """A sign-in with the provider, and the cookie that it is recovered from."""
        made = {"id": new_token(), "next": next_url, "to": redirect_uri, "end": int(self._clock()) + FLOW_S}
        claim = base64.urlsafe_b64encode(json.dumps(made).encode()).decode().rstrip("=")
        return self._pending(made), f"{claim}.{self._key.mac(b'sign-in flow', claim)}"

    def find_flow(self, cookie: str) -> PendingFlow | None:
        """None for a cookie that was not made here, or is older than FLOW_S."""
        claim, _, mac = cookie.partition(".")
        expected = self._key.mac(b"sign-in flow", claim)
        if not hmac.compare_digest(expected.encode(), mac.encode("utf-8", "surrogatepass")):
            return None
        found = json.loads(base64.urlsafe_b64decode(claim + "=" * (-len(claim) % 4)))
        return self._pending(found) if found["end"] >= self._clock() else None

    def _pending(self, made: dict[str, str | int]) -> PendingFlow:
        """State, nonce and verifier are derived from the cookie's id, so none of them can be read from the cookie."""
        state, nonce, verifier = (
            self._key.mac(use, str(made["id"]))
            for use in (b"sign-in state", b"sign-in nonce", b"sign-in verifier")
        )
        return PendingFlow(Flow(state, nonce, verifier, str(made["to"])), own_path(str(made["next"])))
