"""The outbox: a notice of each change, once it is committed, to those whom it concerns, and at the right time."""

import asyncio
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import pytest

from claude_hitl_template.domain.models import Approval
from claude_hitl_template.domain.notices import (
    APPROVAL_KINDS,
    EVERY_WORKSPACE,
    FAILING,
    SESSION_KINDS,
    Channel,
    Parcel,
    QuietHours,
    Settled,
)
from claude_hitl_template.domain.people import SERVICE, Actor, Role
from claude_hitl_template.errors import Conflict
from claude_hitl_template.store.core import CoreStore
from claude_hitl_template.testing.clock import FakeClock
from tests.contract.asking import ask_for
from tests.contract.voting import Team, ask_rule, release

SENT = Settled(state="sent")
CANARY = "rm -rf canary"


class Post:
    """A courier of a test, over one store."""

    def __init__(self, store: CoreStore, clock: FakeClock) -> None:
        self.store, self.clock, self.number = store, clock, 0

    async def channel(self, workspace_id: str, principal_id: str | None = None, **more: Any) -> Channel:
        self.number += 1
        given: dict[str, Any] = {"kind": "webhook", "kinds": APPROVAL_KINDS} | more
        made = Channel(
            id=f"chan_{self.number}",
            workspace_id=workspace_id if principal_id is None else EVERY_WORKSPACE,
            principal_id=principal_id,
            created_at=self.clock(),
            **given,
        )
        return await self.store.add_channel(made, {"signing": "s"})

    async def take(self, *busy: str) -> list[Parcel]:
        return await self.store.take_deliveries(limit=100, busy=busy)

    async def settle(self, parcel: Parcel, settled: Settled = SENT) -> None:
        await self.store.settle_delivery(parcel.delivery_ids, parcel.attempt, settled)

    async def told(self) -> list[tuple[str, str]]:
        """Sends all that is due; the channel and the kind of each notice, in order."""
        found: list[tuple[str, str]] = []
        while parcels := await self.take():
            for parcel in parcels:
                found.append((parcel.channel.id, parcel.notice.kind))
                await self.settle(parcel)
        return found

    async def states(self, **which: Any) -> list[tuple[str, str]]:
        page = await self.store.list_deliveries(None, limit=100, **which)
        return [(one.notice.kind, one.state) for one in reversed(page.data)]


@pytest.fixture
def post(store: CoreStore, clock: FakeClock) -> Post:
    return Post(store, clock)


async def waiting(team: Team, by: Actor = SERVICE, **more: Any) -> Approval:
    return await team.waiting(by=by, **more)


def kinds(told: Sequence[tuple[str, str]]) -> list[str]:
    return [kind for _, kind in told]


async def test_an_approval_and_its_decision_are_told_in_order_and_without_its_input(
    store: CoreStore, post: Post
):
    team = await Team.make(store)
    await team.person("ann")
    channel = await post.channel(team.workspace_id)
    approval = await waiting(team, given={"command": CANARY})
    [parcel] = await post.take()
    assert (parcel.notice.kind, parcel.notice.approval_id) == ("approval.requested", approval.id)
    assert parcel.notice.title == "Bash waits for approval"
    assert (parcel.secret, parcel.external_ref) == ({"signing": "s"}, None)
    assert await post.take() == []
    await team.say("ann", approval)
    assert await post.take() == []  # it comes after what is being sent
    await post.settle(parcel, Settled(state="sent", external_ref={"ts": "1"}))
    [parcel] = await post.take()
    assert (parcel.notice.kind, parcel.notice.result) == ("approval.decided", "allow")
    assert parcel.notice.title == "Bash was allowed by ann"
    assert parcel.external_ref == {"ts": "1"}
    assert CANARY not in parcel.model_dump_json() + str(await store.list_deliveries(None, limit=9))
    await post.settle(parcel)
    assert await post.states(channel_id=channel.id) == [
        ("approval.requested", "sent"), ("approval.decided", "sent"),
    ]  # fmt: skip


