"""The ledger gives an owner, a window or a stranger only what its capability permits, for every method and id."""

from collections.abc import AsyncIterator, Awaitable, Callable
from inspect import signature
from typing import Any

import pytest
import pytest_asyncio

from claude_hitl_template.config.secret_files import SigningKey
from claude_hitl_template.domain.events import draft
from claude_hitl_template.domain.models import Agent, Environment, Session, Usage, utcnow
from claude_hitl_template.domain.notices import Channel, Settled
from claude_hitl_template.domain.people import Actor, Principal, Workspace
from claude_hitl_template.domain.policy.tiers import WorkspacePolicy
from claude_hitl_template.domain.sign_in import ProviderUser
from claude_hitl_template.errors import HitlError, StaleOwner, Unauthorized
from claude_hitl_template.files.manifest import Manifest, SavedFile, blob_name
from claude_hitl_template.store.access import OPENED, Authority, Client, Dispatcher, client, methods_of
from claude_hitl_template.store.core import CoreStore
from claude_hitl_template.store.notifying import Couriers
from claude_hitl_template.store.owners import LEASE_S
from claude_hitl_template.store.protocol import Call, Clients, Owners, Reachable, Store, Supervision, Windows
from claude_hitl_template.testing.memory_backend import MemoryBackend
from tests.contract.asking import message, said

EVERY = methods_of(Store)
OWN, OTHER = "own", "other"
# Names that are not methods of the Store.
NAMES = (
    "_changing", "_writing", "_files", "_backend", "_check_driver", "__init__", "__class__", "__getattribute__", "__dict__",
    "__reduce__", "call", "Call", "claim ", "claim\0", "Claim", "claim.__func__", "store.decide", "", "\u0441laim",
)  # fmt: skip


class House:
    """A ledger with two sessions of two keys, each driven by an owner. Each call passes its capability explicitly."""

    def __init__(self) -> None:
        self.store = CoreStore(MemoryBackend())
        self.authority = Authority(SigningKey(b"k" * 32))
        self.desk = Dispatcher(self.store, self.authority)
        self.sessions: dict[str, Session] = {}
        self.blobs = {OWN: b"mine", OTHER: b"theirs"}

    async def fill(self) -> None:
        for name in (OWN, OTHER):
            key = await self.store.add_key(name, f"hash of {name}")
            session = await self.store.create_session(
                key.id,
                agent=Agent(),
                environment=Environment(),
                title=None,
                metadata={},
                initial=[message("go")],
            )
            session = await self.store.acquire(session.id, f"owner of {name}", lease_s=LEASE_S)
            await self._ask(session)
            await self._save(session, self.blobs[name])
            self.sessions[name] = await self.store.get_session(session.id)
        user = Principal(id="user_x", kind="user", name="user", created_at=utcnow())
        await self.store.add_principal(user)

    async def _ask(self, session: Session) -> None:
        calls = [
            Call(call_id=f"{c}-{session.id}", tool_name="Bash", input={}, digest=c, verdict="ask")
            for c in "ab"
        ]
        drafts = [draft("agent.tool_use", c.call_id, name="Bash", input={}) for c in calls]
        await self.store.open_calls(session.id, session.epoch, drafts, calls, cwd="/w", expires_at=None)

    async def _save(self, session: Session, content: bytes) -> None:
        manifest = Manifest.of([SavedFile("f", 0o600, len(content), 0, (blob_name(content),))])
        await self.store.put_blobs([content, *manifest.encode()])
        await self.store.save_workspace(session.id, session.epoch, blob_name(manifest.encode()[-1]))

    def owner(self, name: str = OWN, *, epoch: int | None = None) -> str:
        session = self.sessions[name]
        return self.authority.owner(session.id, session.epoch if epoch is None else epoch)

    async def call(self, capability: Any, method: str, arguments: dict[str, Any]) -> Any:
        return await self.desk.call(capability, method, (), arguments)

    def arguments(self, method: str, name: str = OWN) -> dict[str, Any]:
        """Returns valid arguments of a method, for this session."""
        session = self.sessions[name]
        blob = self.blobs[name]
        given: dict[str, Any] = {
            "session_id": session.id, "session_ids": [session.id], "epoch": session.epoch, "scope": session.id,
            "workspace_id": session.workspace_id,
            "key": {"scope": session.id, "project_key": "-", "session_id": "s", "subpath": ""}, "project_key": "-",
            "call_id": f"a-{session.id}", "approval_id": "appr_x", "event_id": "sevt_x", "limit": 10, "timeout_s": 0,
            "after": 0, "revision": -1, "version": -1, "drafts": [], "calls": [], "cwd": "/w", "expires_at": None,
            "run_digest": "a", "claim_id": "c", "end_id": "e", "usage": Usage(), "stop_reason": {"type": "end_turn"},
            "approval_ids": [], "deltas": [{"d": 1}], "manifest": session.workspace, "names": [blob_name(blob)],
            "blobs": [blob], "entries": [{"uuid": "u"}], "name": "minted", "secret_hash": "h", "holder": "me",
            "lease_s": 1.0, "message": "m", "before": session.created_at, "path": "f", "inbound": [said(f"a-{session.id}")],
            "by": Actor(name="ann"), "confirmation": said(f"a-{session.id}"), "changes": {"title": "t"}, "agent": Agent(),
            "environment": Environment(), "title": None, "metadata": {}, "initial": [],
            "seconds": 60, "policy": WorkspacePolicy(),
            "key_id": session.workspace_id, "principal_id": "user_x", "at": session.created_at,
            "workspace": Workspace(id="wrkspc_x", name="x", created_at=session.created_at),
            "principal": Principal(id="user_x", kind="user", name="minted", created_at=session.created_at),
            "user": ProviderUser(external_id="i|x", issuer_host="i", name="x"), "password_hash": "h", "token_hash": "h",
            "way": "provider", "network": "192.0.2.1", "seen_s": 60.0,
            "delivery_id": "dlv_x", "delivery_ids": ["dlv_x"], "attempt": 1, "settled": Settled(state="sent"),
            "notice_id": "ntc_x", "channel_id": "chan_x", "secret": {"signing": "s"},
            "channel": Channel(
                id="chan_x", kind="webhook", workspace_id=session.workspace_id, created_at=session.created_at
            ),
            "workspace_ids": [session.workspace_id], "export_id": "e", "form": "jsonl", "from_seq": 1, "up_to": 1,
            "session": session, "lasts_s": 1.0,
            "given": {"host": "files.example.org", "port": 443, "because": "curl"},
        }  # fmt: skip
        wanted = list(signature(EVERY[method]).parameters.values())[1:]
        taken = {"session_id", "epoch", "key", "scope"}
        return {p.name: given[p.name] for p in wanted if p.default is p.empty or p.name in taken}


