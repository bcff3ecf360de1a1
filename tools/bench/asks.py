"""Sessions that ask for one call after another: from their creation, through their decisions, hot and parked."""

import time
from collections.abc import Callable

from claude_hitl_template.cli.common import step
from tools.bench.contenders import (
    CALL,
    READ,
    SETTLE_S,
    Conversation,
    SdkConversation,
    confirmation,
    conversation,
)
from tools.bench.figures import Measure
from tools.bench.service_fixture import BenchService

HOT = {"first command": CALL, "second command": CALL, "later command that writes no file": READ}
TO_WAITING_X, WITHOUT_SPARE_MS = 1.0, 1500
HOT_MORE_MS = 40
PARKED_MS = {True: 600, False: 1500}
MS = 1000.0

type New = Callable[..., Measure]


def hot_asks(one: BenchService, theirs: SdkConversation, new: New, rounds: int) -> None:
    """A new session, spare owner ready, that asks for calls; the SDK alone does the same in a new CLI."""
    waiting = new("create to waiting for a decision, spare owner ready", "ms", "ratio of p50", TO_WAITING_X)
    results = [
        new(f"allow to tool result, hot, {which}", "ms", "difference of p50", HOT_MORE_MS) for which in HOT
    ]
    with step("Measuring new sessions that ask for calls"):
        for number in range(rounds + 1):  # the first one warms up
            measured_s = _ours(one), theirs.asks([*HOT.values()])
            for side, (waiting_s, results_s) in zip(("ours", "bare"), measured_s, strict=True):
                if number:
                    getattr(waiting, side).append(waiting_s * MS)
                    for made, result_s in zip(results, results_s, strict=True):
                        getattr(made, side).append(result_s * MS)


def _ours(one: BenchService) -> tuple[float, list[float]]:
    """Seconds until the first call waits, and for each call from its decision to its result."""
    one.until_spare()
    began = time.perf_counter()
    first, *later = HOT.values()
    with conversation(one.client, first) as ours:
        event_id = ours.until_asked()
        waiting_s, results_s = time.perf_counter() - began, [_result(ours, event_id)]
        for prompt in later:
            ours.say(prompt)
            results_s.append(_result(ours, ours.until_asked()))
    return waiting_s, results_s


def _result(ours: Conversation, event_id: str) -> float:
    """Seconds from the decision on a call that has waited for a while to its result; returns when the turn is over."""
    time.sleep(SETTLE_S)
    result_s = ours.result(event_id)
    ours.until_rest()
    return result_s


def parked_asks(one: BenchService, new: New, rounds: int, *, spare: bool) -> None:
    """Decisions on parked calls; without a spare owner also the creation of a session."""
    with_spare = f"spare owner {'ready' if spare else 'none'}"
    parked = new(f"decision to tool result, parked, {with_spare}", "ms", "p50", PARKED_MS[spare])
    created = None if spare else new(f"create to waiting, {with_spare}", "ms", "p50", WITHOUT_SPARE_MS)
    with step(f"Measuring decisions on parked calls, {with_spare}"):
        for number in range(rounds + 1):
            created_s, result_s = _parked(one)
            if number:
                parked.ours.append(result_s * MS)
                if created is not None:
                    created.ours.append(created_s * MS)


def _parked(one: BenchService) -> tuple[float, float]:
    """Seconds until the call waits, and from its decision to its result."""
    one.until_spare()
    began = time.perf_counter()
    with conversation(one.client, CALL) as ours:
        event_id = ours.until_asked()
        created_s = time.perf_counter() - began
        one.until_parked(ours.id)
        one.until_spare()
        result_s = ours.result(event_id)
        ours.until_rest()
    return created_s, result_s


def decide(one: BenchService, session_id: str, event_id: str) -> None:
    one.client.post(f"/v1/sessions/{session_id}/events", {"events": [confirmation(event_id, "allow")]})