async def test_every_end_of_an_approval_is_told(store: CoreStore, post: Post, clock: FakeClock):
    team = await Team.make(
        store, release(deadline_s=60, on_deadline="escalate", escalate_to={"roles": ["approver"]})
    )
    for name in ("ann", "ben"):
        await team.person(name, "release")
    await post.channel(team.workspace_id)
    approval = await waiting(team)
    assert kinds(await post.told()) == ["approval.requested"]
    await team.say("ann", approval)
    await store.delegate_approval(
        approval.id, team.workspace_id, principal_id="user_ben", by=team.people["ann"]
    )
    assert kinds(await post.told()) == ["approval.voted", "approval.delegated"]
    clock.move(61)
    await store.expire_due()
    assert kinds(await post.told()) == ["approval.escalated"]
    clock.move(61)
    await store.expire_due()
    assert kinds(await post.told()) == ["approval.expired"]
    [other] = await team.ask(await team.session(), "t2", given={"command": "git push"})
    await store.archive_session(other.session_id, team.workspace_id)
    assert kinds(await post.told()) == ["approval.superseded"]  # and not that it was asked for


async def test_a_sessions_life_is_told_by_the_names_of_the_api(store: CoreStore, post: Post):
    team = await Team.make(store)
    await team.person("ann")
    await post.channel(team.workspace_id, kinds=SESSION_KINDS)
    approval = await waiting(team)
    await team.say("ann", approval)
    await store.give_up(approval.session_id, "no owner")
    await store.archive_session(approval.session_id, team.workspace_id)
    await store.delete_session(approval.session_id, team.workspace_id)
    assert kinds(await post.told()) == ["session.deleted"]  # the others went with the session
    approval = await waiting(team)
    assert kinds(await post.told()) == [
        "session.created", "session.status_run_started", "session.status_idled", "session.requires_action",
    ]  # fmt: skip
    await team.say("ann", approval)
    await store.give_up(approval.session_id, "no owner")
    assert kinds(await post.told()) == [
        "session.status_run_started", "session.status_idled", "session.failed",
    ]  # fmt: skip


async def test_what_fails_is_not_told_and_without_a_channel_there_is_no_row(store: CoreStore, post: Post):
    team = await Team.make(store)
    await waiting(team)
    await post.channel("elsewhere")
    await post.channel(team.workspace_id, enabled=False)
    assert await post.take() == []
    assert await post.states() == []
    await post.channel(team.workspace_id)
    session = await team.session()
    with pytest.raises(Exception, match="no such rule"):
        await store.open_calls(
            session.id,
            1,
            [],
            [ask_for("a"), ask_for("b").model_copy(update={"standing_rule": "none", "verdict": "allow"})],
            cwd="/w",
            expires_at=None,
        )
    assert await post.take() == []


async def test_people_are_told_of_calls_that_they_may_decide(store: CoreStore, post: Post):
    rule = release(quorum=2, exclude_requester=True)
    team = await Team.make(store, rule)
    for name in ("ann", "ben", "cleo"):
        await team.person(name, "release")
    await team.person("dan")  # of another group
    await team.person("eve", "release", roles=(Role.VIEWER,))
    channels = {
        name: (await post.channel(team.workspace_id, f"user_{name}")).id for name in sorted(team.people)
    }
    approval = await waiting(team, by=team.people["cleo"])
    assert await post.told() == [(channels[name], "approval.requested") for name in ("ann", "ben")]
    await team.say("ann", approval)
    assert await post.told() == [(channels["ben"], "approval.voted")]
    await team.say("ben", approval)
    # Those who could have decided, and who asked for it.
    assert sorted(await post.told()) == [
        (channels[name], "approval.decided") for name in ("ann", "ben", "cleo")
    ]


async def test_a_call_is_handed_over_to_the_one_it_was_handed_to(store: CoreStore, post: Post):
    team = await Team.make(store)
    for name in ("ann", "ben", "cleo"):
        await team.person(name)
    of_ben = await post.channel(team.workspace_id, "user_ben", kinds=("approval.delegated",))
    await post.channel(team.workspace_id, "user_cleo", kinds=("approval.delegated",))
    approval = await waiting(team)
    await store.delegate_approval(
        approval.id, team.workspace_id, principal_id="user_ben", by=team.people["ann"]
    )
    assert await post.told() == [(of_ben.id, "approval.delegated")]


async def test_that_no_person_who_may_decide_is_reached_is_recorded(store: CoreStore, post: Post):
    team = await Team.make(store, duties=True)
    await team.person("ann")
    await post.channel(team.workspace_id, "user_ann")
    approval = await waiting(team, by=team.people["ann"])
    assert await post.take() == []
    assert await post.states(session_id=approval.session_id) == [("approval.requested", "no_recipient")]


