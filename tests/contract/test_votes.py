"""What a workspace's rules ask of a call: how many people, who, by when; and what of that holds while it waits."""

import asyncio
from datetime import timedelta
from typing import Any

import pytest

from claude_hitl_template.domain import events
from claude_hitl_template.domain.canonical_json import digest
from claude_hitl_template.domain.models import ApprovalState
from claude_hitl_template.domain.people import SERVICE, Actor, Role
from claude_hitl_template.domain.policy import Verdict
from claude_hitl_template.domain.policy.command_segments import JudgedSegment
from claude_hitl_template.errors import (
    AlreadyDecided,
    Conflict,
    Forbidden,
    HitlError,
    InvalidInput,
    NotFound,
    Outdated,
    Superseded,
    TooManyAsks,
)
from claude_hitl_template.store.base import AskLimits
from claude_hitl_template.store.core import CoreStore
from claude_hitl_template.store.protocol import Call
from claude_hitl_template.testing.clock import FakeClock
from tests.contract.asking import message, said
from tests.contract.voting import PUSH, Team, ask_rule, release, rules

S = ApprovalState


async def team_of_three(store: CoreStore, *rule: dict[str, Any], **more: Any) -> Team:
    team = await Team.make(store, *rule, **more)
    for name in ("ann", "ben", "cat"):
        await team.person(name, "release", roles=(Role.APPROVER, Role.REQUESTER))
    await team.person("zoe")  # an approver of another group
    return team


# -- several people


async def test_two_of_a_group_allow_a_call_and_the_first_is_shown(store: CoreStore):
    team = await team_of_three(store, release(2, severity="high", reason="It leaves the building."))
    approval = await team.waiting()
    assert (approval.severity, approval.quorum, approval.reason) == ("high", 2, "It leaves the building.")
    first = await team.say("ann", approval)
    assert first.state is S.PENDING
    assert [vote.name for vote in first.votes] == ["ann"]
    [vote] = await team.log(approval, "approval.vote")
    assert vote.payload["allowed_by"] == ["ann"]
    assert vote.payload["missing"] == ["2 of the group release"]
    assert await team.log(approval, "user.tool_confirmation") == []
    with pytest.raises(HitlError):
        await team.run(approval)
    second = await team.say("ben", approval)
    assert second.state is S.ALLOWED
    [decision] = await team.log(approval, "user.tool_confirmation")
    assert decision.payload["decided_by"] == "ben"
    assert decision.payload["allowed_by"] == ["ann", "ben"]
    assert (await team.run(approval)).state is S.CLAIMED


async def test_a_person_counts_once_however_often_and_with_whatever_key(store: CoreStore):
    team = await team_of_three(store, release(2))
    approval = await team.waiting()
    await team.say("ann", approval)
    await team.say("ann", approval)
    other_key = Actor(name="ann", principal_id="user_ann", key_id="key_other")
    again = await store.decide(approval.id, team.workspace_id, said("t1"), by=other_key)
    assert again.state is S.PENDING
    assert [vote.name for vote in again.votes] == ["ann"]
    assert len(await team.log(approval, "approval.vote")) == 1


async def test_a_deny_decides_at_once(store: CoreStore):
    team = await team_of_three(store, release(3))
    approval = await team.waiting()
    await team.say("ann", approval)
    denied = await team.say("ben", approval, "deny", deny_message="not today")
    assert denied.state is S.DENIED
    with pytest.raises(AlreadyDecided):
        await team.say("cat", approval)


@pytest.mark.parametrize("result", ["allow", "deny"])
async def test_only_people_whom_a_rule_names_decide(store: CoreStore, result: str):
    team = await team_of_three(store, release(1))
    approval = await team.waiting()
    with pytest.raises(Forbidden, match="it takes one of the group release"):
        await team.say("zoe", approval, result)
    assert (await team.now(approval)).state is S.PENDING
    with pytest.raises(Forbidden):  # the service itself is not a person
        await store.decide(approval.id, team.workspace_id, said("t1"), by=SERVICE)


