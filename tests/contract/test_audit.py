"""Decisions and changes are recorded in the audit log, in their own transaction, in one chain without gaps or forks."""

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from claude_hitl_template import fault_points
from claude_hitl_template.domain.audit import SERVICE_CHAIN, Entry
from claude_hitl_template.domain.audit.checkpoints import EVERY
from claude_hitl_template.domain.audit.receipts import verify_receipt
from claude_hitl_template.domain.audit.signing import Signer, keys_of_jwks
from claude_hitl_template.domain.audit.verification import Report, verify
from claude_hitl_template.domain.models import Agent, ApprovalState, Decision, Environment
from claude_hitl_template.domain.people import Actor, Principal, Role, Workspace
from claude_hitl_template.domain.sign_in import ProviderUser
from claude_hitl_template.errors import AlreadyDecided, Conflict, InvalidInput, NotFound, NotWaiting
from claude_hitl_template.store.core import CoreStore
from claude_hitl_template.store.filters import AuditFilter, TimeRange
from claude_hitl_template.store.postgres import PostgresBackend
from claude_hitl_template.store.sqlite import SqliteBackend, sqlite_url
from claude_hitl_template.testing.clock import FakeClock
from tests.contract.asking import KEY, ask_for, asking, message, said

BY = Actor(name="ann", key_id="key_ann")  # the service itself, which checks what ann may do
ANN = Actor(name="ann", principal_id="user_ann")
CANARY = "canary-5f1d"


async def decide(store: CoreStore, session_id: str, *decisions: Any, **more: Any) -> None:
    await store.send_events(session_id, KEY, decisions, by=BY, **more)


async def entries_of(store: CoreStore, workspace_id: str = KEY, **matching: Any) -> list[Entry]:
    found = await store.list_audit(workspace_id, limit=1000, order="asc", matching=AuditFilter(**matching))
    return found.data


async def exported(store: CoreStore, workspace_id: str = KEY, from_seq: int = 1) -> list[dict[str, Any]]:
    export_id = f"exp_{from_seq}"
    end = await store.begin_export(workspace_id, export_id, form="jsonl", from_seq=from_seq, by=ANN)
    documents, after = list[dict[str, Any]](), from_seq - 1
    while after < end["seq"]:
        some, after = await store.export_audit(workspace_id, after=after, up_to=end["seq"])
        documents += some
    return [*documents, end]


async def verified(store: CoreStore, workspace_id: str = KEY) -> Report:
    documents = await exported(store, workspace_id)
    return verify(map(json.dumps, documents), keys_of_jwks({"keys": await store.audit_keys()}))


async def test_a_decision_is_recorded_by_digest_and_without_its_input(store: CoreStore, clock: FakeClock):
    session_id = await asking(store, "c1", "c2")
    approvals = {a.call_id: a for a in (await store.list_approvals(KEY, limit=10)).data}
    edit = {"command": f"echo {CANARY}"}
    await decide(store, session_id, said("c1", updated_input=edit, remember=True))
    clock.move(1)
    await decide(store, session_id, said("c2", "deny", deny_message=CANARY))
    allowed, denied = await entries_of(store)
    assert (allowed.seq, allowed.action, allowed.target) == (1, "approval.decided", approvals["c1"].id)
    assert (allowed.actor.name, denied.time) == ("ann", clock.now)
    assert allowed.details["digest"] == approvals["c1"].digest
    assert allowed.details["run_digest"] == approvals["c1"].digest_of(edit)
    assert (allowed.details["result"], allowed.details["edited"]) == ("allow", True)
    assert (denied.details["result"], denied.details["run_digest"]) == ("deny", None)
    assert denied.previous == allowed.hash
    text = allowed.model_dump_json() + denied.model_dump_json()
    assert CANARY not in text
    assert "echo" not in text


async def test_a_repeated_decision_is_recorded_once(store: CoreStore):
    session_id = await asking(store, "c1")
    for key in ("once", "once", None, "another"):
        await decide(store, session_id, said("c1"), idempotency_key=key)
    with pytest.raises(AlreadyDecided):
        await decide(store, session_id, said("c1", "deny"))
    assert [entry.action for entry in await entries_of(store)] == ["approval.decided"]


async def test_an_expired_call_is_recorded(store: CoreStore, clock: FakeClock):
    await asking(store, "c1", expires_at=clock.now + timedelta(seconds=1))
    clock.move(2)
    assert await store.expire_due() == 1
    assert await store.expire_due() == 0
    [entry] = await entries_of(store)
    assert (entry.action, entry.actor.id, entry.details["tool_name"]) == ("approval.expired", None, "Bash")


