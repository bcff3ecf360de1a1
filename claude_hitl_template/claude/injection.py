"""Adds credentials to a sandbox's requests outside of it. TLS to a host with a credential is intercepted, with a certificate
of this sandbox's own authority; no other host is intercepted."""

import ssl
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import certifi

from claude_hitl_template.config.credentials import Credential
from claude_hitl_template.model.http1 import Headers

if TYPE_CHECKING:
    from claude_hitl_template.claude.certificates import CertificateAuthority


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
            self.bundle.write_bytes(Path(usual).read_bytes().rstrip() + b"\n" + self._authority.pem)
            self.bundle.chmod(0o644)

    def context(self, host: str) -> ssl.SSLContext:
        """A TLS context that presents a certificate for this host. Blocking for a few milliseconds, once per host."""
        if host not in self._contexts:
            self._contexts[host] = self._authority.context(host)
        return self._contexts[host]

    @cached_property
    def _authority(self) -> "CertificateAuthority":
        from claude_hitl_template.claude.certificates import CertificateAuthority  # noqa: PLC0415 - see there

        return CertificateAuthority(self._folder)
