"""Which addresses of targets a notice may be sent to, and connections to exactly the address that was checked."""

from collections.abc import Callable, Sequence
from urllib.parse import urlsplit, urlunsplit

from claude_hitl_template.config.addresses import (
    Host,
    Resolve,
    host_of,
    is_address,
    is_private,
    may_reach,
    resolve,
)
from claude_hitl_template.domain.policy.web import covers
from claude_hitl_template.errors import InvalidInput
from claude_hitl_template.notify.sender import Refused, Retry

SETTING = "HITL_WEBHOOK_PRIVATE_HOSTS"


class Targets:
    """The check of targets. `private`: hosts that are reached at private addresses, too, and by http.

    An entry is a host, `*.domain`, or either with `:port`.
    """

    def __init__(
        self,
        private: Sequence[str] = (),
        *,
        resolve: Resolve = resolve,
        may_reach: Callable[[str], bool] = may_reach,
    ) -> None:
        self._private, self._resolve, self._may_reach = private, resolve, may_reach

    def check(self, url: str) -> Host:
        """The host of a URL that may be registered. Raises InvalidInput, which names the fix.

        A name is resolved at each delivery, not here: its addresses may change.
        """
        host = host_of(url)
        if host is None or not url.isascii() or "\\" in url or any(mark.isspace() for mark in url):
            raise InvalidInput(
                "an https URL of a host that is clear, such as https://hooks.example.org/a", "url"
            )
        found = urlsplit(url)
        if found.username is not None or found.password is not None:
            raise InvalidInput("without a user and a password; use the signature instead", "url")
        if self.names(host):
            return host
        if found.scheme != "https":
            raise InvalidInput(f"https only; http is for hosts that {SETTING} names", "url")
        name = host[0]
        if is_private(name, self._may_reach):
            raise InvalidInput(
                f"{name} is an address of this machine or of a private network; the operator allows such a host "
                f"with {SETTING}",
                "url",
            )
        return host

    def names(self, host: Host) -> bool:
        """Whether the operator named this host among those that are reached at private addresses."""
        return any(covers(entry, *host) for entry in self._private)

    async def address(self, url: str) -> tuple[str, Host] | Refused | Retry:
        """An address of the URL's host that may be reached now, with the host; or why there is none."""
        try:
            host = self.check(url)
        except InvalidInput as error:
            return Refused(error.message)
        name, port = host
        try:
            found = [name] if is_address(name) else await self._resolve(name, port)
        except OSError as error:
            return Retry(f"{name} is not known here ({error.strerror})")
        allowed = found if self.names(host) else [one for one in found if self._may_reach(one)]
        if not allowed:
            return Refused(
                f"{name} leads to this machine or a private network, which {SETTING} does not allow"
            )
        return allowed[0], host


def at_address(url: str, address: str) -> str:
    """The URL with an address in place of its host's name."""
    found = urlsplit(url)
    shown = f"[{address}]" if ":" in address else address
    port = f":{found.port}" if found.port is not None else ""
    return urlunsplit((found.scheme, f"{shown}{port}", found.path, found.query, ""))
