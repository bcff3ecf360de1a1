"""Presses of buttons in Slack: whether Slack sent one, what it says, and links that connect a user of Slack with a person.

A channel's signing secret proves that its app of Slack sent a press. Who holds that secret could report any press, so a
connection is of one channel: a person lets the users of that app's Slack decide for them, and no other app.
"""

import base64
import hmac
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Annotated, Any, Literal
from urllib.parse import parse_qsl

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from claude_hitl_template.config.addresses import host_of
from claude_hitl_template.config.secret_files import SigningKey
from claude_hitl_template.domain.canonical_json import digest
from claude_hitl_template.domain.models import utcnow
from claude_hitl_template.domain.rate_limit import Throttle
from claude_hitl_template.errors import InvalidInput, Unauthorized
from claude_hitl_template.notify.addresses import Targets
from claude_hitl_template.notify.posting import Poster

MAX_BYTES = 256 * 1024  # of a press, which has the message that it is about
LINK_FOR = timedelta(minutes=10)
ANSWERS_FROM = ("hooks.slack.com", 443)  # the host of every response_url
FAILURES, PERIOD_S = 50, 300.0  # of one network, as for sign-ins
MAX_NAME_CHARS = 80
ANSWER_S = 2.5
_PURPOSE = b"slack link"
_VALUE = re.compile(r"([A-Za-z0-9_-]{1,64})(?::([A-Za-z0-9_-]{1,64}):([0-9a-f]{64}))?")
_TIMESTAMP, _SIGNATURE = re.compile(r"[0-9]{1,12}"), re.compile(r"v0=[0-9a-f]{64}")

_SlackId = Annotated[str, StringConstraints(pattern=r"^[A-Z0-9]{2,40}$")]


class _Part(BaseModel):
    """Slack adds fields as it likes; those that are read here must be as they are documented."""

    model_config = ConfigDict(strict=True, frozen=True)


class _User(_Part):
    id: _SlackId
    team_id: _SlackId | None = None
    username: str = ""


class _Team(_Part):
    id: _SlackId


class _Action(_Part):
    action_id: Literal["allow", "deny", "open"]
    value: Annotated[str, StringConstraints(pattern=f"^{_VALUE.pattern}$")]


class _Payload(_Part):
    type: Literal["block_actions"]
    user: _User
    team: _Team | None = None
    actions: Annotated[list[_Action], Field(min_length=1, max_length=1)]
    response_url: Annotated[str, StringConstraints(max_length=1000)]


@dataclass(frozen=True)
class SlackUser:
    """A user of Slack, as the app of one channel reports them. `name` is for people, and identifies no one."""

    channel_id: str
    team: str
    user: str
    name: str = ""

    @property
    def link_id(self) -> str:
        """The id of the channel record that keeps the connection with a person."""
        return f"slck_{digest([self.channel_id, self.team, self.user])[:32]}"


@dataclass(frozen=True)
class Press:
    """A press of a button. `approval_id` and `digest` are "" for the button that only opens the card."""

    action: Literal["allow", "deny", "open"]
    by: SlackUser
    approval_id: str
    digest: str
    response_url: str


# -- reading


def payload_in(body: bytes) -> bytes:
    """The text of `payload`, the only field of the form that Slack sends. Raises InvalidInput."""
    try:
        fields = parse_qsl(
            body.decode("ascii"),
            keep_blank_values=True,
            strict_parsing=True,
            errors="strict",
            max_num_fields=1,
        )
    except ValueError as error:
        raise InvalidInput("must be the only field of a form", "payload") from error
    if [name for name, _ in fields] != ["payload"]:
        raise InvalidInput("must be the only field of a form", "payload")
    return fields[0][1].encode()


def claimed_channel(payload: Any) -> str:
    """Our id of the channel whose secret the press has to be signed with; not yet believed. Raises InvalidInput."""
    actions = payload.get("actions") if isinstance(payload, dict) else None
    first = actions[0] if isinstance(actions, list) and actions else None
    value = first.get("value") if isinstance(first, dict) else None
    found = _VALUE.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        raise InvalidInput("must be the value of a button of this service", "payload.actions.0.value")
    return found[1]