async def test_what_is_not_committed_is_not_recorded(store: CoreStore):
    session_id = await asking(store, "c1")
    with pytest.raises(NotWaiting):
        await decide(store, session_id, said("c1"), said("never"))
    fault_points.install(_fail)
    try:
        with pytest.raises(OSError, match="struck"):
            await decide(store, session_id, said("c1"))
    finally:
        fault_points.install(None)
    assert await entries_of(store) == []


async def _fail(point: str) -> None:
    if point == "send_events.before_commit":
        raise OSError("struck")


async def test_entries_outlive_their_session(store: CoreStore):
    session_id = await asking(store, "c1")
    [approval] = (await store.list_approvals(KEY, limit=10)).data
    await decide(store, session_id, said("c1", "deny"))
    before = await entries_of(store)
    await store.give_up(session_id, "its owner died")
    await store.archive_session(session_id, KEY)
    await store.delete_session(session_id, KEY)
    assert await entries_of(store) == before
    receipt = await store.approval_receipt(approval.id, KEY)
    assert verify_receipt(receipt, keys_of_jwks({"keys": await store.audit_keys()})) == ()


async def test_entries_are_found_by_action_actor_target_and_time(store: CoreStore, clock: FakeClock):
    session_id = await asking(store, "c1", "c2")
    await decide(store, session_id, said("c1"))
    clock.move(10)
    await decide(store, session_id, said("c2"))
    await exported(store)
    first, second, export = await entries_of(store)
    assert await entries_of(store, action="audit.exported") == [export]
    assert await entries_of(store, actor=ANN.principal_id) == [export]
    assert await entries_of(store, target=first.target) == [first]
    assert await entries_of(store, created=TimeRange(gt=first.time)) == [second, export]
    assert await entries_of(store, "another") == []


async def test_pages_of_entries_follow_one_another(store: CoreStore):
    session_id = await asking(store, *(f"c{n}" for n in range(5)))
    for n in range(5):
        await decide(store, session_id, said(f"c{n}"))
    for order in ("asc", "desc"):
        found, page = list[int](), None
        while True:
            answer = await store.list_audit(KEY, limit=2, page=page, order=order)
            found, page = [*found, *(entry.seq for entry in answer.data)], answer.next_page
            if page is None:
                break
        assert found == sorted(range(1, 6), reverse=order == "desc")
    with pytest.raises(InvalidInput):
        await store.list_audit(KEY, limit=2, page="no cursor")


async def test_an_export_is_an_entry_and_ends_with_it(store: CoreStore):
    session_id = await asking(store, "c1")
    await decide(store, session_id, said("c1"))
    documents = await exported(store)
    assert [document["type"] for document in documents] == ["audit_entry", "audit_entry", "audit_export_end"]
    assert documents[1]["action"] == "audit.exported"
    assert await exported(store) == documents  # the same export, asked for again
    later = await exported(store, from_seq=2)
    assert verify(map(json.dumps, later), None).problems == ()
    with pytest.raises(InvalidInput, match="from_seq"):
        await exported(store, from_seq=9)
    report = await verified(store)
    assert (report.problems, report.entries) == ((), 2)


async def test_every_hundred_entries_are_signed(store: CoreStore):
    """Also where one transaction appends several."""
    calls = [f"c{n}" for n in range(EVERY + 2)]
    session_id = await asking(store, *calls)
    for some in (calls[: EVERY - 1], calls[EVERY - 1 :]):
        await decide(store, session_id, *(said(call) for call in some))
    documents = await exported(store)
    [checkpoint] = [one for one in documents if one["type"] == "audit_checkpoint"]
    assert checkpoint["seq"] == EVERY
    assert documents[EVERY] == checkpoint
    assert (await verified(store)).checkpoints == 2


async def test_a_receipt_says_who_decided_what(store: CoreStore):
    session_id = await asking(store, "c1", "c2")
    first, second = (await store.list_approvals(KEY, limit=10)).data
    await decide(store, session_id, said(first.event_id))
    receipt = json.loads(json.dumps(await store.approval_receipt(first.id, KEY)))
    assert verify_receipt(receipt, None) == ()
    assert (receipt["approval_id"], receipt["decision"]["actor"]["name"]) == (first.id, "ann")
    assert receipt["decision"]["details"]["digest"] == first.digest
    assert receipt["entries"] == [entry.wire() for entry in await entries_of(store)]
    with pytest.raises(Conflict, match="pending"):
        await store.approval_receipt(second.id, KEY)
    for approval_id, workspace_id in (("never", KEY), (first.id, "another"), (second.id, "another")):
        with pytest.raises(NotFound):
            await store.approval_receipt(approval_id, workspace_id)


