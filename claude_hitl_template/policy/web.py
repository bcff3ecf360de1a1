"""The hosts of URLs, and whether a rule's domain covers them."""

import re
import unicodedata
from urllib.parse import unquote, urlsplit

HOST = re.compile(r"[a-z0-9]([a-z0-9_.-]*[a-z0-9])?")


def rule_domain(spec: str) -> str:
    return spec.removeprefix("domain:").lower().rstrip(".")


def web_matches(spec: str, url: str, *, allows: bool) -> bool:
    domain, host = rule_domain(spec), clear_host(url)
    hosts = {host} if host else set[str]() if allows else _possible_hosts(url)
    return any(host == domain or host.endswith(f".{domain}") for host in hosts)


def clear_host(url: str) -> str | None:
    """The host (lower case, no trailing dot) of a URL that every parser reads alike; else None."""
    if not url.isascii() or not url.isprintable() or set(url) & set(" \\"):
        return None
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").rstrip(".")
        parts.port  # noqa: B018 - raises for a port that is no number
    except ValueError:
        return None
    is_clear = parts.scheme in ("http", "https") and "@" not in parts.netloc and HOST.fullmatch(host)
    return host if is_clear else None


def _possible_hosts(url: str) -> set[str]:
    """Whatever some parser may take for the host."""
    text = unicodedata.normalize("NFKC", unquote(url)).lower().replace("。", ".")
    text = "".join(char for char in text if char.isprintable())
    return {token.strip(".") for token in re.findall(r"[a-z0-9_.-]+", text)}
