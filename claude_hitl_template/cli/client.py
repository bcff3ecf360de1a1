"""The REST API as this command line uses it. The key is read from a file or the environment, never shown."""

import json
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import httpx
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_delay, wait_exponential

from claude_hitl_template.config import network
from claude_hitl_template.config.secret_files import read_api_key
from claude_hitl_template.config.settings import Settings
from claude_hitl_template.domain.models import new_id
from claude_hitl_template.errors import (
    ConfigError,
    Conflict,
    Forbidden,
    HitlError,
    InvalidInput,
    NotFound,
    Outdated,
    RateLimited,
    TooLarge,
    Unauthorized,
    Unavailable,
)

TIMEOUT_S = 30.0
STREAM_SILENCE_S = 35.0  # the service says something at least every 10 s
PAGE = 200
FIRST_PAUSE_S = 0.5
_FIX_KEY = (
    "use the key that ./hitl up made or was given (HITL_API_KEY), or run ./hitl up to make this one known"
)
_ERRORS: dict[int, type[HitlError]] = {
    400: InvalidInput,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    412: Outdated,
    413: TooLarge,
    503: Unavailable,
}


class ServiceFailed(HitlError):
    """The service answered with an error that is its own fault."""


class Client:
    """Requests with the key. Each raises the HitlError that fits the answer; Unavailable when there is none.

    Requests without an answer, or with 429 or 503, are repeated for `patience_s` seconds; each is reported to `say`.
    Requests that change something carry an idempotency key, so asking again does nothing twice.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str,
        *,
        patience_s: float = 0.0,
        say: Callable[[str], None] = lambda _: None,
        workspace: str | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.base_url, self._patience_s, self._say = base_url, patience_s, say
        chosen = {} if workspace is None else {"anthropic-workspace-id": workspace}
        self._http = network.direct(
            base_url=base_url,
            headers={"x-api-key": api_key, **chosen},
            timeout=TIMEOUT_S,
            transport=transport,
        )

    @classmethod
    def open(
        cls,
        settings: Settings,
        *,
        patience_s: float = 0.0,
        say: Callable[[str], None] = lambda _: None,
        workspace: str | None = None,
    ) -> "Client":
        """A client of the service, here or at HITL_SERVE_URL. Raises ConfigError when there is no key yet."""
        return cls(settings.service_url, _key(settings), patience_s=patience_s, say=say, workspace=workspace)

    def close(self) -> None:
        self._http.close()

    def in_workspace(self, workspace_id: str) -> None:
        """Makes the following requests in this workspace."""
        self._http.headers["anthropic-workspace-id"] = workspace_id

    def get(self, path: str, **params: Any) -> Any:
        return self._request("GET", path, params=params)

    def post(self, path: str, body: Any = None, *, timeout_s: float = TIMEOUT_S) -> Any:
        headers = {"idempotency-key": new_id("cli")}
        return self._request(
            "POST", path, json={} if body is None else body, headers=headers, timeout=timeout_s
        )

    def put(self, path: str, body: Any) -> Any:
        return self._request("PUT", path, json=body)

    def delete(self, path: str) -> Any:
        return self._request("DELETE", path)

    def pages(self, path: str, **params: Any) -> Iterator[dict[str, Any]]:
        """Every item of a listing, page after page."""
        page: str | None = None
        while True:
            answer = self.get(path, limit=PAGE, **params, **({"page": page} if page else {}))
            yield from answer["data"]
            page = answer["next_page"]
            if page is None:
                return

    @contextmanager
    def stream(self, path: str, after: int) -> Generator[Iterator[str]]:
        """The lines of an event stream behind event number `after`. Raises as the other requests do."""
        timeout = httpx.Timeout(TIMEOUT_S, read=STREAM_SILENCE_S)
        headers = {"last-event-id": str(after)}
        with (
            _reachable(self.base_url),
            self._http.stream("GET", path, headers=headers, timeout=timeout) as answer,
        ):
            if not answer.is_success:
                answer.read()
                raise _error(answer)
            yield _lines(answer)

    @contextmanager
    def lines(self, path: str, **params: Any) -> Generator[Iterator[bytes]]:
        """The lines of a response of JSON Lines. Raises as the other requests do, and Unavailable where it is cut off."""
        with _reachable(self.base_url), self._http.stream("GET", path, params=params) as answer:
            if not answer.is_success:
                answer.read()
                raise _error(answer)
            yield _byte_lines(answer)

    def patiently[T](self, action: Callable[[], T]) -> T:
        """`action`, again while the service does not answer or asks to wait."""
        retrying = Retrying(
            retry=retry_if_exception_type((Unavailable, RateLimited)),
            wait=_pause_s,
            stop=stop_after_delay(self._patience_s),
            before_sleep=self._tell,
            reraise=True,
        )
        return retrying(action)

    def _tell(self, state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        first_line = str(error).splitlines()[0]
        self._say(f"{first_line}; trying again (attempt {state.attempt_number + 1})")

    def _request(self, method: str, path: str, **options: Any) -> Any:
        def once() -> Any:
            with _reachable(self.base_url):
                answer = self._http.request(method, path, **options)
            if not answer.is_success:
                raise _error(answer)
            return _json(answer)

        return self.patiently(once)


@contextmanager
def _reachable(base_url: str) -> Generator[None]:
    try:
        yield
    except httpx.TransportError as error:
        why = str(error) or type(error).__name__
        raise Unavailable(
            f"the service does not answer at {base_url} ({why})\n  Fix: start it with ./hitl up; ./hitl status says more"
        ) from error


def _lines(answer: httpx.Response) -> Iterator[str]:
    """Split at newlines only: httpx splits at U+2028 too, which JSON text may hold."""
    rest = ""
    for chunk in answer.iter_text():
        *lines, rest = (rest + chunk).split("\n")
        yield from (line.removesuffix("\r") for line in lines)


def _byte_lines(answer: httpx.Response) -> Iterator[bytes]:
    rest = b""
    for chunk in answer.iter_bytes():
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines
    if rest:
        yield rest


def _pause_s(state: RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    if isinstance(error, RateLimited):
        return error.retry_after_s
    return wait_exponential(multiplier=FIRST_PAUSE_S, max=5)(state)


def _error(answer: httpx.Response) -> HitlError:
    message = _message(answer)
    status = answer.status_code
    if status == 401:
        return Unauthorized(f"{message}\n  Fix: {_FIX_KEY}")
    if status == 429:
        wait = answer.headers.get("retry-after", "")
        return RateLimited(message, float(wait) if wait.isdecimal() else 1.0)
    known = _ERRORS.get(status)
    if known is not None:
        return known(message)
    return ServiceFailed(f"the service answered {status}: {message}\n  Fix: ./hitl logs says why")


def _message(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return answer.text[:200] or answer.reason_phrase


def _json(answer: httpx.Response) -> Any:
    try:
        return answer.json()
    except json.JSONDecodeError as error:
        raise ServiceFailed(
            f"{answer.url} answered with something that is not JSON\n"
            "  Fix: is another program on this port? ./hitl doctor names it"
        ) from error


def said_to_a_key(url: str, settings: Settings) -> dict[str, Any]:
    """GET /v1/version of the service at `url`, without /v1; {} where no key from here is known.

    Raises httpx.HTTPError, and ValueError for invalid JSON.
    """
    for key in _known_keys(settings):
        answer = network.request("GET", f"{url}/v1/version", headers={"x-api-key": key}, timeout=TIMEOUT_S)
        if answer.status_code == 200:
            return answer.json()
    return {}


def _known_keys(settings: Settings) -> Iterator[str]:
    """The one that is set may not be known there yet: then the one before it is."""
    if settings.api_key is not None:
        yield settings.api_key.get_secret_value()
    with suppress(ConfigError):
        yield read_api_key(settings)


def _key(settings: Settings) -> str:
    if settings.api_key is not None:
        return settings.api_key.get_secret_value()
    try:
        return read_api_key(settings)
    except ConfigError as error:
        if settings.serve_url is None:
            raise
        raise ConfigError(
            f"there is no API key for {settings.service_url} here",
            "on the cluster, ./hitl status --show-secrets shows it: set HITL_API_KEY in .env or the profile to it",
        ) from error
