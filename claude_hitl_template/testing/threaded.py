"""Runs the in-process service in its own thread, so that tests can use blocking clients."""

import asyncio
import threading
from collections.abc import Coroutine, Generator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from claude_hitl_template.testing.local_service import LocalService, serve_in_process


@dataclass(frozen=True)
class Threaded:
    """The service, and the event loop that it runs in."""

    service: LocalService
    loop: asyncio.AbstractEventLoop

    def run[T](self, work: Coroutine[Any, Any, T]) -> T:
        """Runs `work` in the service's loop, to which its store belongs, and returns the result."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()


@contextmanager
def serve_in_thread(folder: Path, **options: Any) -> Generator[Threaded]:
    """`serve_in_process` for code without an event loop, with the same options and errors."""
    started: Future[Threaded] = Future()
    ended = threading.Event()

    async def serve() -> None:
        async with serve_in_process(folder, **options) as service:
            started.set_result(Threaded(service, asyncio.get_running_loop()))
            await asyncio.to_thread(ended.wait)

    failures: list[Exception] = []

    def run() -> None:
        try:
            asyncio.run(serve())
        except Exception as error:  # noqa: BLE001 - raised again in the thread that waits
            failures.append(error)
            if not started.done():
                started.set_exception(error)

    thread = threading.Thread(target=run, name="service")
    thread.start()
    try:
        yield started.result()
    finally:
        ended.set()
        thread.join()
    if failures:
        raise failures[0]