@pytest_asyncio.fixture
async def house() -> AsyncIterator[House]:
    house = House()
    await house.fill()
    yield house


async def passes(work: Callable[[], Awaitable[Any]]) -> bool:
    """Whether a call passes the ledger's check, regardless of the store's answer. A stale owner's call does not."""
    try:
        await work()
    except (Unauthorized, StaleOwner):
        return False
    except HitlError:
        return True
    return True


async def opened(house: House, capability: Any, name: str = OWN) -> set[str]:
    """Returns the store's methods that pass the check on behalf of a session."""
    before = {OWN: house.sessions[OWN], OTHER: house.sessions[OTHER]}
    found: set[str] = set()
    for method in sorted(EVERY):
        fresh = House()
        await fresh.fill()
        # Each house has new ids, so the capability is created again for the corresponding session.
        mine = capability(fresh) if callable(capability) else capability
        if await passes(lambda m=method, f=fresh, c=mine: f.call(c, m, f.arguments(m, name))):
            found.add(method)
    assert before == {OWN: house.sessions[OWN], OTHER: house.sessions[OTHER]}
    return found


OWNERS = OPENED["owner"]
PING = frozenset({"ping"})
TABLE: dict[str, tuple[Callable[[House], Any], str, frozenset[str]]] = {
    "an owner of its own session": (lambda h: h.owner(), OWN, OWNERS),
    "an owner of another session": (lambda h: h.owner(), OTHER, PING),
    "an owner whose lease is over": (lambda h: h.owner(epoch=h.sessions[OWN].epoch - 1), OWN, PING),
    "an owner of a lease to come": (lambda h: h.owner(epoch=h.sessions[OWN].epoch + 1), OWN, PING),
    "a forged capability": (lambda h: Authority(SigningKey(b"x" * 32)).ingress(), OWN, PING),
    "a capability with another role written in": (lambda h: h.owner().replace("owner", "ingress"), OWN, PING),
    "no capability": (lambda h: None, OWN, PING),
    "something that is not text": (lambda h: b"hitl-ledger-ingress", OWN, PING),
    "a window on its session": (lambda h: h.authority.window(h.sessions[OWN].id), OWN, OPENED["window"]),
    "a window on another session": (lambda h: h.authority.window(h.sessions[OWN].id), OTHER, PING),
    "the ingress": (lambda h: h.authority.ingress(), OWN, OPENED["ingress"]),
    "a courier": (lambda h: h.authority.courier(), OWN, OPENED["courier"]),
    "the supervisor": (lambda h: h.authority.supervisor(), OWN, OPENED["supervisor"]),
}


