"""The events of a session as safe HTML for the panel's timeline. Pure."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import quote

from claude_hitl_template.domain import missing_dependency
from claude_hitl_template.domain.models import Approval, ImageFacts, Session
from claude_hitl_template.domain.policy import PermissionPolicy
from claude_hitl_template.panel.calls import call_view, pretty
from claude_hitl_template.panel.markup import (
    STYLE,
    block,
    card,
    code,
    facts,
    fold,
    limited,
    line,
    link,
    markdown,
    shortened,
    text,
)
from claude_hitl_template.presentation.text import progress_text, rule_text, summary, texts

PROMPT_CHARS = 4_000


def event_html(event: Mapping[str, Any]) -> str | None:
    """One event of a session's log, as the wire protocol has it; None for those that say nothing to a reader."""
    view = _VIEWS.get(event["type"])
    return view(event) if view else None


def _prompt(event: Mapping[str, Any]) -> str:
    said = texts(event["content"])
    body = code(said) if len(said) <= PROMPT_CHARS else shortened(said)
    return card(line("prompt"), body, kind="hitl-you")


def _message(event: Mapping[str, Any]) -> str:
    return block(markdown(texts(event["content"])))


def _thinking(event: Mapping[str, Any]) -> str:
    thought = texts(event.get("content") or ())
    return block(fold("Thinking", code(limited(thought))) if thought else line("(thinking)"))


def _use(event: Mapping[str, Any]) -> str:
    if missing_dependency.is_report(event):
        said = event["input"]
        return card(line(missing_dependency.advice(said), "hitl-bold"), line(said["why"]), kind="hitl-wait")
    verdicts = {"ask": "asks first", "deny": "denied by a rule", "allow": "allowed by the policy"}
    tool = str(event["name"])
    server = event.get("mcp_server_name")
    name = f"{server}: {tool}" if server else tool
    head = [f"<b>{text(name)}</b>", verdicts.get(str(event.get("evaluated_permission")), "")]
    if event.get("session_thread_id"):
        head.append("by a subagent")
    title = (
        f'<div>{head[0]} <span class="hitl-dim">{" · ".join(part for part in head[1:] if part)}</span></div>'
    )
    return card(title, call_view(name, event["input"], folded=True))


def _result(event: Mapping[str, Any]) -> str:
    said = texts(event.get("content") or ()).rstrip("\n")
    failed = bool(event.get("is_error"))
    parts = [line("failed, or refused", "hitl-error") if failed else line("result"), shortened(said)]
    if event.get("outcome") == "unknown":
        parts.insert(0, _unknown())
    return card(*parts, kind="hitl-bad" if failed else "")


def _unknown() -> str:
    return line(
        "OUTCOME UNKNOWN: nobody can say whether this call took effect. It is not repeated; look before you go on.",
        "hitl-error",
    )


def _confirmation(event: Mapping[str, Any]) -> str:
    by = str(event.get("decided_by") or "somebody")
    if event["result"] == "deny":
        reason = f": {event['deny_message']}" if event.get("deny_message") else ""
        return card(line(f"Denied by {by}{reason}", "hitl-bold"), kind="hitl-bad")
    changed = event.get("updated_input") or {}
    rule = event.get("remember")
    parts: list[str] = []
    if "answers" in changed:
        how = "Answered"
        parts = [facts((str(q), str(a)) for q, a in changed["answers"].items())]
    elif changed:
        how = "Allowed, with an edited input,"
        parts = [fold("What runs instead", code(pretty(changed)), is_open=True)]
    else:
        how = "Allowed"
    if rule:
        parts.append(line(f"Remembered for this session: {rule_text(rule)}"))
    return card(line(f"{how} by {by}", "hitl-bold"), *parts, kind="hitl-wait")


def _error(event: Mapping[str, Any]) -> str:
    error = event["error"]
    if error.get("concerns") == "workspace":
        return card(line(str(error["message"]), "hitl-error"), kind="hitl-bad")
    retrying = (error.get("retry_status") or {}).get("type") == "retrying"
    how = "trying again" if retrying else "error"
    return card(
        line(f"{how}: {error['message']}", "hitl-dim" if retrying else "hitl-error"),
        kind="" if retrying else "hitl-bad",
    )


def _updated(event: Mapping[str, Any]) -> str | None:
    far = event.get("workspace")
    return note(progress_text(far)) if far else None


def _idle(event: Mapping[str, Any]) -> str | None:
    reason = event.get("stop_reason") or {}
    match reason.get("type"):
        case "requires_action":
            count = len(reason.get("event_ids") or ())
            calls = "one call waits" if count == 1 else f"{count} calls wait"
            return block(line(f"Waiting for you: {calls} for a decision", "hitl-bold"))
        case "retries_exhausted":
            return card(
                line("The turn was given up after several tries. The session stays usable.", "hitl-error"),
                kind="hitl-bad",
            )
        case _:
            return None


def note(said: str, kind: str = "hitl-dim") -> str:
    """A line of the window's own."""
    return block(line(said, kind))


def _note(said: str, kind: str = "hitl-dim") -> Callable[[Mapping[str, Any]], str]:
    return lambda _: note(said, kind)


_VIEWS: Mapping[str, Callable[[Mapping[str, Any]], str | None]] = {
    "user.message": _prompt,
    "user.tool_confirmation": _confirmation,
    "user.interrupt": _note("Interrupted: the turn ends, and what waited is superseded.", "hitl-bold"),
    "agent.message": _message,
    "agent.thinking": _thinking,
    "agent.tool_use": _use,
    "agent.mcp_tool_use": _use,
    "agent.tool_result": _result,
    "agent.mcp_tool_result": _result,
    "session.error": _error,
    "session.updated": _updated,
    "session.status_idle": _idle,
    "session.status_rescheduled": _note("The session's process ended unexpectedly; it is started again."),
    "session.status_terminated": _note("The session has ended.", "hitl-bold"),
}


