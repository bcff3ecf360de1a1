"""The settings layers of an image on the real CLI: the model receives them before and after parking, and none of them
lets a call bypass the gate."""

import json
import shutil
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from claude_hitl_template.claude.layers import image_layers
from claude_hitl_template.domain import missing_dependency
from claude_hitl_template.domain.events import UserMessage
from claude_hitl_template.domain.policy import PermissionPolicy
from claude_hitl_template.image import labels
from claude_hitl_template.model.endpoint import Answer, Call, OfflineUpstream
from claude_hitl_template.model.offline import Scenarios
from tests.contract.test_session import House, driven, house, user
from tests.serving import model_app, serving

USER_MEMORY, USER_COMMAND, USER_SKILL = (
    "the memory of the user level",
    "the greeting of",
    "says hello by itself",
)
PROJECT_MEMORY, PROJECT_SKILL = "the memory of the project level", "knows the project"
PLUGIN_COMMAND, PLUGIN_SKILL = "the plugin looks at", "comes with the plugin"


class Recorder:
    """The offline model, which records the requests."""

    def __init__(self) -> None:
        self._offline = OfflineUpstream(Scenarios.load())
        self.requests: list[dict[str, Any]] = []

    @asynccontextmanager
    async def call(self, call: Call) -> AsyncGenerator[Answer]:
        raw = b"".join([chunk async for chunk in call.body])
        self.requests.append(json.loads(raw))
        async with self._offline.call(replace(call, body=_again(raw))) as answer:
            yield answer

    def told(self) -> str:
        """Returns the requests with tools that the model received since the last call, as text."""
        seen, self.requests = self.requests, []
        return "\n".join(json.dumps(body, ensure_ascii=False) for body in seen if body.get("tools"))


async def _again(raw: bytes) -> AsyncIterator[bytes]:
    yield raw


@dataclass
class Model:
    url: str
    recorder: Recorder


@pytest.fixture
async def model() -> AsyncIterator[Model]:
    recorder = Recorder()
    async with serving(model_app(recorder)) as url:
        yield Model(url, recorder)


# -- an image's folder, as the build makes it


def write(path: Path, text: str | dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text if isinstance(text, str) else json.dumps(text))


def skill(name: str, description: str, body: str = "Do it.", more: str = "") -> str:
    return f"---\nname: {name}\ndescription: {description}\n{more}---\n{body}\n"


def lay_out(root: Path) -> None:
    user_level, workspace = root / "template_user/.claude", root / "workspace"
    plugin = root / "plugins/tools/plugins/lint"
    write(root / ".dependency-manifest.json", {"plugins": []})
    write(user_level / "CLAUDE.md", USER_MEMORY)
    write(user_level / "commands/hello.md", f"{USER_COMMAND} $ARGUMENTS")
    write(user_level / "skills/greet/SKILL.md", skill("greet", USER_SKILL))
    write(user_level / "agents/helper.md", "---\nname: helper\ndescription: helps a user\n---\nHelp.\n")
    write(
        user_level / "settings.json",
        {
            "env": {"FROM_USER": "user", "FROM_BOTH": "user"},
            "enabledPlugins": {"lint@tools": True},
            "extraKnownMarketplaces": {"tools": {"source": {"source": "github", "repo": "nowhere/nothing"}}},
        },
    )
    write(workspace / "CLAUDE.md", PROJECT_MEMORY)
    write(workspace / ".claude/skills/know/SKILL.md", skill("know", PROJECT_SKILL))
    write(
        workspace / ".claude/settings.json",
        {"env": {"FROM_PROJECT": "project", "FROM_BOTH": "project"}, "enabledPlugins": {"lint@tools": True}},
    )
    write(workspace / ".claude/settings.local.json", {"env": {"FROM_LOCAL": "local"}})
    write(
        plugin / ".claude-plugin/plugin.json", {"name": "lint", "version": "1.0.0", "description": "Looks."}
    )
    write(plugin / "commands/look.md", f"{PLUGIN_COMMAND} $ARGUMENTS")
    write(plugin / "skills/inspect/SKILL.md", skill("inspect", PLUGIN_SKILL))


async def layered(tmp_path: Path, model: Model, prompt: str, *, hot_s: float = 0.0, **agent: Any) -> House:
    made = await house(tmp_path, model.url, prompt, hot_s=hot_s, **agent)
    lay_out(made.root)
    made.layers = image_layers(made.workspace, made.root, made.root / "etc/managed-settings.json")
    assert made.layers is not None
    return made