@pytest.mark.parametrize(
    "loss", [{"groups": ()}, {"disabled": True}, {"roles": {}}, {"groups": ("releases",)}]
)
async def test_a_vote_of_someone_who_may_no_longer_decide_does_not_count(
    store: CoreStore, loss: dict[str, Any]
):
    team = await team_of_three(store, release(2))
    approval = await team.waiting()
    await team.say("ann", approval)
    await team.change("ann", **loss)
    still = await team.say("ben", approval)
    assert still.state is S.PENDING
    with pytest.raises(Forbidden):
        await team.say("ann", approval)
    assert (await team.say("cat", approval)).state is S.ALLOWED


async def test_a_vote_counts_again_when_its_person_may_decide_again(store: CoreStore):
    team = await team_of_three(store, release(2))
    approval = await team.waiting()
    await team.say("ann", approval)
    await team.change("ann", groups=())
    assert (await team.say("ben", approval)).state is S.PENDING
    await team.change("ann", groups=("release",))
    assert (await team.say("ben", approval)).state is S.ALLOWED


async def test_each_of_several_rules_is_satisfied_for_itself(store: CoreStore):
    team = await team_of_three(
        store, release(2), ask_rule("Bash(git:*)", approvers={"groups": ["legal"]}, severity="critical")
    )
    await team.person("lea", "legal")
    approval = await team.waiting()
    assert (approval.severity, approval.quorum) == ("critical", 2)
    await team.say("ann", approval)
    assert (await team.say("ben", approval)).state is S.PENDING
    assert (await team.say("lea", approval)).state is S.ALLOWED


# -- who asked


async def test_who_asked_does_not_decide_where_a_rule_excludes_them(store: CoreStore):
    team = await team_of_three(store, release(1, exclude_requester=True))
    approval = await team.waiting(by=team.people["ann"])
    with pytest.raises(Forbidden, match="not who asked for the session"):
        await team.say("ann", approval)
    await store.send_events(approval.session_id, team.workspace_id, [message("more")], by=team.people["ben"])
    with pytest.raises(Forbidden):
        await team.say("ben", approval)
    assert (await team.say("cat", approval)).state is S.ALLOWED


async def test_a_vote_of_who_sends_the_next_message_no_longer_counts(store: CoreStore):
    team = await team_of_three(store, release(2), duties=True)
    approval = await team.waiting(by=team.people["cat"])
    await team.say("ann", approval)
    await store.send_events(
        approval.session_id, team.workspace_id, [message("and then")], by=team.people["ann"]
    )
    assert (await team.say("ben", approval)).state is S.PENDING


# -- one input


async def test_all_agree_to_one_input(store: CoreStore):
    team = await team_of_three(store, release(2))
    approval = await team.waiting()
    edited = {"command": "git push --dry-run"}
    await team.say("ann", approval, updated_input=edited)
    with pytest.raises(Conflict, match="ann allowed this call with another input"):
        await team.say("ben", approval)
    allowed = await team.say("ben", approval, updated_input=edited)
    assert allowed.run_input == edited
    with pytest.raises(HitlError):
        await team.run(approval)
    assert (await team.run(approval, edited)).state is S.CLAIMED


async def test_a_lone_voter_may_change_the_input_and_a_vote_that_lapsed_binds_nobody(store: CoreStore):
    team = await team_of_three(store, release(2))
    approval = await team.waiting()
    await team.say("ann", approval, updated_input={"command": "git push -n"})
    changed = await team.say("ann", approval)
    assert [vote.updated_input for vote in changed.votes] == [None]
    await team.change("ann", groups=())
    await team.say("ben", approval, updated_input={"command": "git push -q"})
    allowed = await team.say("cat", approval, updated_input={"command": "git push -q"})
    assert allowed.state is S.ALLOWED


