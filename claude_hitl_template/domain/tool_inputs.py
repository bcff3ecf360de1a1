"""What the Claude Code CLI's tools take, so that an edit which a tool would refuse is refused before it is a decision.

The fields are those of the pinned CLI's own schemas (`input_schema` in its requests to the model; a test compares them).
A tool that is not listed here, of an MCP server for instance, takes any object.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from claude_hitl_template.domain.canonical_json import canonical_json
from claude_hitl_template.errors import InvalidInput

# What these hold reaches the kernel as text, which ends at a NUL.
_KERNEL_FIELDS = ("command", "file_path", "notebook_path", "path", "pattern", "glob", "url")

type _Text = Annotated[str, Field(min_length=1)]
type _Count = Annotated[int, Field(ge=0)]
type _Number = float  # strict: a whole number is one, a text is none


class _Input(BaseModel):
    """A field that is left out is None here; None itself is no value of it."""

    model_config = ConfigDict(extra="forbid", strict=True)


class _Bash(_Input):
    command: _Text
    description: str = ""
    timeout: _Number = 0
    run_in_background: bool = False
    dangerously_disable_sandbox: bool = Field(default=False, alias="dangerouslyDisableSandbox")


class _Read(_Input):
    file_path: _Text
    offset: _Count = 0
    limit: Annotated[int, Field(gt=0)] = 1
    pages: str = ""
    allow_large: bool = False


class _Write(_Input):
    file_path: _Text
    content: str


class _Edit(_Input):
    file_path: _Text
    old_string: str
    new_string: str
    replace_all: bool = False


class _NotebookEdit(_Input):
    notebook_path: _Text
    new_source: str
    cell_id: str = ""
    cell_type: Literal["code", "markdown"] = "code"
    edit_mode: Literal["replace", "insert", "delete"] = "replace"


class _Glob(_Input):
    pattern: _Text
    path: str = ""


class _Grep(_Input):
    pattern: _Text
    path: str = ""
    glob: str = ""
    output_mode: Literal["content", "files_with_matches", "count"] = "content"
    before: _Number = Field(default=0, alias="-B")
    after: _Number = Field(default=0, alias="-A")
    around: _Number = Field(default=0, alias="-C")
    context: _Number = 0
    numbered: bool = Field(default=False, alias="-n")
    ignoring_case: bool = Field(default=False, alias="-i")
    only_matching: bool = Field(default=False, alias="-o")
    type: str = ""
    head_limit: _Number = 0
    offset: _Number = 0
    multiline: bool = False


class _WebFetch(_Input):
    url: Annotated[str, Field(pattern=r"^https?://\S+$")]
    prompt: str
    offset: _Count = 0


class _WebSearch(_Input):
    query: Annotated[str, Field(min_length=2)]
    allowed_domains: list[str] = []
    blocked_domains: list[str] = []


class _Agent(_Input):
    description: str
    prompt: str
    subagent_type: str = ""
    model: Literal["sonnet", "opus", "haiku", "fable"] = "sonnet"
    effort: Literal["low", "medium", "high", "xhigh", "max"] = "low"
    isolation: Literal["worktree", "remote"] = "worktree"
    run_in_background: bool = False


class _Skill(_Input):
    skill: _Text
    args: str = ""


class _EnterPlanMode(_Input):
    pass


class _ExitPlanMode(_Input):
    """`plan` is the text that a human accepts; the CLI takes it in place of its file's."""

    plan: str = ""
    plan_file_path: str = Field(default="", alias="planFilePath")
    allowed_prompts: list[dict[str, str]] = Field(default=[], alias="allowedPrompts")


_INPUTS: Mapping[str, type[_Input]] = {
    "Bash": _Bash,
    "Read": _Read,
    "Write": _Write,
    "Edit": _Edit,
    "NotebookEdit": _NotebookEdit,
    "Glob": _Glob,
    "Grep": _Grep,
    "WebFetch": _WebFetch,
    "WebSearch": _WebSearch,
    "Agent": _Agent,
    "Task": _Agent,
    "Skill": _Skill,
    "EnterPlanMode": _EnterPlanMode,
    "ExitPlanMode": _ExitPlanMode,
}  # AskUserQuestion takes answers, and no edit


def known_fields(tool_name: str) -> dict[str, bool] | None:
    """The fields that a tool takes, and whether it must have them; None for a tool of which nothing is known."""
    model = _INPUTS.get(tool_name)
    if model is None:
        return None
    return {field.alias or name: field.is_required() for name, field in model.model_fields.items()}


def check_edit(tool_name: str, proposed: Mapping[str, Any], edited: Mapping[str, Any]) -> None:
    """Refuses an edit that the tool itself would refuse. Extra fields of the model's own call may stay.

    Raises InvalidInput, whose field begins with `updated_input`.
    """
    if wrong := flaw(tool_name, edited):
        raise InvalidInput(wrong, "updated_input")
    model = _INPUTS.get(tool_name)
    if model is None:
        return
    known = known_fields(tool_name) or {}
    given = {
        name: value
        for name, value in edited.items()
        if name in known or name not in proposed or proposed[name] != value
    }
    try:
        model.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(["updated_input", *(str(part) for part in first["loc"])])
        reason = f"{tool_name} takes no such field" if first["type"] == "extra_forbidden" else first["msg"]
        raise InvalidInput(reason, where) from error


def flaw(tool_name: str, given: object) -> str | None:
    """Why a call with this input cannot run at all, whatever the tool; or None."""
    if not isinstance(given, Mapping):
        return f"the input of {tool_name} must be an object"
    fields: dict[str, Any] = dict(given)
    try:
        canonical_json(fields)
    except InvalidInput as error:
        return error.message
    holding = [key for key in _KERNEL_FIELDS if isinstance(value := fields.get(key), str) and "\0" in value]
    return f"{holding[0]} holds a NUL character" if holding and not tool_name.startswith("mcp__") else None
