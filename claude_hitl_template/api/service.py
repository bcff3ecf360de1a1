"""The routes' dependencies on the rest of the program, and the FastAPI dependency that provides them."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import Depends, Request

from claude_hitl_template.api.auth import WRONG_KEYS
from claude_hitl_template.api.followers import Followers
from claude_hitl_template.config.passwords import Passwords
from claude_hitl_template.config.secret_files import SecretFiles
from claude_hitl_template.domain.models import Agent, Environment, ImageFacts
from claude_hitl_template.domain.policy.floor import Floor
from claude_hitl_template.notify.addresses import Targets
from claude_hitl_template.store.protocol import Clients


@dataclass(frozen=True)
class Service:
    """The dependencies of the routes.

    Attributes:
        floor: The operator's policy, which an agent's policy cannot loosen.
        environments: By the `environment_id` that a session may name.
        image_facts: Returns the facts of an image reference that are known now, without waiting; None if the image is not
            on this machine (yet). Never raises.
        facts: The fields of `GET /v1/version`, ready for JSON.
        drain: Stops starting turns and waits up to the given seconds; returns how many sessions still run.
        drained_s: For how many more seconds nothing is started.
        operator_key: Opens the internal routes.
        targets: Says which addresses a webhook may have.
        passwords: Hashes users' passwords.
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
    secret_files: SecretFiles
    max_request_bytes: int
    requests_per_minute: int
    wrong_keys_per_minute: int = WRONG_KEYS
    targets: Targets = field(default_factory=Targets)
    passwords: Passwords = field(default_factory=Passwords)


async def _service(request: Request) -> Service:
    return request.app.state.service


ServiceDep = Annotated[Service, Depends(_service)]


async def _followers(request: Request) -> Followers:
    return request.app.state.followers


FollowersDep = Annotated[Followers, Depends(_followers)]
