"""Failures below a session: each is reported with its fix, loses nothing, and the session continues afterwards."""

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import SecretStr

from claude_hitl_template.claude import cli_engine as claude_cli
from claude_hitl_template.claude.cli_engine import bundled_cli, check_cli
from claude_hitl_template.domain.models import Agent, Environment, Event, Session
from claude_hitl_template.errors import EngineError
from claude_hitl_template.model.endpoint import (
    UPSTREAM_TIMEOUT,
    AnthropicUpstream,
    upstream_client,
)
from claude_hitl_template.model.offline import Scenarios, respond, sse
from claude_hitl_template.model.offline import message as whole
from claude_hitl_template.session.runner import Limits
from claude_hitl_template.store.core import CoreStore
from claude_hitl_template.testing.memory_backend import MemoryBackend
from tests.contract.test_anthropic_sdk import check_event
from tests.contract.test_session import KEY, House, user
from tests.serving import model_app, serving

THE_KEY = "sk-ant-the-right-key"
PATIENCE_S = 240.0  # nothing but a failure is decided by it
SILENCE_S = 5.0
SILENT = httpx.Timeout(60.0, read=SILENCE_S)


# -- a service to be unlucky with

type Misfortune = Callable[[Request], Awaitable[Response]]


class FakeAnthropic:
    """Anthropic's service for the endpoint: accepts one key, first fails as `misfortunes` say, and then answers."""

    def __init__(self, *misfortunes: Misfortune) -> None:
        self.misfortunes = list(misfortunes)
        self.requests: list[dict[str, Any]] = []
        self.app = FastAPI()
        self.app.add_api_route("/v1/messages", self._answer, methods=["POST"], response_model=None)

    async def _answer(self, request: Request) -> Response:
        body = await request.json()
        self.requests.append(body)
        if request.headers["x-api-key"] != THE_KEY:
            return _problem(401, "authentication_error", "invalid x-api-key")
        if self.misfortunes:
            return await self.misfortunes.pop(0)(request)
        reply = respond(body, Scenarios.load())
        if body.get("stream"):
            return StreamingResponse(iter(sse(reply, "fake")), media_type="text/event-stream")
        return JSONResponse(whole(reply, "fake"))


def _problem(status: int, kind: str, text: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"type": "error", "error": {"type": kind, "message": text}}, status, headers)


async def limited(_request: Request) -> Response:
    return _problem(429, "rate_limit_error", "slow down", {"retry-after": "1"})


async def overloaded(_request: Request) -> Response:
    return _problem(529, "overloaded_error", "Overloaded")


async def silent(_request: Request) -> Response:
    await asyncio.Event().wait()
    raise AssertionError("the event is never set")


def stream_that_ends(how: str) -> Misfortune:
    """A stream that is cut in the middle of its text, or continues with a line that is not JSON."""

    async def answer(request: Request) -> Response:
        reply = respond(await request.json(), Scenarios.load())

        async def chunks() -> AsyncIterator[bytes]:
            sent = 0
            for chunk in sse(reply, "fake"):
                yield chunk
                sent += b"text_delta" in chunk
                if sent == 2:
                    break
            if how == "cut":
                raise ConnectionResetError
            yield b"event: content_block_delta\ndata: {not json\n\n"

        return StreamingResponse(chunks(), media_type="text/event-stream")

    return answer


async def no_api_at_all(_request: Request) -> Response:
    return Response("<html>Log in to this network</html>", media_type="text/html")


@contextlib.asynccontextmanager
async def endpoint(
    upstream: str, *, key: str = THE_KEY, timeout: httpx.Timeout = UPSTREAM_TIMEOUT
) -> AsyncIterator[str]:
    """Serves the model endpoint over an upstream at that address."""
    async with (
        upstream_client(timeout) as client,
        serving(model_app(AnthropicUpstream(upstream, SecretStr(key), client))) as url,
    ):
        yield url


@contextlib.asynccontextmanager
async def model(fake: FakeAnthropic, **more: Any) -> AsyncIterator[str]:
    async with serving(fake.app) as upstream, endpoint(upstream, **more) as url:
        yield url


# -- a session that meets it