def script(*steps: dict[str, Any]) -> str:
    first = {"text": "[offline model] I follow the script of a test.", **steps[0]}
    return f"```scenario\n{json.dumps([first, *steps[1:], {'text': 'That is all.'}], indent=1)}\n```"


def bash(command: str) -> dict[str, Any]:
    return {"name": "Bash", "input": {"command": command}}


async def next_turn(h: House, said: UserMessage | str) -> dict[str, Any]:
    """Sends another message, and drives it with a new owner, which resumes the transcript."""
    await h.send(user(said) if isinstance(said, str) else said)
    await h.drive()
    return await h.until_idle()


async def allow_all(h: House) -> None:
    """Allows all waiting calls until the turn ends, each time while nothing runs."""
    for _ in range(8):
        stop = await h.until_idle()
        if stop["type"] != "requires_action":
            return
        for event_id in stop["event_ids"]:
            await h.confirm(event_id)
        await h.drive()
    raise AssertionError("it is asked without end")


def absent(wanted: Iterable[str], model: Model) -> list[str]:
    told = model.recorder.told()
    return [text for text in wanted if text not in told]


# -- what is in force


async def test_all_layers_are_in_force_before_parking_and_after(tmp_path: Path, model: Model):
    ran = tmp_path / "workspace/ran"
    command = f'echo "$FROM_USER $FROM_PROJECT $FROM_LOCAL $FROM_BOTH" >> {ran}'
    h = await layered(tmp_path, model, script({"tools": [bash(command)]}))
    await h.drive()
    everywhere = (USER_MEMORY, PROJECT_MEMORY, USER_SKILL, PROJECT_SKILL, PLUGIN_SKILL)
    assert absent(everywhere, model) == []
    await allow_all(h)
    assert ran.read_text() == "user project local project\n"
    for said, told in (
        ("/hello world", f"{USER_COMMAND} world"),
        ("/lint:look src", f"{PLUGIN_COMMAND} src"),
    ):
        assert (await next_turn(h, said))["type"] == "end_turn"
        assert absent((*everywhere, told), model) == []


async def test_the_same_prompt_goes_by_each_sessions_own_project(tmp_path: Path, model: Model):
    told: list[str] = []
    for name, memory in (("one", "Answer in rhymes."), ("two", "Answer in prose.")):
        folder = tmp_path / name
        h = await layered(folder, model, f"Read {folder}/workspace/open.txt")
        write(h.workspace / "CLAUDE.md", memory)
        await h.drive()
        told.append(model.recorder.told())
    assert ["rhymes" in text for text in told] == [True, False]
    assert ["prose" in text for text in told] == [False, True]


async def test_what_a_project_denies_is_not_done_and_waits_for_nobody(tmp_path: Path, model: Model):
    ran = tmp_path / "workspace/ran"
    steps = script({"tools": [bash(f"touch {ran}"), bash(f"echo allowed >> {ran}")]})
    h = await layered(tmp_path, model, steps)
    write(h.workspace / ".claude/settings.json", {"permissions": {"deny": ["Bash(touch:*)"]}})
    await h.drive()
    [asked] = (await h.store.list_approvals("key_test", limit=10)).data
    assert "echo allowed" in asked.input["command"]
    [denied, _] = await h.log("agent.tool_use")
    assert denied.payload["evaluated_permission"] == "deny"
    await allow_all(h)
    assert ran.read_text() == "allowed\n"


READ_BACK = "what is in the file"


@pytest.mark.parametrize(
    ("place", "policy", "asked"),
    [
        (".dependency-manifest.json", PermissionPolicy(), False),
        pytest.param(
            "template_user/.claude/skills/greet/more.md", PermissionPolicy(), False, marks=pytest.mark.slow
        ),
        pytest.param("plugins/tools/plugins/lint/more.md", PermissionPolicy(), False, marks=pytest.mark.slow),
        ("config-1/skills/greet/more.md", PermissionPolicy(), False),  # as the CLI tells the model
        ("plugins/link.md", PermissionPolicy(), True),
        pytest.param("elsewhere.md", PermissionPolicy(), True, marks=pytest.mark.slow),
        (".dependency-manifest.json", PermissionPolicy(default="always_ask"), True),
    ],
)
async def test_what_the_image_was_built_with_is_read_without_asking(
    tmp_path: Path, model: Model, place: str, policy: PermissionPolicy, asked: bool
):
    path = tmp_path / place
    steps = script({"tools": [{"name": "Read", "input": {"file_path": str(path)}}]})
    h = await layered(tmp_path, model, steps, policy=policy)
    write(tmp_path / "elsewhere.md", READ_BACK)
    if place.endswith("link.md"):  # leads out of what was built
        path.symlink_to(tmp_path / "elsewhere.md")
    else:
        write(tmp_path / place.replace("config-1", "template_user/.claude"), READ_BACK)
    await h.drive()
    assert ((await h.until_idle())["type"] == "requires_action") == asked
    assert (READ_BACK in model.recorder.told()) != asked


