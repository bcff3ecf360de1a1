"""Ed25519 signatures on documents of the audit log: checkpoints, the ends of exports, and receipts.

A signed document is a JSON object with `key_id`, the RFC 7638 thumbprint of the public key, and `signature`: base64url,
over the RFC 8785 JSON of all its other fields. Its `type` is one of them, so that no document passes for another kind.
"""

import base64
import binascii
import hashlib
import json
from collections.abc import Mapping
from typing import Any, NoReturn

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from claude_hitl_template.domain.audit.canonical import canonical
from claude_hitl_template.errors import InvalidInput

type Keys = Mapping[str, Ed25519PublicKey]  # by thumbprint


class UnknownKey(ValueError):
    """A document is signed by a key that is not among the given ones."""


class BadSignature(ValueError):
    """A signature is not the named key's for this document."""


class Signer:
    """Signs with the service's key. It cannot be pickled, so the key stays in the processes that read it."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.jwk = to_jwk(key.public_key())

    @classmethod
    def generate(cls) -> "Signer":
        """With a new key."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def of_pem(cls, pem: str) -> "Signer":
        """Raises ValueError for what is not an Ed25519 private key."""
        key = serialization.load_pem_private_key(pem.encode(), password=None)
        if not isinstance(key, Ed25519PrivateKey):
            raise ValueError("not an Ed25519 key")  # noqa: TRY004 - of a file's content, as the loader raises
        return cls(key)

    def pem(self) -> str:
        """The private key, PKCS #8."""
        return self._key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ).decode()

    def sign(self, document: Mapping[str, Any]) -> dict[str, Any]:
        """`document` with `key_id` and `signature`."""
        named = {**document, "key_id": self.jwk["kid"]}
        return {**named, "signature": _to_base64url(self._key.sign(canonical(named)))}

    def __repr__(self) -> str:
        return "Signer(...)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("the key of the audit log cannot be sent to another process")


def check(document: Mapping[str, Any], keys: Keys) -> None:
    """Raises UnknownKey, or BadSignature, unless one of `keys` signed this document."""
    key = keys.get(str(document.get("key_id")))
    if key is None:
        raise UnknownKey(f"it is signed by another key, {str(document.get('key_id'))[:50]!r}")
    unsigned = {name: value for name, value in document.items() if name != "signature"}
    try:
        key.verify(_of_base64url(str(document.get("signature"))), canonical(unsigned))
    except (InvalidSignature, binascii.Error, ValueError) as error:
        raise BadSignature("its signature is not the service's") from error


def to_jwk(key: Ed25519PublicKey) -> dict[str, str]:
    """The public key as a JWK (RFC 8037), with its thumbprint as `kid`."""
    raw = key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    bare = {"crv": "Ed25519", "kty": "OKP", "x": _to_base64url(raw)}
    thumbprint = _to_base64url(hashlib.sha256(canonical(bare)).digest())
    return {**bare, "alg": "EdDSA", "use": "sig", "kid": thumbprint}


def keys_of_jwks(jwks: Any) -> dict[str, Ed25519PublicKey]:
    """The keys of a JWK or a JWK set. Raises ValueError for another value, or a key that is not Ed25519."""
    listed: Any = jwks.get("keys", [jwks]) if isinstance(jwks, dict) else None
    if not isinstance(listed, list) or not all(isinstance(jwk, dict) for jwk in listed):
        raise ValueError("not a JWK")
    return dict(_key_of_jwk(jwk) for jwk in listed)


def read_keys(text: str) -> dict[str, Ed25519PublicKey]:
    """The public keys of a file: a JWK, a JWK set as `GET /v1/audit/keys` answers, or PEM. Raises InvalidInput."""
    try:
        if text.lstrip().startswith("{"):
            return keys_of_jwks(json.loads(text))
        key = serialization.load_pem_public_key(text.encode())
    except ValueError as error:
        raise InvalidInput(
            "not an Ed25519 public key: save the response of GET /v1/audit/keys as a file", "--key"
        ) from error
    if not isinstance(key, Ed25519PublicKey):
        raise InvalidInput("the key is not an Ed25519 key", "--key")
    return {to_jwk(key)["kid"]: key}


def _key_of_jwk(jwk: Any) -> tuple[str, Ed25519PublicKey]:
    if jwk.get("kty") != "OKP" or jwk.get("crv") != "Ed25519":
        raise ValueError("not an Ed25519 key")
    key = Ed25519PublicKey.from_public_bytes(_of_base64url(str(jwk.get("x"))))
    return to_jwk(key)["kid"], key  # its own thumbprint, whatever the `kid` says


def _to_base64url(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def _of_base64url(text: str) -> bytes:
    return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