async def test_an_edit_is_judged_by_the_rules_that_match_it(store: CoreStore):
    team = await team_of_three(
        store,
        ask_rule(approvers={"groups": ["release"]}),
        ask_rule("Bash(git push --force:*)", approvers={"groups": ["release"]}, quorum=2),
        {"pattern": "Bash(git push --mirror:*)", "action": "deny"},
    )
    approval = await team.waiting()
    with pytest.raises(Conflict, match="--mirror"):
        await team.say("ann", approval, updated_input={"command": "git push --mirror"})
    assert (await team.say("ann", approval, updated_input={"command": "git push --force"})).state is S.PENDING
    assert (await team.say("ben", approval, updated_input={"command": "git push --force"})).state is S.ALLOWED


# -- remembering


async def test_what_the_workspace_asks_for_is_asked_every_time(store: CoreStore):
    team = await team_of_three(store, ask_rule())
    session = await team.session()
    [approval] = await team.ask(session, "t1")
    with pytest.raises(InvalidInput, match="every time"):
        await team.say("ann", approval, remember=True)
    await team.rule()
    [free] = await team.ask(session, "t2", given={"command": "git push x"})
    await team.say("ann", free, remember="Bash(git push:*)")
    await team.rule(ask_rule())
    [again] = await team.ask(session, "t3", verdict="allow", standing_rule="Bash(git push:*)")
    assert again.state is S.PENDING


async def test_remembering_grants_the_command_of_a_line_that_asked(store: CoreStore):
    team = await team_of_three(store)
    session = await team.session()
    line = {"command": "git status && rm -rf x"}
    segments = (
        JudgedSegment(start=0, end=10, verdict=Verdict.allow, source="Bash(git status)"),
        JudgedSegment(start=14, end=22, verdict=Verdict.ask, source="default"),
    )
    [approval] = await team.ask(session, "t1", given=line, segments=segments)
    assert approval.segments == segments
    with pytest.raises(InvalidInput):
        await team.say("ann", approval, remember="Bash(git status)")  # it did not ask
    decided = await team.say("ann", approval, remember=True)
    assert decided.decision is not None
    assert str(decided.decision.remember) == "Bash(rm -rf x)"
    [next_time] = await team.ask(
        session, "t2", given=line, verdict="allow", standing_rule="Bash(git status) && Bash(rm -rf x)"
    )
    assert next_time.state is S.ALLOWED


# -- a policy that changes


async def test_a_policy_of_which_the_owner_does_not_know_yet_holds(store: CoreStore):
    team = await team_of_three(store, release(2), {"pattern": "Bash(rm:*)", "action": "deny"})
    session = await team.session()
    [asked] = await team.ask(session, "t1", verdict="allow")
    assert (asked.state, asked.quorum) == (S.PENDING, 2)
    [denied] = await team.ask(session, "t2", verdict="allow", given={"command": "rm x"})
    assert denied.state is S.DENIED
    assert denied.decision is not None
    assert denied.decision.decided_by == "rule:the workspace's rule: Bash(rm:*)"
    assert await team.ask(session, "t3", verdict="deny") == []


async def test_a_call_that_is_asked_for_now_is_logged_as_one(store: CoreStore):
    team = await team_of_three(store, release(2))
    session = await team.session()
    draft = events.tool_use("t1", "Bash", PUSH, "allow", None)
    call = Call(call_id="t1", tool_name="Bash", input=PUSH, digest=digest(PUSH), verdict="allow")
    await store.open_calls(session.id, 1, [draft], [call], cwd="/w", expires_at=None)
    [use] = (await store.list_events(session.id, None, limit=10, types=["agent.tool_use"])).data
    assert use.payload["evaluated_permission"] == "ask"
    assert use.payload["evaluation"] == {"type": "always_ask"}


async def test_a_policy_that_became_stricter_holds_when_the_call_is_decided(store: CoreStore):
    team = await team_of_three(store, release(1))
    approval = await team.waiting()
    await team.rule(release(2))
    assert (await team.say("ann", approval)).state is S.PENDING
    await team.rule({"pattern": "Bash(git push:*)", "action": "deny"})
    with pytest.raises(Conflict, match="does not permit this call now"):
        await team.say("ben", approval)
    assert (await team.say("ben", approval, "deny")).state is S.DENIED


