"""Limits failed sign-ins, in each replica, without giving anyone a way to lock others out."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from claude_hitl_template.domain.rate_limit import Backoff, Throttle, network_of
from claude_hitl_template.errors import RateLimited

PERIOD_S = 300.0
PER_NETWORK = 50  # of any accounts, in PERIOD_S
PER_ACCOUNT = 100  # from any networks, in PERIOD_S
FREE, FIRST_S, LONGEST_S, FORGOTTEN_S = 5, 2.0, 900.0, 3600.0


@dataclass(frozen=True)
class Attempt:
    """One attempt to sign in.

    `known`: this browser has signed in to this account before. Then failures elsewhere do not delay it.
    """

    account: str
    address: str
    known: bool = False

    @property
    def network(self) -> str:
        return network_of(self.address)

    @property
    def pair(self) -> str:
        return f"{self.network} {self.account.casefold()}"


class Attempts:
    """Counts attempts before their outcome is known, so that concurrent ones count.

    - Of one account from one network: after FREE failures each wait doubles, from FIRST_S to LONGEST_S. Another network
      is not affected.
    - From one network: PER_NETWORK in PERIOD_S, whatever the accounts.
    - On one account: PER_ACCOUNT in PERIOD_S, from whatever networks, for browsers that it is not `known` in.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._pairs = Backoff(
            free=FREE, first_s=FIRST_S, longest_s=LONGEST_S, forgotten_s=FORGOTTEN_S, clock=clock
        )
        self._networks = Throttle(PER_NETWORK, PERIOD_S, clock=clock)
        self._accounts = Throttle(PER_ACCOUNT, PERIOD_S, clock=clock)

    def begin(self, attempt: Attempt) -> None:
        """Counts the attempt as failed until `succeeded`. Raises RateLimited, which says how long to wait."""
        wait_s = max(
            self._pairs.wait_s(attempt.pair),
            self._networks.wait_s(attempt.network),
            0.0 if attempt.known else self._accounts.wait_s(_account(attempt)),
        )
        if wait_s:
            raise RateLimited("too many sign-ins failed", wait_s)
        self._pairs.failed(attempt.pair)
        self._networks.take(attempt.network)
        if not attempt.known:
            self._accounts.take(_account(attempt))

    def succeeded(self, attempt: Attempt) -> None:
        """Takes the attempt's count back, and forgets the failures before it of this account from this network."""
        self._pairs.succeeded(attempt.pair)
        self._networks.give_back(attempt.network)
        if not attempt.known:
            self._accounts.give_back(_account(attempt))


def _account(attempt: Attempt) -> str:
    return attempt.account.casefold()