@pytest.mark.parametrize("who", TABLE)
async def test_each_caller_gets_behind_the_check_with_what_its_capability_opens(
    house: House, who: str
) -> None:
    capability, whose, expected = TABLE[who]
    assert await opened(house, capability, whose) == expected


async def test_what_is_no_method_of_the_store_is_refused_to_everyone(house: House) -> None:
    for capability in (None, house.owner(), house.authority.ingress(), house.authority.supervisor()):
        for name in NAMES:
            with pytest.raises(Unauthorized):
                await house.call(capability, name, {})


@pytest.mark.parametrize("method", sorted(OWNERS - PING))
async def test_an_owner_names_its_own_session_in_every_place(house: House, method: str) -> None:
    own, other = house.arguments(method), house.arguments(method, OTHER)
    bound = [name for name in ("session_id", "scope", "key") if name in own]
    for name in (*bound, "epoch"):
        wrong = [
            None,
            [own[name]],
            {"scope": house.sessions[OTHER].id},
            type("Same", (str,), {"__eq__": _same})("x"),
        ]
        for value in (*wrong, other[name]) if name != "epoch" else (*wrong, True, 1.0, -1):
            with pytest.raises(Unauthorized):
                await house.call(house.owner(), method, {**own, name: value})
        with pytest.raises((Unauthorized, TypeError)):
            await house.call(house.owner(), method, {n: v for n, v in own.items() if n != name})


def _same(_self: Any, _other: Any) -> bool:
    return True


@pytest.mark.parametrize("method", ["commit", "end_turn"])
async def test_an_owner_appends_to_transcripts_of_its_own_session_only(house: House, method: str) -> None:
    own, other = (house.arguments("append_transcript", name)["key"] for name in (OWN, OTHER))
    given = house.arguments(method)
    parts = [(own, [{"uuid": "1"}]), (other, [{"uuid": "2"}])]
    with pytest.raises(Unauthorized):
        await house.call(house.owner(), method, {**given, "transcript": parts})
    assert await house.store.load_transcript(other) is None
    await house.call(house.owner(), method, {**given, "transcript": parts[:1]})
    assert await house.store.load_transcript(own) == [{"uuid": "1"}]


async def test_an_owner_sees_blobs_of_its_own_workspace_only(house: House) -> None:
    session = house.sessions[OWN]
    mine = client(Owners, lambda m, a, k: house.desk.call(house.owner(), m, a, k))
    with pytest.raises(HitlError, match="no such part"):
        await mine.get_blobs([blob_name(b"theirs")], session_id=session.id, epoch=session.epoch)
    assert await mine.get_blobs([blob_name(b"mine")], session_id=session.id, epoch=session.epoch) == [b"mine"]


async def test_an_owner_says_nothing_in_a_humans_name(house: House) -> None:
    session = house.sessions[OWN]
    mine = client(Owners, lambda m, a, k: house.desk.call(house.owner(), m, a, k))
    forged = draft("user.tool_confirmation", tool_use_id="x", result="allow", decided_by="ann")
    with pytest.raises(HitlError, match=r"no user\.tool_confirmation"):
        await mine.commit(session.id, session.epoch, [forged])
    unasked = Call(
        call_id="z", tool_name="Bash", input={}, digest="z", verdict="allow", standing_rule="ann said so"
    )
    with pytest.raises(HitlError, match="no such rule is remembered"):
        await mine.open_calls(session.id, session.epoch, [], [unasked], cwd="/w", expires_at=None)


@pytest.mark.parametrize("protocol", [Clients, Owners, Supervision, Couriers, Windows, Reachable])
def test_a_client_has_the_methods_of_its_protocol_and_no_other(protocol: type) -> None:
    async def never(*_: Any) -> None:
        raise AssertionError

    made: Any = client(protocol, never)
    assert methods_of(type(made)).keys() == methods_of(protocol).keys()
    with pytest.raises(AttributeError):
        _ = made.claims
    assert isinstance(made, Client)
    for name, method in methods_of(protocol).items():
        assert signature(getattr(type(made), name)) == signature(method)


def test_what_opens_the_ledger_cannot_be_sent() -> None:
    import pickle  # noqa: PLC0415

    key = SigningKey(b"k" * 32)
    for held in (key, Authority(key), Dispatcher(CoreStore(MemoryBackend()), Authority(key))):
        with pytest.raises(TypeError, match="cannot be sent"):
            pickle.dumps(held)
    assert "k" * 32 not in repr(key)
