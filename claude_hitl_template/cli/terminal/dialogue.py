"""Asks the user about one approval, and builds the body of `POST /v1/approvals/{id}/decide` from the answer."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rich.console import RenderableType
from rich.text import Text

from claude_hitl_template.cli.terminal.render import approval_view
from claude_hitl_template.domain.policy.command_segments import JudgedSegment
from claude_hitl_template.domain.policy.offers import Offer, offers
from claude_hitl_template.errors import InvalidInput
from claude_hitl_template.presentation.terminal import shown
from claude_hitl_template.presentation.text import option_label, parse_input

type Body = dict[str, Any]
CHOICES = {"a": "allow", "d": "deny", "e": "edit", "w": "always", "y": "allow", "n": "deny"}
TOOL_PROMPT = "allow / deny [why] / edit / always [number] [a/d/e/w] > "
HOST_PROMPT = "allow for now / deny [why] / always in this session [a/d/w] > "
PLAN_PROMPT = "accept / back [comments] [a/b] > "


class Prompter(Protocol):
    """Shows texts to a user and asks for input. `ask` and `edit` raise EOFError or KeyboardInterrupt if the user leaves."""

    def show(self, what: RenderableType) -> None: ...

    def ask(self, prompt: str) -> str: ...

    def edit(self, text: str) -> str | None:
        """The edited text; None if it was not changed."""
        ...


def ask_about(prompter: Prompter, approval: Mapping[str, Any]) -> Body:
    """Shows the call and asks until there is a decision."""
    prompter.show(approval_view(approval))
    match approval["kind"]:
        case "question":
            return _ask_question(prompter, approval["input"])
        case "plan":
            return _ask_plan(prompter)
        case "network":
            return _ask_host(prompter, approval)
        case _:
            return _ask_tool(prompter, approval)


def scripted(approval: Mapping[str, Any], result: str, deny_message: str | None) -> Body:
    """The decision for `--answer`. To allow a question is to choose its first option."""
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


def _denied(prompter: Prompter, reason: str) -> Body:
    """A denial with the reason that was typed already, or else asked for."""
    return denial(reason or prompter.ask("reason (the agent gets it; Enter for none) > ").strip())


def questions(given: Mapping[str, Any]) -> dict[str, list[str]]:
    """The labels of the options by question. Raises InvalidInput for a question without options."""
    found = {str(q["question"]): [option_label(o) for o in q.get("options", ())] for q in given["questions"]}
    for question, labels in found.items():
        if not labels:
            raise InvalidInput(f"the question {question!r} offers nothing to choose from")
    return found


def edit_input(
    prompter: Prompter, approval: Mapping[str, Any], edited: dict[str, Any] | None = None
) -> dict[str, Any] | None:
    """Has the user edit a call's input and shows the result.

    Args:
        prompter: Where the user is asked.
        approval: In wire format.
        edited: The result of an earlier edit, to continue with.

    Returns:
        The edited input; None if it equals the proposed one.
    """
    given = approval["input"] if edited is None else edited
    text = prompter.edit(json.dumps(given, ensure_ascii=False, indent=2) + "\n")
    try:
        changed = given if text is None else parse_input(text)
    except InvalidInput as error:
        prompter.show(shown(f"{error}; nothing was changed", "red"))
        changed = given
    else:
        if changed == given:
            prompter.show(shown("the input is unchanged", "yellow"))
    prompter.show(approval_view(approval, changed))
    return None if changed == approval["input"] else changed


def _ask_tool(prompter: Prompter, approval: Mapping[str, Any]) -> Body:
    edited: dict[str, Any] | None = None
    rules = _show_rules(prompter, approval, None)
    while True:
        word, rest = _choice(prompter.ask(TOOL_PROMPT))
        body: Body = {"result": "allow"} if edited is None else {"result": "allow", "updated_input": edited}
        match word:
            case "allow":
                return body
            case "always":
                remember = _chosen_rule(prompter, rules, rest)
                if remember is not None:
                    return {**body, "remember": remember}
            case "deny":
                return _denied(prompter, rest)
            case "edit":
                edited = edit_input(prompter, approval, edited)
                rules = _show_rules(prompter, approval, edited)
            case _:
                prompter.show(
                    "allow: run exactly this. deny: do not run it. edit: change the input, then decide."
                )
                prompter.show(
                    "always: allow, and from now on in this session allow without asking what rule 1 covers; "
                    "always 2: what rule 2 covers. The operator's policy may ask all the same."
                )


def _show_rules(
    prompter: Prompter, approval: Mapping[str, Any], edited: Mapping[str, Any] | None
) -> list[Offer]:
    """Shows the rules that "always" would remember, each with its number."""
    if approval.get("requirements"):  # the workspace asks every time
        return []
    given = approval["input"] if edited is None else edited
    segments = (
        [] if edited else map(JudgedSegment.model_validate, map(_stored, approval.get("segments") or ()))
    )
    found = offers(str(approval["tool_name"]), given, Path(str(approval["cwd"])), tuple(segments))
    for number, offer in enumerate(found, start=1):
        head = "always  " if number == 1 else " " * 8
        rule = "" if offer.rule.digest else f"{offer.rule.rule}  "
        prompter.show(
            Text.assemble((head, "bold"), f"{number}. ", shown(rule, "bold"), shown(offer.covers, "dim"))
        )
    return found


def _stored(segment: Mapping[str, Any]) -> dict[str, Any]:
    """A segment without its text, which the wire repeats."""
    return {name: value for name, value in segment.items() if name != "text"}


def _chosen_rule(prompter: Prompter, rules: Sequence[Offer], number: str) -> bool | str | None:
    """Returns the `remember` of a decision; for an invalid number, None after a message. True means rule 1."""
    if not rules:
        prompter.show(shown("such a call cannot be remembered: decide it once", "yellow"))
        return None
    if number in ("", "1"):
        return True
    if number.isdecimal() and 1 <= int(number) <= len(rules):
        return rules[int(number) - 1].rule.rule
    there = f"1 to {len(rules)}" if len(rules) > 1 else "1 only"
    prompter.show(shown(f"there is no rule {number!r}: {there}", "yellow"))
    return None


def _ask_host(prompter: Prompter, approval: Mapping[str, Any]) -> Body:
    _show_rules(prompter, approval, None)
    while True:
        word, reason = _choice(prompter.ask(HOST_PROMPT))
        match word:
            case "allow":
                return {"result": "allow"}
            case "always":
                return {"result": "allow", "remember": True}
            case "deny":
                return _denied(prompter, reason)
            case _:
                prompter.show(
                    "allow: until the end of the turn in which the agent learns of it. deny: not in this turn."
                )
                prompter.show("always: from now on in this session.")


def _ask_question(prompter: Prompter, given: Mapping[str, Any]) -> Body:
    answers: dict[str, str | list[str]] = {}
    for asked in given["questions"]:
        question, several = str(asked["question"]), bool(asked.get("multiSelect"))
        labels = [option_label(o) for o in asked.get("options", ())]
        prompter.show(shown(question, "bold"))
        hint = "numbers" if several else "a number"
        answer: str | list[str] | None = None
        while answer is None:
            line = prompter.ask(f"{hint}, or your own words (/deny [why] to decline) > ").strip()
            if line.split(" ")[0] == "/deny":
                return denial(line.removeprefix("/deny").strip())
            answer = choose(line, labels, several=several)
            if answer is None:
                prompter.show(shown(_why_not(line, labels), "yellow"))
        answers[question] = answer
    return {"result": "allow", "answers": answers}


def _why_not(line: str, labels: Sequence[str]) -> str:
    """Why `choose` found no answer in a line."""
    if not line:
        return "the question needs an answer"
    if not labels:
        return "there is nothing to choose from: answer in your own words"
    numbers = line.replace(",", " ").split()
    wrong = [n for n in numbers if not 1 <= int(n) <= len(labels)]
    offered = f"the choices are 1 to {len(labels)}"
    return f"there is no {', '.join(wrong)}; {offered}" if wrong else f"choose one; {offered}"


def choose(line: str, labels: list[str], *, several: bool) -> str | list[str] | None:
    """The answer that a typed line means: labels by number, or the words themselves; None for an invalid choice."""
    parts = line.replace(",", " ").split()
    if not parts or not all(part.isdecimal() for part in parts):
        return line or None
    numbers = [int(part) for part in parts]
    if not all(1 <= n <= len(labels) for n in numbers) or (len(numbers) > 1 and not several):
        return None
    chosen = [labels[n - 1] for n in dict.fromkeys(numbers)]
    return chosen if several else chosen[0]


def _ask_plan(prompter: Prompter) -> Body:
    while True:
        word, _, comments = prompter.ask(PLAN_PROMPT).strip().partition(" ")
        if word.lower() in ("a", "accept", "allow", "y", "yes"):
            return {"result": "allow"}
        if word.lower() in ("b", "back", "d", "deny", "n", "no"):
            return denial(comments.strip() or prompter.ask("comments for the agent > ").strip())


def _choice(line: str) -> tuple[str, str]:
    """The choice that a typed line begins with, and the rest of the line."""
    word, _, rest = line.strip().partition(" ")
    word = word.lower()
    return (CHOICES.get(word, word), rest.strip())


type Decider = Callable[[Mapping[str, Any]], Body]
