"""Request bodies. What an agent may override is in agents.py, what a client may send as an event in domain/events.py."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, StringConstraints, field_validator
from pydantic.json_schema import SkipJsonSchema

from claude_hitl_template.api.agents import AgentBody, by_id
from claude_hitl_template.api.strict_json import Body
from claude_hitl_template.domain.events import ClientEvent, UserMessage, UserToolConfirmation

Title = Annotated[str, StringConstraints(max_length=500)]
MetaKey = Annotated[str, StringConstraints(min_length=1, max_length=64)]
MetaValue = Annotated[str, StringConstraints(max_length=512)]


class CreateSession(Body):
    """`agent` is an agent's id, or an object that overrides parts of it."""

    agent: Annotated[AgentBody, by_id("agent")]
    environment_id: str
    title: Title | None = None
    metadata: Annotated[dict[MetaKey, MetaValue], Field(max_length=16)] = Field(
        default_factory=dict[str, str]
    )
    initial_events: Annotated[list[UserMessage], Field(max_length=50)] = Field(
        default_factory=list[UserMessage]
    )
    resources: Annotated[list[Any], Field(max_length=0)] = Field(default_factory=list[Any])
    vault_ids: Annotated[list[Any], Field(max_length=0)] = Field(default_factory=list[Any])


class UpdateSession(Body):
    """Fields that are left out stay. `metadata` is a patch: null removes a key."""

    title: Title | None = None
    metadata: dict[MetaKey, MetaValue | None] | None = None


class SendEvents(Body):
    """Events for a session; all of them are accepted, or none."""

    events: list[ClientEvent] = Field(min_length=1, max_length=100)


class Decide(UserToolConfirmation):
    """A decision. The address names the call, so `type` and `tool_use_id` of a `user.tool_confirmation` are left out."""

    type: SkipJsonSchema[Literal["user.tool_confirmation"]] = "user.tool_confirmation"
    tool_use_id: SkipJsonSchema[str] = ""

    @field_validator("type", "tool_use_id", mode="before")
    @classmethod
    def _refuse(cls, _given: Any) -> Any:
        raise ValueError("the address says which call is decided; leave it out")

    def confirmation(self, approval_id: str) -> UserToolConfirmation:
        """This decision on the call of an approval."""
        given = self.model_dump(exclude_unset=True)
        return UserToolConfirmation(type="user.tool_confirmation", tool_use_id=approval_id, **given)


class Drain(Body):
    """For how long to wait for running turns."""

    grace_s: Annotated[float, Field(strict=True, description="Seconds; at most 300.")] = 10


class Secret(Body):
    """A secret that is stored on the service's machine."""

    value: str


def _key_name(given: str) -> str:
    name = given.strip()
    if not name:
        raise ValueError("is empty; say whose key it is")
    if not name.isprintable():
        raise ValueError("contains characters that cannot be displayed")
    return name


class NewKey(Body):
    """An API key; `name` says whose it is."""

    name: Annotated[str, Field(min_length=1, max_length=100), AfterValidator(_key_name)]
