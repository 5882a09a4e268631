"""Virtual time."""

import pytest

from tetri.sim.kernel import Kernel


def test_events_happen_in_order_of_time_then_in_the_order_in_which_they_were_set():
    kernel, seen = Kernel(), []
    kernel.at(2.0, seen.append, "third")
    kernel.at(1.0, seen.append, "first")
    kernel.at(1.0, seen.append, "second")
    kernel.run()
    assert seen == ["first", "second", "third"]
    assert (kernel.now, kernel.happened) == (2.0, 3)


def test_an_event_may_set_others_even_at_its_own_time():
    kernel, seen = Kernel(-1.0), []

    def first(_):
        kernel.at(kernel.now, seen.append, "at once")
        kernel.at(kernel.now + 1.0, seen.append, "later")

    kernel.at(0.0, first)
    kernel.at(0.0, seen.append, "set before")
    kernel.run()
    assert seen == ["set before", "at once", "later"]


def test_it_stops_before_the_next_event_and_goes_on_from_there():
    kernel, seen = Kernel(), []
    kernel.at(1.0, lambda _: kernel.stop())
    kernel.at(1.0, seen.append, "after")
    kernel.run()
    assert seen == [] and kernel.more_now
    kernel.run()
    assert seen == ["after"] and not kernel.more_now


def test_nothing_happens_in_the_past():
    kernel = Kernel()
    kernel.at(1.0, lambda _: kernel.at(0.5, print))
    with pytest.raises(ValueError, match="is before the current time"):
        kernel.run()
