"""Every call of the Store reaches the ledger, and its answer the caller, at the largest permitted size.

The ledger runs on Ray Serve with Ray's default gRPC limit (4 MiB) on both sides. The service sets a higher limit, but
only in processes that it starts itself.
"""

import json
import pickle
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from inspect import signature
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio

import claude_hitl_template
from claude_hitl_template.cli.host.processes import end, ray_environment
from claude_hitl_template.config.secret_files import SIGNING_KEY, SigningKey
from claude_hitl_template.config.settings import Settings
from claude_hitl_template.domain import events
from claude_hitl_template.domain.audit.signing import keys_of_jwks
from claude_hitl_template.domain.audit.verification import verify
from claude_hitl_template.domain.canonical_json import digest
from claude_hitl_template.domain.events import UserInterrupt
from claude_hitl_template.domain.models import Agent, Environment, Usage, new_id, utcnow
from claude_hitl_template.domain.notices import APPROVAL_KINDS, Channel, Settled
from claude_hitl_template.domain.people import SERVICE, Actor, Principal, Role, Workspace
from claude_hitl_template.domain.policy.tiers import WorkspacePolicy
from claude_hitl_template.domain.sign_in import ProviderUser
from claude_hitl_template.errors import InternalError
from claude_hitl_template.files.manifest import CHUNK_BYTES, Manifest, SavedFile, blob_name
from claude_hitl_template.store.access import OPENED, Authority
from claude_hitl_template.store.notifying import Couriers
from claude_hitl_template.store.owners import LEASE_S
from claude_hitl_template.store.protocol import Call, Clients, Owners, Supervision
from claude_hitl_template.store.supervision import EXISTING
from tests.contract.asking import key_of, message, said

pytestmark = [
    pytest.mark.slow,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.filterwarnings("ignore"),  # Ray's own, of many kinds
]

LIMIT = 4 * 1024 * 1024
BIG = "x" * 5_000_000  # more than the limit, as a system prompt, an input, or an image in a transcript may be
MESSAGE = 900_000
# Neither what is asked nor what is answered grows with what users, models or tools say.
SMALL = frozenset({
    "add_key", "find_identity", "get_key", "list_keys", "revoke_key", "rotate_key", "set_first_key", "list_kept_decisions",
    "last_seq", "begin_turn", "hold", "defer", "remind", "release", "save_workspace",
    "missing_blobs", "add_files", "workspace_file", "list_transcripts", "delete_transcripts", "delete_session", "give_up",
    "note_key_use", "add_workspace", "change_workspace", "get_workspace", "list_workspaces", "add_principal",
    "change_principal", "get_principal", "find_principal", "list_principals", "set_password", "find_password",
    "add_browser_session", "find_browser_session", "list_browser_sessions", "end_browser_sessions",
    "note_failed_sign_in", "put_provider_user", "list_audit", "begin_export", "export_audit", "audit_keys",
    "approval_receipt", "tell_waiting", "drop_lease", "supervised", "existing", "wait_supervised", "expire_due", "retire",
    "ping", "list_waiting", "get_waiting", "list_same_calls", "wait_approvals", "get_policy", "set_policy",
    "add_channel", "get_channel", "list_channels", "change_channel", "channel_secret", "remove_channel",
    "send_test", "take_deliveries", "settle_delivery", "list_deliveries", "redeliver", "note_reader",
})  # fmt: skip
METHODS = frozenset().union(*OPENED.values())


