"""Text turns of several sessions at once, and the processor time of one."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Protocol

from claude_hitl_template.cli.client import Client
from claude_hitl_template.cli.common import step
from tools.bench.contenders import TEXT, Conversation, SdkConversation, conversation
from tools.bench.figures import Measure
from tools.bench.service_fixture import CALM_S, BenchService
from tools.bench.usage import CpuUse

SESSIONS = 8
TURNS = 10
LEAST_A_SECOND = 15
MS = 1000.0

type New = Callable[..., Measure]
type OpenBare = Callable[[Path], AbstractContextManager[SdkConversation]]


class _Talks(Protocol):
    def turn(self, prompt: str) -> float: ...


def cpu_of_turns(
    one: BenchService, ours: Conversation, theirs: SdkConversation, new: New, rounds: int
) -> None:
    """What a text turn costs all processes of either side; noise of the machine hardly changes it."""
    made = new("processor time of a text turn (bare: client and CLI)", "ms", "ratio of p50")
    parts = {part: new(f"processor time of a text turn: {part}", "ms") for part in ("Ledger", "Ingress")}
    replicas = {part: one.replica(part) for part in parts}
    with step("Measuring the processor time of text turns"):
        for _ in range(rounds):
            used = {part: CpuUse(lambda found=found: [found]) for part, found in replicas.items()}
            whole, alone = CpuUse(one.processes), CpuUse(theirs.processes)
            for _ in range(TURNS):
                ours.turn(TEXT)
            made.ours.append(whole.seconds() * MS / TURNS)
            for part, cpu in used.items():
                parts[part].ours.append(cpu.seconds() * MS / TURNS)
            for _ in range(TURNS):
                theirs.turn(TEXT)
            made.bare.append(alone.seconds() * MS / TURNS)


def turns_together(one: BenchService, alone: OpenBare, folder: Path, new: New, rounds: int) -> None:
    """Eight sessions, each of which says the next message when its turn is over. `alone` connects the SDK alone."""
    made = new(f"text turns a second, {SESSIONS} sessions at once", "1/s", "p50, at least", LEAST_A_SECOND)
    with step(f"Measuring text turns of {SESSIONS} sessions at once"), ExitStack() as stack:
        clients = [Client.open(one.settings) for _ in range(SESSIONS)]
        ours = [stack.enter_context(conversation(client, TEXT)) for client in clients]
        for talk in ours:
            talk.until_rest()
        theirs = [stack.enter_context(alone(folder / str(number))) for number in range(SESSIONS)]
        time.sleep(CALM_S)  # so many sessions may leave no room for a spare owner
        for number in range(rounds + 1):  # the first one warms up
            for samples, side in ((made.ours, ours), (made.bare, theirs)):
                a_second = _at_once(side)
                if number:
                    samples.append(a_second)
    for client in clients:
        client.close()


def _at_once(side: Sequence[_Talks]) -> float:
    """Turns a second."""

    def talk(one: _Talks) -> None:
        for _ in range(TURNS):
            one.turn(TEXT)

    with ThreadPoolExecutor(len(side)) as pool:
        began = time.perf_counter()
        list(pool.map(talk, side))
        return len(side) * TURNS / (time.perf_counter() - began)
