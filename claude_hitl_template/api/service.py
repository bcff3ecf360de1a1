"""What the routes need from the rest of the program, and how a route asks for it."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Request

from claude_hitl_template.api.auth import WRONG_KEYS
from claude_hitl_template.api.followers import Followers
from claude_hitl_template.config.secret_files import SecretFiles
from claude_hitl_template.domain.models import Agent, Environment, ImageFacts
from claude_hitl_template.domain.policy.floor import Floor
from claude_hitl_template.store.protocol import Clients


@dataclass(frozen=True)
class Service:
    """The dependencies of the routes.

    Attributes:
        floor: The operator's policy; it applies whatever an agent's policy says.
        environments: What a session may name as its `environment_id`.
        image_facts: What is known of an image reference now; None for an image that is not here (yet). Never raises,
            and answers at once.
        facts: What `GET /v1/version` shows, ready for JSON.
        drain: Stops starting turns and waits up to the given seconds; returns how many sessions still run.
        drained_s: For how many more seconds nothing is started.
        operator_key: Opens the internal routes.
        wrong_keys_per_minute: How many wrong keys one address may present.
    """

    store: Clients
    agent: Agent
    floor: Floor
    environments: Mapping[str, Environment]
    image_facts: Callable[[str], Awaitable[ImageFacts | None]]
    facts: Callable[[], dict[str, Any]]
    drain: Callable[[float], Awaitable[int]]
    undrain: Callable[[], Awaitable[None]]
    drained_s: Callable[[], Awaitable[float]]
    operator_key: str
    shelf: SecretFiles
    max_request_bytes: int
    requests_per_minute: int
    wrong_keys_per_minute: int = WRONG_KEYS


async def _service(request: Request) -> Service:
    return request.app.state.service


ServiceDep = Annotated[Service, Depends(_service)]


async def _followers(request: Request) -> Followers:
    return request.app.state.followers


FollowersDep = Annotated[Followers, Depends(_followers)]
