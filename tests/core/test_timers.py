"""Timers of a core."""

import pickle

from tetri.core.timers import Timers


def test_the_earliest_comes_first_and_equals_in_the_order_of_setting():
    timers = Timers()
    for key, when in (("c", 2.0), ("a", 1.0), ("b", 2.0), ("d", 3.0)):
        timers.set(key, when)
    assert timers.next() == 1.0
    fired = []
    for key in timers.due(2.0):
        fired.append(key)
        if key == "a":
            timers.set("e", 2.0)  # and what is due by now
    assert fired == ["a", "c", "b", "e"] and timers.next() == 3.0


def test_setting_again_moves_and_clearing_removes():
    timers = Timers()
    timers.set("a", 1.0)
    timers.set("b", 1.0)
    timers.set("a", 5.0)
    timers.clear("b")
    timers.clear("never")
    assert "a" in timers and "b" not in timers
    assert not list(timers.due(4.0)) and timers.next() == 5.0
    timers.set("a", 4.5)
    timers.set("a", 4.5)  # the same again fires once
    assert list(timers.due(9.0)) == ["a"] and timers.next() is None


def test_what_was_cleared_does_not_pile_up():
    timers = Timers()
    for number in range(10_000):
        timers.set(number, 1e6 + number)
        timers.clear(number)
    timers.set("a", 5.0)
    assert len(pickle.dumps(timers)) < 10_000 and list(timers.due(10.0)) == ["a"]
