"""Parses submitted forms: decisions, messages, and the conversation to start. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from claude_hitl_template.domain.events import MAX_TEXT_CHARS, UserMessage, UserToolConfirmation, text_blocks
from claude_hitl_template.domain.models import Agent, Approval, Environment
from claude_hitl_template.domain.policy import PermissionPolicy
from claude_hitl_template.domain.tool_inputs import check_edit
from claude_hitl_template.errors import InvalidInput
from claude_hitl_template.presentation.text import (
    asked_questions,
    option_label,
    parse_input,
    question_options,
)

type Inputs = Mapping[str, Any]
MAX_REASON_CHARS = 10_000
MAX_TITLE_CHARS, MAX_SYSTEM_CHARS, MAX_MODEL_CHARS = 500, 100_000, 200


class FormErrors(Exception):
    """Messages by field name; "" is the form itself."""

    def __init__(self, errors: Mapping[str, str]) -> None:
        super().__init__(errors)
        self.errors = errors


def field_text(inputs: Inputs, name: str) -> str:
    """The text of a field: a browser sends each line break as CRLF, and Kodosumi sends None for an empty field."""
    given = inputs.get(name)
    return str(given).replace("\r\n", "\n") if given is not None else ""


# -- decisions


def confirmations(approvals: Sequence[Approval], inputs: Inputs) -> list[UserToolConfirmation]:
    """The decisions in a form.

    Args:
        approvals: The calls of the form; a call about which the form says nothing is left out.
        inputs: The form.

    Raises:
        FormErrors: A field is invalid, or nothing is decided.
    """
    found: list[UserToolConfirmation] = []
    errors: dict[str, str] = {}
    for approval in approvals:
        try:
            found += _confirmation(approval, inputs)
        except InvalidInput as error:
            errors[error.field or approval.id] = error.message
    if not found and not errors:
        errors[""] = "Nothing was decided: choose what to do."
    if errors:
        raise FormErrors(errors)
    return found


def refusal_errors(
    approvals: Sequence[Approval], sent: Sequence[UserToolConfirmation], error: InvalidInput
) -> FormErrors | InvalidInput:
    """Assigns an error of the service to the fields of the form: an edited input is the field `input`.

    Args:
        approvals: The calls of the form.
        sent: The decisions that the service refused.
        error: The refusal.
    """
    edited = {one.tool_use_id for one in sent if one.updated_input is not None}
    fields = [f"{approval.id}.input" for approval in approvals if approval.event_id in edited]
    if not error.field.startswith("updated_input") or not fields:
        return error
    return FormErrors(dict.fromkeys(fields, f"{error}. Nothing was decided."))


def _confirmation(approval: Approval, inputs: Inputs) -> list[UserToolConfirmation]:
    name = approval.id
    choice = field_text(inputs, f"{name}.do")
    if not choice and field_text(inputs, "batch") == "allow" and approval.kind in ("tool", "network"):
        choice = "allow"
    match choice:
        case "" | "later":
            return []
        case "deny":
            return [_build(approval, result="deny", deny_message=_reason(inputs, f"{name}.reason"))]
        case "allow" if approval.kind != "question":
            return [_build(approval, result="allow")]
        case "remember" if approval.kind in ("tool", "network"):
            return [_build(approval, result="allow", remember=True)]
        case "edit" if approval.kind == "tool":
            return [_build(approval, result="allow", **_edited(approval, inputs))]
        case "answer" if approval.kind == "question":
            return [_build(approval, result="allow", answers=_answers(approval, inputs))]
        case _:
            raise InvalidInput("this choice does not fit such a call", f"{name}.do")


def _build(approval: Approval, **given: Any) -> UserToolConfirmation:
    return UserToolConfirmation(type="user.tool_confirmation", tool_use_id=approval.event_id, **given)


def _reason(inputs: Inputs, name: str) -> str | None:
    reason = field_text(inputs, name).strip()
    if len(reason) > MAX_REASON_CHARS:
        raise InvalidInput(f"at most {MAX_REASON_CHARS} characters; these are {len(reason)}", name)
    return reason or None


def _edited(approval: Approval, inputs: Inputs) -> dict[str, Any]:
    name = f"{approval.id}.input"
    try:
        changed = parse_input(field_text(inputs, name))
    except InvalidInput as error:
        raise InvalidInput(f"{error.message}. Nothing was decided.", name) from error
    if changed == approval.input:
        return {}
    try:
        check_edit(approval.tool_name, approval.input, changed)
    except InvalidInput as error:
        raise InvalidInput(f"{error}. Nothing was decided.", name) from error
    return {"updated_input": changed}


def _answers(approval: Approval, inputs: Inputs) -> dict[str, str | list[str]]:
    answers: dict[str, str | list[str]] = {}
    for number, question in enumerate(asked_questions(approval.input)):
        group = f"{approval.id}.q{number}"
        labels = [option_label(o) for o in question_options(question)]
        own = field_text(inputs, f"{group}.own").strip()
        answers[str(question.get("question", ""))] = (
            _several(group, labels, own, inputs)
            if question.get("multiSelect")
            else _one(group, labels, own, inputs)
        )
    return answers


def _one(group: str, labels: Sequence[str], own: str, inputs: Inputs) -> str:
    chosen = field_text(inputs, group)
    if chosen and own:
        raise InvalidInput("choose an answer, or write one of your own, not both", group)
    if own:
        return own
    if not chosen.isdecimal() or int(chosen) >= len(labels):
        raise InvalidInput("choose an answer, or write one of your own", group)
    return labels[int(chosen)]


def _several(group: str, labels: Sequence[str], own: str, inputs: Inputs) -> list[str]:
    chosen = [
        label for number, label in enumerate(labels) if field_text(inputs, f"{group}.o{number}") == "on"
    ]
    if not chosen and not own:
        raise InvalidInput("choose at least one answer, or write one of your own", group)
    return [*chosen, *([own] if own else [])]


# -- messages, and the conversation to start


def next_message(inputs: Inputs, name: str = "text") -> UserMessage:
    """The message in the field `name`. Raises FormErrors."""
    prompt = field_text(inputs, name)
    if not prompt.strip():
        raise FormErrors({name: "This is empty: say what to do."})
    if len(prompt) > MAX_TEXT_CHARS:
        raise FormErrors(
            {
                name: f"At most {MAX_TEXT_CHARS:,} characters; these are {len(prompt):,}. Upload a file instead."
            }
        )
    try:
        return UserMessage.model_validate({"type": "user.message", "content": text_blocks(prompt)})
    except ValidationError as error:
        raise FormErrors({name: str(error.errors()[0]["msg"])}) from error


@dataclass(frozen=True)
class Start:
    """A conversation to start."""

    message: UserMessage
    agent: Agent
    environment: Environment
    title: str


def start(inputs: Inputs, agent: Agent, environments: Mapping[str, Environment]) -> Start:
    """The conversation that a form asks for.

    Args:
        inputs: The form.
        agent: The agent that the form changes.
        environments: By id; the first is the default.

    Raises:
        FormErrors: Names every invalid field.
    """
    errors: dict[str, str] = {}
    message: UserMessage | None = None
    try:
        message = next_message(inputs, "prompt")
    except FormErrors as error:
        errors |= error.errors
    limits = {"title": MAX_TITLE_CHARS, "model": MAX_MODEL_CHARS, "system": MAX_SYSTEM_CHARS}
    for name, limit in limits.items():
        if len(field_text(inputs, name)) > limit:
            errors[name] = f"At most {limit:,} characters."
    policies = {"risky": PermissionPolicy(), "everything": PermissionPolicy(default="always_ask")}
    chosen = field_text(inputs, "policy") or "risky"
    if chosen not in (*policies, "plan"):
        errors["policy"] = "Choose one of the offered policies."
    if field_text(inputs, "agent") not in ("", agent.id):
        errors["agent"] = "There is no such agent."
    environment = environments.get(field_text(inputs, "environment") or next(iter(environments)))
    if environment is None:
        errors["environment"] = "There is no such environment."
    if errors or message is None or environment is None:
        raise FormErrors(errors)
    changed = agent.but(
        model=field_text(inputs, "model").strip() or agent.model,
        system=field_text(inputs, "system").strip() or agent.system,
        policy=policies.get(chosen, PermissionPolicy()),
        permission_mode="plan" if chosen == "plan" else "default",
    )
    title = " ".join(field_text(inputs, "title").split()) or _title(field_text(inputs, "prompt"))
    return Start(message, changed, environment, title)


def _title(prompt: str) -> str:
    """The beginning of the prompt, for a conversation without a title."""
    line = " ".join(prompt[:400].split())
    return line if len(line) <= 80 else f"{line[:79]}…"
