"""Strikes are chosen by a seed: each kind once, and then by weight; one without a target is repeated later."""

from collections import Counter

from tests.chaos.faults import LIGHT, Row


def test_the_first_strikes_are_one_of_each_kind_in_an_order_of_the_seed():
    first, again, other = ([row.next() for _ in LIGHT] for row in (Row(s, LIGHT, 1.0) for s in "aab"))
    assert first == again
    assert first != other
    assert sorted(first) == sorted(LIGHT)


def test_what_met_nobody_comes_again_and_keeps_no_other_from_coming():
    row = Row("seed", {"present": 1, "absent": 0}, 1.0)
    found: list[str] = []
    for _ in range(9):
        found.append(row.next())
        if found[-1] == "absent":
            row.missed("absent")
    assert 3 <= found.count("absent") <= 6


def test_afterwards_kinds_come_as_often_as_they_weigh():
    row = Row("seed", {"often": 9, "seldom": 1}, 1.0)
    found = Counter(row.next() for _ in range(1000))
    assert 850 < found["often"] < 950
