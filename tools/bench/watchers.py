"""Many clients that only read event streams, in a process of their own.

    python -m tools.bench.watchers

Reads one JSON object: `host`, `port`, `key`, `paths` and `count`. Opens `count` streams, spread over the paths, and answers
{"open": count} when each has its first bytes. Then answers each further line with {"late_ms": [...]}: for each stream how
long after its commit the last `session.status_idle` arrived.
"""

import asyncio
import json
import re
import sys
import time
from datetime import datetime
from typing import Any

RESTED = re.compile(rb'"session.status_idle"')
COMMITTED = re.compile(rb'"processed_at":\s*"([^"]+)"')
MS = 1000.0


class Watcher:
    def __init__(self, request: bytes) -> None:
        self._request = request
        self.opened = asyncio.Event()
        self.late_ms: float | None = None

    async def follow(self, host: str, port: int) -> None:
        """Raises ConnectionError when the service answers with an error, or ends the stream."""
        reader, writer = await asyncio.open_connection(host, port)
        try:
            writer.write(self._request)
            head = await reader.readuntil(b"\r\n\r\n")
            if b" 200 " not in head.split(b"\r\n", 1)[0]:
                raise ConnectionError(f"a watcher was refused: {head[:80]!r}")
            self.opened.set()
            while data := await reader.read(65536):
                self._note(data)
        finally:
            writer.close()
        raise ConnectionError("the service ended a watcher's stream")

    def _note(self, data: bytes) -> None:
        if RESTED.search(data):
            committed = datetime.fromisoformat(COMMITTED.findall(data)[-1].decode())
            self.late_ms = (time.time() - committed.timestamp()) * MS


async def main() -> None:
    asked = json.loads(await asyncio.to_thread(sys.stdin.readline))
    paths = asked["paths"]
    watchers = [Watcher(_request(asked, paths[n % len(paths)])) for n in range(asked["count"])]
    async with asyncio.TaskGroup() as group:
        following = [group.create_task(w.follow(asked["host"], asked["port"])) for w in watchers]
        for watcher in watchers:
            await watcher.opened.wait()
        _say({"open": len(watchers)})
        while await asyncio.to_thread(sys.stdin.readline):
            _say({"late_ms": [w.late_ms for w in watchers if w.late_ms is not None]})
        for task in following:
            task.cancel()


def _request(asked: dict[str, Any], path: str) -> bytes:
    lines = (
        f"GET {path} HTTP/1.1",
        f"Host: {asked['host']}",
        f"x-api-key: {asked['key']}",
        "accept: text/event-stream",
        f"last-event-id: {asked['after']}",
    )
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def _say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
