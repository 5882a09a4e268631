"""What a worker reports of its load."""

import pytest

from tests.core.build import assign, capacity, close
from tests.core.driver import working
from tests.core.reading import only
from tetri.core.actions import Publish
from tetri.core.worker import load_report
from tetri.cost import Cost
from tetri.request import LengthRange


def test_loads_are_published_again_and_again():
    cost = Cost(prefill=((0.0, 0.0), (10.0, 1.0)), decode=((1.0, 0.5),))
    roomy = capacity(blocks=40, context=100, max_batch=4)
    told = working("d1", capacity=roomy, slots=30, load_s=0.25, cost=cost)
    told.running("x", src="d9", max_tokens=20, length=LengthRange(low=0, high=10))
    told.tell(assign("a", prompt=20))
    told.later()
    told.now += 0.2
    told.step()
    (report,) = [action.message for action in only(told.later(0.05), Publish)]
    load = report.load
    assert (load.queued, load.queued_tokens, load.queued_s) == (1, 13, pytest.approx(1.3))
    assert (load.waiting, load.landed, load.running, load.heavy, load.growth_blocks) == (1, 0, 1, 0, 2 + 2)
    assert (load.decode_s, load.busy) == (pytest.approx(3.5), pytest.approx(0.8))  # 6 and 8 tokens
    assert only(told.later(0.25), Publish)


def test_a_long_queue_is_listed_in_every_few_heartbeats_a_short_one_in_each(monkeypatch):
    monkeypatch.setattr(load_report, "LISTED", 10)
    told = working("p1", capacity=capacity(max_batch=1))

    def listed(count):
        """How many requests each of so many heartbeats lists."""
        lists = [told.heartbeat().holds for _ in range(count)]
        return [None if holds is None else len(holds) for holds in lists]

    told.tell(*[assign(f"r{number}", prompt=4) for number in range(10)])
    assert listed(3) == [10] * 3
    told.tell(assign("one", prompt=4))
    assert listed(4) == [None, 11] * 2
    told.tell(*[assign(f"s{number}", prompt=4) for number in range(29)])
    assert listed(8) == [None, None, None, 40] * 2
    told.tell(*[close(f"s{number}") for number in range(29)], close("one"))
    assert listed(2) == [10] * 2