@dataclass
class Rig(House):
    """A House with the timeouts that the CLI's retries need, whose owner may die."""

    patience_s: float = PATIENCE_S

    async def drive(self) -> None:
        try:
            await super().drive()
        finally:
            left = (await self.store.get_session(self.session.id)).lease
            if left is not None:
                await self.store.drop_lease(self.session.id, left.epoch)

    async def turn(self) -> dict[str, Any]:
        """Drives the session until it is parked, and returns the stop reason."""
        await self.drive()
        return await self.until_idle()

    async def errors(self) -> list[dict[str, Any]]:
        return [e.payload["error"] for e in await self.log("session.error")]

    async def retried(self) -> list[str]:
        return [e["type"] for e in await self.errors() if e["retry_status"]["type"] == "retrying"]

    async def checked_log(self) -> list[Event]:
        """Returns the whole log. Asserts that it has no gaps and repeats, and that each event has the official SDK's
        type."""
        log = await self.log()
        assert [e.seq for e in log] == list(range(1, len(log) + 1))
        assert len({e.id for e in log}) == len(log)
        for event in log:
            check_event(event.wire())
        return log


async def rig(tmp_path: Path, model_url: str, prompt: str, **more: Any) -> Rig:
    store = CoreStore(MemoryBackend())
    session: Session = await store.create_session(
        KEY, agent=Agent(), environment=Environment(), title=None, metadata={}, initial=[user(prompt)]
    )
    return Rig(store, session, tmp_path, model_url, Limits(hot_window_s=0, idle_timeout_s=0), **more)


# -- the model's service


async def test_a_refused_key_ends_the_turn_at_once_and_says_what_to_mend(tmp_path: Path):
    fake = FakeAnthropic()
    async with serving(fake.app) as upstream:
        async with endpoint(upstream, key="sk-ant-wrong") as url:
            h = await rig(tmp_path, url, "Read hello.txt")
            assert (await h.turn())["type"] == "retries_exhausted"
        [error] = await h.errors()
        assert error["type"] == "model_request_failed_error"
        assert "ANTHROPIC_API_KEY" in error["message"]
        assert "./hitl up" in error["message"]
        assert "sk-ant-wrong" not in error["message"]
        assert len(fake.requests) == 1
        assert await h.said() == ""
        async with endpoint(upstream) as url:
            h.model_url = url
            await h.send(user("Write hello.txt with a greeting"))
            assert (await h.turn())["type"] == "requires_action"
    await h.checked_log()
    assert "Read hello.txt" in str(fake.requests[-1]["messages"])


MISFORTUNES: dict[str, tuple[list[Misfortune], list[str]]] = {
    "429": ([limited, limited], ["model_rate_limited_error"] * 2),
    "529": ([overloaded, overloaded], ["model_overloaded_error"] * 2),
    "silence": ([silent], ["model_request_failed_error"]),
    "cut": ([stream_that_ends("cut")] * 2, ["model_request_failed_error"] * 2),
    "malformed": ([stream_that_ends("malformed")], []),
    "no API": ([no_api_at_all], []),
}
# As the others, or the CLI waits for some seconds before it asks again.
SLOW_TO_PASS = ("529", "silence", "no API", "malformed")


@pytest.mark.parametrize(
    "what", [pytest.param(what, marks=[pytest.mark.slow] * (what in SLOW_TO_PASS)) for what in MISFORTUNES]
)
async def test_what_passes_is_retried_and_nothing_is_said_or_done_twice(tmp_path: Path, what: str):
    misfortunes, told = MISFORTUNES[what]
    fake = FakeAnthropic(*misfortunes)
    async with model(fake, timeout=SILENT) as url:
        h = await rig(tmp_path, url, "Read hello.txt")
        assert (await h.turn())["type"] == "end_turn"
    assert await h.retried() == told
    assert len(await h.errors()) == len(told)
    log = await h.checked_log()
    assert [e.type for e in log].count("agent.tool_use") == 1
    assert (await h.said()).count("[offline model]") == 1


async def test_what_breaks_in_the_middle_of_the_work_is_taken_up_where_it_was(tmp_path: Path):
    fake = FakeAnthropic()
    async with model(fake) as url:
        h = await rig(tmp_path, url, "Write hello.txt with a greeting")
        stop = await h.turn()
        fake.misfortunes = [overloaded, stream_that_ends("cut")]
        await h.confirm(stop["event_ids"][0])
        assert (await h.turn())["type"] == "end_turn"
    assert (h.workspace / "hello.txt").exists()
    log = await h.checked_log()
    assert [e.type for e in log].count("agent.tool_result") == 1
    assert len(await h.retried()) == 2