async def test_mild_calls_are_kept_from_a_channel_for_severe_ones(store: CoreStore, post: Post):
    team = await Team.make(store, ask_rule(severity="critical"))
    await post.channel(team.workspace_id, min_severity="high")
    await waiting(team, given={"command": "ls"})
    await waiting(team)
    assert kinds(await post.told()) == ["approval.requested"]


async def test_a_decision_supersedes_what_asks_for_it(store: CoreStore, post: Post, clock: FakeClock):
    team = await Team.make(store)
    await team.person("ann")
    await post.channel(team.workspace_id, kinds=("approval.requested",))
    first, second = await waiting(team), await waiting(team)
    parcel, _ = await post.take()
    await post.settle(parcel, Settled(state="retry", why="503", retry_s=600))
    await team.say("ann", first)
    await team.say("ann", second)
    clock.move(601)
    assert await post.take() == []
    assert await post.states() == [("approval.requested", "superseded")] * 2


async def test_a_notice_whose_courier_died_is_taken_again_and_a_late_outcome_changes_nothing(
    store: CoreStore, post: Post, clock: FakeClock
):
    team = await Team.make(store)
    await post.channel(team.workspace_id)
    await waiting(team)
    [lost] = await post.take()
    clock.move(59)
    assert await post.take() == []
    clock.move(2)
    [again] = await post.take()
    assert (again.delivery_ids, again.attempt) == (lost.delivery_ids, 2)
    await post.settle(lost, Settled(state="gone", why="late"))
    assert await post.states() == [("approval.requested", "pending")]
    await post.settle(again)
    assert await post.states() == [("approval.requested", "sent")]


async def test_it_is_tried_again_for_a_day_and_then_given_up(store: CoreStore, post: Post, clock: FakeClock):
    team = await Team.make(store)
    channel = await post.channel(team.workspace_id)
    await waiting(team)
    tries = 0
    while parcels := await post.take():
        tries += 1
        await post.settle(parcels[0], Settled(state="retry", why="HTTP 500", retry_s=3600))
        clock.move(3600)
    assert tries == 25
    assert await post.states() == [("approval.requested", "failed")]
    state = (await store.get_channel(channel.id, None)).state
    assert (state.status, state.failures, state.last_error) == ("failing", tries, "HTTP 500")
    assert tries > FAILING
    await waiting(team)
    assert kinds(await post.told()) == ["approval.requested"]
    assert (await store.get_channel(channel.id, None)).state.status == "active"


async def test_nothing_more_is_sent_to_a_target_that_is_gone(store: CoreStore, post: Post):
    team = await Team.make(store)
    channel = await post.channel(team.workspace_id)
    await waiting(team)
    await waiting(team)
    first, second = await post.take()
    await post.settle(first, Settled(state="gone", why="410"))
    await post.settle(second, Settled(state="retry", why="timeout"))
    await waiting(team)
    assert await post.take() == []
    assert await post.states() == [("approval.requested", "gone")] * 2
    await store.change_channel(channel.id, team.workspace_id, {"settings": {"url": "https://b.example"}})
    await waiting(team)
    assert kinds(await post.told()) == ["approval.requested"]


async def test_one_channel_that_hangs_delays_no_other(store: CoreStore, post: Post):
    team = await Team.make(store)
    hangs, works = await post.channel(team.workspace_id), await post.channel(team.workspace_id)
    for _ in range(5):
        await waiting(team)
    found = [parcel.channel.id for parcel in await post.take()]
    assert (found.count(hangs.id), found.count(works.id)) == (2, 2)
    more = [parcel.channel.id for parcel in await post.take(hangs.id)]
    assert more == [works.id] * 2


async def test_quiet_hours_hold_back_all_but_critical_notices(store: CoreStore, post: Post, clock: FakeClock):
    team = await Team.make(store, ask_rule(severity="critical"))
    quiet = QuietHours(start="22:00", end="07:00", time_zone="Europe/Berlin")
    clock.now = clock.now.replace(hour=23)  # midnight in Berlin
    await post.channel(team.workspace_id, quiet_hours=quiet)
    await waiting(team, given={"command": "ls"})
    assert await post.told() == []
    await waiting(team)
    assert kinds(await post.told()) == ["approval.requested"]
    clock.now = (clock.now + timedelta(days=1)).replace(hour=5, minute=59)
    assert await post.told() == []
    clock.move(60)
    assert kinds(await post.told()) == ["approval.requested"]


