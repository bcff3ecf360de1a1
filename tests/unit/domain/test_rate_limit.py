"""Attempts are counted per key, become available again with time, and use bounded memory."""

import pytest

from claude_hitl_template.domain.rate_limit import Throttle, network_of


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_key_has_so_many_tries_and_gets_them_back_steadily() -> None:
    clock = Clock()
    throttle = Throttle(10, 300.0, clock=clock)
    for _ in range(10):
        assert throttle.wait_s("a") == 0
        throttle.take("a")
    assert throttle.wait_s("a") == pytest.approx(30)
    assert throttle.wait_s("b") == 0
    clock.now += 29
    assert throttle.wait_s("a") == pytest.approx(1)
    clock.now += 1
    assert throttle.wait_s("a") == 0
    clock.now += 10_000
    for _ in range(10):
        throttle.take("a")
    assert throttle.wait_s("a") > 0


def test_a_try_that_is_given_back_was_none() -> None:
    throttle = Throttle(1, 60.0, clock=Clock())
    for _ in range(3):
        throttle.take("a")
        assert throttle.wait_s("a") > 0
        throttle.give_back("a")
        assert throttle.wait_s("a") == 0


def test_of_more_keys_than_are_kept_the_one_used_longest_ago_is_forgotten() -> None:
    throttle = Throttle(1, 60.0, keys=2, clock=Clock())
    for key in ("a", "b", "a", "c"):
        throttle.take(key)
    assert [key for key in "abc" if throttle.wait_s(key)] == ["a", "c"]


@pytest.mark.parametrize(
    ("host", "counted_as"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::"),
        ("2001:db8:1:2::9%eth0", "2001:db8:1:2::"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("", ""),
        ("not an address", "not an address"),
    ],
)
def test_one_machine_is_counted_once(host: str, counted_as: str) -> None:
    assert network_of(host) == counted_as