@pytest.mark.slow
async def test_a_service_that_stays_silent_is_asked_twice(tmp_path: Path):
    fake = FakeAnthropic(silent, silent)
    async with model(fake, timeout=SILENT) as url:
        h = await rig(tmp_path, url, "Read hello.txt")
        assert (await h.turn())["type"] == "retries_exhausted"
        assert len(fake.requests) == 2
        assert "did not answer in time" in (await h.errors())[-1]["message"]
        await h.send(user("Read hello.txt"))
        assert (await h.turn())["type"] == "end_turn"
    await h.checked_log()


@pytest.mark.slow
async def test_a_service_that_cannot_be_reached_ends_the_turn_after_the_cli_s_retries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(claude_cli, "MODEL_RETRIES", 3)  # all of them take more than a minute
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # bound and not listening: every connection is refused
        async with endpoint(f"http://127.0.0.1:{nobody.getsockname()[1]}") as url:
            h = await rig(tmp_path, url, "Read hello.txt")
            assert (await h.turn())["type"] == "retries_exhausted"
    assert await h.retried() == ["model_overloaded_error"] * claude_cli.MODEL_RETRIES
    last = (await h.errors())[-1]
    assert last["retry_status"]["type"] == "exhausted"
    assert "ANTHROPIC_BASE_URL" in last["message"]
    async with model(FakeAnthropic()) as url:
        h.model_url = url
        await h.send(user("Read hello.txt"))
        assert (await h.turn())["type"] == "end_turn"
    await h.checked_log()


@pytest.mark.slow
async def test_a_rate_limit_that_lasts_for_minutes_is_told_at_once(tmp_path: Path):
    async def for_minutes(_request: Request) -> Response:
        return _problem(429, "rate_limit_error", "come back in ten minutes", {"retry-after": "600"})

    async with model(FakeAnthropic(for_minutes)) as url:
        h = await rig(tmp_path, url, "Read hello.txt")
        assert (await h.turn())["type"] == "retries_exhausted"
        [error] = await h.errors()
        assert error["type"] == "model_rate_limited_error"
        assert "come back in ten minutes" in error["message"]
        await h.send(user("Read hello.txt"))
        assert (await h.turn())["type"] == "end_turn"


# -- the CLI


def program(path: Path, script: str, mode: int = 0o755) -> Path:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(mode)
    return path


def missing(folder: Path) -> Path:
    return folder / "nothing-here"


def a_folder(folder: Path) -> Path:
    (folder / "folder").mkdir()
    return folder / "folder"


def not_executable(folder: Path) -> Path:
    (folder / "plain").write_text("#!/bin/sh\n")
    return folder / "plain"


def too_old(folder: Path) -> Path:
    return program(folder / "old", "echo '1.0.0 (Claude Code)'")


def crashing(folder: Path) -> Path:
    return program(folder / "crashing", "echo 'libfoo.so.1 is missing' >&2; exit 3")


def hanging(folder: Path) -> Path:
    return program(folder / "hanging", "exec sleep 3600")


def crashing_later(folder: Path) -> Path:
    told = 'if [ "$1" = --version ]; then echo 2.1.330; exit; fi'
    return program(folder / "later", f"{told}\necho 'no space for the cache' >&2; exit 3")


def for_its_owner_only(folder: Path) -> Path:
    return program(folder / "own", "echo 2.1.330", 0o700)


def hanging_later(folder: Path) -> Path:
    told = 'if [ "$1" = --version ]; then echo 2.1.330; exit; fi'
    return program(folder / "hanging-later", f"{told}\nexec sleep 3600")


BROKEN_CLIS: dict[Callable[[Path], Path], str] = {
    missing: "there is no program at",
    a_folder: "there is no program at",
    not_executable: "there is no program at",
    too_old: "1.0.0",
    crashing: "libfoo.so.1 is missing",
    hanging: "nothing for",
    crashing_later: "no space for the cache",
    hanging_later: "said nothing for",
}
if os.getuid() == 0:  # else the agent is the service's own user
    BROKEN_CLIS[for_its_owner_only] = "may not run the Claude Code CLI"


