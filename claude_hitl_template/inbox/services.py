"""What the pages need of the rest of the program, and who their reader is."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from fastapi import FastAPI, Request

from claude_hitl_template.api.followers import Followers
from claude_hitl_template.domain.models import Agent, Environment
from claude_hitl_template.domain.people import Action, Actor, Principal
from claude_hitl_template.inbox.live import Live
from claude_hitl_template.notify.addresses import Targets
from claude_hitl_template.notify.slack_presses import SlackApp
from claude_hitl_template.store.protocol import Clients


class User(Protocol):
    """A signed-in person, as `signin.browser.BrowserUser` is one."""

    @property
    def principal(self) -> Principal: ...
    @property
    def workspace_ids(self) -> tuple[str, ...]: ...
    @property
    def csrf(self) -> str: ...
    @property
    def actor(self) -> Actor: ...
    def may(self, action: Action, workspace_id: str) -> bool: ...


@dataclass(frozen=True)
class Pages:
    """The dependencies of the pages.

    Attributes:
        agent: The agent of new sessions.
        environments: By id; the first is the default.
        followers: Of the events of sessions, shared with the API.
        live: Of the changes of approvals.
        user: Returns who the browser is. Raises what `install` has handlers for.
        check_csrf: Raises for a request that a page of this service did not send. Takes what `user` returned.
        push_key: The public key that browsers subscribe to pushes with.
        has_mail: Whether notices can be sent by mail.
        targets: The check of addresses that notices are sent to.
        slack: Takes presses of buttons in Slack.
        install: Prepares the application for `user` and `check_csrf`.
        sandboxed: Whether commands run in a sandbox; a card says where they do not.
        is_free: Returns whether the offline model answers, so that nothing costs anything.
    """

    store: Clients
    agent: Agent
    environments: Mapping[str, Environment]
    followers: Followers
    live: Live
    user: Callable[[Request], Awaitable[User]]
    check_csrf: Callable[[Request, Any], Awaitable[None]]
    push_key: str
    targets: Targets
    has_mail: bool
    slack: SlackApp
    install: Callable[[FastAPI], None]
    sandboxed: bool = True
    is_free: Callable[[], bool] = lambda: False