# -- what stands around the events


def header(session: Session, given: Sequence[str], facts_: ImageFacts | None = None) -> str:
    """What is in force: agent, environment, image, plugins, tools and policy. `given` names uploaded files.

    `facts_`: what is known of the image; None where there is none, or nothing is known of it.
    """
    agent, environment = session.agent, session.environment
    pairs = [
        ("session", session.id),
        ("agent", f"{agent.name} (version {agent.version}, model {agent.model})"),
        ("environment", environment.name),
        ("image", environment.image or "none: a process of the service's own user"),
        *_image(facts_),
        ("plugins", _plugins(environment.image, facts_)),
        ("tools", _tools(agent.toolset)),
        ("policy", policy_text(session.effective_policy(), agent.permission_mode)),
    ]
    if given:
        pairs.append(("files", ", ".join(given)))
    return STYLE + block(fold(session.title or "This conversation", facts(pairs), is_open=True))


def _image(known: ImageFacts | None) -> list[tuple[str, str]]:
    if known is None:
        return []
    made = f"version {known.version or 'unknown'}, commit {known.commit[:12] or 'unknown'}"
    runs = f"Ray {known.ray or 'unknown'}, Python {known.python or 'unknown'}"
    return [("digest", known.digest or "none: made on this machine"), ("built from", f"{made}; {runs}")]


def _plugins(image: str | None, known: ImageFacts | None) -> str:
    """What an image's manifest says, whatever it is made of."""
    if image is not None and known is None:
        return "not known"
    listed = known.manifest.get("plugins") if known else None
    found = [p for p in listed if isinstance(p, dict)] if isinstance(listed, list) else []
    named = [f"{p.get('name')}@{p.get('marketplace')} ({str(p.get('commit'))[:12]})" for p in found]
    return ", ".join(named) or "none"


def _tools(toolset: Mapping[str, Any] | None) -> str:
    if toolset is None:
        return "all of Claude Code's"
    default = (toolset.get("default_config") or {}).get("enabled", True)
    configs = toolset.get("configs") or []
    listed = [c["name"] for c in configs if c.get("enabled") is not None and c["enabled"] != default]
    if not listed:
        return "all of Claude Code's" if default else "none"
    return f"all but {', '.join(listed)}" if default else ", ".join(listed)


def policy_text(policy: PermissionPolicy, mode: str) -> str:
    """What holds for a call, in words."""
    defaults = {
        None: "reading in the workspace is allowed; what writes, runs or leaves the machine asks",
        "always_ask": "every call asks",
        "always_allow": "every call is allowed",
        "always_deny": "every call is denied",
    }
    plan = "a plan comes first; " if mode == "plan" else ""
    rules = "; ".join(f"{rule}: {rule.policy.removeprefix('always_')}" for rule in policy.rules)
    return f"{plan}{defaults[policy.default]}{f'. Rules: {rules}' if rules else ''}"


def turn_end(usage: Mapping[str, Any], before: Mapping[str, Any] | None) -> str:
    """Tokens and cost of the turn that ended: the difference of two `session.usage` figures."""
    earlier = before or {}

    def grown(name: str) -> float:
        return usage.get(name, 0) - earlier.get(name, 0)

    cached = grown("cache_read_input_tokens")
    tokens = f"{grown('input_tokens'):,} tokens in, {grown('output_tokens'):,} out"
    cost = f"${grown('cost_usd'):.4f} (session ${usage.get('cost_usd', 0):.4f})"
    parts = [tokens, *([f"{cached:,} from the cache"] if cached else []), cost]
    return block(line(f"Turn ended: {', '.join(parts)}"))


def asking(approvals: Sequence[Approval], path: str) -> str:
    """The line that leads to the form where calls are decided. `path` is the lock's."""
    lines = "".join(line(f"{a.tool_name}: {summary(a.input)}") for a in approvals)
    count = "this call" if len(approvals) == 1 else f"these {len(approvals)} calls"
    return card(lines, link(path, f"Decide on {count}", "button"), kind="hitl-wait")


def your_turn(path: str) -> str:
    return card(link(path, "Go on, or end the conversation", "button"), kind="hitl-wait")


def downloads(
    flow_id: str, found: Sequence[tuple[str, str, int]], left_out: Sequence[tuple[str, str]]
) -> str:
    """Files that the turn changed: (name shown, name it is stored under, bytes). `left_out`: (name, why)."""
    items = "".join(
        f"<li>{link(f'/files/{flow_id}/out/{quote(stored)}', name)} "
        f'<span class="hitl-dim">{size:,} bytes</span></li>'
        for name, stored, size in found
    )
    rest = "".join(
        f'<li>{text(name)} <span class="hitl-dim">{text(why)}</span></li>' for name, why in left_out
    )
    missing = f"{line('Not offered here')}<ul>{rest}</ul>" if rest else ""
    files = f"{line('Files that this turn changed')}<ul>{items}</ul>" if items else ""
    return card(files, missing)


def final(said: str, pairs: Sequence[tuple[str, str]], links: Sequence[tuple[str, str]] = ()) -> str:
    """The last page of a flow. `links` are (path, label)."""
    buttons = "".join(link(path, label, "button") for path, label in links)
    return STYLE + card(line(said, "hitl-bold"), facts(pairs), buttons)
