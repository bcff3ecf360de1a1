"""Access control of the Store: each caller has a capability, which the ledger checks on every call.

    hitl-ledger-<role>.<session id>.<epoch>.<HMAC-SHA256 of what precedes it, hex>

A role may call the methods of one protocol. `owner` and `window` are bound to a session, an owner also to its lease's
epoch: session, transcript scope and epoch in the arguments must match. Capabilities are not stored; the signing key is
enough to check one. Ledger, ingress and supervisor read that key from a file of the head's data folder.
"""

import functools
import hmac
import inspect
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NoReturn, cast

from claude_hitl_template.errors import Unauthorized
from claude_hitl_template.store.notifying import Couriers
from claude_hitl_template.store.protocol import Clients, Owners, Reachable, Store, Supervision, Windows

if TYPE_CHECKING:  # an owner has no key, and needs no settings
    from claude_hitl_template.config.secret_files import SigningKey

type Role = Literal["ingress", "supervisor", "courier", "owner", "window"]
type Send = Callable[[str, tuple[Any, ...], dict[str, Any]], Awaitable[Any]]

PREFIX = "hitl-ledger-"
_PURPOSE = b"ledger"
_SHAPE = re.compile(rf"({PREFIX}([a-z]+)\.([A-Za-z0-9_-]{{0,128}})\.(-1|[0-9]{{1,18}}))\.([0-9a-f]{{64}})")
_NO_EPOCH = -1


def methods_of(protocol: type) -> dict[str, Callable[..., Any]]:
    """The methods of a protocol, those that it inherits included, by name."""
    found: dict[str, Callable[..., Any]] = {}
    for base in reversed(protocol.__mro__):
        found |= {n: m for n, m in vars(base).items() if inspect.isfunction(m) and not n.startswith("_")}
    return found


OPEN = frozenset(methods_of(Reachable))  # to everyone who reaches the ledger
_PROTOCOLS: Mapping[Role, type] = {
    "ingress": Clients,
    "supervisor": Supervision,
    "courier": Couriers,
    "owner": Owners,
    "window": Windows,
}
OPENED: Mapping[Role, frozenset[str]] = {role: frozenset(methods_of(p)) for role, p in _PROTOCOLS.items()}


@dataclass(frozen=True)
class Capability:
    """The caller's identity. `session_id` is set for owner and window, `epoch` for an owner."""

    role: Role
    session_id: str | None = None
    epoch: int | None = None


class Authority:
    """Issues and checks capabilities. It cannot be pickled, so it stays in its process."""

    def __init__(self, key: "SigningKey") -> None:
        self._key = key

    def ingress(self) -> str:
        return self._issue("ingress")

    def supervisor(self) -> str:
        return self._issue("supervisor")

    def courier(self) -> str:
        return self._issue("courier")

    def owner(self, session_id: str, epoch: int) -> str:
        """Mints the capability of the owner with this lease."""
        return self._issue("owner", session_id, epoch)

    def window(self, session_id: str) -> str:
        """Mints the capability of a flow of the panel that shows this session."""
        return self._issue("window", session_id)

    def check(self, capability: str | None) -> Capability:
        """Raises Unauthorized for what was not made with this key."""
        found = _SHAPE.fullmatch(capability) if type(capability) is str else None
        if found is None or not hmac.compare_digest(self._key.mac(_PURPOSE, found[1]), found[5]):
            raise Unauthorized("the ledger was called without a capability of this service")
        role, session_id, epoch = found[2], found[3], int(found[4])
        return Capability(cast(Role, role), session_id or None, None if epoch == _NO_EPOCH else epoch)

    def _issue(self, role: Role, session_id: str = "", epoch: int = _NO_EPOCH) -> str:
        claim = f"{PREFIX}{role}.{session_id}.{epoch}"
        return f"{claim}.{self._key.mac(_PURPOSE, claim)}"

    def __reduce__(self) -> NoReturn:
        raise TypeError("an Authority cannot be sent to another process")


class Dispatcher:
    """Calls the Store after checking the caller's capability."""

    def __init__(self, store: Store, authority: Authority) -> None:
        self._authority = authority
        self._methods = {name: getattr(store, name) for name in methods_of(Store)}

    def call(
        self, capability: str | None, method: str, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Awaitable[Any]:
        """Raises Unauthorized before the store is called."""
        if method not in OPEN:
            check(self._authority.check(capability), method, args, kwargs)
        return self._methods[method](*args, **kwargs)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Dispatcher cannot be sent to another process")


def check(capability: Capability, method: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raises Unauthorized unless the capability opens this call; TypeError for arguments that the method does not take."""
    if method not in OPENED[capability.role]:
        raise Unauthorized(f"this caller of the ledger, {capability.role}, may not call {method!r:.100}")
    if capability.session_id is None:
        return
    given = _SIGNATURES[method].bind(*args, **kwargs).arguments
    for name in _BOUND[capability.role, method]:
        if not _fits(name, given.get(name), capability):
            raise Unauthorized(f"{method}: {name} is not what this caller's capability is for")


def _fits(name: str, value: Any, capability: Capability) -> bool:
    """Compares by exact type: an unpickled object could define `__eq__` to match everything."""
    if name == "epoch":
        return type(value) is int and value == capability.epoch
    if name == "transcript":
        return all(_fits("key", key, capability) for key, _ in value or ())
    if name == "key":
        value = value.get("scope") if type(value) is dict else None
    return type(value) is str and value == capability.session_id


def _bound(role: Role, method: str) -> tuple[str, ...]:
    """The parameters that must be the capability's own. Raises AssertionError for a method that names no session."""
    known = _SIGNATURES[method].parameters
    of_session = [name for name in ("session_id", "scope") if name in known]
    # A transcript's key, with its scope; and what is appended to several.
    of_session += [name for name in ("key", "transcript") if name in known]
    epoch = ["epoch"] if role == "owner" else []
    if not of_session or not known.keys() >= {*epoch}:
        raise AssertionError(f"{method} of the role {role} takes no session")
    return (*of_session, *epoch)


def _without_self(method: Callable[..., Any]) -> inspect.Signature:
    signature = inspect.signature(method)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


_SIGNATURES = {name: _without_self(method) for name, method in methods_of(Store).items()}
_BOUND = {
    (role, method): _bound(role, method) for role in ("owner", "window") for method in OPENED[role] - OPEN
}


# -- the other side


class Client:
    """Sends each call to the Dispatcher. Its methods are those of one protocol; any other name raises AttributeError."""

    def __init__(self, send: Send) -> None:
        self._send = send

    def __reduce__(self) -> NoReturn:
        raise TypeError("a client of the ledger cannot be sent to another process")


def client[P](protocol: type[P], send: Send) -> P:
    """A typed client of the ledger for this protocol."""
    return cast(P, _CLIENTS[protocol](send))


def _client(protocol: type) -> type[Client]:
    methods = {name: _sending(name, method) for name, method in methods_of(protocol).items()}
    return type(f"{protocol.__name__}Client", (Client,), methods)


def _sending(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    async def call(self: Client, *args: Any, **kwargs: Any) -> Any:
        return await self._send(name, args, kwargs)  # pyright: ignore[reportPrivateUsage]

    return call


_CLIENTS: Mapping[type, type[Client]] = {
    protocol: _client(protocol) for protocol in (*_PROTOCOLS.values(), Reachable)
}
