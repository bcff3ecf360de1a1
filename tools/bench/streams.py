"""What a turn costs, and how late events arrive, while many clients watch its session, or others."""

import json
import subprocess
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from urllib.parse import urlsplit

from claude_hitl_template.cli.common import step
from claude_hitl_template.config.secret_files import read_api_key
from claude_hitl_template.errors import EngineError
from tools.bench.contenders import TEXT, Conversation, conversation
from tools.bench.figures import Measure
from tools.bench.service_fixture import BenchService

# By number of watchers: times a turn without them, and ms until the last of them has an event (p95).
WATCHERS = {50: (None, None), 200: (2.0, 300), 1000: (6.0, 1500)}
SILENT, OTHERS, SILENT_X = 500, 5, 1.1
MS = 1000.0

type New = Callable[..., Measure]


def watched_turns(one: BenchService, new: New, rounds: int) -> None:
    """The session without watchers stands where the bare SDK stands elsewhere."""
    with conversation(one.client, TEXT) as ours:
        ours.until_rest()
        one.until_spare()
        for count, (times, late_ms) in WATCHERS.items():
            turn = new(f"text turn, {count} watchers (bare: none)", "ms", "ratio of p50", times)
            with _measured(ours, turn, count, rounds), watchers(one, [ours.id], count) as ask:
                ours.turn(TEXT)
                late = new(f"event at the last of {count} watchers", "ms", "p95", late_ms)
                for _ in range(rounds):
                    turn.ours.append(ours.turn(TEXT) * MS)
                    late.ours.append(max(ask()["late_ms"]))
        others = [_quiet_session(one) for _ in range(OTHERS)]
        name = f"text turn, {SILENT} silent watchers of other sessions (bare: none)"
        turn = new(name, "ms", "ratio of p50", SILENT_X)
        with _measured(ours, turn, SILENT, rounds), watchers(one, others, SILENT):
            ours.turn(TEXT)
            turn.ours += [ours.turn(TEXT) * MS for _ in range(rounds)]
        for other in others:
            one.client.delete(f"/v1/sessions/{other}")


def _quiet_session(one: BenchService) -> str:
    body = {"agent": "default", "environment_id": "default"}
    return str(one.client.post("/v1/sessions", body)["id"])


@contextmanager
def _measured(ours: Conversation, turn: Measure, count: int, rounds: int) -> Generator[None]:
    """Measures the turns without watchers first."""
    with step(f"Measuring turns with {count} watchers"):
        ours.turn(TEXT)
        turn.bare += [ours.turn(TEXT) * MS for _ in range(rounds)]
        yield


@contextmanager
def watchers(
    one: BenchService, session_ids: Sequence[str], count: int
) -> Generator[Callable[[], dict[str, list[float]]]]:
    """So many open streams; call what is given for what they saw last. Raises EngineError when one is refused."""
    place = urlsplit(one.settings.base_url)
    asked = {
        "host": place.hostname,
        "port": place.port,
        "key": read_api_key(one.settings),
        "count": count,
        "after": 0,
        "paths": [f"{place.path}/v1/sessions/{each}/events/stream" for each in session_ids],
    }
    command = [sys.executable, "-m", "tools.bench.watchers"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:  # noqa: S603
        stdin, stdout = process.stdin, process.stdout
        if stdin is None or stdout is None:
            raise AssertionError("Popen opens both")

        def ask(what: object = "now") -> dict[str, list[float]]:
            stdin.write(json.dumps(what) + "\n")
            stdin.flush()
            line = stdout.readline()
            if not line:
                raise EngineError("the watchers ended; what they said is above")
            return json.loads(line)

        try:
            ask(asked)
            yield ask
        finally:
            stdin.close()
