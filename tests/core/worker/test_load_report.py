"""What a worker reports of its load."""

import pytest

from tests.core.build import assign, capacity
from tests.core.driver import working
from tests.core.reading import only
from tetri.core.actions import Publish
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
