"""Adds credentials to a sandbox's requests outside of it. TLS to a host with a credential is intercepted, with a certificate
of this sandbox's own authority; no other host is intercepted."""

import ssl
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from functools import cached_property
from ipaddress import ip_address
from pathlib import Path

import certifi
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from claude_hitl_template.config.credentials import Credential
from claude_hitl_template.model.http1 import Headers

VALID = timedelta(days=365)  # longer than any process of a session lives
BEFORE = timedelta(days=1)  # for clocks that differ
PEM, NO_PASSWORD = serialization.Encoding.PEM, serialization.NoEncryption()


class Injector:
    """Credentials of one sandbox. `folder` belongs to the owner; only `bundle` is visible in the sandbox."""

    def __init__(self, credentials: Iterable[Credential], folder: Path) -> None:
        self._credentials, self._folder = tuple(credentials), folder
        self._contexts: dict[str, ssl.SSLContext] = {}

    @property
    def bundle(self) -> Path:
        """The certificates that the sandbox's programs trust, if `make` made it."""
        return self._folder / "certificates.pem"

    def is_for(self, host: str, port: int) -> bool:
        return any(one.is_for(host, port) for one in self._credentials)

    def headers(
        self, host: tuple[str, int], method: str, target: str, given: Headers, *, tls: bool
    ) -> Headers:
        """The headers for the server: with this request's credentials, and without the agent's values for them."""
        here = [one for one in self._credentials if one.is_for(*host)]
        ours = {one.header.lower() for one in here}
        kept = [(name, value) for name, value in given if name.lower() not in ours]
        added: dict[str, str] = {}
        for one in here:
            if one.fits(method, target, tls=tls) and one.value is not None:
                added.setdefault(one.header.lower(), one.value.get_secret_value())
        return [*kept, *added.items()]

    # -- certificates

    def make(self) -> None:
        """Writes the bundle: the usual trusted certificates and this sandbox's authority. Blocking."""
        if self._credentials:
            usual = ssl.get_default_verify_paths().cafile or certifi.where()
            own = self._authority.public_bytes(PEM)
            self.bundle.write_bytes(Path(usual).read_bytes().rstrip() + b"\n" + own)
            self.bundle.chmod(0o644)

    def context(self, host: str) -> ssl.SSLContext:
        """A TLS context that presents a certificate for this host. Blocking for a few milliseconds, once per host."""
        if host not in self._contexts:
            self._contexts[host] = self._make_context(host)
        return self._contexts[host]

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

    def _make_context(self, host: str) -> ssl.SSLContext:
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