@pytest.mark.parametrize("in_image", [True, False], ids=["in an image", "as a local process"])
async def test_the_home_folder_of_whoever_runs_the_service_is_not_seen(
    tmp_path: Path, model: Model, in_image: bool, monkeypatch: pytest.MonkeyPatch
):
    home = tmp_path / "home"
    write(home / ".claude/CLAUDE.md", "a stranger's memory")
    write(home / ".claude/commands/hello.md", "a stranger's command")
    write(home / ".claude/skills/odd/SKILL.md", skill("odd", "a stranger's skill"))
    monkeypatch.setenv("HOME", str(home))
    h = await layered(tmp_path / "session", model, "/hello world")
    h.layers = h.layers if in_image else None
    await h.drive()
    await next_turn(h, "/hello again")
    told = model.recorder.told()
    assert "stranger" not in told
    assert (USER_MEMORY in told) == (PROJECT_MEMORY in told) == (PLUGIN_SKILL in told) == in_image


async def test_a_plan_is_drafted_unasked_in_an_image_too(tmp_path: Path, model: Model):
    h = await layered(tmp_path, model, "Make a plan first")
    await h.drive()
    waiting = (await h.store.list_approvals("key_test", limit=10)).data
    assert [a.tool_name for a in waiting] == ["ExitPlanMode"]
    assert "planned.txt" in waiting[0].input["plan"]
    await allow_all(h)
    assert (h.workspace / "planned.txt").exists()


# -- what no layer can do


def hooks(mark: Path) -> dict[str, Any]:
    ran = [{"hooks": [{"type": "command", "command": f"touch {mark}"}]}]
    return dict.fromkeys(("SessionStart", "UserPromptSubmit", "PreToolUse", "PostToolUse", "Stop"), ran)


async def test_no_hook_runs_but_the_gate(tmp_path: Path, model: Model):
    """Neither hooks of a layer or a plugin, nor those that an agent may have written into a skill of a subfolder."""
    mark, ran = tmp_path / "workspace/hook-ran", tmp_path / "workspace/ran"
    in_skill = (
        f"hooks:\n  PreToolUse:\n    - hooks:\n        - type: command\n          command: touch {mark}\n"
    )
    steps = script(
        {"tools": [{"name": "Read", "input": {"file_path": "sub/x.txt"}}]},
        {"tools": [{"name": "Skill", "input": {"skill": "own"}}]},
    )
    h = await layered(tmp_path, model, steps, hot_s=60)
    write(h.workspace / "sub/x.txt", "x")
    write(
        h.workspace / "sub/.claude/skills/own/SKILL.md",
        skill("own", "written here", script({"tools": [bash(f"touch {ran}")]}), in_skill),
    )
    for path in ("template_user/.claude/settings.json", "workspace/.claude/settings.json"):
        write(h.root / path, {"hooks": hooks(mark)})
    write(h.workspace / ".claude/settings.local.json", {"hooks": hooks(mark), "allowManagedHooksOnly": False})
    write(h.root / "plugins/tools/plugins/lint/hooks/hooks.json", {"hooks": hooks(mark)})
    async with driven(h):
        while (stop := await h.until_idle())["type"] == "requires_action":
            for event_id in stop["event_ids"]:
                await h.confirm(event_id)
    approvals = (await h.store.list_approvals("key_test", limit=10)).data
    assert [(a.tool_name, a.state.value) for a in approvals] == [
        ("Skill", "succeeded"),
        ("Bash", "succeeded"),
    ]
    assert ran.exists()
    assert not mark.exists()


