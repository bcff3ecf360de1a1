"""The certificate authority of one sandbox, for hosts with a credential. Its import takes a while, and most sandboxes need
none: it is imported when a sandbox has a credential."""

import ssl
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from functools import cached_property
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

VALID = timedelta(days=365)  # longer than any process of a session lives
BEFORE = timedelta(days=1)  # for clocks that differ
PEM, NO_PASSWORD = serialization.Encoding.PEM, serialization.NoEncryption()


class CertificateAuthority:
    """Signs certificates that only this sandbox's programs trust. Private keys are in `folder` for a moment."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @property
    def pem(self) -> bytes:
        """The authority's own certificate."""
        return self._authority.public_bytes(PEM)

    def context(self, host: str) -> ssl.SSLContext:
        """A TLS context that presents a new certificate for this host. Blocking for a few milliseconds."""
        key = ec.generate_private_key(ec.SECP256R1())
        usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
        extensions: Sequence[tuple[x509.ExtensionType, bool]] = [
            (x509.SubjectAlternativeName([_general(host)]), True),
            (x509.BasicConstraints(ca=False, path_length=None), True),
            (usage, False),
            (x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), False),
        ]
        certificate = self._sign(x509.Name([]), key.public_key(), extensions)
        secret = key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, NO_PASSWORD)
        file = self._folder / "host.pem"
        file.touch(mode=0o600)
        file.write_bytes(secret + certificate.public_bytes(PEM))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(file)
        context.set_alpn_protocols(["http/1.1"])
        file.unlink()
        return context

    @cached_property
    def _key(self) -> ec.EllipticCurvePrivateKey:
        return ec.generate_private_key(ec.SECP256R1())

    @cached_property
    def _name(self) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "claude-hitl: this sandbox alone")])

    @cached_property
    def _authority(self) -> x509.Certificate:
        usage = x509.KeyUsage(
            key_cert_sign=True, crl_sign=True, digital_signature=True, content_commitment=False, key_encipherment=False,
            data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
        )  # fmt: skip
        extensions: Sequence[tuple[x509.ExtensionType, bool]] = [
            (x509.BasicConstraints(ca=True, path_length=0), True),
            (usage, True),
            (x509.SubjectKeyIdentifier.from_public_key(self._key.public_key()), False),
        ]
        return self._sign(self._name, self._key.public_key(), extensions)

    def _sign(
        self,
        subject: x509.Name,
        public_key: ec.EllipticCurvePublicKey,
        extensions: Sequence[tuple[x509.ExtensionType, bool]],
    ) -> x509.Certificate:
        now = datetime.now(UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - BEFORE)
            .not_valid_after(now + VALID)
        )
        for extension, critical in extensions:
            builder = builder.add_extension(extension, critical)
        return builder.sign(self._key, hashes.SHA256())


def _general(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        return x509.DNSName(host)