@pytest.mark.parametrize(
    ("now", "why"),
    [
        (release(2), "needs other approvers now"),
        (ask_rule(approvers={"groups": ["legal"]}), "needs other approvers now"),
        (
            ask_rule("Bash", approvers={"groups": ["release"]}, exclude_requester=True),
            "needs other approvers",
        ),
        ({"pattern": "Bash(git:*)", "action": "deny"}, "is not permitted now"),
    ],
)
async def test_a_policy_that_became_stricter_holds_when_the_call_runs(
    store: CoreStore, now: dict[str, Any], why: str
):
    team = await team_of_three(store, release(1))
    approval = await team.waiting()
    await team.say("ann", approval)
    await team.rule(now)
    with pytest.raises(Forbidden, match=why):
        await team.run(approval)
    assert (await team.now(approval)).state is S.ALLOWED
    await team.rule(release(1))
    assert (await team.run(approval)).state is S.CLAIMED


async def test_what_a_remembered_rule_allowed_does_not_run_once_the_workspace_asks(store: CoreStore):
    team = await team_of_three(store)
    session = await team.session()
    [first] = await team.ask(session, "t1")
    await team.say("ann", first, remember=True)
    [second] = await team.ask(session, "t2", verdict="allow", standing_rule="Bash(git push)")
    assert second.state is S.ALLOWED
    await team.rule(ask_rule())
    with pytest.raises(Forbidden):
        await store.claim(session.id, 1, "t2", second.digest, claim_id="c2")


async def test_a_loosened_policy_leaves_waiting_calls_as_they_were_asked(store: CoreStore):
    team = await team_of_three(store, release(2))
    approval = await team.waiting()
    await team.rule()
    assert (await team.say("ann", approval)).state is S.PENDING
    other = await team.waiting()
    assert (await team.say("zoe", other)).state is S.ALLOWED


async def test_a_held_call_that_was_allowed_by_too_few_is_asked_for_anew(store: CoreStore):
    team = await team_of_three(store, release(1))
    session = await team.session()
    [held] = await team.ask(session, "t1")
    await store.hold(session.id, 1, "t1")
    await team.say("ann", held)
    await team.rule(release(2))
    [anew] = await team.ask(session, "t2")
    assert (anew.id != held.id, anew.state, anew.quorum) == (True, S.PENDING, 2)
    assert (await team.now(held)).state is S.SUPERSEDED


async def test_of_two_changes_to_a_policy_the_second_is_told_the_current_version(store: CoreStore):
    team = await Team.make(store)
    assert (await store.get_policy(team.workspace_id)).version == 0
    first = await store.set_policy(team.workspace_id, rules(release(1)), if_version=0, by=SERVICE)
    assert (first.version, first.changed_by) == (1, SERVICE.name)
    with pytest.raises(Outdated, match="current version is 1"):
        await store.set_policy(team.workspace_id, rules(), if_version=0, by=SERVICE)
    second = await store.set_policy(team.workspace_id, rules(), if_version=1, by=SERVICE)
    assert await store.get_policy(team.workspace_id) == second
    with pytest.raises(NotFound):
        await store.get_policy("wrkspc_none")
    with pytest.raises(NotFound):
        await store.set_policy("wrkspc_none", rules(), by=SERVICE)


# -- deadlines


