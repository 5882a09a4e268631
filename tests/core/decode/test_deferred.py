"""Large offers that small ones could keep out for ever."""

import pytest

from tests.core.build import close, offer
from tests.core.driver import working
from tests.core.reading import sent
from tetri.core.decode.starvation_guard import LONG_S, StarvationGuard
from tetri.core.instance.ledger import Ledger
from tetri.wire.handover import Grant


class Crowd:
    """Two small requests of 2 blocks are always here, of the 5 that may be reserved: when the older one ends, another
    asks, and asks first. Whoever is refused asks again every 0.1 s."""

    def __init__(self):
        self.told, self.number, self.inside, self.outside = working("d1", "p1", "p2"), 0, [], []

    def asks(self, rid, prompt=8):
        """Whether it is let in."""
        self.number += 1
        return bool(sent(self.told.tell(offer(rid, prompt, offer=self.number)), kind=Grant))

    def goes_on(self):
        self.told.later(0.1)
        if self.inside:
            self.told.tell(close(self.inside.pop(0)))
        while len(self.inside) + len(self.outside) < 2:
            self.outside.append(f"s{self.number}")
        for rid in list(self.outside):
            if self.asks(rid):
                self.outside.remove(rid)
                self.inside.append(rid)


def test_who_was_turned_away_for_long_is_next():
    """Small offers that come again and again do not keep a large one out for ever."""
    crowd, waited = Crowd(), 0.0
    crowd.goes_on()
    while not crowd.asks("large", 16):
        crowd.goes_on()
        waited += 0.1
        assert waited < LONG_S + 1.0, "it never gets in"
    assert waited >= LONG_S
    crowd.told.tell(close("large"))
    crowd.goes_on()
    assert len(crowd.inside) == 2, "nobody waits any more"


@pytest.mark.parametrize("gone", ["closed", "elsewhere"])
def test_nobody_waits_for_one_that_does_not_ask_any_more(gone):
    crowd = Crowd()
    crowd.goes_on()
    for _ in range(round(LONG_S / 0.1) + 1):
        assert not crowd.asks("large", 16)
        crowd.goes_on()
    crowd.told.tell(*map(close, crowd.inside))
    assert not crowd.asks("a"), "for now the large one is next"
    if gone == "closed":
        crowd.told.tell(close("large"))
    else:  # it would have asked with every view and every beat
        crowd.told.later(3 * max(crowd.told.own.load_s, crowd.told.own.heartbeat_s) + 0.01)
    assert crowd.asks("a")


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
    for step in range(12):
        turned.enter("a", 9, 1.3 + 0.5 * step)
    assert turned.before("c", 9, ledger, 0, 1.3 + LONG_S - 0.01) is None
    assert turned.before("c", 9, ledger, 0, 1.3 + LONG_S) is not None
