"""Where a request goes."""

from random import Random

from tetri.policy.route import first_fit, least_loaded
from tetri.policy.views import DecodeView, PrefillView


def test_the_least_loaded_and_the_first_of_equals():
    views = [PrefillView("a", 3), PrefillView("b", 2), PrefillView("c", 2)]
    assert least_loaded(views) == "b" and least_loaded([]) is None


def test_the_first_that_has_room():
    views = [DecodeView("a", 3), DecodeView("b", 5), DecodeView("c", 9)]
    assert [first_fit(blocks, views, Random(1)) for blocks in (3, 4, 9, 10)] == ["a", "b", "c", None]
    assert first_fit(0, [], Random(1)) is None