def check_signature(secret: str, body: bytes, timestamp: str, signature: str, now: datetime) -> None:
    """Raises Unauthorized unless Slack signed the body with this secret in the last five minutes."""
    from slack_sdk.signature import Clock, SignatureVerifier  # noqa: PLC0415 - many services need none

    class _Now(Clock):
        def now(self) -> float:
            return now.timestamp()

    shaped = _TIMESTAMP.fullmatch(timestamp) and _SIGNATURE.fullmatch(signature)
    if not shaped or not SignatureVerifier(secret, _Now()).is_valid(body, timestamp, signature):
        raise Unauthorized("not signed by Slack for this channel, or more than five minutes ago")


def press_of(payload: Any, targets: Targets) -> Press:
    """What a press says. Raises InvalidInput that names the field."""
    try:
        read = _Payload.model_validate(payload)
    except ValidationError as error:
        first = error.errors()[0]
        field_name = ".".join(map(str, ("payload", *first["loc"])))
        raise InvalidInput(first["msg"], field_name) from error
    found = _VALUE.fullmatch(read.actions[0].value)
    team = read.user.team_id or (read.team.id if read.team else None)
    if found is None or team is None:
        raise InvalidInput("must have a team", "payload.team")
    if read.actions[0].action_id != "open" and found[2] is None:
        raise InvalidInput("must name a call", "payload.actions.0.value")
    _check_answers_to(read.response_url, targets)
    by = SlackUser(found[1], team, read.user.id, read.user.username[:MAX_NAME_CHARS])
    return Press(read.actions[0].action_id, by, found[2] or "", found[3] or "", read.response_url)


def _check_answers_to(url: str, targets: Targets) -> None:
    host = host_of(url)
    is_slack = host == ANSWERS_FROM and url.startswith("https://")
    if host is None or not (is_slack or targets.names(host)):
        raise InvalidInput(f"must be an address of {ANSWERS_FROM[0]}", "payload.response_url")
    targets.check(url)


# -- connecting


class SlackLinks:
    """Makes and reads the tokens of links that connect a user of Slack with the person who opens one."""

    def __init__(self, key: SigningKey, clock: Callable[[], datetime] = utcnow) -> None:
        self._key, self._clock = key, clock

    def token(self, of: SlackUser) -> str:
        made = [of.channel_id, of.team, of.user, of.name, self._clock().isoformat()]
        claim = base64.urlsafe_b64encode(json.dumps(made).encode()).decode().rstrip("=")
        return f"{claim}.{self._key.mac(_PURPOSE, claim)}"

    def read(self, token: str) -> tuple[SlackUser, datetime]:
        """Whom a token is of, and when it was made. Raises InvalidInput for another's, and for one older than LINK_FOR."""
        claim, _, mac = token.partition(".")
        made_here = self._key.mac(_PURPOSE, claim) if claim.isascii() else ""
        if not made_here or not hmac.compare_digest(made_here, mac if mac.isascii() else ""):
            raise InvalidInput("This link is not complete. Press the button in Slack again for a new one.")
        channel_id, team, user, name, at = json.loads(
            base64.urlsafe_b64decode(claim + "=" * (-len(claim) % 4))
        )
        made = datetime.fromisoformat(at)
        if not timedelta(0) <= self._clock() - made <= LINK_FOR:
            raise InvalidInput("This link is too old. Press the button in Slack again for a new one.")
        return SlackUser(channel_id, team, user, name), made


def _throttle() -> Throttle:
    return Throttle(FAILURES, PERIOD_S)


@dataclass(frozen=True)
class SlackApp:
    """What the pages need to take presses.

    Attributes:
        poster: Posts answers to Slack.
        targets: The check of where answers go.
        pages_url: Where browsers reach the pages of the service.
        failures: Counts requests that were refused, by network.
        answer_s: How long a decision may take. Slack gives up after 3 s.
    """

    links: SlackLinks
    poster: Poster
    targets: Targets
    pages_url: str
    clock: Callable[[], datetime] = utcnow
    failures: Throttle = field(default_factory=_throttle)
    answer_s: float = ANSWER_S

    @classmethod
    def of(cls, key: SigningKey, targets: Targets, pages_url: str) -> "SlackApp":
        return cls(SlackLinks(key), Poster(targets), targets, pages_url)
