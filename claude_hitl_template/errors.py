"""The package's errors, by what a caller can do about them.

    HitlError
    |-- ConfigError            the service is set up wrongly; `fix` says what to change
    |-- InvalidInput           a value from outside is unusable; `field` names it
    |   `-- TooLarge           ... because of its size
    |-- NotFound               no such thing, or not visible to this caller
    |-- Conflict               the request contradicts what is already recorded
    |   |-- AlreadyDecided     another decision was first
    |   |-- Superseded         the approval stopped waiting before it was decided
    |   |-- TooManyAsks        a session asked for more decisions than it may
    |   `-- IllegalTransition  a state change that the table of transitions does not have
    |-- NotWaiting             the named call does not wait for a decision
    |-- Unauthorized           no key, or a wrong one
    |-- RateLimited            too many requests; `retry_after_s` says when to come back
    |-- StaleOwner             a write with a lease epoch that is no longer the session's
    |-- EngineError            the Claude Code CLI, or what it talks to, failed
    |-- InternalError          a defect of the service; its log has the traceback
    `-- Unavailable            a part of the service does not answer; trying again is right
        `-- StoreUnreachable   ... because the database does not answer; a write may or may not have been kept

Errors cross Ray, so each class passes all arguments to `super().__init__` and can be pickled.
They are independent of HTTP; `api/problems.py` maps them.
"""


class HitlError(Exception):
    """Base of all errors of this package. `str(error)` is a message for users: the problem and, if known, the fix."""

    @property
    def message(self) -> str:
        return str(self.args[0]) if self.args else type(self).__name__

    def __str__(self) -> str:
        return self.message


class ConfigError(HitlError):
    """A setting or the machine is not as the service needs it."""

    def __init__(self, message: str, fix: str = "") -> None:
        super().__init__(message, fix)
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.message}\n  Fix: {self.fix}" if self.fix else self.message


class InvalidInput(HitlError):
    """A value from outside is unusable. `field` is its dotted path, "" when it is the whole request."""

    def __init__(self, message: str, field: str = "") -> None:
        super().__init__(message, field)
        self.field = field

    def __str__(self) -> str:
        return f"{self.field}: {self.message}" if self.field else self.message


class TooLarge(InvalidInput):
    """A value from outside is over its size limit."""


class NotFound(HitlError):
    """Not found, or not visible to the caller; the two are not distinguished."""


class Conflict(HitlError):
    """The request contradicts what is already recorded."""


class AlreadyDecided(Conflict):
    """Another decision on this approval was committed first."""


class Superseded(Conflict):
    """The approval stopped waiting (interrupted, expired, archived) before a decision came."""


class TooManyAsks(Conflict):
    """A session asked for more decisions than it may within a minute, or since the last message of a human."""


class IllegalTransition(Conflict):
    """A state change that the table of legal transitions does not have."""


class NotWaiting(HitlError):
    """The named call does not wait for a decision, and never did."""


class Unauthorized(HitlError):
    """No API key came with the request, or an unknown one."""


class Forbidden(HitlError):
    """The caller is known, and its role, its key or a rule does not permit this."""


class Outdated(Conflict):
    """A change was made to a version that is not the current one; the message names the current one."""


class RateLimited(HitlError):
    """Too many requests with one key."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message, retry_after_s)
        self.retry_after_s = retry_after_s


class StaleOwner(HitlError):
    """A session's owner wrote with a lease epoch that has been taken over; it must stop at once."""


class EngineError(HitlError):
    """The Claude Code CLI, or the model it talks to, failed.

    `kind` is one of the wire protocol's error types (for instance "model_overloaded_error").
    `retryable` says whether starting the engine again may help.
    """

    def __init__(self, message: str, kind: str = "unknown_error", retryable: bool = True) -> None:
        super().__init__(message, kind, retryable)
        self.kind = kind
        self.retryable = retryable


class InternalError(HitlError):
    """A defect of the service: repeating the request does not help. The service's log has the traceback."""


class Unavailable(HitlError):
    """A part of the service does not answer now; the same request may be repeated after `retry_after_s` seconds."""

    retry_after_s = 5.0


class StoreUnreachable(Unavailable):
    """The database did not answer, or the connection broke. Whether a write was kept is unknown: repeat it."""
