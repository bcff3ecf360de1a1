"""Judging a call: any input from a model is judged and can be stored, and paths are judged from the right folder."""

from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from claude_hitl_template.claude.cli_engine import TOOLS
from claude_hitl_template.claude.cli_engine import is_plan_folder as is_cli_plan_folder
from claude_hitl_template.domain.canonical_json import canonical_json
from claude_hitl_template.domain.models import Agent, Approval, ApprovalState, Session, utcnow
from claude_hitl_template.domain.policy import PermissionPolicy, Rule, Verdict, from_folder, portable_rules
from claude_hitl_template.domain.policy.tiers import WorkspacePolicy
from claude_hitl_template.domain.tool_inputs import known_fields
from claude_hitl_template.session.engine import Moment, ToolUse
from claude_hitl_template.session.gate import Gate
from claude_hitl_template.session.judge import Judge, recordable

TEXT = st.text(st.characters(exclude_categories=()), max_size=20)  # surrogates and NUL too
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=10,
)
FIELDS = sorted({field for tool in TOOLS for field in known_fields(tool) or ()})


def session(*rules: Rule, **more: Any) -> Session:
    now = utcnow()
    return Session(id="sesn_1", workspace_id="key_1", created_at=now, updated_at=now, rules=rules, **more)


def gate(workspace: Path) -> Gate:
    async def nothing(_use: ToolUse) -> None: ...

    return Gate(
        cast(Any, None),
        session(),
        workspace=workspace,
        is_plan_folder=lambda _folder: False,
        hot_window_s=0.0,
        on_overdue=nothing,
        on_changed=nothing,
        is_behind=lambda: False,
    )


def judge(workspace: Path, **more: Any) -> Judge:
    return Judge(workspace, lambda _folder: False, **{"plan_mode": False, **more})


@given(
    st.sampled_from([*TOOLS, "mcp__a__b", "Unheard", ""]),
    VALUE | st.dictionaries(st.sampled_from(FIELDS), VALUE, max_size=4),
)
def test_whatever_a_model_sends_is_classified_and_can_be_kept(name: str, sent: Any):
    one = gate(Path("/nowhere"))
    use = one.received(ToolUse("toolu_1", name, sent))
    call = one.classify(use)
    canonical_json(call.input)
    assert call.verdict in ("allow", "ask", "deny")
    if not isinstance(sent, dict):
        assert call.verdict == "deny"


@pytest.mark.parametrize("sent", [[1], "text", None, 5, {"x": float("nan")}, {"\ud800": 1}])
def test_what_cannot_be_kept_as_it_is_does_not_run(sent: Any):
    assert gate(Path("/nowhere")).classify(ToolUse("t", "Read", {})).verdict == "ask"
    one = gate(Path("/nowhere"))
    assert one.classify(one.received(ToolUse("t", "mcp__a__b", sent))).verdict == "deny"
    canonical_json(recordable(sent))


def test_a_folder_is_named_from_the_workspace(tmp_path: Path):
    workspace = tmp_path / "w"
    (workspace / "sub").mkdir(parents=True)
    (tmp_path / "linked").symlink_to(workspace)
    one = judge(tmp_path / "linked")
    assert one.portable(workspace) == "."
    assert one.shown(workspace) == str(tmp_path / "linked")
    assert one.portable(workspace / "sub") == one.portable(tmp_path / "linked" / "sub") == "./sub"
    assert one.portable(tmp_path) == str(tmp_path)


def test_each_thread_has_the_folder_that_the_cli_said_last(tmp_path: Path):
    one = judge(tmp_path)
    assert one.folder(None) == one.folder("agent") == tmp_path
    one.see(ToolUse("t", "Bash", {}, moment=Moment("/a")), None)
    one.see(ToolUse("t", "Bash", {}, moment=Moment("/b", plan_mode=True)), "agent")
    assert (one.folder(None), one.folder("agent"), one.folder("other")) == (
        Path("/a"),
        Path("/b"),
        Path("/a"),
    )
    assert not one.plan_mode


REMEMBERED = ["Bash(./run.sh)", "Bash(npm test)", "Write(./a.txt)", "WebFetch(domain:a.example)", "mcp__a__b"]