async def test_at_a_deadline_a_call_is_handed_on_and_then_denied(store: CoreStore, clock: FakeClock):
    rule = release(1, deadline_s=60, on_deadline="escalate", escalate_to={"groups": ["oncall"]})
    team = await team_of_three(store, rule)
    await team.person("oli", "oncall")
    first, second = await team.waiting(), await team.waiting()
    with pytest.raises(Forbidden):
        await team.say("oli", first)
    clock.move(61)
    assert await store.expire_due() == 0
    assert await store.expire_due() == 0, "it was handed on once"
    [handed] = await team.log(first, "approval.escalated")
    assert handed.payload["to"] == {"roles": [], "groups": ["oncall"]}
    assert (await team.say("oli", first)).state is S.ALLOWED
    clock.move(61)
    assert await store.expire_due() == 1
    assert (await team.now(second)).state is S.EXPIRED
    with pytest.raises(Superseded):
        await team.say("ann", second)


async def test_a_decision_behind_a_deadline_that_no_sweep_has_reached_is_of_the_people_after_it(
    store: CoreStore, clock: FakeClock
):
    rule = release(1, deadline_s=60, on_deadline="escalate", escalate_to={"groups": ["oncall"]})
    team = await team_of_three(store, rule)
    await team.person("oli", "oncall")
    approval = await team.waiting()
    clock.move(61)
    assert (await team.say("oli", approval)).state is S.ALLOWED


async def test_a_deadline_without_more_denies_and_votes_do_not_stop_it(store: CoreStore, clock: FakeClock):
    team = await team_of_three(store, release(2, deadline_s=60))
    approval = await team.waiting()
    assert approval.expires_at == clock() + timedelta(seconds=60)
    await team.say("ann", approval)
    clock.move(61)
    with pytest.raises(Superseded):
        await team.say("ben", approval)
    assert await store.expire_due() == 1
    assert (await team.now(approval)).state is S.EXPIRED


# -- claim, hand over


async def test_who_looks_at_a_call_is_shown_for_a_time_and_keeps_nobody_from_deciding(
    store: CoreStore, clock: FakeClock
):
    team = await team_of_three(store, release(1))
    approval = await team.waiting()

    async def claim(name: str, seconds: int = 300) -> Any:
        by = team.people[name]
        return await store.claim_approval(approval.id, team.workspace_id, seconds=seconds, by=by)

    claimed = await claim("ann")
    assert claimed.reviewer.name == "ann"
    with pytest.raises(Conflict, match="ann is looking at this call until"):
        await claim("ben")
    with pytest.raises(Forbidden):
        await claim("zoe")
    with pytest.raises(InvalidInput):
        await claim("ann", -1)
    clock.move(301)
    assert (await claim("ben")).reviewer.name == "ben"
    assert (await claim("ben", 0)).reviewer is None
    await claim("ben")
    assert (await team.say("cat", approval)).state is S.ALLOWED
    assert [e.payload["by"] for e in await team.log(approval, "approval.claimed")] == [
        "ann",
        "ben",
        "ben",
        "ben",
    ]
    with pytest.raises(AlreadyDecided):
        await claim("ann")


async def test_a_call_is_handed_over_to_people_who_may_decide_and_to_nobody_else(store: CoreStore):
    team = await team_of_three(store, release(1))
    approval = await team.waiting()

    async def hand(name: str, **to: Any) -> Any:
        return await store.delegate_approval(approval.id, team.workspace_id, by=team.people[name], **to)

    handed = await hand("ann", principal_id="user_ben", note="yours")
    assert (handed.assignee.name, handed.assignee.by) == ("ben", "ann")
    assert (await hand("ann", group="release")).assignee.group == "release"
    for to in ({"principal_id": "user_zoe"}, {"principal_id": "user_none"}, {"group": "legal"}, {}):
        with pytest.raises(InvalidInput):
            await hand("ann", **to)
    with pytest.raises(Forbidden):
        await hand("zoe", principal_id="user_ann")
    [first, second] = await team.log(approval, "approval.delegated")
    assert first.payload["to"]["name"] == "ben"
    assert second.payload["to"] == {"principal_id": None, "group": "release", "name": "release"}
    with pytest.raises(NotFound):
        await store.delegate_approval(approval.id, "other", group="release", by=team.people["ann"])


# -- too many asks