async def test_a_decision_from_before_the_log_was_kept_has_no_receipt(store: CoreStore, backend: Any):
    session_id = await asking(store, "c1")
    [approval] = (await store.list_approvals(KEY, limit=10, session_id=session_id)).data
    decision = Decision(result="deny", decided_by="ann", decided_at=approval.created_at)
    async with backend.begin(write=True) as tx:
        await tx.put_approval(approval.to(ApprovalState.DENIED, decision=decision))
    with pytest.raises(Conflict, match="before this service kept an audit log"):
        await store.approval_receipt(approval.id, KEY)


async def test_a_call_that_a_remembered_rule_allows_is_recorded_as_the_rules(store: CoreStore):
    session_id = await asking(store, "c1")
    await decide(store, session_id, said("c1", remember=True))
    [rule] = (await store.get_session(session_id)).rules
    again = ask_for("c2").model_copy(update={"standing_rule": str(rule)})
    await store.open_calls(session_id, 1, [], [again], cwd="/w", expires_at=None)
    first, second = await entries_of(store)
    assert (second.actor.id, second.actor.name) == (None, "remembered rule")
    assert first.details["remembered"] == second.details["rule"]


async def test_a_workspace_has_its_own_chain(store: CoreStore):
    session_id = await asking(store, "c1")
    await decide(store, session_id, said("c1"))
    report = await verified(store, "another")
    assert (report.problems, report.entries, report.workspace_id) == ((), 1, "another")
    assert (await verified(store)).entries == 2


# -- keys and people


async def test_keys_are_recorded_in_their_workspace_and_never_their_secret(store: CoreStore):
    made = await store.add_key("bob", f"hash {CANARY}", "hitl_abc", by=ANN)
    await store.add_key("bob", f"hash {CANARY}", "hitl_abc", by=ANN)
    await store.rotate_key(made.id, f"hash 2 {CANARY}", "hitl_def", by=ANN)
    await store.rotate_key(made.id, f"hash 2 {CANARY}", "hitl_def", by=ANN)
    await store.revoke_key(made.id, by=ANN)
    await store.revoke_key(made.id, by=ANN)
    found = await entries_of(store, made.id)  # its own workspace has its id
    assert [(entry.action, entry.target) for entry in found] == [
        ("workspace.created", made.id),
        ("principal.created", made.principal_id),
        ("role.changed", made.principal_id),
        ("key.created", made.id),
        ("key.rotated", made.id),
        ("key.revoked", made.id),
    ]
    assert {entry.actor.id for entry in found[3:]} == {ANN.principal_id}
    assert found[4].details["prefix"] == "hitl_def"
    assert CANARY not in "".join(entry.model_dump_json() for entry in found)
    assert (await verified(store, made.id)).problems == ()


async def test_the_first_key_and_its_replacement_are_recorded(store: CoreStore):
    first = await store.set_first_key("hash 1")
    await store.set_first_key("hash 1")
    await store.set_first_key("hash 2")
    found = [entry.action for entry in await entries_of(store, first.id)]
    assert [action for action in found if action.startswith("key.")] == ["key.created", "key.rotated"]
    [admin] = await entries_of(store, SERVICE_CHAIN)
    assert (admin.action, admin.target) == ("role.changed", first.principal_id)
    assert admin.details["after"] == ["admin"]


async def test_roles_and_workspaces_are_recorded_where_they_change(store: CoreStore, clock: FakeClock):
    one, two = [Workspace(id=f"wrkspc_{name}", name=name, created_at=clock.now) for name in ("one", "two")]
    for workspace in (one, one, two):
        await store.add_workspace(workspace, by=ANN)
    bob = Principal(
        id="user_bob", kind="user", name="bob", created_at=clock.now, email=f"{CANARY}@example.org"
    )
    await store.add_principal(bob, by=ANN)
    await store.change_principal(bob.id, {"roles": {one.id: ["approver"]}}, by=ANN)
    await store.change_principal(bob.id, {"roles": {one.id: ["approver"]}}, by=ANN)
    await store.change_principal(bob.id, {"roles": {two.id: ["operator"]}, "groups": ["ops"]}, by=ANN)
    await store.change_principal(bob.id, {"disabled": True}, by=ANN)
    await store.change_workspace(one.id, {"separation_of_duties": True}, by=ANN)

    async def said_in(workspace_id: str) -> list[tuple[str, dict[str, Any]]]:
        return [(entry.action, entry.details) for entry in await entries_of(store, workspace_id)]

    created, gained, lost, changed = await said_in(one.id)
    assert created == ("workspace.created", {"name": {"before": None, "after": "one"}} | created[1])
    assert gained == ("role.changed", {"name": "bob", "before": [], "after": ["approver"]})
    assert lost == ("role.changed", {"name": "bob", "before": ["approver"], "after": []})
    assert changed == ("workspace.changed", {"separation_of_duties": {"before": False, "after": True}})
    assert [action for action, _ in await said_in(two.id)] == [
        "workspace.created",
        "principal.changed",
        "role.changed",
        "principal.disabled",
    ]
    [(action, details)] = await said_in(SERVICE_CHAIN)
    assert (action, details["email"]) == ("principal.created", "changed")
    assert CANARY not in json.dumps(details)


