"""People who are signed in, without a sign-in: the cookie `person` names one of them."""

from collections.abc import Mapping
from dataclasses import dataclass

from fastapi import FastAPI, Request

from claude_hitl_template.domain.models import utcnow
from claude_hitl_template.domain.people import Action, Actor, Principal, Role
from claude_hitl_template.errors import Unauthorized
from claude_hitl_template.inbox.services import User

COOKIE = "person"
CSRF = "csrf-token-of-tests"


@dataclass(frozen=True)
class Person:
    """A user with roles by workspace id."""

    principal: Principal
    csrf: str = CSRF

    @property
    def workspace_ids(self) -> tuple[str, ...]:
        return self.principal.workspace_ids

    @property
    def actor(self) -> Actor:
        return Actor(name=self.principal.name, principal_id=self.principal.id)

    def may(self, action: Action, workspace_id: str) -> bool:
        return workspace_id in self.workspace_ids and self.principal.may(action, workspace_id)


class SignedIn:
    """Answers who the browser is, and whether a page of ours sent a form."""

    def __init__(self) -> None:
        self.people: dict[str, Person] = {}

    def add(self, name: str, roles: Mapping[str, tuple[Role, ...]]) -> Person:
        principal = Principal(
            id=f"user_{name}", kind="user", name=name, created_at=utcnow(), roles=dict(roles)
        )
        self.people[name] = Person(principal)
        return self.people[name]

    async def user(self, request: Request) -> User:
        person = self.people.get(request.cookies.get(COOKIE, ""))
        if person is None:
            raise Unauthorized("sign in first")
        return person

    async def check_csrf(self, request: Request, user: User) -> None:
        if (await request.form()).get("csrf") != user.csrf:
            raise Unauthorized("this form is not one of ours")

    def install(self, app: FastAPI) -> None:
        """There are no errors of a sign-in to handle."""
