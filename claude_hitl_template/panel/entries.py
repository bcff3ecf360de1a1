"""The entries of the panel: forms that begin or go on with something."""

from collections.abc import Callable
from typing import Any

from fastapi import Request
from kodosumi.core import InputsError, Launch, ServeAPI, forms

from claude_hitl_template.events import UserMessage, text_blocks
from claude_hitl_template.panel.services import PanelServices
from claude_hitl_template.panel.users import panel_user

MIRROR = "claude_hitl_template.query:mirror_session"


def register(app: ServeAPI, services: Callable[[], PanelServices]) -> None:
    """Adds the entries to `app`. `services` is called when a request comes."""
    form = forms.Model(forms.InputArea(label="Prompt", name="prompt"), forms.Submit("Start"))

    @app.enter("/start", form, summary="Start a conversation", tags=["claude-hitl"])
    async def start(inputs: dict[str, Any], request: Request) -> Any:  # pyright: ignore[reportUnusedFunction]
        prompt, user, given = (inputs["prompt"] or "").strip(), panel_user(request), services()
        if not prompt:
            raise InputsError(prompt="say what the agent is to do")
        content = text_blocks(prompt)
        message = UserMessage.model_validate({"type": "user.message", "content": content})
        session = await given.store.create_session(
            user.key_id,
            agent=given.agent,
            environment=given.environment,
            title=None,
            metadata={},
            initial=[message],
        )
        return Launch(request, MIRROR, inputs={"session": session.id, "user": user.name, "after": 0})