async def test_what_a_sign_in_provider_gives_and_takes_is_recorded(store: CoreStore, clock: FakeClock):
    one = await store.add_workspace(Workspace(id="wrkspc_one", name="one", created_at=clock.now))
    zoe = ProviderUser(
        external_id=f"https://idp.example.org#{CANARY}", issuer_host="idp.example.org", name="zoe",
        roles={one.id: (Role.APPROVER,)},
    )  # fmt: skip
    for roles in (zoe.roles, zoe.roles, {}):
        made = await store.put_provider_user(zoe.but(roles=roles))
    found = await entries_of(store, one.id)
    assert [(entry.action, entry.target) for entry in found[1:]] == [
        ("principal.created", made.id),
        ("role.changed", made.id),
        ("role.changed", made.id),
    ]
    assert found[-1].details == {"name": "zoe", "before": ["approver"], "after": []}
    assert {entry.actor.name for entry in found[1:]} == {"sign-in provider idp.example.org"}
    assert CANARY not in "".join(entry.model_dump_json() for entry in found)


async def test_a_decision_names_its_principal_and_its_key(store: CoreStore, clock: FakeClock):
    made = await store.add_key("bob", "hash")
    session = await store.create_session(
        made.id, agent=Agent(), environment=Environment(), title=None, metadata={}, initial=[message()]
    )
    await store.acquire(session.id, "owner", lease_s=15)
    await store.open_calls(session.id, 1, [], [ask_for("c1")], cwd="/w", expires_at=None)
    by = Actor(name="bob", principal_id=made.principal_id, key_id=made.id)
    await store.send_events(session.id, made.id, [said("c1")], by=by)
    entry = (await entries_of(store, made.id))[-1]
    assert entry.actor.model_dump() == {"id": made.principal_id, "name": "bob", "key_id": made.id}


# -- races


@pytest_asyncio.fixture(params=["sqlite", "postgres"])
async def ledgers(
    request: pytest.FixtureRequest, migrated: Path, tmp_path: Path
) -> AsyncIterator[list[CoreStore]]:
    """Three ledgers on one database, with one key."""
    backends: list[SqliteBackend | PostgresBackend]
    if request.param == "sqlite":
        shutil.copy(migrated, tmp_path / "store.db")
        backends = [SqliteBackend(sqlite_url(tmp_path / "store.db")) for _ in range(3)]
    else:
        url = request.getfixturevalue("database")
        backends = [PostgresBackend(url) for _ in range(3)]
    signer = Signer.generate()
    yield [CoreStore(backend, signer=signer) for backend in backends]
    for backend in backends:
        await backend.close()


async def test_decisions_and_exports_at_once_give_no_gap_and_no_fork(ledgers: list[CoreStore]):
    """The first ones begin the chain at the same time; changes of keys append to other chains meanwhile."""
    sessions = [await asking(ledgers[0], *(f"c{n}" for n in range(10))) for _ in range(6)]
    tries = [
        decide(ledgers[(n + number) % 3], session_id, said(f"c{n}"))
        for n in range(10)
        for number, session_id in enumerate(sessions)
    ]
    exports = [
        ledgers[n % 3].begin_export(KEY, f"exp {n}", form="jsonl", from_seq=1, by=ANN) for n in range(10)
    ]
    keys = [ledgers[n % 3].add_key(f"key {n % 5}", f"hash {n % 5}") for n in range(15)]
    _, ends, made = await asyncio.gather(
        asyncio.gather(*tries), asyncio.gather(*exports), asyncio.gather(*keys)
    )
    entries = await entries_of(ledgers[0])
    assert [entry.seq for entry in entries] == list(range(1, 71))
    assert {end["hash"] for end in ends} == {e.hash for e in entries if e.action == "audit.exported"}
    report = await verified(ledgers[1])
    assert (report.problems, report.entries) == ((), 71)
    for key_id in {key.id for key in made}:
        found = [entry.action for entry in await entries_of(ledgers[2], key_id)]
        assert sorted(found) == ["key.created", "principal.created", "role.changed", "workspace.created"]