class Weighed:
    """Calls the ledger with each caller's capability, and records the size in bytes of each method's largest request
    or answer."""

    def __init__(self, authority: Authority, reached: Callable[..., Any]) -> None:
        self._authority, self._reached = authority, reached
        self.largest: dict[str, int] = {}

    def _caller(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if method in OPENED["ingress"] and kwargs.get("epoch") is None:
            return self._reached(Clients, capability=self._authority.ingress())
        if method in OPENED["supervisor"]:
            return self._reached(Supervision, capability=self._authority.supervisor())
        if method in OPENED["courier"]:
            return self._reached(Couriers, capability=self._authority.courier())
        given = signature(getattr(Owners, method)).bind(self, *args, **kwargs).arguments
        session_id = given.get("session_id") or given.get("scope") or given["key"]["scope"]
        return self._reached(Owners, capability=self._authority.owner(session_id, given["epoch"]))

    def __getattr__(self, method: str) -> Any:
        async def call(*args: Any, **kwargs: Any) -> Any:
            answer = await getattr(self._caller(method, args, kwargs), method)(*args, **kwargs)
            size = max(len(pickle.dumps((args, kwargs))), len(pickle.dumps(answer)))
            self.largest[method] = max(self.largest.get(method, 0), size)
            return answer

        return call


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def store(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Weighed]:
    # Importing Ray Serve warns, which would fail the collection of all tests.
    import ray  # noqa: PLC0415
    from ray import serve  # noqa: PLC0415
    from ray.serve._private.request_router import replica_wrapper  # noqa: PLC0415

    from claude_hitl_template.cluster.deployments import Ledger  # noqa: PLC0415
    from claude_hitl_template.cluster.ledger_line import APP_NAME, Line, reach  # noqa: PLC0415

    name, _ = claude_hitl_template.GRPC_LIMIT
    data = tmp_path_factory.mktemp("data")
    settings = {"HITL_DATA_DIR": str(data), name: str(LIMIT)}
    (data / "secrets").mkdir()
    (data / "secrets" / SIGNING_KEY).write_text("k" * 64)
    key = SigningKey(b"k" * 64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_gcs_server_port_wait_time_s", "120")  # on a machine that is busy
        patch.setenv("RAY_AUTH_MODE", "disabled")  # else Ray leaves a token in the home folder
        patch.setattr(replica_wrapper, name, LIMIT)
        start_ray(settings)
        try:
            serve.start(proxy_location="Disabled")
            handle = serve.run(Ledger.bind(), name=APP_NAME, route_prefix=None)

            def reached(protocol: type[Any], *, capability: str) -> Any:
                # The first call of a line goes through the handle, whose limit this is about.
                return reach(protocol, Line(handle), capability)

            yield Weighed(Authority(key), reached)
        finally:
            serve.shutdown()
            ray.shutdown()


def start_ray(settings: dict[str, str]) -> None:
    """Starts Ray, whose own timeout of 30 s a busy machine may exceed."""
    import ray  # noqa: PLC0415

    before = psutil.Process().children()
    for left in (2, 1, 0):
        try:
            ray.init(
                address="local",
                namespace="serve",
                num_cpus=1,
                include_dashboard=False,
                log_to_driver=False,
                runtime_env={"env_vars": settings},
            )
        except Exception as error:  # what Ray raises is nothing more
            ray.shutdown()  # it does not end the processes of the failed start
            end([process for process in psutil.Process().children(recursive=True) if process not in before])
            if not left or "timed out" not in str(error).lower():
                raise
        else:
            return


def big_call(call_id: str) -> Call:
    given = {"command": f"{call_id} {BIG}"}
    return Call(call_id=call_id, tool_name="Bash", input=given, digest=digest(given), verdict="ask")


async def make(store: Any, key_id: str, *first: str) -> str:
    session = await store.create_session(
        key_id,
        agent=Agent(system=BIG),
        environment=Environment(),
        title=None,
        metadata={},
        initial=[message(text) for text in first],
    )
    assert session.agent.system == BIG
    return session.id


async def a_life(store: Any) -> None:
    """Calls every method of the Store, and checks that the data written is the data read."""
    await store.ping()
    key = await store.add_key("someone", "hash")
    assert (key_of(await store.find_identity("hash")), await store.get_key(key.id)) == (key, key)
    five = [f"{number} {'m' * MESSAGE}" for number in range(5)]
    sid = await make(store, key.id, *five)
    assert [s.id for s in (await store.list_sessions(key.id, limit=10)).data] == [sid]
    assert [s.id for s in await store.supervised()] == [sid]
    await store.wait_supervised(-1, timeout_s=0)
    assert await store.existing([sid, *(f"sesn_{n:026}" for n in range(EXISTING - 1))]) == [sid]
    epoch = (await store.acquire(sid, "one", lease_s=LEASE_S)).epoch
    await store.tell_waiting(sid, epoch, "no room")
    found = await store.snapshot(sid, epoch)
    assert [e.payload["content"][0]["text"] for e in found.queued] == five
    assert (await store.wait_session(sid, epoch, -1, timeout_s=0)).queued == found.queued
    await store.begin_turn(sid, epoch, found.queued[0].id)
    await a_transcript(store, sid, epoch)
    await some_calls(store, sid, epoch, key.id)
    await a_workspace(store, sid, epoch, key.id)
    await the_log(store, sid, epoch, key.id, five)
    await the_end(store, sid, epoch, key.id)


async def a_transcript(store: Any, sid: str, epoch: int) -> None:
    key = {"scope": sid, "project_key": "-", "session_id": "s", "subpath": ""}
    image = [{"uuid": "image", "message": BIG}]
    results = [{"uuid": f"r{n}", "toolUseResult": "r" * 30_000} for n in range(150)]
    await store.append_transcript(key, image, epoch=epoch)
    await store.append_transcript(key, results, epoch=epoch)
    assert await store.load_transcript(key, epoch=epoch) == [*image, *results]
    assert [k for k, _ in await store.list_transcripts(sid, "-", epoch=epoch)] == [key]
    await store.delete_transcripts(key, epoch=epoch)
    assert await store.load_transcript(key, epoch=epoch) is None


async def some_calls(store: Any, sid: str, epoch: int, key_id: str) -> None:
    calls = [big_call("a"), big_call("b")]
    drafts = [events.tool_use(c.call_id, c.tool_name, c.input, c.verdict, None) for c in calls]
    opened = await store.open_calls(sid, epoch, drafts, calls, cwd="/w", expires_at=None)
    assert [a.input for a in opened] == [c.input for c in calls]
    page = await store.list_approvals(key_id, limit=10, session_id=sid)
    assert [page.data[0], *await rest(store, page, key_id, sid)] == opened
    assert await store.get_approval(opened[0].id, key_id) == opened[0]
    assert await store.find_approval(sid, epoch, "a") == opened[0]
    waiting = (await store.list_waiting([key_id], limit=50)).data
    assert [call.id for call in waiting] == [approval.id for approval in opened]
    assert await store.get_waiting([opened[0].id], None) == waiting[:1]
    assert await store.list_same_calls(opened[0].id, key_id) == []
    assert not (await store.wait_approvals(0, timeout_s=0)).complete
    edited = {"command": f"edited {BIG}"}
    [decided] = await store.send_events(
        sid, key_id, [said("a", updated_input=edited)], by=Actor(name="ann"), idempotency_key="once"
    )
    again = await store.send_events(
        sid, key_id, [said("a", updated_input=edited)], by=Actor(name="ann"), idempotency_key="once"
    )
    assert again == [decided]
    claimed = await store.claim(sid, epoch, "a", digest(edited), claim_id="claim")
    assert claimed.run_input == edited
    ann = await store.add_principal(
        Principal(
            id=new_id("user"), kind="user", name="ann", created_at=utcnow(), roles={key_id: (Role.APPROVER,)}
        )
    )
    looking = await store.claim_approval(
        opened[1].id, key_id, seconds=60, by=Actor(principal_id=ann.id, name="ann")
    )
    assert looking.input == calls[1].input
    handed = await store.delegate_approval(opened[1].id, key_id, principal_id=ann.id, by=Actor(name="ann"))
    assert handed.input == calls[1].input
    await store.hold(sid, epoch, "b")
    await store.defer(sid, epoch, None)
    assert [a.call_id for a in await store.lost_calls(sid, epoch)] == ["b"]
    assert (await store.decide(opened[1].id, key_id, said("b", "deny"), by=Actor(name="ann"))).input == calls[
        1
    ].input
    await store.remind(sid, epoch, [opened[1].id])
    host = {"host": "files.example.org", "port": 443, "because": BIG}
    asked = await store.ask_network(sid, epoch, "n", host, cwd="/w", expires_at=None)
    assert asked.input == host
    await store.decide(asked.id, key_id, said("n", "deny"), by=Actor(name="ann"))
    await the_audit_log(store, asked.id, key_id)


async def the_audit_log(store: Any, approval_id: str, key_id: str) -> None:
    signed = await store.begin_export(key_id, "exp_1", form="jsonl", from_seq=1, by=Actor(name="ann"))
    documents, last = await store.export_audit(key_id, after=0, up_to=signed["seq"])
    assert last == signed["seq"]
    lines = [json.dumps(document) for document in (*documents, signed)]
    assert verify(lines, keys_of_jwks({"keys": await store.audit_keys()})).problems == ()
    [entry] = (await store.list_audit(key_id, limit=1)).data
    assert entry.wire() in documents
    assert (await store.approval_receipt(approval_id, key_id))["approval_id"] == approval_id


async def rest(store: Any, page: Any, key_id: str, sid: str) -> list[Any]:
    found = page.data[1:]
    while page.next_page:
        page = await store.list_approvals(key_id, limit=10, session_id=sid, page=page.next_page)
        found += page.data
    return found


async def a_workspace(store: Any, sid: str, epoch: int, key_id: str) -> None:
    blobs = [bytes([n]) * CHUNK_BYTES for n in range(4)]
    names = [blob_name(blob) for blob in blobs]
    assert await store.missing_blobs([*names, *[blob_name(b"%d" % n) for n in range(9000)]])
    await store.put_blobs(blobs)
    assert await store.get_blobs(names) == blobs
    await store.put_blobs(blobs, session_id=sid, epoch=epoch)
    deep = "/".join(["d" * 250] * 16)
    files = [SavedFile(f"{deep}/{n:04}", 0o600, 4 * CHUNK_BYTES, 0, tuple(names)) for n in range(1000)]
    parts = Manifest.of(files).encode()
    await store.put_blobs(parts)
    await store.save_workspace(sid, epoch, blob_name(parts[-1]))
    assert await store.get_blobs(names, session_id=sid, epoch=epoch) == blobs
    assert (await store.list_workspace(sid, key_id, limit=1000)).data == files
    assert await store.workspace_file(sid, key_id, files[7].path) == files[7]
    added = Manifest.of([SavedFile("up", 0o600, 1, 0, ())]).encode()
    await store.put_blobs(added)
    await store.add_files(sid, key_id, blob_name(added[-1]))


async def the_log(store: Any, sid: str, epoch: int, key_id: str, five: list[str]) -> None:
    await store.commit(sid, epoch, [events.agent_message("said", BIG)])
    await store.preview(sid, epoch, [{"type": "event_delta", "event_id": "x", "delta": BIG}])
    _, deltas, _ = await store.wait_events(sid, key_id, 10_000, timeout_s=0, previews=0)
    assert deltas[0]["delta"] == BIG
    newest = await store.last_seq(sid, key_id)
    listed, page = [], None
    while page is None or page.next_page:
        page = await store.list_events(sid, key_id, limit=1000, page=page and page.next_page)
        listed += page.data
    assert [e.seq for e in listed] == list(range(1, newest + 1))
    assert [e.payload["content"][0]["text"] for e in listed if e.type == "user.message"] == five
    heard: list[Any] = []
    while len(heard) < newest:
        found, _, _ = await store.wait_events(sid, key_id, len(heard), timeout_s=0)
        heard += found
    assert heard == listed


async def the_end(store: Any, sid: str, epoch: int, key_id: str) -> None:
    await store.update_session(sid, key_id, changes={"title": "named"})
    drafts = [events.tool_result("a", events.text_blocks(BIG), False)]
    ended = {"end_id": "end", "usage": Usage(), "stop_reason": events.END_TURN}
    await store.end_turn(sid, epoch, drafts, **ended)
    assert (await store.get_session(sid)).agent.system == BIG
    await store.drop_lease(sid, epoch)
    await store.give_up(sid, "no owner drives it")
    for _ in range(5):  # one for each message
        await store.send_events(sid, key_id, [UserInterrupt(type="user.interrupt")], by=Actor(name="ann"))
    assert await store.release(sid, (await store.acquire(sid, "two", lease_s=LEASE_S)).epoch)
    assert (await store.archive_session(sid, key_id)).archived_at
    await store.delete_session(sid, key_id)
    old = await make(store, key_id)
    await store.reserve((await store.get_session(old)).but(id=new_id("sesn")), lasts_s=60)
    await store.archive_session(old, key_id)
    await keys_and_what_is_kept(store)
    assert await store.expire_due() == 0
    assert await store.retire(utcnow() + timedelta(seconds=1)) == [old]


async def keys_and_what_is_kept(store: Any) -> None:
    other = await store.add_key("other", "other hash")
    known = await store.list_keys()
    first = next((key for key in known if key.first), other)  # the service's own stays what it is
    assert (await store.set_first_key(first.secret_hash)).first
    spare = await store.add_key("spare", "spare hash")
    assert (await store.rotate_key(spare.id, "rotated hash")).id == spare.id
    assert (await store.revoke_key(spare.id)).revoked_at
    await store.list_kept_decisions(limit=10)
    await store.note_key_use(other.id, utcnow())
    await people(store)


async def channels(store: Any, workspace_id: str) -> None:
    channel = Channel(
        id="chan_1", workspace_id=workspace_id, kind="webhook", kinds=APPROVAL_KINDS, created_at=utcnow()
    )
    assert await store.add_channel(channel, {"signing": "s"}) == channel
    assert await store.list_channels(workspace_id) == [await store.get_channel(channel.id, workspace_id)]
    changed = await store.change_channel(channel.id, workspace_id, {"kinds": APPROVAL_KINDS[:1]})
    assert changed == await store.get_channel(channel.id, workspace_id)
    assert await store.channel_secret(channel.id) == {"signing": "s"}
    test = await store.send_test(channel.id, workspace_id, notice_id="ntc_1")
    [parcel] = await store.take_deliveries(limit=10)
    await store.settle_delivery(parcel.delivery_ids, parcel.attempt, Settled(state="sent"))
    assert [d.id for d in (await store.list_deliveries(workspace_id, limit=10)).data] == [test.id]
    assert (await store.redeliver(test.id, workspace_id)).state == "pending"
    await store.remove_channel(channel.id, workspace_id)


async def people(store: Any) -> None:
    made = await store.add_workspace(Workspace(id=new_id("wrkspc"), name="payments", created_at=utcnow()))
    changed = await store.change_workspace(made.id, {"separation_of_duties": True})
    assert await store.get_workspace(made.id) == changed
    assert changed in await store.list_workspaces()
    await store.set_policy(made.id, WorkspacePolicy(), by=SERVICE)
    assert (await store.get_policy(made.id)).policy == WorkspacePolicy()
    await channels(store, made.id)
    user = await store.add_principal(
        Principal(
            id=new_id("user"), kind="user", name="eve", created_at=utcnow(), roles={made.id: (Role.VIEWER,)}
        )
    )
    user = await store.change_principal(user.id, {"groups": ["ops"]})
    assert await store.get_principal(user.id) == await store.find_principal(name="eve") == user
    assert user in await store.list_principals()
    assert await store.set_password(user.id, "password hash")
    assert (await store.find_password("eve")).password_hash == "password hash"
    session = await store.add_browser_session(
        user.id, "token hash", way="password", password_hash="password hash"
    )
    assert (await store.find_browser_session("token hash", seen_s=60)).session == session
    assert await store.list_browser_sessions(user.id) == [session]
    await store.end_browser_sessions(user.id)
    await store.note_failed_sign_in(user.id, network="192.0.2.0")
    known = ProviderUser(external_id="https://idp.example.org#1", issuer_host="idp.example.org", name="zoe")
    assert (await store.put_provider_user(known)).name == "zoe"
    await store.note_reader(user.id)


async def test_every_call_of_the_store_gets_through_at_its_largest_size(store: Weighed) -> None:
    """A new method must be called here at its largest size, or be listed as a small one."""
    await a_life(store)
    assert set(store.largest) == METHODS
    assert {name for name, size in store.largest.items() if size > LIMIT} == METHODS - SMALL


async def test_a_defect_of_the_ledger_is_told_as_one_and_nothing_is_repeated(store: Weighed) -> None:
    with pytest.raises(InternalError, match="supervised"):
        await store.supervised(besides=1)


async def test_what_the_supervisor_asks_each_second_does_not_grow_with_system_prompts(store: Weighed) -> None:
    key = await store.add_key("another", "another hash")
    ids = {await make(store, key.id, "go") for _ in range(7)}
    found = await store.supervised()
    assert ids <= {s.id for s in found}
    assert len(pickle.dumps(found)) < 1000 * len(found)


def test_the_service_raises_the_limit_where_it_starts_the_processes() -> None:
    name, limit = claude_hitl_template.GRPC_LIMIT
    assert ray_environment(Settings()).get(name) == limit
    config = Path(__file__).parents[2] / "data" / "config" / "claude_hitl_template.yaml"
    assert f'{name}: "{limit}"' in config.read_text()
