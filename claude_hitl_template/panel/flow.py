"""A flow: a window on a session, in the panel's timeline. It keeps nothing, and may end at any time."""

from collections.abc import Mapping
from html import escape
from typing import Any

from kodosumi.core import Tracer

from claude_hitl_template.panel.services import Locks, PanelServices


async def mirror(inputs: Mapping[str, Any], tracer: Tracer, services: PanelServices, locks: Locks) -> str:
    """Shows the session of `inputs` as it goes on. Returns the final page."""
    after = int(inputs["after"])
    while True:
        found, _, _ = await services.store.wait_events(
            inputs["session"], None, after, timeout_s=services.wait_s
        )
        for event in found:
            after = event.seq
            await tracer.html(f"<p>{escape(event.type)}</p>")
            if event.type == "session.status_idle":
                return f"session {inputs['session']} waits"