def test_a_remembered_command_holds_in_the_folder_of_the_session_only(tmp_path: Path):
    rules = tuple(Rule(rule=rule, policy="always_allow") for rule in REMEMBERED)
    exact = Rule(rule="Bash", policy="always_allow", digest="0" * 64)
    assert [r.rule for r in portable_rules((*rules, exact))] == REMEMBERED[2:]
    one, sub = judge(tmp_path), tmp_path / "sub"
    for command in ("./run.sh", "npm test"):
        here = one.evaluate(session(*rules), "Bash", {"command": command}, tmp_path)[1]
        there = one.evaluate(session(*rules), "Bash", {"command": command}, sub)[1]
        assert (here.verdict, there.verdict) == (Verdict.allow, Verdict.ask)


def test_an_allow_rule_for_a_program_of_the_workspace_does_not_hold_elsewhere(tmp_path: Path):
    rules = tuple(
        Rule(rule=rule, policy="always_allow")
        for rule in ("Bash(./run.sh:*)", "Bash(npm test)", "Bash(/bin/ls:*)")
    )
    owner, one = session(), judge(tmp_path)
    owner = owner.but(agent=owner.agent.but(policy=PermissionPolicy(rules=rules)))
    found = [
        one.evaluate(owner, "Bash", {"command": c}, tmp_path / "sub")[1].verdict.value
        for c in ("./run.sh x", "npm test", "/bin/ls x")
    ]
    assert found == ["ask", "allow", "allow"]


def test_a_relative_path_is_of_the_folder_that_was_approved():
    folder = Path("/w/sub")
    assert from_folder("Write", {"file_path": "a/../b", "content": ""}, folder)["file_path"] == "/w/sub/b"
    for same in ("/a", "~/a", " a", ""):
        assert from_folder("Read", {"file_path": same}, folder) == {"file_path": same}
    assert from_folder("Bash", {"command": "ls"}, folder) == {"command": "ls"}


def test_paths_are_judged_from_the_folder_they_are_relative_to(tmp_path: Path):
    owner = session()
    guarded = PermissionPolicy(
        rules=(Rule(rule="Read(./secrets/**)", policy="always_ask"),), default="always_allow"
    )
    owner = owner.but(agent=owner.agent.but(policy=guarded))
    one = judge(tmp_path)
    there = one.evaluate(owner, "Read", {"file_path": "key.txt"}, tmp_path / "secrets")[1]
    here = one.evaluate(owner, "Read", {"file_path": "key.txt"}, tmp_path)[1]
    assert (there.verdict, here.verdict) == (Verdict.ask, Verdict.allow)


def test_a_plan_is_read_only_where_plans_are_and_through_no_link(tmp_path: Path):
    """The CLI names the file, and the agent may control that name."""
    secrets, plans = tmp_path / "secrets", tmp_path / "config" / "plans"
    for folder in (secrets, plans):
        folder.mkdir(parents=True)
    (secrets / "key").write_text("the service's")
    (plans / "own.md").write_text("# Plan")
    (plans / "linked.md").symlink_to(secrets / "key")
    is_plan_folder = is_cli_plan_folder(tmp_path / "config")

    def shown(path: Path) -> Any:
        one = Judge(tmp_path / "workspace", is_plan_folder, plan_mode=True)
        asked = ToolUse(
            "t", "ExitPlanMode", {"planFilePath": str(path)}, moment=Moment("/a", plans=path.parent)
        )
        one.see(asked, None)
        return one.with_plan(asked).input.get("plan")

    assert shown(plans / "own.md") == "# Plan"
    for path in (secrets / "key", plans / "linked.md", plans / ".." / ".." / "secrets" / "key", plans):
        assert shown(path) is None
    plans.rename(tmp_path / "aside")
    plans.symlink_to(secrets)
    assert shown(plans / "key") is None


# -- the workspace's policy, identical calls


def ruled(*rules: dict[str, Any], **more: Any) -> WorkspacePolicy:
    return WorkspacePolicy.model_validate({"rules": rules, **more})


def allowing(*texts: str) -> Session:
    rules = tuple(Rule(rule=text, policy="always_allow") for text in texts)
    return session(agent=Agent(policy=PermissionPolicy(rules=rules)))


