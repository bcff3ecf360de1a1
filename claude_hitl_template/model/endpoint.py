"""The model endpoint of sessions in place of Anthropic's: it has the key, sessions do not.

A session's process sends a session token as its API key. The endpoint checks it and relays the call to an
upstream: Anthropic, with the real key put in, or the offline model. Bodies are streamed through both ways
as they arrive, and the upstream's call is cancelled as soon as the client disconnects.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any

import httpx
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import SecretStr
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from claude_hitl_template.config import network
from claude_hitl_template.errors import ConfigError, InvalidInput, Unauthorized, Unavailable
from claude_hitl_template.model.call_ids import UniqueCallIds
from claude_hitl_template.model.offline import Reply, Scenarios, count_tokens, message, respond, sse
from claude_hitl_template.model.upstream import (
    AWAY,
    COUNT_TOKENS,
    MESSAGES,
    NOT_SENT_BACK,
    SENT_ON,
    SENT_ON_PREFIXES,
    Answer,
    Call,
    Upstream,
    problem,
)

__all__ = [
    "Answer",
    "AnthropicUpstream",
    "Call",
    "OfflineUpstream",
    "Upstream",
    "build_router",
    "upstream_client",
]

# Seconds. The stream of a model is never silent for long, it pings; `pool` 5: no waiting for other sessions' streams.
UPSTREAM_TIMEOUT = httpx.Timeout(90.0, connect=5.0, pool=5.0)
_REFUSED_KEY = 401
KEY_REFUSED = (
    "the model's service refused the key of this service: set ANTHROPIC_API_KEY (in the environment or in .env) to a "
    "valid key, start the service again (./hitl down, ./hitl up), then send your message again"
)


class OfflineUpstream:
    """The offline model as an upstream."""

    def __init__(self, scenarios: Scenarios) -> None:
        self._scenarios = scenarios

    @asynccontextmanager
    async def call(self, call: Call) -> AsyncGenerator[Answer]:
        yield self._answer(call.path, b"".join([chunk async for chunk in call.body]))

    def _answer(self, path: str, raw: bytes) -> Answer:
        try:
            body = _parsed(raw)
        except InvalidInput as error:
            return _error(400, str(error))
        if path == COUNT_TOKENS:
            return _json(200, {"input_tokens": count_tokens(body)})
        reply, model = respond(body, self._scenarios), str(body.get("model"))
        if reply.failure and isinstance(status := reply.failure.status, int):
            headers = {} if (wait := reply.failure.retry_after_s) is None else {"retry-after": str(wait)}
            return _error(status, reply.failure.message, reply.failure.type, headers)
        if body.get("stream"):
            return Answer(200, {"content-type": "text/event-stream; charset=utf-8"}, _paced(reply, model))
        return _json(200, message(reply, model))


def _parsed(raw: bytes) -> dict[str, Any]:
    try:
        body = json.loads(raw)
    except ValueError as error:
        raise InvalidInput(f"the body is not JSON: {error}") from error
    if not isinstance(body, dict) or not isinstance(body.get("messages"), list):
        raise InvalidInput("must be a list", "messages")
    return body


async def _paced(reply: Reply, model: str) -> AsyncIterator[bytes]:
    for chunk in sse(reply, model):
        yield chunk
        await asyncio.sleep(reply.delay_s)
    if reply.failure and reply.failure.status == "cut":
        raise Unavailable("the offline model breaks the stream off, as its scenario says")


def upstream_client(timeout: httpx.Timeout = UPSTREAM_TIMEOUT) -> httpx.AsyncClient:
    """A client for AnthropicUpstream, without httpx's limit of 100 connections: there may be more sessions.

    Raises ConfigError for a proxy in the environment that cannot be used.
    """
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=100)
    return network.outward_async(timeout=timeout, limits=limits)


class AnthropicUpstream:
    """Anthropic's service, or any that speaks its protocol, at `base_url` without "/v1".

    Answers come back as they are, but for a refused key (401): the CLI would try it again for minutes, so it is
    answered with 403 and the fix. A request that gets no answer is repeated once only: the CLI would
    repeat it for as long as its retries last.

    `client` brings the timeouts, and the caller closes it. Raises ConfigError if the key cannot be
    sent in a header.
    """

    def __init__(self, base_url: str, api_key: SecretStr, client: httpx.AsyncClient) -> None:
        key = api_key.get_secret_value()
        # A header that httpx refuses is quoted in its error.
        if not (key and key.isascii() and key.isprintable() and " " not in key):
            raise ConfigError("The Anthropic API key is empty or has characters no key has.", "Set it again.")
        self._base_url = base_url.rstrip("/")
        self._api_key = api_key
        self._client = client
        self._met_silence: set[str] = set()  # sessions whose last request was not answered in time

    @asynccontextmanager
    async def call(self, call: Call) -> AsyncGenerator[Answer]:
        query = f"?{call.query}" if call.query else ""
        request = self._client.build_request(
            "POST",
            f"{self._base_url}{call.path}{query}",
            headers=self._headers(call.headers),
            content=call.body,
        )
        try:
            response = await self._client.send(request, stream=True)
        except httpx.ReadTimeout as error:
            yield self._silence(call, error)
            return
        except network.UNREACHABLE as error:
            yield self._unreachable(error)
            return
        self._met_silence.discard(_session_of(call))
        try:
            if response.status_code == _REFUSED_KEY:
                yield _error(403, KEY_REFUSED)
                return
            headers = {name: value for name, value in response.headers.items() if name not in NOT_SENT_BACK}
            yield Answer(response.status_code, headers, _raw(response))
        finally:
            await response.aclose()

    def _silence(self, call: Call, error: httpx.ReadTimeout) -> Answer:
        session = _session_of(call)
        if session in self._met_silence:
            self._met_silence.discard(session)
            return self._unreachable(error, {"x-should-retry": "false"})
        self._met_silence.add(session)
        return self._unreachable(error)

    def _unreachable(self, error: Exception, headers: Mapping[str, str] | None = None) -> Answer:
        kind, late = type(error).__name__, isinstance(error, httpx.TimeoutException)
        what = "did not answer in time" if late else "cannot be reached"
        text = (
            f"the model's service at {httpx.URL(self._base_url).host} {what} ({kind}); check this machine's network and "
            "ANTHROPIC_BASE_URL"
        )
        return _error(504 if late else AWAY, text, headers=headers)

    def _headers(self, sent: Mapping[str, str]) -> dict[str, str]:
        kept = {n: v for n, v in sent.items() if n in SENT_ON or n.startswith(SENT_ON_PREFIXES)}
        # The body goes back as it came: without this, httpx would offer encodings which the client did not.
        return {"accept-encoding": "identity", **kept, "x-api-key": self._api_key.get_secret_value()}


async def _raw(response: httpx.Response) -> AsyncIterator[bytes]:
    try:
        async for chunk in response.aiter_raw():
            yield chunk
    except httpx.TransportError as error:
        # Not `from error`: it holds the request, and with it the key.
        raise Unavailable(f"the stream of the model broke off ({type(error).__name__})") from None


def _session_of(call: Call) -> str:
    return call.headers.get("x-claude-code-session-id", "")


def build_router(upstream: Upstream, verify: Callable[[str], Awaitable[None]]) -> APIRouter:
    """The routes that the Claude Code CLI calls under its ANTHROPIC_BASE_URL.

    `verify` gets what the client sent as its API key, or as bearer token, and raises Unauthorized if it may
    not call the model. The client then gets a 403: after a 401 the CLI asks again for minutes.
    """
    router, unique = APIRouter(), UniqueCallIds(upstream)

    async def relay(request: Request) -> Response:
        try:
            await verify(_token(request))
        except Unauthorized as error:
            return JSONResponse(problem(403, error.message), 403)
        except Unavailable as error:
            return JSONResponse(problem(AWAY, error.message), AWAY)
        path = COUNT_TOKENS if request.url.path.endswith(COUNT_TOKENS) else MESSAGES
        return _Relay(unique, path, request)

    async def hello() -> Response:
        return Response()

    router.add_api_route(MESSAGES, relay, methods=["POST"], summary="Messages API", response_model=None)
    router.add_api_route(COUNT_TOKENS, relay, methods=["POST"], summary="Count tokens", response_model=None)
    # The CLI warms its connection up with this one, without a key.
    router.add_api_route("/api/hello", hello, methods=["GET", "HEAD"], summary="Probe", response_model=None)
    return router


def _token(request: Request) -> str:
    """Raises Unauthorized if the request has none."""
    scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
    token = request.headers.get("x-api-key") or (bearer.strip() if scheme.lower() == "bearer" else "")
    if not token:
        raise Unauthorized("no session token: it is sent as x-api-key or as bearer token")
    return token


class _Relay(Response):
    """Relays the upstream's response, and ends the upstream's call when the client disconnects."""

    def __init__(self, upstream: Upstream, path: str, request: Request) -> None:
        super().__init__()
        self._upstream = upstream
        self._request = request
        self._sent = asyncio.Event()
        self._call = Call(path, request.url.query, dict(request.headers), self._body())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        relaying = asyncio.create_task(self._relay(send))
        leaving = asyncio.create_task(self._client_gone(receive))
        try:
            await asyncio.wait((relaying, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            relaying_ended = relaying.done()
            relaying.cancel()
            leaving.cancel()
            await asyncio.wait((relaying, leaving))
        if relaying_ended:
            with suppress(ClientDisconnect):
                relaying.result()

    async def _relay(self, send: Send) -> None:
        async with self._upstream.call(self._call) as answer:
            headers = [(n.encode("latin-1"), v.encode("latin-1")) for n, v in answer.headers.items()]
            await send({"type": "http.response.start", "status": answer.status, "headers": headers})
            async for chunk in answer.chunks:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _body(self) -> AsyncIterator[bytes]:
        async for chunk in self._request.stream():
            yield chunk
        self._sent.set()

    async def _client_gone(self, receive: Receive) -> None:
        # While the body comes in, only its reader may receive; it notices by itself when the client goes.
        await self._sent.wait()
        while (await receive())["type"] != "http.disconnect":
            pass


def _error(status: int, text: str, kind: str = "", headers: Mapping[str, str] | None = None) -> Answer:
    return _json(status, problem(status, text, kind), headers)


def _json(status: int, content: dict[str, Any], headers: Mapping[str, str] | None = None) -> Answer:
    async def once() -> AsyncIterator[bytes]:
        yield json.dumps(content).encode()

    return Answer(status, {"content-type": "application/json", **(headers or {})}, once())
