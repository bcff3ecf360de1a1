"""Asks a human about one approval, and turns the answer into the body of `POST /v1/approvals/{id}/decide`."""

import json
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from rich.console import RenderableType

from claude_hitl_template.cli.terminal.render import approval_view
from claude_hitl_template.errors import InvalidInput
from claude_hitl_template.presentation.terminal import shown
from claude_hitl_template.presentation.text import option_label, parse_input

type Body = dict[str, Any]
CHOICES = {"a": "allow", "d": "deny", "e": "edit", "w": "always", "y": "allow", "n": "deny"}
TOOL_PROMPT = "allow / deny [why] / edit / always [a/d/e/w] > "
HOST_PROMPT = "allow for now / deny [why] / always in this session [a/d/w] > "
PLAN_PROMPT = "accept / back [comments] [a/b] > "


class Desk(Protocol):
    """Where the human sits. `ask` and `edit` raise EOFError or KeyboardInterrupt when the human leaves."""

    def show(self, what: RenderableType) -> None: ...

    def ask(self, prompt: str) -> str: ...

    def edit(self, text: str) -> str | None:
        """The text as edited; None when it was left as it is."""
        ...


def ask_about(desk: Desk, approval: Mapping[str, Any]) -> Body:
    """Shows the call, and asks until there is a decision."""
    desk.show(approval_view(approval))
    match approval["kind"]:
        case "question":
            return _ask_question(desk, approval["input"])
        case "plan":
            return _ask_plan(desk)
        case "network":
            return _ask_host(desk)
        case _:
            return _ask_tool(desk, approval)


def scripted(approval: Mapping[str, Any], result: str, deny_message: str | None) -> Body:
    """The decision that `--answer` stands for. To allow a question is to choose the first option of each."""
    if result == "deny":
        return denial(deny_message)
    if approval["kind"] != "question":
        return {"result": "allow"}
    return {
        "result": "allow",
        "answers": {q: labels[0] for q, labels in questions(approval["input"]).items()},
    }


def denial(reason: str | None) -> Body:
    return {"result": "deny", "deny_message": reason} if reason else {"result": "deny"}


def questions(given: Mapping[str, Any]) -> dict[str, list[str]]:
    """The labels on offer, by question. Raises InvalidInput for a question without options."""
    found = {str(q["question"]): [option_label(o) for o in q.get("options", ())] for q in given["questions"]}
    for question, labels in found.items():
        if not labels:
            raise InvalidInput(f"the question {question!r} offers nothing to choose from")
    return found


def edit_input(
    desk: Desk, approval: Mapping[str, Any], edited: dict[str, Any] | None = None
) -> dict[str, Any] | None:
    """What the human made of the input (or of `edited`), shown again; None while it is what was proposed."""
    given = approval["input"] if edited is None else edited
    text = desk.edit(json.dumps(given, ensure_ascii=False, indent=2) + "\n")
    try:
        changed = given if text is None else parse_input(text)
    except InvalidInput as error:
        desk.show(shown(f"{error}; nothing was changed", "red"))
        changed = given
    desk.show(approval_view(approval, changed))
    return None if changed == approval["input"] else changed


def _ask_tool(desk: Desk, approval: Mapping[str, Any]) -> Body:
    edited: dict[str, Any] | None = None
    while True:
        word, reason = _word(desk.ask(TOOL_PROMPT))
        body: Body = {"result": "allow"} if edited is None else {"result": "allow", "updated_input": edited}
        match word:
            case "allow":
                return body
            case "always":
                return {**body, "remember": True}
            case "deny":
                return denial(reason or desk.ask("why? (the agent is told; Enter for no reason) > ").strip())
            case "edit":
                edited = edit_input(desk, approval, edited)
            case _:
                desk.show("allow: run exactly this. deny: do not. edit: change the input, then decide.")
                desk.show("always: allow, and allow such calls unasked from now on in this session.")


def _ask_host(desk: Desk) -> Body:
    while True:
        word, reason = _word(desk.ask(HOST_PROMPT))
        match word:
            case "allow":
                return {"result": "allow"}
            case "always":
                return {"result": "allow", "remember": True}
            case "deny":
                return denial(reason or desk.ask("why? (the agent is told; Enter for no reason) > ").strip())
            case _:
                desk.show("allow: until the turn ends in which the agent is told. deny: not in this turn.")
                desk.show("always: from now on in this session.")


def _ask_question(desk: Desk, given: Mapping[str, Any]) -> Body:
    answers: dict[str, str | list[str]] = {}
    for asked in given["questions"]:
        question, several = str(asked["question"]), bool(asked.get("multiSelect"))
        labels = [option_label(o) for o in asked.get("options", ())]
        desk.show(shown(question, "bold"))
        hint = "numbers" if several else "a number"
        answer: str | list[str] | None = None
        while answer is None:
            line = desk.ask(f"{hint}, or your own words (/deny [why] to decline) > ").strip()
            if line.split(" ")[0] == "/deny":
                return denial(line.removeprefix("/deny").strip())
            answer = choose(line, labels, several=several)
        answers[question] = answer
    return {"result": "allow", "answers": answers}


def choose(line: str, labels: list[str], *, several: bool) -> str | list[str] | None:
    """What an answer stands for: labels by number, or its own words. None: it stands for nothing."""
    parts = line.replace(",", " ").split()
    if not parts or not all(part.isdecimal() for part in parts):
        return line or None
    numbers = [int(part) for part in parts]
    if not all(1 <= n <= len(labels) for n in numbers) or (len(numbers) > 1 and not several):
        return None
    chosen = [labels[n - 1] for n in dict.fromkeys(numbers)]
    return chosen if several else chosen[0]


def _ask_plan(desk: Desk) -> Body:
    while True:
        word, _, comments = desk.ask(PLAN_PROMPT).strip().partition(" ")
        if word.lower() in ("a", "accept", "allow", "y", "yes"):
            return {"result": "allow"}
        if word.lower() in ("b", "back", "d", "deny", "n", "no"):
            return denial(comments.strip() or desk.ask("comments for the agent > ").strip())


def _word(line: str) -> tuple[str, str]:
    """The choice, and what followed it."""
    word, _, rest = line.strip().partition(" ")
    word = word.lower()
    return (CHOICES.get(word, word), rest.strip())


type Decider = Callable[[Mapping[str, Any]], Body]
