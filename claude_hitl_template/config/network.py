"""HTTP clients of this package. Only connections to the model's service use a proxy from the environment.

Addresses of this machine and the cluster are reached directly, because a proxy cannot reach them. Every HTTP client of
this package is created here.
"""

import os
import ssl
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any
from urllib.request import getproxies_environment

import httpx
from socksio.exceptions import SOCKSError

from claude_hitl_template.config.grpc import GRPC
from claude_hitl_template.errors import ConfigError

# What a request raises that got no answer; the library under httpx reports a proxy that is not SOCKS.
UNREACHABLE: tuple[type[Exception], ...] = (httpx.TransportError, SOCKSError)
# Addresses that no process may reach through a proxy: loopback, and a cloud's metadata service.
NEVER = ("localhost", "127.0.0.1", "127.0.0.0/8", "::1", "169.254.169.254", "metadata.google.internal")
_LAST_PORT = 65535
_NO_ADDRESS = "it is not a proxy's address"
_SUFFIX = "_proxy"
_BYPASS = ("no_proxy", "NO_PROXY")  # programs read one of the two


def direct(**options: Any) -> httpx.Client:
    """A client for the service's own addresses; options as for httpx.Client."""
    return httpx.Client(trust_env=False, verify=_verified(str(options.get("base_url", ""))), **options)


def direct_async(**options: Any) -> httpx.AsyncClient:
    """The same as `direct`, for asyncio."""
    if "verify" not in options:
        options["verify"] = _trusted()
    return httpx.AsyncClient(trust_env=False, **options)


def request(method: str, url: str, **options: Any) -> httpx.Response:
    """One request to an address of the service; options as for httpx.request."""
    return httpx.request(method, url, trust_env=False, verify=_verified(url), **options)


def outward(**options: Any) -> httpx.Client:
    """A client for the model's service, through the environment's proxy. Raises ConfigError for an unusable proxy."""
    check_proxies()
    return httpx.Client(verify=_trusted(), **options)


def outward_async(**options: Any) -> httpx.AsyncClient:
    """The same as `outward`, for asyncio."""
    check_proxies()
    return httpx.AsyncClient(verify=_trusted(), **options)


def check_proxies() -> None:
    """Raises ConfigError, which names the variable, for a proxy that cannot be used to reach the model's service."""
    named = getproxies_environment()
    for scheme in ("http", "https", "all"):
        if named.get(scheme):
            _check_proxy(_variable(scheme), named[scheme])
    try:
        httpx.Client(verify=_trusted()).close()
    except (ValueError, httpx.InvalidURL):
        name = next(name for name in _BYPASS if os.environ.get(name))
        raise ConfigError(
            f"{name} holds something that is not a host, domain or address",
            f"correct {name}: names and addresses with commas between them",
        ) from None


def _verified(url: str) -> ssl.SSLContext:
    """How servers at this address are verified. For http no certificates are read, and a server with TLS is refused."""
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT) if url.startswith("http:") else _trusted()


@cache
def _trusted() -> ssl.SSLContext:
    """The certificates that the environment names (SSL_CERT_FILE), else the usual ones: reading them takes a while."""
    return httpx.create_ssl_context(trust_env=True)


def with_proxies(environment: Mapping[str, str], own: Iterable[str]) -> dict[str, str]:
    """An environment with proxies for a child process; `own` addresses and loopback bypass them."""
    kept = {name: value for name, value in environment.items() if name not in GRPC}
    listed = [entry.strip() for name in _BYPASS for entry in environment.get(name, "").split(",")]
    bypass = ",".join(dict.fromkeys(entry for entry in [*listed, *NEVER, *own] if entry))
    return {**kept, **dict.fromkeys(_BYPASS, bypass), **GRPC}


def without_proxies(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment without proxies for a child process that reaches only the service."""
    kept = {name: value for name, value in environment.items() if not name.lower().endswith(_SUFFIX)}
    return {**kept, **dict.fromkeys(_BYPASS, "*"), **GRPC}


def _variable(scheme: str) -> str:
    """The variable that names the proxy of a scheme, as it is written in the environment."""
    lower = f"{scheme}{_SUFFIX}"
    return lower if os.environ.get(lower) else next(n for n in os.environ if n.lower() == lower)


def _check_proxy(variable: str, url: str) -> None:
    try:
        proxy = httpx.Proxy(url if "://" in url else f"http://{url}")
        httpx.HTTPTransport(proxy=proxy, verify=_trusted()).close()
        why = None if proxy.url.host and (proxy.url.port or 0) <= _LAST_PORT else _NO_ADDRESS
    except (ValueError, httpx.InvalidURL):
        why = _NO_ADDRESS
    if why is not None:  # neither the value nor httpx's words, which quote it: it may hold a password
        raise ConfigError(
            f"{variable} cannot be used to reach the model's service: {why}",
            f"set {variable} to http://HOST:PORT, https://HOST:PORT or socks5://HOST:PORT, or unset it",
        )