@pytest.mark.parametrize(
    "broken",
    [
        pytest.param(broken, marks=[pytest.mark.slow] * (broken not in (missing, too_old, crashing)))
        for broken in BROKEN_CLIS
    ],
    ids=lambda f: f.__name__,
)
async def test_a_cli_that_is_no_good_ends_the_turn_with_what_to_mend_and_is_not_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: Callable[[Path], Path]
):
    if broken in (
        hanging,
        hanging_later,
    ):  # what crashes must not be taken for what hangs, however busy the machine is
        monkeypatch.setattr(claude_cli, "VERSION_TIMEOUT_S", 5.0)
        monkeypatch.setattr(claude_cli, "START_TIMEOUT_S", 5.0)
    async with model(FakeAnthropic()) as url:
        h = await rig(tmp_path, url, "Read hello.txt", cli_path=broken(tmp_path))
        assert (await h.turn())["type"] == "retries_exhausted"
        [error] = await h.errors()
        assert BROKEN_CLIS[broken] in error["message"]
        if broken is not crashing_later:
            assert "HITL_CLI_PATH" in error["message"]
        monkeypatch.undo()
        h.cli_path = None
        await h.send(user("Read hello.txt"))
        assert (await h.turn())["type"] == "end_turn"
    log = await h.checked_log()
    assert [e.type for e in log].count("agent.tool_use") == 2


def test_the_bundled_cli_is_not_asked_for_its_version_and_another_is_asked_once(tmp_path: Path):
    check_cli(bundled_cli())
    counting = program(tmp_path / "claude", f"echo asked >> {tmp_path}/asked; echo '2.1.330 (Claude Code)'")
    check_cli(counting)
    check_cli(counting)
    assert (tmp_path / "asked").read_text() == "asked\n"
    program(counting, "echo '2.1.316 (Claude Code)'")
    with pytest.raises(EngineError, match=r"2\.1\.316"):
        check_cli(counting)


async def test_a_cli_too_old_for_the_gate_never_meets_what_was_parked_and_the_call_runs_with_a_good_one(
    tmp_path: Path,
):
    async with model(FakeAnthropic()) as url:
        h = await rig(tmp_path, url, "Write hello.txt with a greeting")
        stop = await h.turn()
        await h.confirm(stop["event_ids"][0])
        told = f'echo "$1" >> {tmp_path}/asked; echo 2.1.316'
        h.cli_path = program(tmp_path / "older", told)
        assert (await h.turn())["type"] == "retries_exhausted"
        assert (tmp_path / "asked").read_text() == "--version\n"
        assert claude_cli.LEAST_CLI in (await h.errors())[-1]["message"]
        h.cli_path = None
        await h.send(user("Read hello.txt"))
        assert (await h.turn())["type"] == "end_turn"
    assert (h.workspace / "hello.txt").exists()
    log = await h.checked_log()
    assert [e.type for e in log].count("user.tool_confirmation") == 1


# -- folders and files


async def test_a_workspace_replaced_by_a_file_while_parked_is_told_and_can_be_mended(tmp_path: Path):
    async with model(FakeAnthropic()) as url:
        h = await rig(tmp_path, url, "Write hello.txt with a greeting")
        stop = await h.turn()
        h.workspace.rmdir()
        h.workspace.write_text("in its place")
        await h.confirm(stop["event_ids"][0])
        assert (await h.turn())["type"] == "retries_exhausted"
        assert str(h.workspace) in (await h.errors())[-1]["message"]
        assert h.workspace.read_text() == "in its place"
        h.workspace.unlink()
        await h.send(user("Read hello.txt"))
        assert (await h.turn())["type"] == "end_turn"
    assert (h.workspace / "hello.txt").exists()
    used = [e.payload["name"] for e in await h.checked_log() if e.type == "agent.tool_use"]
    assert used == ["Write", "Read"]


async def test_a_workspace_deleted_while_parked_is_made_anew_and_the_call_runs(tmp_path: Path):
    async with model(FakeAnthropic()) as url:
        h = await rig(tmp_path, url, "Write hello.txt with a greeting")
        stop = await h.turn()
        h.workspace.rmdir()
        await h.confirm(stop["event_ids"][0])
        assert (await h.turn())["type"] == "end_turn"
    assert (h.workspace / "hello.txt").exists()
    await h.checked_log()
