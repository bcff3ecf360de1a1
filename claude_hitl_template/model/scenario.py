"""Scenarios of the offline model: what it says and which tools it calls, as data.

A scenario is a list of steps, one for each answer of the model after the user's prompt. Steps with `when`
that follow each other are the branches of one answer, up to the step that repeats a `when`: ok, denied, ok,
denied are two answers with two branches each.

In every string of a step {prompt} is the user's prompt, {tool_result} the shortened results of the calls of
the last answer, {plan_file} the file in which the CLI wants a plan.
"""

import json
import re
from collections.abc import Iterable, Mapping
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from claude_hitl_template.errors import InvalidInput

LABEL = "[offline model]"
"""Prefix of the offline model's answers, so that it is not mistaken for an AI."""

Outcome = Literal["ok", "denied", "answered"]

_FENCE = re.compile(r"^```scenario[ \t]*\n(.*?)(?:^```|\Z)", re.DOTALL | re.MULTILINE)


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ToolCall(_Data):
    """A tool call to make, in the tool's own schema."""

    name: str
    input: dict[str, Any] = Field(default_factory=dict)


class Failure(_Data):
    """A failure of the model's service to simulate.

    `status` is an HTTP status, or "cut" (the connection ends in the middle of the last block), or
    "malformed" (a line there is no JSON). The last two need a stream: a request without one is answered in
    full.
    """

    status: Annotated[int, Field(ge=400, le=599)] | Literal["cut", "malformed"]
    type: str = ""
    message: str = "simulated by the offline model"
    retry_after_s: Annotated[int, Field(ge=0)] | None = None


class Step(_Data):
    """One answer, or one branch of it. `delay_s` is a pause in seconds between the chunks of its stream."""

    text: str = ""
    thinking: str = ""
    tools: tuple[ToolCall, ...] = ()
    when: Outcome | None = None
    delay_s: Annotated[float, Field(ge=0, le=600)] = 0.0
    error: Failure | None = None


class Scenario(_Data):
    """Steps to follow when `match`, a regular expression without regard to case, is found in the prompt.

    `prompt` is an example. Fails validation if it does not match, or if the first text lacks the LABEL.
    """

    name: str
    description: str
    prompt: str
    match: re.Pattern[str]
    steps: tuple[Step, ...]

    @model_validator(mode="after")
    def _is_honest(self) -> Self:
        first = next((step.text for step in self.steps if step.text), "")
        if not first.startswith(LABEL):
            raise ValueError(f"the first text of scenario {self.name} must begin with {LABEL}")
        if not self.fits(self.prompt):
            raise ValueError(f"the prompt of scenario {self.name} does not match its own expression")
        return self

    def fits(self, prompt: str) -> bool:
        return re.search(self.match.pattern, prompt, re.IGNORECASE) is not None


class Scenarios(_Data):
    """All scenarios the offline model knows; the first that fits a prompt is followed."""

    known: tuple[Scenario, ...] = ()

    @classmethod
    def load(cls, folder: Traversable | None = None) -> Self:
        """The *.yaml files of `folder`, in the order of their names; without one, those of this package."""
        folder = folder or resources.files("claude_hitl_template.model") / "scenarios"
        files = {file.name: file for file in folder.iterdir() if file.name.endswith(".yaml")}
        texts = (file.read_text("utf-8") for _, file in sorted(files.items()))
        return cls(known=tuple(Scenario.model_validate(_yaml(text)) for text in texts))

    def steps_for(self, prompt: str) -> tuple[Step, ...]:
        """The steps a prompt asks for; () if no scenario fits.

        A fenced block ```scenario in the prompt, a list of steps in YAML, is itself the scenario.
        Raises InvalidInput if that block is unusable.
        """
        if fence := _FENCE.search(prompt):
            return _parse(fence[1])
        return next((scenario.steps for scenario in self.known if scenario.fits(prompt)), ())


def _parse(text: str) -> tuple[Step, ...]:
    try:
        return TypeAdapter(tuple[Step, ...]).validate_python(_yaml(text))
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidInput(first["msg"], ".".join(["scenario", *map(str, first["loc"])])) from error
    except (yaml.YAMLError, ValueError) as error:
        raise InvalidInput(f"not YAML: {error}", "scenario") from error


def _yaml(text: str) -> Any:
    """Through JSON, because a tool's input is JSON: YAML also has dates and cycles."""
    return json.loads(json.dumps(yaml.safe_load(text), default=str))


def branches(steps: Iterable[Step]) -> list[list[Step]]:
    """The steps grouped by answer: each group holds one step, or the branches to choose from."""
    groups: list[list[Step]] = []
    for step in steps:
        seen = {other.when for other in groups[-1]} if groups else {None}
        if step.when is None or None in seen or step.when in seen:
            groups.append([])
        groups[-1].append(step)
    return groups


def filled(value: Any, values: Mapping[str, str]) -> Any:
    """`value`, any JSON, with the {placeholders} in its strings replaced by `values`; unknown ones stay."""
    if isinstance(value, str):
        return re.sub(r"\{(\w+)\}", lambda found: values.get(found[1], found[0]), value)
    if isinstance(value, list):
        return [filled(item, values) for item in value]
    if isinstance(value, dict):
        return {key: filled(item, values) for key, item in value.items()}
    return value