async def test_a_command_or_skill_runs_no_shell_while_it_is_read(tmp_path: Path, model: Model):
    ran = tmp_path / "workspace/ran"
    h = await layered(tmp_path, model, "/run")
    write(
        h.workspace / ".claude/commands/run.md",
        f"---\nallowed-tools: Bash\n---\nIt says !`touch {ran}` and goes on.",
    )
    await h.drive()
    assert (await h.until_idle())["type"] == "end_turn"
    assert "and goes on" in model.recorder.told()
    assert not ran.exists()


# -- layers that cannot be used


@pytest.mark.parametrize(
    ("place", "text"),
    [
        ("template_user/.claude/settings.json", "{"),
        pytest.param("workspace/.claude/settings.json", "[]", marks=pytest.mark.slow),
        pytest.param("workspace/.claude/settings.local.json", "nonsense", marks=pytest.mark.slow),
        pytest.param("etc/managed-settings.json", "{", marks=pytest.mark.slow),
        pytest.param("etc/managed-settings.json", "{}", marks=pytest.mark.slow),
        ("etc/managed-settings.json", '{"allowManagedHooksOnly": "yes"}'),
    ],
)
async def test_a_layer_that_cannot_be_used_ends_the_turn_with_its_name_and_can_be_mended(
    tmp_path: Path, model: Model, place: str, text: str
):
    h = await layered(tmp_path, model, "/hello world")
    write(h.root / place, text)
    await h.drive()
    assert (await h.until_idle())["type"] == "retries_exhausted"
    [error] = [e.payload["error"]["message"] for e in await h.log("session.error")]
    assert str(h.root / place) in error
    assert "./hitl image build" in error
    assert model.recorder.told() == ""
    shutil.rmtree(h.root / "etc", ignore_errors=True)
    write(h.root / place, {"allowManagedHooksOnly": True})
    assert (await next_turn(h, "/hello again"))["type"] == "end_turn"
    assert f"{USER_COMMAND} again" in model.recorder.told()


# -- what is missing


def report(**given: Any) -> str:
    return script({"tools": [{"name": missing_dependency.FULL_NAME, "input": given}]})


@pytest.mark.parametrize(
    "agent",
    [
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"permission_mode": "plan"}, marks=pytest.mark.slow),
        pytest.param({"policy": PermissionPolicy(default="always_ask")}, marks=pytest.mark.slow),
        {"policy": PermissionPolicy(default="always_deny")},
    ],
)
async def test_a_missing_tool_is_reported_without_asking_anybody(
    tmp_path: Path, model: Model, agent: dict[str, Any]
):
    h = await layered(tmp_path, model, report(kind="system", name="jq", why="to read JSON"), **agent)
    await h.drive()
    await next_turn(h, report(kind="npm", name="@types/node", why="to check types"))  # resumed
    for use in await h.log("agent.mcp_tool_use"):
        assert missing_dependency.is_report(use.wire())
        assert use.payload["evaluated_permission"] == "allow"
    results = await h.log("agent.mcp_tool_result")
    assert [r.payload["is_error"] for r in results] == [False, False]
    assert "A human was informed that jq is missing" in str(results[0].payload["content"])
    assert (await h.store.list_approvals("key_test", limit=1)).data == []


async def test_a_report_that_says_nothing_usable_is_sent_back(tmp_path: Path, model: Model):
    h = await layered(tmp_path, model, report(kind="system", name="jq\n; rm -rf /", why="x"))
    await h.drive()
    [use] = await h.log("agent.mcp_tool_use")
    assert not missing_dependency.is_report(use.wire())
    [result] = await h.log("agent.mcp_tool_result")
    assert result.payload["is_error"]
    assert "name must be" in str(result.payload["content"])


async def test_outside_of_an_image_there_is_nothing_to_report_to(tmp_path: Path, model: Model):
    h = await house(tmp_path, model.url, "/hello world")
    await h.drive()
    assert missing_dependency.TOOL not in model.recorder.told()


def test_only_a_session_in_the_images_own_workspace_gets_its_layers(tmp_path: Path):
    lay_out(tmp_path)
    found = image_layers(tmp_path / "workspace", tmp_path)
    assert found is not None
    assert found.user == tmp_path / Path(labels.HOME).name / ".claude"
    assert found.plugins == (tmp_path / "plugins/tools/plugins/lint",)
    assert image_layers(tmp_path / "elsewhere", tmp_path) is None
    (tmp_path / ".dependency-manifest.json").unlink()
    assert image_layers(tmp_path / "workspace", tmp_path) is None
