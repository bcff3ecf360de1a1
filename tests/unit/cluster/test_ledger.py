"""Calls of the ledger over Ray: which are repeated, which use the object store, and the error that a defect becomes."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import grpc
import pytest
import structlog
from grpc.aio import AioRpcError, Metadata
from ray.exceptions import ActorUnavailableError, ObjectStoreFullError, RayTaskError

from claude_hitl_template.config.secret_files import SigningKey
from claude_hitl_template.domain.people import Actor
from claude_hitl_template.errors import InternalError, NotFound, Unavailable
from claude_hitl_template.store.access import Authority, Dispatcher
from claude_hitl_template.store.core import CoreStore
from claude_hitl_template.store.protocol import OWN_KEY, Clients
from claude_hitl_template.testing.memory_backend import MemoryBackend

with warnings.catch_warnings(
    action="ignore", category=DeprecationWarning
):  # Ray Serve's own, as it is imported
    import claude_hitl_template.cluster.ledger_handle  # noqa: F401 - a line imports it in the end
    from claude_hitl_template.cluster.ledger import LedgerService
    from claude_hitl_template.cluster.ledger_line import Line, reach

TOO_LARGE = AioRpcError(grpc.StatusCode.RESOURCE_EXHAUSTED, Metadata(), Metadata())
AUTHORITY = Authority(SigningKey(b"k" * 32))
BROKEN = AioRpcError(grpc.StatusCode.UNKNOWN, Metadata(), Metadata())
GONE = ActorUnavailableError("gone", b"0" * 16)

type Answer = Callable[[], Any]


class Handle:
    """A Serve handle that gives these answers or errors, one per call; `calls` records how each was sent, and its
    arguments."""

    def __init__(self, answers: Sequence[Any], *, by_reference: bool = False) -> None:
        self._answers, self._by_reference = answers, by_reference
        self.calls: list[tuple[bool, str, dict[str, Any]]] = []

    def options(self, *, _by_reference: bool) -> "Handle":
        other = Handle(self._answers, by_reference=_by_reference)
        other.calls = self.calls
        return other

    @property
    def call(self) -> "Handle":
        return self

    @property
    def socket(self) -> "Nowhere":
        return Nowhere()

    async def remote(self, capability: str, method: str, *_args: Any, **kwargs: Any) -> Any:
        assert capability == "ours"
        answer = self._answers[len(self.calls)]
        self.calls.append((self._by_reference, method, kwargs))
        if isinstance(answer, BaseException):
            raise answer
        return answer


class Nowhere:
    """Says that the ledger has no socket."""

    async def remote(self) -> None:
        return None


async def test_what_is_too_large_for_one_message_goes_by_the_object_store() -> None:
    handle = Handle([TOO_LARGE, (True, 7)])
    assert await reach(Clients, Line(handle), "ours").last_seq("s", None) == 7
    assert [by_reference for by_reference, _, _ in handle.calls] == [False, True]


async def test_what_may_pass_is_repeated() -> None:
    handle = Handle([GONE, (True, 7)])
    assert await reach(Clients, Line(handle), "ours").last_seq("s", None) == 7


@pytest.mark.parametrize(
    "failures",
    [
        pytest.param([BROKEN], id="an answer that cannot be sent"),
        pytest.param([RayTaskError("call", "Traceback ...", KeyError("x"))], id="an error that Ray wraps"),
        pytest.param([TOO_LARGE, TOO_LARGE], id="too large either way"),
        pytest.param([TOO_LARGE, ObjectStoreFullError("full")], id="no room in the object store"),
    ],
)
async def test_what_would_come_again_is_told_at_once_with_the_methods_name(failures: list[Exception]) -> None:
    handle = Handle(failures)
    with pytest.raises(InternalError, match="last_seq"):
        await reach(Clients, Line(handle), "ours").last_seq("s", None)
    assert len(handle.calls) == len(failures)


async def test_an_error_of_ours_comes_back_as_what_it_is() -> None:
    with pytest.raises(NotFound, match="no session"):
        await reach(Clients, Line(Handle([(False, NotFound("no session"))])), "ours").last_seq("s", None)


async def test_a_call_without_an_idempotency_key_gets_one_that_its_repetition_has_too() -> None:
    handle = Handle([GONE, (True, [])])
    await reach(Clients, Line(handle), "ours").send_events("s", None, [], by=Actor(name="ann"))
    first, second = (said["idempotency_key"] for _, _, said in handle.calls)
    assert first == second
    assert first.startswith(OWN_KEY)


class Ledger(LedgerService):
    def __init__(self, store: Any) -> None:
        self._desk = Dispatcher(store, AUTHORITY)


async def test_a_defect_of_the_ledger_is_logged_with_its_traceback_and_is_no_try_again() -> None:
    ledger = Ledger(CoreStore(MemoryBackend()))
    with structlog.testing.capture_logs() as logged:
        ok, error = await ledger.call(AUTHORITY.ingress(), "find_identity")
    assert not ok
    assert isinstance(error, InternalError)
    assert not isinstance(error, Unavailable)
    assert [(line["event"], line["method"], line["exc_info"]) for line in logged] == [
        ("the ledger failed", "find_identity", True)
    ]
