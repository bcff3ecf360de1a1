"""What web push needs of both sides: the service's VAPID key (RFC 8292), and the subscription of a browser (RFC 8291)."""

import base64
import binascii
import hashlib
from collections.abc import Mapping
from typing import NoReturn, Self
from urllib.parse import urlsplit

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import (
    SECP256R1,
    EllipticCurvePrivateKey,
    EllipticCurvePublicKey,
    generate_private_key,
)
from py_vapid import Vapid02

from claude_hitl_template.domain.frozen import Frozen
from claude_hitl_template.errors import InvalidInput

MAX_ENDPOINT = 2000
AUTH_BYTES = 16


class PushKey:
    """Signs for the push services. It cannot be pickled, so the key stays in the processes that read it."""

    def __init__(self, key: EllipticCurvePrivateKey) -> None:
        self._key, self._vapid = key, Vapid02(private_key=key)

    @classmethod
    def of_pem(cls, pem: str) -> Self:
        """Raises ValueError for what is not a key of an elliptic curve."""
        key = serialization.load_pem_private_key(pem.encode(), None)
        if not isinstance(key, EllipticCurvePrivateKey):
            raise ValueError("it is not a key of an elliptic curve")  # noqa: TRY004 - the text is at fault
        return cls(key)

    @classmethod
    def generate(cls) -> Self:
        return cls(generate_private_key(SECP256R1()))

    @property
    def public(self) -> str:
        """What a browser takes as `applicationServerKey`."""
        point = self._key.public_key().public_bytes(
            serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint
        )
        return base64.urlsafe_b64encode(point).decode().rstrip("=")

    def authorization(self, endpoint: str, contact: str) -> str:
        """The header for one push, which names `contact`, an https or mailto address, to the push service."""
        target = urlsplit(endpoint)
        claims = {"aud": f"{target.scheme}://{target.netloc}", "sub": contact}
        return self._vapid.sign(claims)["Authorization"]

    def __repr__(self) -> str:
        return "PushKey(...)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("the key for web push cannot be sent to another process")


class Subscription(Frozen):
    """A browser's subscription. All of it is secret: with it, anyone can send to the browser.

    Attributes:
        endpoint: The address at the browser's push service.
        p256dh: The browser's public key, base64url.
        auth: A secret of the browser, base64url.
    """

    endpoint: str
    p256dh: str
    auth: str

    @classmethod
    def of(cls, given: Mapping[str, str]) -> Self:
        """Checks what a browser sent. Raises InvalidInput."""
        found = cls(**{name: given.get(name, "") for name in cls.model_fields})
        if not found.endpoint or len(found.endpoint) > MAX_ENDPOINT:
            raise InvalidInput("must be the address of a push service", "endpoint")
        if len(_bytes(found.auth, "auth")) != AUTH_BYTES:
            raise InvalidInput(f"must be {AUTH_BYTES} bytes, base64url", "auth")
        try:
            EllipticCurvePublicKey.from_encoded_point(SECP256R1(), _bytes(found.p256dh, "p256dh"))
        except ValueError as error:
            raise InvalidInput("must be a public key of the curve P-256, base64url", "p256dh") from error
        return found

    @property
    def fingerprint(self) -> str:
        """Names the subscription without giving it away."""
        return hashlib.sha256(self.endpoint.encode()).hexdigest()


def _bytes(text: str, field: str) -> bytes:
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidInput("must be base64url", field) from error