def test_the_workspaces_policy_is_stricter_than_what_the_agent_or_a_human_allowed(tmp_path: Path):
    one, agent = judge(tmp_path), allowing("Bash(git push)", "Bash(rm x)")
    given = {"command": "git push"}
    assert one.evaluate(agent, "Bash", given, tmp_path)[1].verdict is Verdict.allow
    one.workspace_policy = ruled(
        {"pattern": "Bash(git push:*)", "action": "ask"}, {"pattern": "Bash(rm:*)", "action": "deny"}
    )
    _, found = one.evaluate(agent, "Bash", given, tmp_path)
    assert (found.verdict, found.source) == (Verdict.ask, "the workspace's rule: Bash(git push:*)")
    remembering = session(Rule(rule="Bash(git push)", policy="always_allow"))
    assert one.evaluate(remembering, "Bash", given, tmp_path)[1].verdict is Verdict.ask
    assert one.evaluate(agent, "Bash", {"command": "rm x"}, tmp_path)[1].verdict is Verdict.deny


def test_a_workspaces_rule_about_paths_follows_links_as_they_are(tmp_path: Path):
    (tmp_path / "infra").mkdir()
    (tmp_path / "elsewhere").symlink_to("infra")
    one = judge(tmp_path)
    one.workspace_policy = ruled({"pattern": "Edit(infra/**)", "action": "deny"})
    given = {"file_path": "elsewhere/x", "content": ""}
    assert one.evaluate(session(), "Write", given, tmp_path)[1].verdict is Verdict.deny


def approved(one: Gate, **more: Any) -> Approval:
    call = one.classify(ToolUse("t1", "Bash", {"command": "git push"}))
    return Approval(
        id="appr_1",
        session_id="sesn_1",
        workspace_id="key_1",
        event_id="t1",
        call_id="t1",
        batch=("t1",),
        tool_name="Bash",
        input=call.input,
        digest=call.digest,
        cwd=str(call.cwd),
        folder=call.folder,
        created_at=utcnow(),
        **more,
    )


def test_a_call_that_was_allowed_by_too_few_for_the_policy_of_now_does_not_run(tmp_path: Path):
    one, use = judge(tmp_path), ToolUse("t1", "Bash", {"command": "git push"})
    allowed = approved(gate(tmp_path), state=ApprovalState.ALLOWED, run_input={"command": "git push"})
    assert one.differs(session(), allowed, use, tmp_path) is None
    one.workspace_policy = ruled({"pattern": "Bash(git push:*)", "action": "ask"})
    assert one.differs(session(), allowed, use, tmp_path) is None
    one.workspace_policy = ruled({"pattern": "Bash(git push:*)", "action": "ask", "quorum": 2})
    assert "needs other approvers now" in str(one.differs(session(), allowed, use, tmp_path))
    waiting = allowed.but(state=ApprovalState.PENDING)
    assert one.differs(session(), waiting, use, tmp_path) is None, "the decision itself takes two"
    one.workspace_policy = ruled({"pattern": "Bash(git push:*)", "action": "deny"})
    assert "is not permitted now" in str(one.differs(session(), waiting, use, tmp_path))


def test_which_command_of_a_line_asks_is_sent_with_the_call(tmp_path: Path):
    one = gate(tmp_path)
    one.update(allowing("Bash(git status)"), [], ruled({"pattern": "Bash(rm:*)", "action": "ask"}))
    call = one.classify(ToolUse("t1", "Bash", {"command": "git status && rm -rf x"}))
    assert (call.verdict, call.rules) == ("ask", ("Bash(rm:*)",))
    assert [(s.text(call.input["command"]), s.verdict.value, s.source) for s in call.segments] == [
        ("git status", "allow", "Bash(git status)"),
        ("rm -rf x", "ask", "the workspace's rule: Bash(rm:*)"),
    ]
    assert one.classify(ToolUse("t2", "Bash", {"command": "rm x"})).segments == ()


def test_of_identical_calls_that_wait_a_human_is_asked_about_one(tmp_path: Path):
    one, given = gate(tmp_path), {"command": "git push"}

    def verdict(call_id: str, **other: Any) -> str:
        return one.classify(ToolUse(call_id, "Bash", {**given, **other})).verdict

    assert [verdict("t1"), verdict("t2"), verdict("t1")] == ["ask", "deny", "ask"]
    assert verdict("t3", command="git push -f") == "ask"
    waiting = approved(one)
    one.register([waiting])
    assert verdict("t4") == "deny"
    one.register([waiting.but(held=True)])
    assert verdict("t5") == "ask", "the call takes the held one's approval over"
    one.register([approved(one).but(call_id="t5", state=ApprovalState.ALLOWED)])
    assert verdict("t6") == "ask", "a decided call is over"
