"""A browser's device and its push service on this machine, which decrypts what is pushed and checks who pushed it."""

import asyncio
import base64
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import batched
from typing import Any
from urllib.parse import urlsplit

import http_ece
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat


def unbase64url(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def checked_claims(token: str, public: str) -> dict[str, Any]:
    """The claims of an ES256 token. Raises InvalidSignature."""
    signed, _, signature = token.rpartition(".")
    r, s = (int.from_bytes(part) for part in batched(unbase64url(signature), 32))
    key = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), unbase64url(public))
    key.verify(encode_dss_signature(r, s), signed.encode(), ec.ECDSA(SHA256()))
    return json.loads(unbase64url(signed.split(".")[1]))


def base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


@dataclass
class Device:
    """A browser, and its push service on a port of this machine."""

    answer: bytes = b"HTTP/1.1 201 Created\r\ncontent-length: 0\r\n\r\n"
    key: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))
    auth: bytes = field(default_factory=lambda: os.urandom(16))
    origin: str = ""
    came: asyncio.Event = field(default_factory=asyncio.Event)
    heads: list[str] = field(default_factory=list[str])
    bodies: list[bytes] = field(default_factory=list[bytes])

    @asynccontextmanager
    async def listening(self) -> AsyncIterator["Device"]:
        async with await asyncio.start_server(self._serve, "127.0.0.1", 0) as server:
            self.origin = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            yield self

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        self.heads.append(head)
        self.bodies.append(await reader.readexactly(int(self.header("content-length"))))
        self.came.set()
        writer.write(self.answer)
        if self.answer:
            writer.close()
        else:  # it hangs
            await reader.read()
            writer.close()

    @property
    def host(self) -> str:
        return urlsplit(self.origin).netloc

    def header(self, name: str) -> str:
        lines = [line.partition(": ") for line in self.heads[-1].split("\r\n")]
        return next(value for found, _, value in lines if found.lower() == name)

    @property
    def subscription(self) -> dict[str, str]:
        point = self.key.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
        return {"endpoint": f"{self.origin}/p/1", "p256dh": base64url(point), "auth": base64url(self.auth)}

    def read(self) -> dict[str, Any]:
        """The last push, decrypted."""
        found = http_ece.decrypt(
            self.bodies[-1], private_key=self.key, auth_secret=self.auth, version="aes128gcm"
        )
        return json.loads(found)
