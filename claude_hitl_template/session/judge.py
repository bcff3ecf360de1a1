"""Evaluates a call with the present state: the folder it will run in, and the present targets of links.

A call is judged when its message is committed, when the CLI asks for it, and again immediately before it runs; in
between, a sibling may have changed a link, the shell's folder, or the file of the plan that a human reads. A hard link
cannot be told from the file itself, and nothing here sees what a background process does after the last check.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import structlog

from claude_hitl_template.domain import policy
from claude_hitl_template.domain.models import Approval, ApprovalState, Session, utcnow
from claude_hitl_template.domain.policy import Evaluation, PermissionPolicy, Rule, Verdict
from claude_hitl_template.domain.policy.command_segments import JudgedSegment, judged_segments
from claude_hitl_template.domain.policy.floor import BUILT_IN, STRICTNESS, Floor, strictest
from claude_hitl_template.domain.policy.tiers import NO_POLICY, Tier, covers
from claude_hitl_template.files.safe_open import open_file
from claude_hitl_template.session.engine import ToolUse

log = structlog.get_logger()

MAX_PLAN_BYTES = 1024 * 1024
_MAX_DEPTH = 100


class Judge:
    """Judges the calls of one engine. `workspace` is the CLI's folder until it reports another. `floor` applies in
    addition to the agent's policy."""

    def __init__(
        self,
        workspace: Path,
        is_plan_folder: Callable[[Path], bool],
        *,
        plan_mode: bool,
        floor: Floor = BUILT_IN,
    ) -> None:
        self._workspace, self._is_plan_folder, self._floor = workspace, is_plan_folder, floor
        self.workspace_policy = NO_POLICY  # of the tenant; it may change while calls wait
        self._image_rules: tuple[Rule, ...] = ()
        self._folders: dict[str | None, Path] = {}  # by thread
        self._own_plans: Path | None = None
        self._plan_file: Path | None = None
        self.plan_mode = plan_mode

    def hold_to(self, rules: Sequence[Rule]) -> None:
        self._image_rules = tuple(rules)

    # -- the folder

    def see(self, use: ToolUse, thread: str | None) -> None:
        """Takes over the folder that the CLI reports with its question."""
        if use.moment is None:
            return
        self._folders[thread] = Path(use.moment.cwd)
        if thread is None:
            self.plan_mode = use.moment.plan_mode
        self._own_plans = use.moment.plans or self._own_plans
        if use.name == "ExitPlanMode" and isinstance(path := _field(use.input, "planFilePath"), str):
            self._plan_file = Path(path)

    def folder(self, thread: str | None) -> Path:
        """The folder that a call of this thread runs in."""
        return self._folders.get(thread) or self._folders.get(None) or self._workspace

    def portable(self, folder: Path) -> str:
        """`.` for the workspace, `./sub` in it, else the absolute path: the workspace's own may change."""
        real, workspace = _resolved(folder), _resolved(self._workspace)
        if not real.is_relative_to(workspace):
            return str(real)
        below = real.relative_to(workspace)
        return f"./{below}" if below.parts else "."

    def shown(self, folder: Path) -> str:
        return str(self._workspace) if self.portable(folder) == "." else str(folder)

    # -- the policy

    def evaluate(
        self, session: Session, name: str, given: Mapping[str, Any], folder: Path
    ) -> tuple[Evaluation, Evaluation]:
        """Two evaluations: by the agent's policy, the floor and the workspace's policy, and with the remembered rules."""
        if self.is_plan_file(name, given, folder):
            draft = Evaluation(Verdict.allow, "the draft of a plan")
            return draft, draft
        own, remembered = session.agent.policy, session.rules
        if self.portable(folder) != ".":
            remembered = policy.portable_rules(remembered)
        in_image = self._in_image(own)
        tier = self.tier(name, given, folder).found
        one, other = (
            strictest(
                self._floor.evaluate(in_image, name, given, self._workspace, cwd=folder, remembered=rules),
                tier,
            )
            for rules in ((), remembered)
        )
        return one, other

    def tier(self, name: str, given: Mapping[str, Any], folder: Path) -> Tier:
        """What the workspace's policy alone says of a call."""
        return self.workspace_policy.evaluate(name, given, self._workspace, folder)

    def segments(self, session: Session, given: Mapping[str, Any], folder: Path) -> tuple[JudgedSegment, ...]:
        """How the commands of a Bash call's line are judged; () for one command."""
        command = given.get("command")
        if not isinstance(command, str):
            return ()

        def judge(one: str) -> Evaluation:
            return self.evaluate(session, "Bash", {**given, "command": one}, folder)[1]

        whole = [self.evaluate(session, "Bash", given, folder)[1], self.tier("Bash", given, folder).found]
        return judged_segments(command, whole, judge)

    def _in_image(self, policy: PermissionPolicy) -> PermissionPolicy:
        held = [rule for rule in self._image_rules if rule.policy == "always_deny" or policy.default is None]
        return policy.model_copy(update={"rules": (*policy.rules, *held)}) if held else policy

    def targets(self, name: str, given: Mapping[str, Any], folder: Path) -> tuple[str, ...]:
        return policy.targets(name, given, self._workspace, folder)

    def stricter(
        self, session: Session, issued: ToolUse, asked: ToolUse, folder: Path, before: Evaluation
    ) -> str | None:
        """Why a call that was allowed without a human must not run now; None if it may.

        The CLI's own reading of the paths (`asked`) is checked as well.
        """
        for use in (issued, asked):
            _, now = self.evaluate(session, use.name, _mapping(use.input), folder)
            if STRICTNESS[now.verdict] > STRICTNESS[before.verdict]:
                return "is not permitted now" if now.verdict is Verdict.deny else "must be asked for now"
            if policy.path_field(use.name) is None:
                break
        return None

    def differs(self, session: Session, approval: Approval, asked: ToolUse, folder: Path) -> str | None:
        """How the call that would run now differs from the one shown to a human; None if it does not."""
        name, given = approval.tool_name, approval.input if approval.run_input is None else approval.run_input
        if (there := self.portable(folder)) != (approval.folder or "."):
            return f"would run in the folder {there}, and was judged for {approval.folder or '.'}"
        _, effective = self.evaluate(session, name, given, folder)
        if effective.verdict is Verdict.deny:
            return f"is not permitted now ({effective.source})"
        by_rule = approval.decision is not None and approval.decision.decided_by.startswith("rule:")
        if by_rule and effective.verdict is not Verdict.allow:
            return "is not what was to be allowed unasked"
        needed = self.tier(name, given, folder).requirements(utcnow())
        if approval.state is ApprovalState.ALLOWED and not covers(approval.requirements, needed):
            return f"needs other approvers now ({effective.source})"
        return self._leads_elsewhere(approval, given, folder) or self._other_plan(approval, asked)

    def _leads_elsewhere(self, approval: Approval, given: Mapping[str, Any], folder: Path) -> str | None:
        if approval.targets is None or (field := policy.path_field(approval.tool_name)) is None:
            return None
        name, now = approval.tool_name, self.targets(approval.tool_name, given, folder)
        shown = approval.targets
        if given.get(field) != approval.input.get(field):  # a human wrote the path, and saw no link behind it
            shown = policy.written_targets(name, self._below_workspace(given, field), self._workspace, folder)
        return (
            None
            if now == shown
            else f"leads to {_listed(now)} now, and led to {_listed(shown)} when it was shown"
        )

    def _below_workspace(self, given: Mapping[str, Any], field: str) -> Mapping[str, Any]:
        """A path that is written as the workspace's own, which may be behind a link itself."""
        path = Path(str(given.get(field)))
        if not path.is_relative_to(self._workspace):
            return given
        return {**given, field: str(_resolved(self._workspace) / path.relative_to(self._workspace))}

    # -- plans

    def is_plan_file(self, name: str, given: object, folder: Path) -> bool:
        """Plan mode keeps its draft in the CLI's own folder, outside the workspace; the plan itself is asked about."""
        path = _field(given, "file_path")
        if not self.plan_mode or name not in ("Write", "Edit", "Read") or not isinstance(path, str):
            return False
        try:
            resolved = (folder / path).resolve()
        except (OSError, RuntimeError, ValueError):
            return False
        plans = resolved.parent
        own = self._own_plans is None or plans == _resolved(self._own_plans)
        if resolved.suffix != ".md" or not own or not self._is_plan_folder(plans):
            return False
        self._plan_file = resolved
        return True

    def with_plan(self, use: ToolUse) -> ToolUse:
        """Adds the plan's text to ExitPlanMode, which does not name it: a human must see the file that the model wrote.
        The CLI chooses the file's name, and another one after a resume."""
        if use.name != "ExitPlanMode":
            return use
        given = {name: value for name, value in use.input.items() if name != "planFilePath"}
        text = given.get("plan") or self._plan()
        return use.with_input({**given, "plan": text} if text else given)

    def _plan(self) -> str | None:
        """The text of the plan's file. The CLI reports the path, so only plan folders are read, and no links followed."""
        if self._plan_file is None or not self._is_plan_folder(self._plan_file.parent):
            return None
        folder = self._plan_file.parent
        try:
            with open_file(folder.parent, f"{folder.name}/{self._plan_file.name}") as file:
                return file.read(MAX_PLAN_BYTES).decode()
        except (OSError, UnicodeError) as error:
            log.warning("plan not readable", why=str(error))
            return None

    def _other_plan(self, approval: Approval, asked: ToolUse) -> str | None:
        """Why ExitPlanMode would now approve another plan than the one shown; None if it would not, or there is no file."""
        if approval.tool_name != "ExitPlanMode":
            return None
        texts = {_field(asked.input, "plan"), self._plan()} - {None, ""}  # as the CLI read it, and as it is
        same = texts <= {approval.input.get("plan")}
        return (
            None if same else "is for another plan than the one that was shown: the plan's file has changed"
        )


# -- inputs that are none


def recordable(given: object) -> dict[str, Any]:
    """The input as it can be stored and shown: a JSON object, with U+FFFD for invalid characters."""
    found = _clean(given, _MAX_DEPTH)
    return found if isinstance(found, dict) else {"input": found}


def _clean(value: Any, depth: int) -> Any:
    match value:
        case _ if depth == 0:
            return "..."
        case str():
            return "".join("\ufffd" if "\ud800" <= char <= "\udfff" else char for char in value)
        case None | bool() | int() | float() if not isinstance(value, float) or math.isfinite(value):
            return value
        case list() | tuple():
            return [_clean(one, depth - 1) for one in value]
        case Mapping():
            return {_clean(str(key), 1): _clean(one, depth - 1) for key, one in value.items()}
        case _:
            return str(value)


def _field(given: object, name: str) -> Any:
    return _mapping(given).get(name)


def _mapping(given: object) -> Mapping[str, Any]:
    return given if isinstance(given, Mapping) else {}


def _listed(places: Sequence[str]) -> str:
    return (
        " and ".join(place.removeprefix("/") if place.startswith("//") else place for place in places)
        or "nowhere"
    )


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError):
        return path.absolute()