async def test_a_session_that_asks_too_often_rests_until_a_human_says_more(backend: Any, clock: FakeClock):
    store = CoreStore(backend, clock, ask_limits=AskLimits(per_minute=3, per_session=5))
    team = await Team.make(store)
    await team.person("ann")
    session = await team.session()

    def given(n: int) -> dict[str, Any]:
        return {"command": f"git push {n}"}

    for n in range(3):
        await team.ask(session, f"t{n}", given=given(n))
    await team.ask(session, "t0", given=given(0))  # again, because the answer was lost
    with pytest.raises(TooManyAsks, match="within a minute"):
        await team.ask(session, "t3", given=given(3))
    assert await team.ask(session, "x", verdict="deny", given=given(9)) == []
    clock.move(61)
    await team.ask(session, "t4", "t5", given=given(4))
    clock.move(61)
    with pytest.raises(TooManyAsks, match="since the last message"):
        await team.ask(session, "t6", given=given(6))
    await store.send_events(session.id, team.workspace_id, [message("go on")], by=team.people["ann"])
    await team.ask(session, "t6", given=given(6))


async def test_a_session_that_asks_for_too_many_hosts_is_not_heard(backend: Any, clock: FakeClock):
    store = CoreStore(backend, clock, ask_limits=AskLimits(per_minute=2, per_session=5))
    team = await Team.make(store)
    session = await team.session()

    async def host(n: int) -> Any:
        given = {"host": f"h{n}.example", "port": 443, "because": "curl"}
        return await store.ask_network(session.id, 1, f"t{n}", given, cwd="/w", expires_at=None)

    await host(1)
    await host(2)
    await host(1)
    with pytest.raises(Conflict):
        await host(3)


async def test_a_host_that_the_workspace_asks_two_people_for_or_denies(store: CoreStore):
    team = await team_of_three(
        store,
        ask_rule("Network(*.prod.example)", quorum=2, approvers={"groups": ["release"]}),
        {"pattern": "Network(evil.example)", "action": "deny"},
    )
    session = await team.session()
    given = {"host": "a.prod.example", "port": 443, "because": "curl"}
    asked = await store.ask_network(session.id, 1, "t1", given, cwd="/w", expires_at=None)
    assert (await team.say("ann", asked)).state is S.PENDING
    assert (await team.say("ben", asked)).state is S.ALLOWED
    with pytest.raises(HitlError, match="does not permit it"):
        await store.ask_network(
            session.id, 1, "t2", {**given, "host": "evil.example"}, cwd="/w", expires_at=None
        )


async def test_what_the_owner_judged_by_the_current_policy_is_taken_as_it_judged_it(store: CoreStore):
    team = await team_of_three(store, release(2), ask_rule("Edit(infra/**)"))
    session = await team.session()
    version = (await store.get_policy(team.workspace_id)).version
    [through_a_link] = await team.ask(
        session, "t1", given={"command": "x"}, rules=("Edit(infra/**)",), policy_version=version
    )
    assert [one.rule for one in through_a_link.requirements] == ["Edit(infra/**)"]
    assert await team.ask(session, "t2", verdict="allow", policy_version=version) == []
    [older] = await team.ask(session, "t3", verdict="allow", policy_version=version - 1)
    assert older.quorum == 2
    await team.rule()
    [default] = await team.ask(session, "t4", rules=("default",), policy_version=version + 1)
    assert [one.rule for one in default.requirements] == ["default"]


async def test_an_awake_owner_sees_a_changed_policy_at_once(store: CoreStore):
    team = await team_of_three(store)
    session = await team.session()
    revision = (await store.snapshot(session.id, 1)).session.revision
    waiting = asyncio.create_task(store.wait_session(session.id, 1, revision, timeout_s=60))
    while not waiting.done():
        await team.rule(release(2))
        await team.rule(release(3))
        await asyncio.wait([waiting], timeout=0.1)
    found = waiting.result()
    assert found.policy_version > 0
    assert found.policy.rules[0].approvers.groups == ("release",)