async def test_a_digest_is_one_notice_of_what_still_waits(store: CoreStore, post: Post, clock: FakeClock):
    team = await Team.make(store, ask_rule(severity="high"))
    await team.person("ann")
    await post.channel(team.workspace_id, "user_ann", digest_s=600)
    decided = await waiting(team, given={"command": "ls"})
    await waiting(team)
    assert await post.take() == []
    clock.move(300)
    await waiting(team, given={"command": "ls"})
    await waiting(team, given={"command": "ls"})
    assert await post.take() == []
    await store.change_channel("chan_1", None, {"kinds": ("approval.requested",)})
    await team.say("ann", decided)
    clock.move(300)
    [parcel] = await post.take()
    notice = parcel.notice
    assert (notice.kind, notice.count, notice.severity) == ("digest", 3, "high")
    await post.settle(parcel)
    assert await post.take() == []


async def test_a_person_who_looks_at_the_inbox_is_told_when_it_is_closed(
    store: CoreStore, post: Post, clock: FakeClock
):
    team = await Team.make(store)
    await team.person("ann")
    await post.channel(team.workspace_id, "user_ann")
    await store.note_reader("user_ann")
    await waiting(team)
    assert await post.told() == []
    clock.move(30)
    await store.note_reader("user_ann")
    assert await post.told() == []
    clock.move(60)
    assert kinds(await post.told()) == ["approval.requested"]


async def test_a_notice_is_sent_again_by_hand_even_of_a_decided_call(store: CoreStore, post: Post):
    team = await Team.make(store)
    ann = await team.person("ann")
    await post.channel(team.workspace_id, kinds=("approval.requested",))
    approval = await waiting(team)
    await post.told()
    await team.say("ann", approval)
    [sent] = (await store.list_deliveries(team.workspace_id, limit=9)).data
    await store.redeliver(sent.id, team.workspace_id, by=ann)
    [parcel] = await post.take()
    assert (parcel.notice, parcel.attempt) == (sent.notice, 2)
    await post.settle(parcel)
    test = await store.send_test("chan_1", team.workspace_id, notice_id="ntc_1", by=ann)
    assert await store.send_test("chan_1", team.workspace_id, notice_id="ntc_1", by=ann) == test
    assert await post.told() == [("chan_1", "test")]
    unsent = sent.but(id="dlv_x", channel_id=None)
    async with store._backend.begin(write=True) as tx:  # pyright: ignore[reportPrivateUsage]
        await tx.put_delivery(unsent)
    with pytest.raises(Conflict, match="no channel"):
        await store.redeliver("dlv_x", None)


async def test_old_deliveries_are_forgotten_and_those_of_a_deleted_session_at_once(
    store: CoreStore, post: Post, clock: FakeClock
):
    team = await Team.make(store)
    await post.channel(team.workspace_id, kinds=("approval.requested",))
    await waiting(team)
    await post.told()
    other = await waiting(team)
    clock.move(15 * 24 * 3600)
    assert await store.sweep_deliveries() == 1
    assert await post.states() == []
    await store.archive_session(other.session_id, team.workspace_id)
    assert await post.take() == []
    third = await waiting(team)
    await post.told()
    assert await post.states() == [("approval.requested", "superseded"), ("approval.requested", "sent")]
    for session_id in (other.session_id, third.session_id):
        await store.delete_session(session_id, team.workspace_id)
    assert await post.states() == []


async def test_couriers_that_take_at_once_get_each_notice_once(store: CoreStore, post: Post):
    team = await Team.make(store)
    await team.person("ann")
    channels = [await post.channel(team.workspace_id) for _ in range(3)]
    approvals = [await waiting(team) for _ in range(4)]
    found: list[str] = []

    async def courier() -> None:
        while parcels := await post.take():
            for parcel in parcels:
                found.extend(parcel.delivery_ids)
                await post.settle(parcel)

    # Decisions, the end of a session and of a channel at the same time: none waits for another in a circle.
    await asyncio.gather(
        *(courier() for _ in range(4)),
        *(team.say("ann", approval) for approval in approvals[:2]),
        store.archive_session(approvals[2].session_id, team.workspace_id),
        store.remove_channel(channels[0].id, team.workspace_id),
    )
    await courier()
    assert len(found) == len(set(found))
    left = (await store.list_deliveries(None, limit=100, states=["pending"])).data
    assert left == []
    decided = await store.list_deliveries(None, limit=100, channel_id=channels[1].id, states=["sent"])
    assert [one.notice.kind for one in decided.data].count("approval.decided") == 2
