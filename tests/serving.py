"""Serves test applications on free ports of 127.0.0.1, in the test's own event loop or in a thread."""

import asyncio
import socket
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI

from claude_hitl_template.cluster.local_sockets import KEEP_ALIVE_S
from claude_hitl_template.model.endpoint import Upstream, build_router


@asynccontextmanager
async def serving(app: Any) -> AsyncGenerator[str]:
    """Serves an ASGI application during the context, and yields its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = _server(app)
        task = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            while not server.started:
                await asyncio.sleep(0.01)
            yield _address(listener)
        finally:
            server.should_exit = True
            await task


@contextmanager
def loopback(app: Any, *, port: int = 0, **options: bool) -> Generator[str]:
    """As `serving`, for tests without an event loop; leaves no thread behind. `port`: 0 for a free one; `options` are
    uvicorn's."""
    with socket.create_server(("127.0.0.1", port)) as listener:
        server = _server(app, **options)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield _address(listener)
        finally:
            server.should_exit = True
            thread.join()


async def _anyone(_token: str) -> None:
    """Accepts any token."""


def model_app(upstream: Upstream, verify: Callable[[str], Awaitable[None]] = _anyone) -> FastAPI:
    """Builds the model endpoint without the rest of the service."""
    app = FastAPI()
    app.include_router(build_router(upstream, verify))
    return app


def _server(app: Any, **options: bool) -> uvicorn.Server:
    # Simulated failures would fill the log with the tracebacks of broken connections.
    config = uvicorn.Config(
        app, log_level="critical", timeout_graceful_shutdown=1, timeout_keep_alive=KEEP_ALIVE_S, **options
    )  # type: ignore[arg-type]
    return uvicorn.Server(config)


def _address(listener: socket.socket) -> str:
    return f"http://127.0.0.1:{listener.getsockname()[1]}"
