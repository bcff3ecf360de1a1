"""The hosts of URLs and of connections, and whether a rule's domain or an entry of a list covers them."""

import ipaddress
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


# -- hosts of connections

WEB_PORTS = (80, 443)  # of an entry that names no port
_MAX_NAME_CHARS = 253
_ENTRY = re.compile(r"(\*\.)?(\[[^\]]*\]|[^:\[\]*]+)(?::([0-9]{1,5}))?")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")


def clear_name(host: str) -> str | None:
    """A host's name in lower case and without the last dot, or an IP address as it is usually written; None for anything
    else. An address in another spelling (`2130706433`, `0x7f.1`, `0177.0.0.1`) is refused: a human must read
    the address that is reached."""
    name = host.lower().removesuffix(".")
    try:
        return None if "%" in name else str(ipaddress.ip_address(name))
    except ValueError:
        pass
    if not HOST.fullmatch(name) or ".." in name or len(name) > _MAX_NAME_CHARS:
        return None
    return None if _NUMBER.fullmatch(name.rpartition(".")[2]) else name


def check_entry(text: str) -> str:
    """An entry of a list of hosts, in lower case: `example.org`, `*.example.org` (what is below it), each with a port or,
    without one, for 80 and 443. Raises ValueError."""
    _read_entry(text.lower())
    return text.lower()


def covers(entry: str, host: str, port: int, *, any_port: bool = False) -> bool:
    """`host` as `clear_name` has it. `any_port`: an entry without a port is for all of them."""
    below, name, ports = _read_entry(entry.lower())
    if (ports is None and not any_port and port not in WEB_PORTS) or (ports is not None and port != ports):
        return False
    return host.endswith(f".{name}") if below else host == name


def _read_entry(entry: str) -> tuple[bool, str, int | None]:
    found = _ENTRY.fullmatch(entry)
    name = clear_name(found[2].removeprefix("[").removesuffix("]")) if found else None
    port = int(found[3]) if found and found[3] else None
    if found is None or name is None or port == 0 or (port or 0) > 65535:
        raise ValueError(
            f"{entry!r} names no host: write `files.example.org` or `*.example.org`, with `:PORT` where it is not 80 or "
            "443; names beyond ASCII in their `xn--` form"
        )
    return bool(found[1]), name, port
