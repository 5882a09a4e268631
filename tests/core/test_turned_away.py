"""Small offers that come again and again do not keep a large one out for ever."""

from random import Random

import pytest

from tests.core.build import Told, identity, instance, membership, offer, sent
from tetri.core.decode.starvation_guard import LONG_S, StarvationGuard
from tetri.core.instance.ledger import Ledger
from tetri.core.worker.worker import Worker
from tetri.wire.handover import Grant
from tetri.wire.messages import Close

ASK_S = 0.1  # so often whoever was refused asks again
SMALL, LARGE = 8, 16  # prompt tokens: 2 and 4 of the 5 blocks that may be reserved


class Crowd:
    """Two small requests are always here: when the older one ends, another asks, and asks first."""

    def __init__(self) -> None:
        self.told = Told(Worker(identity("d1", "decode"), Random(1), now=0.0))
        self.told.later()
        self.told.tell(membership(1, instance("p1", "prefill"), instance("d1", "decode")))
        self.number = 0
        self.inside: list[str] = []
        self.outside: list[str] = []

    def asks(self, rid: str, prompt: int) -> bool:
        """Whether it is let in."""
        self.number += 1
        return bool(sent(self.told.tell(offer(rid, prompt, offer=self.number)), kind=Grant))

    def goes_on(self) -> None:
        self.told.later(ASK_S)
        if self.inside:
            self.told.tell(Close(rid=self.inside.pop(0), attempt=1))
        while len(self.inside) + len(self.outside) < 2:
            self.outside.append(f"s{self.number}")
        for rid in list(self.outside):
            if self.asks(rid, SMALL):
                self.outside.remove(rid)
                self.inside.append(rid)


def test_who_was_turned_away_for_long_is_next():
    crowd = Crowd()
    crowd.goes_on()
    waited = 0.0
    while not crowd.asks("large", LARGE):
        crowd.goes_on()
        waited += ASK_S
        assert waited < LONG_S + 1.0, "it never gets in"
    assert waited >= LONG_S
    crowd.told.tell(Close(rid="large", attempt=1))
    crowd.goes_on()
    assert len(crowd.inside) == 2, "nobody waits any more"
    crowd.told.core.check()


@pytest.mark.parametrize("gone", ["closed", "elsewhere"])
def test_nobody_waits_for_one_that_does_not_ask_any_more(gone):
    crowd = Crowd()
    crowd.goes_on()
    for _ in range(round(LONG_S / ASK_S) + 1):
        assert not crowd.asks("large", LARGE)
        crowd.goes_on()
    crowd.inside, ended = [], crowd.inside
    for rid in ended:
        crowd.told.tell(Close(rid=rid, attempt=1))
    assert crowd.asks("a", SMALL) is False, "for now the large one is next"
    if gone == "closed":
        crowd.told.tell(Close(rid="large", attempt=1))
    else:
        crowd.told.later(crowd.told.core.decode.starvation_guard.gone_s + 0.01)
    assert crowd.asks("a", SMALL)


def test_who_fits_beside_it_need_not_wait():
    turned, ledger = StarvationGuard(0.6), Ledger(20, 0.5)
    now = LONG_S + 0.1
    for step in range(round(now / 0.5) + 1):
        turned.enter("large", 6, 0.5 * step)
    turned.enter("later", 9, now)
    assert turned.before("small", 4, ledger, 0, now) is None
    assert turned.before("small", 5, ledger, 0, now) == f"a request of 6 blocks, turned away for {now:.1f} s, is next"
    assert turned.before("large", 6, ledger, 0, now) is None
    assert turned.before("small", 4, ledger, 11, now) is not None, "blocks that are kept are not free"
    turned.leave("large")
    assert turned.before("small", 5, ledger, 0, now) is None


def test_who_comes_back_after_a_while_begins_anew_and_the_gone_are_forgotten():
    turned, ledger = StarvationGuard(0.6), Ledger(20, 0.5)
    turned.enter("a", 9, 0.0)
    turned.enter("b", 9, 1.0)
    assert list(turned.waiting) == ["b"]
    turned.enter("a", 9, 1.3)
    assert turned.before("c", 9, ledger, 0, 1.4) is None
    assert turned.waiting["a"].since == 1.3
