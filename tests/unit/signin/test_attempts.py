"""Guessing gets slower and slower, and locks out no one but the guesser."""

import pytest

from claude_hitl_template.errors import RateLimited
from claude_hitl_template.signin import attempts
from claude_hitl_template.signin.attempts import Attempt, Attempts

ANN = Attempt("ann", "192.0.2.1")


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ours(clock: Clock) -> Attempts:
    return Attempts(clock)


def wait_s(ours: Attempts, attempt: Attempt) -> float:
    with pytest.raises(RateLimited) as refused:
        ours.begin(attempt)
    return refused.value.retry_after_s


def test_each_failure_doubles_the_wait_up_to_a_quarter_of_an_hour(ours: Attempts, clock: Clock) -> None:
    for _ in range(attempts.FREE):
        ours.begin(ANN)
    waits: list[float] = []
    for _ in range(12):
        ours.begin(ANN)
        waits.append(wait_s(ours, ANN))
        clock.now += waits[-1]
    assert waits[:4] == [2, 4, 8, 16]
    assert waits[-1] == attempts.LONGEST_S == 900


def test_what_is_refused_does_not_lengthen_the_wait(ours: Attempts, clock: Clock) -> None:
    for _ in range(attempts.FREE + 1):
        ours.begin(ANN)
    assert [wait_s(ours, ANN) for _ in range(50)] == [2.0] * 50


def test_the_owner_of_an_account_signs_in_from_elsewhere_meanwhile(ours: Attempts) -> None:
    for _ in range(attempts.FREE + 1):
        ours.begin(ANN)
    wait_s(ours, ANN)
    ours.begin(Attempt("ann", "198.51.100.7"))
    ours.begin(Attempt("bob", ANN.address))


def test_the_name_counts_whatever_its_case(ours: Attempts) -> None:
    for name in ("ann", "Ann", "ANN", "aNN", "anN", "AnN"):
        ours.begin(Attempt(name, ANN.address))
    wait_s(ours, ANN)


def test_a_success_forgets_the_failures(ours: Attempts) -> None:
    for _ in range(3):
        for _ in range(attempts.FREE):
            ours.begin(ANN)
        ours.succeeded(ANN)


def test_failures_are_forgotten_after_an_hour(ours: Attempts, clock: Clock) -> None:
    for _ in range(attempts.FREE + 1):
        ours.begin(ANN)
    clock.now += attempts.FORGOTTEN_S
    for _ in range(attempts.FREE):
        ours.begin(ANN)


def test_one_network_tries_no_more_than_a_few_accounts(ours: Attempts) -> None:
    for number in range(attempts.PER_NETWORK):
        ours.begin(Attempt(f"user {number}", f"2001:db8::{number:x}"))  # all of one /64
    assert wait_s(ours, Attempt("ann", "2001:db8::ffff")) <= attempts.PERIOD_S / attempts.PER_NETWORK
    ours.begin(Attempt("ann", "2001:db8:0:1::1"))


def test_guesses_from_many_networks_are_limited_and_do_not_delay_a_browser_that_the_user_has_used(
    ours: Attempts,
) -> None:
    for number in range(attempts.PER_ACCOUNT):
        ours.begin(Attempt("ann", f"10.0.{number // 250}.{number % 250}"))
    assert wait_s(ours, Attempt("ann", "192.0.2.9")) <= attempts.PERIOD_S / attempts.PER_ACCOUNT
    ours.begin(Attempt("ann", "192.0.2.9", known=True))
