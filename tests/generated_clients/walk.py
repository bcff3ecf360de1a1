"""The walk of docs/rest.md with a client that openapi-python-client made from docs/openapi.json."""

import sys
import time

from claude_hitl_client import AuthenticatedClient
from claude_hitl_client.api.approvals import decide_approval, list_approvals
from claude_hitl_client.api.events import list_events, send_events
from claude_hitl_client.api.sessions import create_session, get_session
from claude_hitl_client.api.workspace import list_workspace
from claude_hitl_client.models.agent_message_event import AgentMessageEvent
from claude_hitl_client.models.agent_tool_use_event import AgentToolUseEvent
from claude_hitl_client.models.create_session import CreateSession
from claude_hitl_client.models.decide import Decide
from claude_hitl_client.models.decide_answers_type_0 import DecideAnswersType0
from claude_hitl_client.models.decide_result import DecideResult
from claude_hitl_client.models.decide_updated_input_type_0 import DecideUpdatedInputType0
from claude_hitl_client.models.inbound_text import InboundText
from claude_hitl_client.models.problem import Problem
from claude_hitl_client.models.send_events import SendEvents
from claude_hitl_client.models.stop_reason import StopReason
from claude_hitl_client.models.user_message import UserMessage
from claude_hitl_client.models.user_tool_confirmation_event import UserToolConfirmationEvent

client = AuthenticatedClient(sys.argv[1], sys.argv[2])


def there[T](answer: T | Problem | None) -> T:
    if answer is None or isinstance(answer, Problem):
        raise SystemExit((answer and answer.error.message) or "no answer")
    return answer


def message(text: str) -> UserMessage:
    return UserMessage(type_="user.message", content=[InboundText(type_="text", text=text)])


def rests(session_id: str, because: str) -> None:
    while True:
        reason = there(get_session.sync(session_id, client=client)).stop_reason
        if isinstance(reason, StopReason) and reason.type_ == because:
            return
        time.sleep(0.1)


def waiting(session_id: str) -> list[str]:
    return sorted(one.id for one in there(list_approvals.sync(client=client, session_id=session_id)).data)


def decide(approval_id: str, body: Decide) -> None:
    there(decide_approval.sync(approval_id, client=client, body=body))


body = CreateSession(
    agent="default", environment_id="default", initial_events=[message("Do three things at once")]
)
session = there(create_session.sync(client=client, body=body)).id
rests(session, "requires_action")
first, second, third = waiting(session)
decide(first, Decide(DecideResult.ALLOW))
decide(second, Decide(DecideResult.DENY, deny_message="no dates, please"))
edited = DecideUpdatedInputType0.from_dict({"command": "uname -s > system.txt"})
decide(third, Decide(DecideResult.ALLOW, updated_input=edited))
rests(session, "end_turn")
there(send_events.sync(session, client=client, body=SendEvents([message("Ask me a question")])))
rests(session, "requires_action")
(question,) = waiting(session)
answers = {
    "Which colour should the report have?": "Blue",
    "Which formats do you need?": ["PDF", "as a slide"],
}
decide(question, Decide(DecideResult.ALLOW, answers=DecideAnswersType0.from_dict(answers)))
rests(session, "end_turn")
for event in there(list_events.sync(session, client=client)).data:
    if isinstance(event, AgentMessageEvent):
        print("".join(block.text or "" for block in event.content))
    elif isinstance(event, AgentToolUseEvent):
        print(event.name, event.input_.to_dict())
    elif isinstance(event, UserToolConfirmationEvent):
        print(event.result, event.deny_message or "")
print("files", *sorted(one.path for one in there(list_workspace.sync(session, client=client)).data))
