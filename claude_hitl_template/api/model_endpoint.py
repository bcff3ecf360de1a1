"""The application under /model: the model endpoint behind session tokens."""

import time
from collections import OrderedDict
from collections.abc import Callable

from fastapi import FastAPI

from claude_hitl_template.api import problems
from claude_hitl_template.config.secret_files import SigningKey
from claude_hitl_template.errors import NotFound, Unauthorized
from claude_hitl_template.model import tokens
from claude_hitl_template.model.endpoint import Upstream, build_router
from claude_hitl_template.store.protocol import Clients

REMEMBER_S = 1.0  # for how long a lease that was found is taken to hold
REMEMBERED = 10_000


class _Leases:
    """Whether an owner still holds its session's lease. A request of the model does not wait for the ledger if the lease
    held a moment ago; an owner that lost it is refused within REMEMBER_S, and can write nothing in that time."""

    def __init__(self, store: Clients, clock: Callable[[], float]) -> None:
        self._store, self._clock = store, clock
        self._found: OrderedDict[str, tuple[int, float]] = OrderedDict()  # epoch, and until when

    async def hold(self, session_id: str, epoch: int) -> bool:
        found = self._found.get(session_id)
        if found is not None and found[0] == epoch and self._clock() < found[1]:
            return True
        asked = self._clock()
        try:
            lease = (await self._store.get_session(session_id)).lease
        except NotFound:
            lease = None
        self._found.pop(session_id, None)
        if lease is None or lease.epoch != epoch:
            return False
        self._found[session_id] = (epoch, asked + REMEMBER_S)
        if len(self._found) > REMEMBERED:
            self._found.popitem(last=False)
        return True


def build_model_app(
    upstream: Upstream,
    store: Clients,
    signing_key: SigningKey,
    clock: Callable[[], float] = time.monotonic,
) -> FastAPI:
    """The endpoint in front of `upstream`. A token opens it as long as its session's lease has the token's epoch."""
    leases = _Leases(store, clock)

    async def verify(token: str) -> None:
        session_id, epoch = tokens.check(signing_key.secret, token)
        if not await leases.hold(session_id, epoch):
            raise Unauthorized("another process drives this session now")

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.include_router(build_router(upstream, verify))
    problems.install_bare(app)
    return app
