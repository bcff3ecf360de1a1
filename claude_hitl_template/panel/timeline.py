"""The entries of a session's timeline in the panel, as HTML. Pure."""

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from claude_hitl_template.domain.models import Approval, ImageFacts, Session
from claude_hitl_template.domain.policy import PermissionPolicy
from claude_hitl_template.panel.markup import render
from claude_hitl_template.presentation.events import event_view, waiting_text
from claude_hitl_template.presentation.sessions import card_url
from claude_hitl_template.presentation.text import summary

FREE = "free of charge (offline model)"


def event_html(event: Mapping[str, Any]) -> str | None:
    """The entry of an event in wire format; None for an event with nothing for a reader.

    That calls wait is not an entry: the card of `decide_link` says it, as long as they do.
    """
    if (event.get("stop_reason") or {}).get("type") == "requires_action":
        return None
    view = event_view(event)
    return None if view is None else str(render("event.html.j2", view=view))


def header(session: Session, uploaded: Sequence[str], image: ImageFacts | None = None) -> str:
    """The first entry of a timeline: the session's agent, environment, image, plugins, tools and policy.

    Args:
        session: The session that the window shows.
        uploaded: Names of the files that were uploaded with the first message.
        image: The facts of the environment's image; None without an image, or if they are unknown.
    """
    agent, environment = session.agent, session.environment
    pairs = [
        ("session", session.id),
        ("agent", f"{agent.name} (version {agent.version}, model {agent.model})"),
        ("environment", environment.name),
        ("image", environment.image or "none: a process of the service's own user"),
        *_image(image),
        ("plugins", _plugins(environment.image, image)),
        ("tools", _tools(agent.toolset)),
        ("policy", policy_text(session.effective_policy(), agent.permission_mode)),
    ]
    if uploaded:
        pairs.append(("files", ", ".join(uploaded)))
    return str(render("header.html.j2", title=session.title or "This conversation", pairs=pairs))


def _image(known: ImageFacts | None) -> list[tuple[str, str]]:
    if known is None:
        return []
    source = f"version {known.version or 'unknown'}, commit {known.commit[:12] or 'unknown'}"
    runtime = f"Ray {known.ray or 'unknown'}, Python {known.python or 'unknown'}"
    return [("digest", known.digest or "none: made on this machine"), ("built from", f"{source}; {runtime}")]


def _plugins(image: str | None, known: ImageFacts | None) -> str:
    """The plugins in an image's manifest, which may hold anything."""
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
    """A permission policy in words."""
    defaults = {
        None: "reading in the workspace is allowed; what writes, runs or leaves the machine asks",
        "always_ask": "every call asks",
        "always_allow": "every call is allowed",
        "always_deny": "every call is denied",
    }
    plan = "a plan comes first; " if mode == "plan" else ""
    rules = "; ".join(f"{rule}: {rule.policy.removeprefix('always_')}" for rule in policy.rules)
    return f"{plan}{defaults[policy.default]}{f'. Rules: {rules}' if rules else ''}"


def note(text: str) -> str:
    """A line about the window itself."""
    return str(render("note.html.j2", said=text))


def turn_end(usage: Mapping[str, Any], before: Mapping[str, Any] | None, *, free: bool = False) -> str:
    """Tokens and cost (USD) of the turn that ended.

    Args:
        usage: The session's total usage, from the `session.usage` event at the end of the turn.
        before: The same of the turn before; None for the first turn.
        free: Whether the offline model answered.
    """
    earlier = before or {}

    def grown(name: str) -> float:
        return usage.get(name, 0) - earlier.get(name, 0)

    cached = grown("cache_read_input_tokens")
    tokens = f"{grown('input_tokens'):,} tokens in, {grown('output_tokens'):,} out"
    cost = FREE if free else f"${grown('cost_usd'):.4f} (session ${usage.get('cost_usd', 0):.4f})"
    parts = [tokens, *([f"{cached:,} from the cache"] if cached else []), cost]
    return note(f"Turn ended: {', '.join(parts)}")


def decide_link(approvals: Sequence[Approval], lock_id: str, path: str, pages_url: str) -> str:
    """A card that leads to the form, at `path`, where these calls are decided, and to the inbox at `pages_url`. It is there
    until `closed` of its lock."""
    count = "this call" if len(approvals) == 1 else f"these {len(approvals)} calls"
    return str(
        render(
            "go.html.j2",
            lock_id=lock_id,
            title=waiting_text(len(approvals)),
            lines=[_waiting_line(approval) for approval in approvals],
            path=path,
            label=f"Decide on {count}",
            inbox=card_url(pages_url, approvals[0].id),
        )
    )


def _waiting_line(approval: Approval) -> str:
    until = approval.expires_at.isoformat(timespec="minutes") if approval.expires_at else ""
    return f"{approval.tool_name}: {summary(approval.input)}{f' (until {until})' if until else ''}"


def message_link(lock_id: str, path: str) -> str:
    """A card that leads to the form, at `path`, for the next message. It is there until `closed` of its lock."""
    label = "Go on, or end the conversation"
    return str(render("go.html.j2", lock_id=lock_id, title="", lines=[], path=path, label=label, inbox=""))


def closed(lock_id: str) -> str:
    """Takes the card of a lock away: entries of a timeline cannot be removed, but hidden."""
    return str(render("closed.html.j2", lock_id=lock_id))


def downloads(
    flow_id: str, found: Sequence[tuple[str, str, int]], left_out: Sequence[tuple[str, str]]
) -> str:
    """The files that a turn changed.

    Args:
        flow_id: The flow whose folder of the panel has the files.
        found: Of each file the name in the workspace, the name under which the panel has it, and bytes.
        left_out: The name of each file that is not offered, and why.
    """
    files = [
        (f"/files/{flow_id}/out/{quote(stored)}", name, f"{size_bytes:,}")
        for name, stored, size_bytes in found
    ]
    return str(render("downloads.html.j2", files=files, left_out=left_out))


def final(said: str, pairs: Sequence[tuple[str, str]], links: Sequence[tuple[str, str]] = ()) -> str:
    """The last page of a flow: what happened, facts as names and values, links as paths and labels."""
    return str(render("final.html.j2", said=said, pairs=pairs, links=links))
