"""What a call would do, whole: the same in the timeline and in the form where it is decided."""

import json
from collections.abc import Mapping
from typing import Any

from claude_hitl_template.domain.canonical_json import shown_host
from claude_hitl_template.panel.markup import code, diff, facts, fold, limited, line, markdown, text
from claude_hitl_template.presentation.text import (
    are_strings,
    is_host,
    option_description,
    option_label,
    question_options,
)

LONG_LINES = 30


def call_view(tool: str, given: Mapping[str, Any], *, folded: bool = False) -> str:
    """Every field of a call's input, the telling ones in the form that suits them. HTML.

    `folded`: long ones stand behind a fold, for where nothing is decided.
    """
    rest = dict(given)
    parts: list[str] = []
    match tool:
        case "Bash" if isinstance(given.get("command"), str):
            if isinstance(given.get("description"), str):
                parts.append(line(rest.pop("description"), "hitl-bold"))
            parts.append(_code(rest.pop("command"), "The command", folded=folded))
        case "Write" if are_strings(given, "file_path", "content"):
            parts.append(facts([("file", rest.pop("file_path"))]))
            parts.append(_code(rest.pop("content"), "The content", folded=folded))
        case "Edit" if are_strings(given, "file_path", "old_string", "new_string"):
            parts.append(facts([("file", rest.pop("file_path"))]))
            old, new = rest.pop("old_string"), rest.pop("new_string")
            parts.append(_long(diff(old, new), f"{old}\n{new}", "The change", folded=folded))
        case "Network" if is_host(given):
            where = shown_host(rest.pop("host"), rest.pop("port"))
            parts.append(facts([("wants to reach", where)]))
            if isinstance(given.get("because"), str):
                parts += [line("because of"), _code(rest.pop("because"), "What ran", folded=folded)]
        case "AskUserQuestion" if isinstance(given.get("questions"), list):
            parts += [_question(asked, given.get("answers")) for asked in rest.pop("questions")]
            rest.pop("answers", None)
        case "ExitPlanMode" if isinstance(given.get("plan"), str):
            parts.append(markdown(rest.pop("plan")))
        case _:
            return _code(pretty(given), "The input", folded=folded) if given else ""
    return "".join([*parts, facts((name, _plain(value)) for name, value in rest.items()) if rest else ""])


def pretty(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _code(given: str, title: str, *, folded: bool) -> str:
    return _long(code(limited(given) if folded else given), given, title, folded=folded)


def _long(shown: str, given: str, title: str, *, folded: bool) -> str:
    lines = given.count("\n") + 1
    if not folded or lines <= LONG_LINES:
        return shown
    return fold(f"{title} ({lines} lines)", shown)


def _question(asked: Any, answers: Any) -> str:
    if not isinstance(asked, dict):
        return code(_plain(asked))
    question = str(asked.get("question", ""))
    several = " (several may be chosen)" if asked.get("multiSelect") else ""
    options = "".join(_option(option) for option in question_options(asked))
    answer = answers.get(question) if isinstance(answers, dict) else None
    chosen = f"<p>answer: <b>{text(_plain(answer))}</b></p>" if answer else ""
    return f"<p><b>{text(question)}</b>{several}</p><ul>{options}</ul>{chosen}"


def _option(option: Any) -> str:
    more = option_description(option)
    described = f" <span class='hitl-dim'>{text(more)}</span>" if more else ""
    return f"<li>{text(option_label(option))}{described}</li>"
